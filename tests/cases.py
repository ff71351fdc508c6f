"""Small models and drawn layers, as data: what the tests are run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCase:
    """A layer to be made with the given arguments, and the shape of an input that it takes."""

    cls: type[nn.Module]
    arguments: dict[str, Any]
    shape: tuple[int, ...]

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """Return the layer and an input, with weights, biases and rows of ordinary size."""
        torch.manual_seed(seed)
        layer = self.cls(**self.arguments, dtype=dtype)
        return layer, torch.randn(self.shape, dtype=dtype)


@st.composite
def linear_cases(draw: st.DrawFn) -> LayerCase:
    leading = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    d_in, d_out = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    return LayerCase(
        nn.Linear, {"in_features": d_in, "out_features": d_out, "bias": draw(st.booleans())}, (*leading, d_in)
    )


@st.composite
def conv_cases(draw: st.DrawFn) -> LayerCase:
    """Draw a convolution over all of its arguments: dimensions, groups, stride, dilation, padding and its modes."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(spatial))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(spatial))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * spatial if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(spatial))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(2, 4)) for k, d in zip(kernel, dilation, strict=True))
    arguments = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    batch = (draw(st.integers(1, 3)),) if draw(st.booleans()) or arguments["padding_mode"] != "zeros" else ()
    return LayerCase(CONVS[spatial - 1], arguments, (*batch, arguments["in_channels"], *size))


@st.composite
def transposed_cases(draw: st.DrawFn) -> LayerCase:
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(spatial))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(spatial))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    arguments = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True)),
        "output_padding": tuple(draw(st.integers(0, m)) for m in most),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    batch = (draw(st.integers(1, 3)),) if draw(st.booleans()) else ()
    size = tuple(draw(st.integers(2, 4)) for _ in range(spatial))
    return LayerCase(TRANSPOSED[spatial - 1], arguments, (*batch, arguments["in_channels"], *size))


def layer_cases() -> st.SearchStrategy[LayerCase]:
    """Draw any layer that can be a site."""
    return st.one_of(linear_cases(), conv_cases(), transposed_cases())


class Functional(nn.Module):
    """Convolution and linear called as functions on parameters of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)
        self.head = nn.Parameter(torch.randn(5, 4) / 2)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, self.kernel, padding=1, stride=2).relu().mean((2, 3))
        return F.linear(hidden, self.head, bias=self.bias)


class StandardizedConv2d(nn.Conv2d):
    """A subclass with a forward of its own: the weight is standardised in the graph."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (std + 1e-5), self.bias)


class HandMadeWeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(5, 6))
        self.g = nn.Parameter(torch.rand(5, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True))


class Shared(nn.Module):
    """One layer called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class ModeDependent(nn.Module):
    """A layer whose own forward differs between train and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.auxiliary = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        if self.training:
            out = F.dropout(out + self.auxiliary(x), 0.5, training=True)
        return out


class ControlFlow(nn.Module):
    """What no tracer follows: a branch on the data, and a layer called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        for _ in range(depth):
            x = self.body(x) if x.sum() > 0 else self.body(-x)
        return self.head(x)


class UpSample(nn.Module):
    """A transposed convolution that is told its output size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.shape[-2:])


class SamePaddedConv2d(nn.Conv2d):
    """A convolution that pads by the size of its input, as those ported from other frameworks do."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:] if isinstance(x, Tensor) else None
        if size is not None and (missing := [-length % step for length, step in zip(size, self.stride, strict=True)]):
            x = F.pad(x, (0, missing[1] + 1, 0, missing[0] + 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Products(nn.Module):
    """Linears that are written as products with a matrix, inputs first and outputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(6, 5) / 2)
        self.middle = nn.Parameter(torch.randn(4, 5) / 2)
        self.outer = nn.Parameter(torch.randn(4, 3) / 2)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, F.linear((x @ self.inner).tanh(), self.middle), self.outer)


class GatedMlp(nn.Module):
    """Two linears that read the same value, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class AttentionBlock(nn.Module):
    """Self-attention over the rows, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class ReadsItsChild(nn.Module):
    """A forward behind a branch that calls a child, and reads the child's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.head(self.body(x)), self.body.weight) if len(x.shape) > 1 else x


def small_cnn() -> nn.Module:
    """A conv net with normalisation, dropout, a depthwise layer, circular padding, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 10),
    )


@dataclass(frozen=True)
class ModelCase:
    """A model to be made, the shape of its input, and the names of its sites."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: tuple[str, ...]


MODELS = {
    "cnn": ModelCase(small_cnn, (5, 3, 8, 8), ("0", "3", "4", "8")),
    "functional": ModelCase(Functional, (4, 3, 7, 7), ("kernel", "head")),
    "subclass": ModelCase(lambda: nn.Sequential(StandardizedConv2d(3, 4, 3, padding=1)), (2, 3, 6, 6), ("0",)),
    "weight_norm": ModelCase(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5))), (7, 6), ("0",)),
    "weight_norm_square": ModelCase(lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), (7, 4, 3), ("",)),
    "spectral_norm": ModelCase(lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), (2, 3, 6, 6), ("",)),
    "hand_made_weight_norm": ModelCase(HandMadeWeightNorm, (7, 6), ("v",)),
    "shared": ModelCase(Shared, (7, 6), ("layer",)),
    "tied": ModelCase(Tied, (7, 6), ("first",)),
    "modes": ModelCase(ModeDependent, (7, 6), ("", "auxiliary")),
    "control_flow": ModelCase(ControlFlow, (7, 6), ("body.0", "head")),
    "same_padded": ModelCase(lambda: SamePaddedConv2d(3, 4, 3, 2), (2, 3, 6, 7), ("",)),
    "products": ModelCase(Products, (7, 6), ("inner", "middle", "outer")),
    "shared_input": ModelCase(GatedMlp, (7, 6), ("gate", "up", "down")),
    "attention": ModelCase(
        AttentionBlock,
        (7, 6),
        ("attn.out_proj", *(f"attn.in_proj_weight[{i}:{i + 6}]" for i in (0, 6, 12))),
    ),
    "reads_its_child": ModelCase(ReadsItsChild, (7, 6), ("body", "head.0")),
    "up_sample": ModelCase(UpSample, (2, 3, 10, 9), ("down", "up")),
}
