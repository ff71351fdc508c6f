"""Calibrating sets R by a few batches; no weight moves, and a bad batch leaves everything as it was."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from factors import dense_R, is_identity
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import decorr_fx
from decorr_fx import ConfigError, Crgd, Dbp, LayerError, ModelError, NotTransformedError, Power, Rule
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import sites_of


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 3)
    )


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 8, 2, 6, 6) * torch.arange(1.0, 7))


def state_of(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_of_a_real_network_changes_but_R() -> None:
    model = decorr_fx.transform(torchvision.models.resnet18(num_classes=10))
    x = torch.randn(4, 3, 64, 64)
    before, expected, keys = state_of(model), model.eval()(x), decorr_fx.state_keys(model)
    decorr_fx.calibrate(model, [torch.randn(8, 3, 64, 64) for _ in range(3)])
    assert not model.training
    assert torch.equal(model(x), expected)
    assert all(site.steps == 3 and site.refused == 0 for site in decorr_fx.stats(model))
    assert not any(is_identity(site) or site.is_identity for site in sites_of(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in keys)


def test_R_is_the_closed_form_of_all_rows() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(5, 4)), Power(max_samples=7))
    seen = [torch.randn(7, 5) @ torch.randn(5, 5) for _ in range(4)]
    decorr_fx.calibrate(model, seen)
    Sigma = reference.measure(torch.cat(seen).double()).M
    rule, U = Power(), model[0].weight_decorr.U[0].double()
    used = model[0].weight_decorr.used
    expected = reference.shrinking(Sigma, float(Sigma.trace()), used, rule.power, rule.damping)
    torch.testing.assert_close(dense_R(U[-used:]), expected, rtol=1e-4, atol=1e-4)
    expected = reference.gain(Sigma, expected, rule.gain) * expected
    torch.testing.assert_close(decorr_fx.matrices(model)["0"][0].double(), expected, rtol=1e-4, atol=1e-4)


def test_random_numbers_and_modes_are_what_they_were() -> None:
    model = decorr_fx.transform(small())
    loader = DataLoader(torch.cat(batches()), batch_size=8, shuffle=True)
    model[1].eval()
    model[5].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    decorr_fx.calibrate(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert [(site.schedule.attempts, int(site.steps)) for site in sites_of(model)] == [(0, 3), (0, 3)]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_differs_from_batch_to_batch() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 3)))
    masks: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda _, args: masks.append(args[0] != 0))
    decorr_fx.calibrate(model, [torch.ones(4, 50)] * 2)
    assert not torch.equal(*masks)


class Attention(nn.Module):
    """Three layers on one input, and a buffer that each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


@pytest.mark.parametrize("training", [True, False])
def test_shared_sites_and_replaced_buffers(training: bool) -> None:
    model = decorr_fx.transform(nn.Sequential(Attention(), nn.Linear(8, 2)))
    model.train(training)
    mean = model[0].mean
    decorr_fx.calibrate(model, [torch.randn(4, 5, 8) for _ in range(2)])
    assert [int(site.steps) for site in sites_of(model)] == [2, 2]
    assert model[0].mean is mean and not mean.any()


def test_what_R_was_before_does_not_count() -> None:
    fresh, trained = (decorr_fx.transform(nn.Sequential(nn.Linear(5, 4))) for _ in range(2))
    seen = [torch.randn(16, 5) for _ in range(2)]
    decorr_fx.calibrate(trained, [100 * torch.randn(16, 5) @ torch.randn(5, 5) for _ in range(9)])
    for model in (fresh, trained):
        decorr_fx.calibrate(model, seen)
    R_of_trained, R_of_fresh = (decorr_fx.matrices(model)["0"] for model in (trained, fresh))
    torch.testing.assert_close(R_of_trained, R_of_fresh)


def test_a_layer_that_sees_zeros_keeps_the_identity() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Threshold(1e6, 0.0), nn.Linear(4, 2)))
    decorr_fx.calibrate(model, [torch.randn(8, 5)])
    assert [is_identity(site) for site in sites_of(model)] == [False, True]
    assert all((site.steps, site.refused) == (1, 0) for site in decorr_fx.stats(model))


