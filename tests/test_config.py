import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import ConfigError, Crgd, Dbp, DecorrError, Power, Rule
from decorr_fx.config import SmallSteps

RULES = [Power, Dbp, Crgd]
NAN, INF = float("nan"), float("inf")
OF_ALL = [
    ("max_samples", 0), ("max_samples", 2.5), ("max_samples", True), ("update_every", 0), ("update_every", True),
    ("preserve_function", "yes"), ("preserve_function", 1), ("share_inputs", None),
]  # fmt: skip
OF_SMALL_STEPS = [
    ("decor_lr", -0.1), ("decor_lr", NAN), ("decor_lr", INF), ("decor_lr", "0.1"), ("decor_lr", None),
    ("structure", "lowrank"), ("structure", "auto"), ("structure", "channels"), ("structure", 1),
]  # fmt: skip
OF_POWER = [
    ("rank", 0), ("rank", 2.0), ("rank", -3), ("damping", 0.0), ("damping", INF), ("damping", NAN), ("rate", -0.1),
    ("rate", 1.5), ("power", -0.1), ("power", 0.6), ("gain", -0.1), ("gain", 1.1),
    ("gain", True), ("cost_budget", 0), ("cost_budget", INF), ("cost_budget", "5 %"),
]  # fmt: skip
OF_DBP = [("kappa", -0.01), ("kappa", 1.01), ("kappa", True), ("sample_fraction", 0.0), ("sample_fraction", 1.5)]


@pytest.mark.parametrize(
    ("rule", "field", "value"),
    [
        *((rule, *wrong) for rule in RULES for wrong in OF_ALL),
        *((rule, *wrong) for rule in (Dbp, Crgd) for wrong in OF_SMALL_STEPS),
        *((Power, *wrong) for wrong in OF_POWER),
        *((Dbp, *wrong) for wrong in OF_DBP),
    ],
)
def test_each_field_refuses_what_is_out_of_range_and_says_the_value(
    rule: type[Rule], field: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        rule(**{field: value})
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, DecorrError)


@pytest.mark.parametrize("rule", RULES)
def test_every_numeric_field_has_a_value_that_it_refuses(rule: type[Rule]) -> None:
    checked = {name for name, _ in [*OF_ALL, *OF_SMALL_STEPS, *OF_POWER, *OF_DBP]}
    assert {field.name for field in dataclasses.fields(rule)} <= checked


@pytest.mark.parametrize(
    ("rule", "field"), [(Power, "kappa"), (Power, "structure"), (Power, "decor_lr"), (Dbp, "rank"), (Crgd, "kappa")]
)
def test_a_rule_has_no_settings_of_another_one(rule: type[Rule], field: str) -> None:
    with pytest.raises(TypeError, match=field):
        rule(**{field: 1})


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_frozen_and_keyword_only(rule: type[Rule]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule().max_samples = 1
    with pytest.raises(TypeError):
        rule(1)
    assert rule() == rule() and hash(rule()) == hash(rule(max_samples=rule().max_samples))
    assert dataclasses.replace(rule(), max_samples=7).max_samples == 7
    with pytest.raises(ConfigError, match="max_samples"):
        dataclasses.replace(rule(), max_samples=0)


@pytest.mark.parametrize("rule", [Rule, SmallSteps])
def test_what_rules_have_in_common_is_no_rule(rule: type[Rule]) -> None:
    with pytest.raises(ConfigError, match=rf"{rule.__name__} is no rule; use decorr_fx.Power"):
        rule()


def test_the_edges_are_allowed() -> None:
    Power(rank=1, max_samples=1, update_every=1, damping=1e-300, rate=0, power=0, gain=0, cost_budget=1e-9)
    Power(rate=1, power=0.5, gain=1, cost_budget=1000, damping=1e300)
    Dbp(kappa=0, decor_lr=0, sample_fraction=1)
    Dbp(kappa=1, sample_fraction=1e-300, structure="full")
    Crgd(decor_lr=1e30, structure="block")


@pytest.mark.parametrize("rule", [Dbp, Crgd])
def test_a_step_size_may_be_a_function_of_the_step(rule: type[SmallSteps]) -> None:
    assert rule(decor_lr=lambda step: 0.5**step).rate_at(2) == 0.25
    assert rule(decor_lr=0.3).rate_at(2) == 0.3


@pytest.mark.parametrize("value", [-1.0, NAN, INF, None, "0.1"])
def test_a_function_that_returns_no_step_size_is_named_with_its_step(value: object) -> None:
    with pytest.raises(ConfigError, match=r"decor_lr\(7\) returned .*; it must return a finite number >= 0"):
        Dbp(decor_lr=lambda step: value).rate_at(7)


def test_the_defaults_are_those_of_the_docs() -> None:
    assert Power() == Power(
        rank=32, damping=0.3, rate=0.08, power=0.5, gain=1.0, cost_budget=0.05, max_samples=64,
        update_every=16, preserve_function=True, share_inputs=True,
    )  # fmt: skip
    assert Power().rate_at(1000) == 0.08
    small_steps = {"decor_lr": 0.16, "structure": None, "max_samples": 256, "update_every": 8}
    assert Dbp() == Dbp(kappa=0.5, sample_fraction=1.0, **small_steps)
    assert Crgd() == Crgd(**small_steps)
    published = Dbp.paper()
    assert (published.structure, published.update_every, published.preserve_function) == ("full", 1, False)


def trained(rule: Rule | None) -> nn.Module:
    model = decorr_fx.transform(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: None, Power, Dbp, Crgd, Dbp.paper, lambda: Power(gain=0.0, preserve_function=False)],
    ids=["default", "power", "dbp", "crgd", "paper", "power with a gain, by the published step"],
)
def test_every_rule_trains_a_model(make: Callable[[], Rule | None]) -> None:
    assert all(site.steps == 3 and site.refused == 0 for site in decorr_fx.stats(trained(make())))
