"""Layouts of drawn layers, and drawn R over them, with R as one dense matrix a group: for the tests of `ops`."""

from dataclasses import dataclass, replace

import torch
from cases import LayerCase, layer_cases
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.calls import layer_signature
from decorr_fx.ops.layout import Factored, Layout
from decorr_fx.ops.low_rank import LowRank

R = LowRank | Factored


def plain_layout(case: LayerCase) -> Layout:
    """Return how the weight of a layer is read, without a structure of R."""
    layer, _ = case.make()
    return layer_signature(layer).layout(getattr(layer, "groups", 1), layer.weight.shape)


@dataclass(frozen=True)
class Laid:
    """A layer, and how its weight is read."""

    case: LayerCase
    layout: Layout

    def weight(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return numbers in the shape of the weight."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.case.make()[0].weight.shape
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows(self, weight: Tensor, group: int) -> Tensor:
        """Return a weight as rows `[d_out, d]` of one group, channel-major."""
        of_group = weight.chunk(self.layout.groups, 0)[group]
        return (of_group.transpose(0, 1) if self.layout.transposed else of_group).flatten(1)


@st.composite
def laid(draw: st.DrawFn, low_rank: bool | None = None) -> Laid:
    """Draw a layer with any structure of R: of low rank, dense or a Kronecker pair, the latter two in blocks or not."""
    case = draw(layer_cases())
    plain = plain_layout(case)
    if draw(st.booleans()) if low_rank is None else low_rank:
        return Laid(case, replace(plain, rank=draw(st.integers(1, plain.d))))
    blocks = draw(st.sampled_from([n for n in range(1, plain.channels + 1) if plain.channels % n == 0]))
    return Laid(case, replace(plain, blocks=blocks, paired=draw(st.booleans())))


def drawn_R(layout: Layout, seed: int, dtype: torch.dtype = torch.float64, gain: bool = False) -> R:
    """Return R of one weight, well enough conditioned to be divided by; not symmetric where it is dense."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    if not layout.rank:
        noise = [torch.randn(shape, **options) for shape in layout.factor_shapes]
        return Factored([(torch.eye(n.shape[2]) + 0.4 * n / n.shape[2] ** 0.5).to(dtype) for n in noise])
    directions = torch.linalg.qr(torch.randn(layout.stacks, layout.d, layout.d, **options))[0][:, : layout.rank]
    lengths = 0.9 * torch.rand(layout.stacks, layout.rank, 1, **options)
    gains = (0.5 + torch.rand(layout.stacks, **options)).to(dtype) if gain else None
    return LowRank((lengths * directions).to(dtype), gains)


def joined(Rs: list[R]) -> R:
    """Return the R of several weights of one shape, one after the other."""
    if isinstance(Rs[0], LowRank):
        gain = None if Rs[0].gain is None else torch.cat([one.gain for one in Rs])
        return LowRank(torch.cat([one.U for one in Rs]), gain)
    return Factored([torch.cat(of_all) for of_all in zip(*(one.factors for one in Rs), strict=True)])


def dense_of_group(R: R, layout: Layout, group: int) -> Tensor:
    """Return R of one group as one matrix over its channel-major features, in float64."""
    if isinstance(R, LowRank):
        U = R.U[group].double()
        scale = 1.0 if R.gain is None else R.gain[group].double()
        return scale * (torch.eye(layout.d, dtype=torch.float64) - U.T @ U)
    blocks = R.factors[0][group * layout.blocks : (group + 1) * layout.blocks].double()
    return reference.dense(list(blocks), R.factors[1][group].double() if layout.paired else None)