def test_an_interruption_leaves_everything_as_it_was() -> None:
    model = decorr_fx.transform(small())
    before = state_of(model)

    def interrupted() -> Iterator[Tensor]:
        yield batches()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decorr_fx.calibrate(model, interrupted())
    assert_same(model, before)


def test_training_goes_on_from_there() -> None:
    model, plain = decorr_fx.transform(small()), small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    decorr_fx.calibrate(model, batches())
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    R, gain, x = decorr_fx.matrices(model)["5"][0], model[5].weight_decorr.gain.clone(), batches()[0]
    for one in (model, plain):
        torch.manual_seed(1)  # of the dropout
        one(x).square().sum().backward()
    before, gradient = plain[5].weight.detach(), plain[5].weight.grad
    optimizer.step()
    torch.testing.assert_close(model[5].weight.detach(), before - 0.01 * gradient @ R.T @ R / gain)
    assert [site.steps for site in decorr_fx.stats(model)] == [4, 4]


class Functional(nn.Module):
    """A forward that calls its weight itself, and is watched for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def test_layers_in_eval_mode_and_watched_ones_record_too() -> None:
    model = decorr_fx.transform(nn.Sequential(Functional(), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        decorr_fx.calibrate(model.eval(), [torch.randn(8, 5) for _ in range(2)])
    assert [int(site.steps) for site in sites_of(model)] == [2, 2]
    assert not any(module.training for module in model.modules())
    assert all(not site.recording_all and site.seen == 0 for site in sites_of(model))


def test_frozen_layers_are_left_as_they_are() -> None:
    model = decorr_fx.transform(small())
    model[0].requires_grad_(False)
    decorr_fx.calibrate(model, batches())
    assert [int(site.steps) for site in sites_of(model)] == [0, 3]


@pytest.mark.parametrize("form", [lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_a_batch_may_be_given_in_any_form(form: Callable[[Tensor], Any]) -> None:
    model = decorr_fx.transform(small())
    decorr_fx.calibrate(model, map(form, batches()))
    assert [site.steps for site in decorr_fx.stats(model)] == [3, 3]


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (lambda x: (x, torch.zeros(8)), ModelError, "does not run on batch 2: .*without labels"),
        (lambda x: x[:, :1], ModelError, "does not run on batch 2"),
        (lambda x: x * float("nan"), LayerError, "layer '0': its input is not finite for batch 2"),
    ],
)
def test_a_bad_batch_is_told_and_leaves_everything_as_it_was(
    spoil: Callable[[Tensor], Any], error: type[Exception], told: str
) -> None:
    model = decorr_fx.transform(small())
    before, x = state_of(model), batches()
    with pytest.raises(error, match=told):
        decorr_fx.calibrate(model, [*x[:2], spoil(x[2])])
    assert_same(model, before)
    assert all(site.seen == 0 for site in sites_of(model))


def test_nothing_to_calibrate_on_or_with() -> None:
    model = decorr_fx.transform(small())
    before = state_of(model)
    with pytest.raises(ModelError, match="no batch"):
        decorr_fx.calibrate(model, [])
    with decorr_fx.paused(model), pytest.raises(ModelError, match="no R can move"):
        decorr_fx.calibrate(model, batches())
    with pytest.raises(NotTransformedError):
        decorr_fx.calibrate(small(), batches())
    with pytest.raises(ModelError, match="batches is one Tensor; give several, or a list of one"):
        decorr_fx.calibrate(model, batches()[0])
    with pytest.raises(ModelError, match="batch 0 does not reach a layer"):
        decorr_fx.calibrate(model, [torch.zeros(0, 2, 6, 6)])
    assert_same(model, before)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Dbp(), "layer '0': Dbp has no closed form"),
        (Crgd(), "layer '0': Crgd has no closed form"),
        (Power(preserve_function=False), "layer '0': with preserve_function=False"),
    ],
)
def test_settings_that_cannot_be_calibrated(rule: Rule, told: str) -> None:
    model = decorr_fx.transform(small(), rule)
    with pytest.raises(ConfigError, match=told):
        decorr_fx.calibrate(model, batches())
