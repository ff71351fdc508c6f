"""A watched forward: whatever way a weight is called, the rows that meet it are recorded, each once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decorr_fx
from decorr_fx.passes.rewrite.layer import Watched
from decorr_fx.runtime.site.state import sites_of


class Behind(nn.Module):
    """A layer whose forward asks for a type, so that it runs as it is."""

    def __init__(self, rule: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.rule = nn.Linear(6, 4), rule

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return self.rule(self.layer, x)


WAYS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "by keyword": lambda layer, x: F.linear(input=x, weight=layer.weight),
    "the layer": lambda layer, x: layer(x),
    "cast": lambda layer, x: F.linear(x.double(), layer.weight.double()),
    "transposed": lambda layer, x: x @ layer.weight.T,
    "on the left": lambda layer, x: (layer.weight @ x.mT).mT,
    "addmm": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t()),
    "standardised": lambda layer, x: F.linear(x, layer.weight - layer.weight.mean(1, keepdim=True)),
    "reshaped": lambda layer, x: F.conv1d(x.T[None], layer.weight.unsqueeze(2))[0].T,
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_recorded_once(way: str) -> None:
    plain, x = Behind(WAYS[way]), torch.randn(5, 6)
    model = decorr_fx.transform(plain)
    assert way == "the layer" or isinstance(model.run, Watched)
    torch.testing.assert_close(model(x), plain(x))
    (site,) = sites_of(model)
    assert site.seen == 5
    torch.testing.assert_close(site.rows[:5].sort(0)[0], x.sort(0)[0])
    model.eval()(x)
    assert site.seen == 5  # eval mode records nothing


@pytest.mark.parametrize("way", WAYS)
def test_folding_is_exact_after_steps(way: str) -> None:
    model, x = decorr_fx.transform(Behind(WAYS[way])), torch.randn(30, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [3]
    torch.testing.assert_close(decorr_fx.fold(model)(x), model(x))


def test_a_weight_that_is_used_the_other_way_round_records_nothing_wrong() -> None:
    model = decorr_fx.transform(Behind(lambda layer, x: F.linear(layer(x), layer.weight.t())))
    model(torch.randn(5, 6))
    (site,) = sites_of(model)
    assert site.seen == 5  # by the layer's own call


def test_the_weights_are_back_in_place_after_an_error() -> None:
    def fails(layer: nn.Linear, x: Tensor) -> Tensor:
        F.linear(x, layer.weight)
        raise ValueError("no")

    model = decorr_fx.transform(Behind(fails))
    weight = model.layer.weight
    with pytest.raises(ValueError, match="no"):
        model(torch.randn(5, 6))
    assert model.layer.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert next(sites_of(model)).in_place == {}
