import pytest
import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
from tools.train.correlations import measure_correlations


def absolute_correlation(z: Tensor) -> Tensor:
    return (z.T @ z / z.norm(dim=0) / z.norm(dim=0)[:, None]).abs()


@pytest.mark.parametrize("rule", [Power(), Dbp(structure="full"), Dbp(structure="kronecker"), Crgd(structure="full")])
def test_correlations_are_those_of_decorrelated_rows_and_measuring_changes_nothing(rule: Rule) -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)), rule)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 2, 3, 3) + 0.5
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    conv, linear = measure_correlations(model, x, rule)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [conv.fqn, linear.fqn] == ["0", "2"]
    assert len(conv.matrix) == (2 if rule == Dbp(structure="kronecker") else 8)  # of a pair the channels
    rows = model[:2](x).detach()
    rows = rows - rows.mean(0) if isinstance(rule, Crgd) else rows
    z = rows @ decorr_fx.matrices(model)["2"][0].T
    torch.testing.assert_close(linear.matrix, absolute_correlation(z))


def test_a_plain_model_is_measured_where_the_rule_would_decorrelate() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(9, 6)
    first, second = measure_correlations(model, x, Power())
    torch.testing.assert_close(first.matrix, absolute_correlation(x))
    torch.testing.assert_close(second.matrix, absolute_correlation(model[:2](x).detach()))
    assert first.mean_square == pytest.approx(float(absolute_correlation(x).triu(1).square().sum()) / 15)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
