import dataclasses

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import ConfigError, DecorrConfig, DecorrError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "newton"), ("rule", None), ("structure", "lowrank"), ("decor_lr", -0.1), ("decor_lr", float("nan")),
        ("decor_lr", float("inf")), ("decor_lr", "0.1"), ("kappa", -0.01), ("kappa", 1.01), ("kappa", True),
        ("sample_fraction", 0.0), ("sample_fraction", 1.5), ("max_samples", 0), ("max_samples", 2.5),
        ("power", -0.1), ("power", 0.6), ("damping", 0.0), ("damping", float("inf")),
        ("rank", 0), ("rank", 2.0), ("structure", "full"),  # which is for the other rules
        ("update_every", 0), ("update_every", True), ("center", 1), ("preserve_function", "yes"), ("max_dim", -3),
    ],
)  # fmt: skip
def test_each_field_refuses_what_is_out_of_range_and_says_the_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        DecorrConfig(**{field: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert isinstance(caught.value, DecorrError)


def test_the_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecorrConfig().kappa = 0.1
    with pytest.raises(TypeError):
        DecorrConfig("dbp")


def test_the_edges_are_allowed() -> None:
    DecorrConfig(kappa=0, decor_lr=0, sample_fraction=1, max_samples=1, max_dim=1, update_every=1)
    assert DecorrConfig(decor_lr=lambda step: 0.5**step).lr_at(2) == 0.25


@pytest.mark.parametrize("name", ["paper", "dbp"])
def test_a_recipe_trains_a_model(name: str) -> None:
    config = DecorrConfig.recipe(name)
    assert config.rule == "dbp"
    model = decorr_fx.transform(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    assert all(site.steps == 3 and site.refused == 0 for site in decorr_fx.stats(model))


def test_a_recipe_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="no recipe 'papers'; use one of paper, dbp"):
        DecorrConfig.recipe("papers")
