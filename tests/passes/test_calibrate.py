"""Calibrating sets R by a few batches; the function stands still, and a bad batch leaves everything as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import decorr_fx
from decorr_fx import ConfigError, DecorrConfig, LayerError, ModelError, NotTransformedError
from decorr_fx.ops import reference
from decorr_fx.runtime.state import sites_of


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


def test_the_function_of_a_real_network_stands_still() -> None:
    model = decorr_fx.transform(torchvision.models.resnet18(num_classes=10))
    x = torch.randn(4, 3, 64, 64)
    before, expected = state_of(model), model.eval()(x)
    decorr_fx.calibrate(model, [torch.randn(8, 3, 64, 64) for _ in range(3)])
    assert not model.training
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert all(site.steps == 3 and site.refused == 0 for site in decorr_fx.stats(model))
    statistics = [key for key in before if "running" in key or "num_batches" in key]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in statistics)


def test_R_is_the_closed_form_of_all_rows() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(5, 4)), DecorrConfig(structure="full", max_samples=7))
    seen = [torch.randn(7, 5) @ torch.randn(5, 5) for _ in range(4)]
    decorr_fx.calibrate(model, seen)
    Sigma = reference.measure(torch.cat(seen).double()).M
    expected = model[0].weight_decorr.spec.config.gain * reference.root(Sigma, 0.25, 0.01)
    torch.testing.assert_close(model[0].weight_decorr.R[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_random_numbers_and_modes_are_what_they_were() -> None:
    model = decorr_fx.transform(small())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    decorr_fx.calibrate(model, iter(batches()))
    assert [module.training for module in model.modules()] == modes
    assert [site.attempts for site in sites_of(model)] == [0, 0]
    drawn = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    batches()
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_training_goes_on_from_there() -> None:
    model = decorr_fx.transform(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    decorr_fx.calibrate(model, batches())
    model(batches()[0]).square().sum().backward()
    optimizer.step()
    assert [site.steps for site in decorr_fx.stats(model)] == [4, 4]


@pytest.mark.parametrize("form", [lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_a_batch_may_be_given_in_any_form(form: Callable[[Tensor], Any]) -> None:
    model = decorr_fx.transform(small())
    decorr_fx.calibrate(model, map(form, batches()))
    assert [site.steps for site in decorr_fx.stats(model)] == [3, 3]


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (lambda x: (x, torch.zeros(8)), ModelError, "does not run on batch 2 in train mode: .*without labels"),
        (lambda x: x[:, :1], ModelError, "does not run on batch 2"),
        (lambda x: x * float("nan"), LayerError, "layer '0': its input or R is not finite for batch 2"),
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
    assert_same(model, before)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (DecorrConfig.recipe("dbp"), "layer '0': rule 'dbp' has no closed form"),
        (DecorrConfig(preserve_function=False), "layer '0': with preserve_function=False"),
    ],
)
def test_settings_that_cannot_be_calibrated(config: DecorrConfig, told: str) -> None:
    model = decorr_fx.transform(small(), config)
    with pytest.raises(ConfigError, match=told):
        decorr_fx.calibrate(model, batches())
