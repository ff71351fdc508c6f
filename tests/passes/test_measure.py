"""With example inputs the structure is chosen by the rows of one example, and by nothing else of them."""

import gc

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import ConfigError, DecorrConfig, ModelError
from decorr_fx.runtime.site.state import LIVE_SITES, sites_of


def small_images() -> nn.Module:
    """A network in which the same weight is much work on large images, and little on small ones."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
    )  # fmt: skip


def structures(model: nn.Module, x: object) -> list[str]:
    return [site.structure for site in decorr_fx.report(model, DecorrConfig(rule="dbp"), example_inputs=x).sites]


def test_the_size_of_an_example_counts_and_their_number_does_not() -> None:
    model = small_images()
    large, small = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 2, 2)
    assert structures(model, large)[1] == "kronecker"
    assert structures(model, small)[1] != structures(model, large)[1]
    for x in (large, small):
        assert structures(model, x) == structures(model, x[:1]) == structures(model, x.repeat(5, 1, 1, 1))


def test_the_model_is_left_as_it_was() -> None:
    model = small_images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    transformed = decorr_fx.transform(model, example_inputs=torch.randn(4, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(s.steps == 0 for s in decorr_fx.stats(transformed))
    assert all(p is q for p, q in zip(model.parameters(), transformed.parameters(), strict=True))


def test_the_report_before_and_after_tell_the_same() -> None:
    model, x = small_images(), torch.randn(2, 3, 16, 16)
    assert str(decorr_fx.report(model, example_inputs=x)) == str(
        decorr_fx.report(decorr_fx.transform(model, example_inputs=x))
    )


def test_a_budget_is_kept_by_the_whole_model() -> None:
    x = torch.randn(2, 3, 16, 16)
    configs = [DecorrConfig(rule="dbp", cost_budget=budget) for budget in (1e-3, 0.5)]
    costs = [decorr_fx.report(small_images(), config, example_inputs=x).cost for config in configs]
    assert costs[0] < 1e-3 < costs[1] < 0.5


@pytest.mark.parametrize("as_inputs", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_inputs_may_be_given_in_any_form(as_inputs: object) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_images()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.model(input)

    x = torch.randn(2, 3, 16, 16)
    assert structures(Named(), as_inputs(x)) == structures(small_images(), x)


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(ModelError, match="does not run on example_inputs in train mode: RuntimeError"):
        decorr_fx.transform(small_images(), example_inputs=torch.randn(2, 4, 8, 8))
    with pytest.raises(ConfigError, match="transformed already"):
        decorr_fx.report(decorr_fx.transform(small_images()), example_inputs=torch.randn(2, 3, 8, 8))


def test_shared_inputs_count_once_and_shared_layers_each_time() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.twice = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(self.twice(self.q(x) + self.k(x)))

    model = decorr_fx.transform(Shared(), example_inputs=torch.randn(2, 10, 16))
    rows = {site.spec.fqn: site.spec.work.rows for site in decorr_fx.runtime.site.state.sites_of(model)}
    assert rows == {"q": 1280, "twice": 2560}


def test_no_optimizer_meets_the_copy_that_was_measured() -> None:
    gc.collect()
    gc.disable()  # the copy is a cycle: it must be out of the way before it is found
    try:
        before = set(LIVE_SITES)
        model = decorr_fx.transform(small_images(), example_inputs=torch.randn(2, 3, 8, 8))
        assert set(LIVE_SITES) - before == set(sites_of(model))
        with pytest.raises(ModelError, match="does not run"):
            decorr_fx.transform(small_images(), example_inputs=torch.randn(2, 4, 8, 8))
        assert set(LIVE_SITES) - before == set(sites_of(model))
    finally:
        gc.enable()
