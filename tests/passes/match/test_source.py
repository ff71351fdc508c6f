"""Whatever a weight is computed from, the parameter behind it is a site that records its input and moves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import HandMadeWeightNorm, StandardizedConv2d
from factors import is_identity
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

import decorr_fx
from decorr_fx.runtime.site.state import sites_of


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


class Packed(nn.Module):
    """Three weights in one parameter, cut in the way that is given."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]], kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.qkv, self.cut = nn.Parameter(torch.randn(12, 4, *kernel) / 2), cut
        self.call = (F.linear, F.conv1d, F.conv2d)[len(kernel)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.qkv)
        return self.call(x, q) * self.call(x, k) + self.call(x.tanh(), v)


class Functional(nn.Module):
    """A parameter that a function of it and the input is called on."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.rule = nn.Parameter(torch.randn(shape) / 2), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.weight)


class WeightList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) / 2, torch.randn(4, 4) / 2])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight).tanh()
        return x


class OfChildren(nn.Module):
    """Calls the weights of its children itself, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias).tanh()
        return x


class Method(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias) * 2


def parametrized(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def sliced(W: Tensor) -> tuple[Tensor, ...]:
    return W[:4], W[4:8], W[8:]


ROWS, IMAGE = (9, 4), (2, 3, 6, 6)
PACKED = ["qkv[0:4]", "qkv[4:8]", "qkv[8:12]"]
SOURCES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), ROWS, [""]),
    "weight-norm-conv": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), IMAGE, [""]),
    "weight-norm-transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3), dim=1), IMAGE, [""]),
    "weight-norm-by-hand": (HandMadeWeightNorm, (9, 6), ["v"]),
    "spectral-norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), ROWS, [""]),
    "spectral-norm-conv": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), IMAGE, [""]),
    "spectral-norm-inside": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))), ROWS, ["0"]),
    "parametrized": (lambda: parametrized(nn.Linear(4, 4), Doubled()), ROWS, [""]),
    "parametrized-twice": (lambda: parametrized(parametrized(nn.Linear(4, 4), Doubled()), Doubled()), ROWS, [""]),
    "parametrized-user": (lambda: parametrized(Functional(F.linear, 4, 4), Doubled()), ROWS, [""]),
    "standardised": (lambda: StandardizedConv2d(3, 4, 3), IMAGE, [""]),
    "method": (lambda: Method(3, 4, 3), IMAGE, [""]),
    "slices": (lambda: Packed(sliced), ROWS, PACKED),
    "chunk": (lambda: Packed(lambda W: W.chunk(3)), ROWS, PACKED),
    "split": (lambda: Packed(lambda W: W.split([4, 4, 4])), ROWS, PACKED),
    "torch-chunk": (lambda: Packed(lambda W: torch.chunk(W, 3, dim=0)), ROWS, PACKED),
    "torch-split": (lambda: Packed(lambda W: torch.split(W, 4)), ROWS, PACKED),
    "tensor-split": (lambda: Packed(lambda W: W.tensor_split(3)), ROWS, PACKED),
    "slices-conv": (lambda: Packed(sliced, (3,)), (2, 4, 7), PACKED),
    "chunk-conv": (lambda: Packed(lambda W: W.chunk(3), (3, 3)), (2, 4, 7, 7), PACKED),
    "unbound": (lambda: Packed(lambda W: W.unflatten(0, (3, 4)).unbind(0)), ROWS, PACKED),
    "narrow": (lambda: Packed(lambda W: tuple(W.narrow(0, i, 4) for i in (0, 4, 8))), ROWS, PACKED),
    "inputs-first": (lambda: Functional(lambda x, W: x @ W, 4, 3), ROWS, [""]),
    "inputs-first-module": (lambda: Conv1D(3, 4), ROWS, [""]),
    "transposed": (lambda: Functional(lambda x, W: F.linear(x, W.t()), 4, 3), ROWS, [""]),
    "scaled": (lambda: Functional(lambda x, W: F.linear(x, W * 0.5), 4, 4), ROWS, [""]),
    "noisy": (lambda: Functional(lambda x, W: F.linear(x, W + 0.01 * torch.randn_like(W)), 4, 4), ROWS, [""]),
    "dropped": (lambda: Functional(lambda x, W: F.linear(x, F.dropout(W, 0.3)), 4, 4), ROWS, [""]),
    "cast": (lambda: Functional(lambda x, W: F.linear(x.double(), W.double()).float(), 4, 4), ROWS, [""]),
    "parameter-list": (WeightList, ROWS, ["weights.0", "weights.1"]),
    "of-children": (OfChildren, ROWS, ["layers.0", "layers.1"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_weight_is_a_site_that_records_and_moves(name: str) -> None:
    make, shape, expected = SOURCES[name]
    plain, x = make(), torch.randn(shape)
    report = decorr_fx.report(plain)
    assert ([site.fqn for site in report.sites], report.skipped) == (expected, ())
    model = decorr_fx.transform(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(site.seen > 0 for site in sites_of(model))
        optimizer.step()
    assert all((s.steps, s.refused) == (3, 0) for s in decorr_fx.stats(model))
    assert not any(is_identity(site) for site in sites_of(model))
    assert str(type(decorr_fx.fold(model))) == str(type(plain))


def test_what_is_computed_with_features_elsewhere_is_no_site() -> None:
    for rule in (lambda x, W: F.linear(x, W.flip(1)), lambda x, W: F.linear(x, W[:, [1, 0, 2, 3]])):
        with pytest.raises(decorr_fx.ModelError, match="with the features in other places"):
            decorr_fx.transform(Functional(rule, 4, 4))
    with pytest.raises(decorr_fx.ModelError, match="with the features in other places"):
        decorr_fx.transform(parametrized(nn.Linear(4, 4), Symmetric()))


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (lambda x, W: F.linear(x, W.flatten(1)), (4, 2, 2)),
        (lambda x, W: F.linear(x, W[..., 0, 0]), (4, 4, 1, 1)),
        (lambda x, W: F.conv1d(x.T[None], W.unsqueeze(-1))[0].T, (4, 4)),
    ],
)
def test_one_that_is_reshaped_is_no_site(rule: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(decorr_fx.ModelError, match="computed from 0 parameters of its shape"):
        decorr_fx.transform(Functional(rule, *shape))
