"""With example inputs the report gives the costs of the rows of one forward, and of nothing else of them."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, ModelCase
from torch import Tensor, nn

import decorr_fx
from decorr_fx import ConfigError, ModelError, Power
from decorr_fx.inputs import Example
from decorr_fx.ops.cost import around_flops, move_flops, own_flops, used_rank
from decorr_fx.passes.count import count_rows
from decorr_fx.passes.match.settings import Settings
from decorr_fx.passes.plan import make_plan
from decorr_fx.runtime.site.state import Site, sites_of


def small_images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(64, 64, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
    )  # fmt: skip


def rows(model: nn.Module, example: object) -> dict[str, int]:
    return {site.fqn: site.rows for site in decorr_fx.report(model, example_inputs=example).sites}


def test_the_rows_of_a_forward_are_counted_and_the_costs_follow() -> None:
    model = small_images()
    assert rows(model, torch.randn(2, 3, 9, 9)) == {"0": 2 * 81, "4": 2 * 16, "7": 2, "9": 2}
    rule = Power(update_every=4)
    report = decorr_fx.report(model, rule, example_inputs=torch.randn(2, 3, 9, 9))
    assert report.counted
    first = report.sites[0]
    layout = next(sites_of(decorr_fx.transform(model, rule))).spec.layout
    assert first.used == used_rank(layout.rank, 162, rule.cost_budget) < layout.rank
    assert first.flops == around_flops([layout], first.used) + move_flops(layout, 64) // 4
    assert first.cost == first.flops / own_flops([layout], 162)
    assert "rows as in one forward on example_inputs" in str(report)


def test_without_example_inputs_rows_are_assumed() -> None:
    report = decorr_fx.report(small_images())
    assert not report.counted and {site.rows for site in report.sites} == {4096}
    assert "4096 rows a step assumed" in str(report)


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_as_many_rows_are_counted_as_a_training_step_records(case: ModelCase) -> None:
    plain, x = case.make(), torch.randn(case.shape)
    model = decorr_fx.transform(copy.deepcopy(plain))
    counted = count_rows(make_plan(plain, Settings(Power(), None, {})), Example.of(x))
    model(x)
    recorded = {site.spec.fqn: site.rows_of_step() for site in sites_of(model)}
    assert {fqn: counted[fqn] for fqn in recorded} == recorded
    assert all(recorded.values())


def test_the_model_is_left_as_it_was() -> None:
    model = small_images().eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator())
    decorr_fx.report(model, example_inputs=x)
    transformed = decorr_fx.transform(model)
    decorr_fx.report(transformed, example_inputs=x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(s.steps == 0 for s in decorr_fx.stats(transformed))
    assert not any(site.seen for site in sites_of(transformed))


def test_the_report_before_and_after_tell_the_same() -> None:
    model, x = small_images(), torch.randn(2, 3, 16, 16)
    plan, fact = (decorr_fx.report(one, example_inputs=x) for one in (model, decorr_fx.transform(model)))
    assert plan == fact and str(plan) == str(fact)


@pytest.mark.parametrize("as_inputs", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_inputs_may_be_given_in_any_form(as_inputs: object) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_images()

        def forward(self, input: Tensor) -> Tensor:
            return self.model(input)

    x = torch.randn(2, 3, 16, 16)
    assert list(rows(Named(), as_inputs(x)).values()) == list(rows(small_images(), x).values())


def test_inputs_that_the_model_does_not_take() -> None:
    for model in (small_images(), decorr_fx.transform(small_images())):
        with pytest.raises(ModelError, match="does not run on example_inputs in train mode: RuntimeError"):
            decorr_fx.report(model, example_inputs=torch.randn(2, 4, 8, 8))
    with pytest.raises(ConfigError, match="transformed already"):
        decorr_fx.report(model, Power(), example_inputs=torch.randn(2, 3, 8, 8))


def test_shared_inputs_count_once_and_shared_layers_each_time() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.twice = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.q(x) + self.k(x)))

    assert rows(Shared(), torch.randn(2, 10, 16)) == {"q": 20, "k": 20, "twice": 40}


def test_layers_that_the_forward_does_not_reach_have_no_rows() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return self.never(self.always(x)) if again else F.relu(self.always(x))

    counted = count_rows(make_plan(Optional(), Settings(Power(), None, {})), Example.of(torch.randn(9, 4)))
    assert counted == {"always": 9}


def test_no_site_is_left_of_the_copy_that_was_counted() -> None:
    model = decorr_fx.transform(small_images())
    gc.collect()
    before = live_sites()
    decorr_fx.report(model, example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(ModelError, match="does not run"):
        decorr_fx.report(model, example_inputs=torch.randn(2, 4, 8, 8))
    gc.collect()
    assert live_sites() == before


def live_sites() -> int:
    return sum(issubclass(type(thing), Site) for thing in gc.get_objects())
