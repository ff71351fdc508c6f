"""Drawn factors of R with rows for a step: what the tests of the rules are run over."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from decorr_fx import Power
from decorr_fx.ops.layout import identity_factors
from decorr_fx.runtime.site.state import Site, sites_of


@dataclass(frozen=True)
class Drawn:
    """Factors near the identity, rows with unused ones at the end, and how many rows are in use, of some matrices R."""

    factors: list[Tensor]
    x: Tensor
    used: int

    @property
    def matrices(self) -> int:
        return len(self.factors[-1])

    def blocks(self, matrix: int) -> slice:
        """Return which stacks belong to a matrix."""
        each = len(self.x) // self.matrices
        return slice(matrix * each, (matrix + 1) * each)

    def parts(self, matrix: int, factors: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Return the blocks, and the factor over taps, of one matrix."""
        first, *others = factors or self.factors
        return list(first[self.blocks(matrix)]), others[0][matrix] if others else None

    def rows(self, matrix: int, stacked: Tensor) -> Tensor:
        """Return the rows `[n, d]` of one matrix, its blocks side by side."""
        return stacked[self.blocks(matrix)].transpose(0, 1).flatten(1)


@st.composite
def sites(draw: st.DrawFn) -> Drawn:
    matrices, blocks = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        sides, stacks = (draw(st.integers(2, 6)), draw(st.integers(2, 5))), (matrices * blocks, matrices)
    else:
        sides, stacks = (draw(st.integers(1, 12)),), (matrices,)
    used, unused = draw(st.integers(1, 20)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    options = {"generator": generator, "dtype": torch.float64}
    noise = [torch.randn(s, side, side, **options) for s, side in zip(stacks, sides, strict=True)]
    factors = [torch.eye(n.shape[-1], dtype=torch.float64) + 0.2 * n for n in noise]
    x = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(stacks[0], used + unused, *sides, **options)
    x[:, used:] = 0
    return Drawn(factors, x, used)


def dense_R(U: Tensor) -> Tensor:
    """Return R of `U [rank, d]` as one matrix."""
    return torch.eye(U.shape[1], dtype=U.dtype) - U.T @ U


def running_moments(model: nn.Module) -> list[Tensor]:
    """Return the running second moments of all sites of the rule `Power`, one after the other, of each stack."""
    sketches = [site.scale[..., None] * site.U for site in sites_of(model) if isinstance(site.spec.rule, Power)]
    return [sketch.mT @ sketch for sketch in sketches]


def is_identity(site: Site) -> bool:
    """Tell whether R is the identity, as its buffers have it."""
    identity = identity_factors(site.spec.layout, site.rows.device, site.rows.dtype)
    return all(torch.equal(factor, start) for factor, start in zip(site.state, identity, strict=False))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-12))
