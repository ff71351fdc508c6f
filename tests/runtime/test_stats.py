"""How far R has come: numbers of every site, as a table and as scalars for loggers."""

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import Dbp, Power, Rule, SiteStats, Stats
from decorr_fx.ops import reference


def two_layers(rule: Rule) -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), rule)


def train(model: nn.Module, x: torch.Tensor, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_they_tell_how_correlated_the_rows_were_at_the_last_move() -> None:
    model = two_layers(Dbp(decor_lr=0.2, update_every=1, max_samples=400))
    x = torch.randn(400, 5) @ torch.randn(5, 5)
    train(model, x)
    first = decorr_fx.stats(model)[0]
    assert first.correlation == pytest.approx(reference.correlation_loss(x), rel=1e-4)  # R was the identity
    assert first.variance_error == pytest.approx(reference.variance_loss(x), rel=1e-4)
    train(model, x, 300)
    last = decorr_fx.stats(model)[0]
    assert last.fqn == "0" and last.steps == 301
    assert last.correlation < 0.01 * first.correlation
    assert last.variance_error < 0.01 * first.variance_error


def test_of_the_rule_power_they_are_those_of_z() -> None:
    layer = decorr_fx.transform(nn.Linear(5, 4).double(), Power(update_every=1, cost_budget=10.0))
    x = torch.randn(60, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    train(layer, x)
    R = decorr_fx.matrices(layer)[""][0]
    train(layer, x)
    (found,) = decorr_fx.stats(layer)
    assert found.correlation == pytest.approx(reference.correlation_loss(reference.decorrelate_rows(x, R)), rel=1e-6)


def test_the_model_in_six_numbers() -> None:
    stats = Stats([SiteStats("a", 0.25, 1.0, 3, 0), SiteStats("b", 0.75, 4.0, 2, 5)])
    assert stats.scalars() == {
        "decorr/correlation": 0.5, "decorr/correlation_worst": 0.75, "decorr/variance_error": 2.5,
        "decorr/variance_error_worst": 4.0, "decorr/steps": 2.0, "decorr/refused": 5.0,
    }  # fmt: skip


def test_the_table_has_a_line_a_site() -> None:
    table = str(decorr_fx.stats(two_layers(Power())))
    assert "variance error" in table and len(table.splitlines()) == 4
    assert "(root)" in str(decorr_fx.stats(decorr_fx.transform(nn.Linear(2, 2))))


def test_rows_that_are_not_finite_are_counted() -> None:
    model = two_layers(Power(update_every=1))
    train(model, torch.full((9, 5), torch.nan))
    assert decorr_fx.stats(model).scalars()["decorr/refused"] == 2
