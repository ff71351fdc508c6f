"""Drawn rows of correlated units and the weights that read them: for the tests of `ops.prune`."""

import torch
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.prune.subspace import Units


def draw(seed: int, n: int, o: int) -> tuple[Tensor, Tensor]:
    """Return rows of correlated units, and the weight of a reader."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = (torch.randn(8 * n, n, generator=generator, dtype=torch.float64) @ mixing.T).relu()
    return x, torch.randn(o, n, generator=generator, dtype=torch.float64)


def moment(x: Tensor) -> Tensor:
    """Return the second moment of rows."""
    return x.mT @ x / len(x)


def units(*readers: tuple[Tensor, Tensor]) -> Units:
    """Return the units of a group with these readers, each given by rows and weight."""
    norms = torch.rand(readers[0][0].shape[1], dtype=torch.float64)
    return Units("layer", [moment(x) for x, _ in readers], [W for _, W in readers], norms)


def told_by(x: Tensor, kept: Tensor, unit: Tensor) -> Tensor:
    """Return the mean square of what the kept units do not tell of one more."""
    if not len(kept):
        return x[:, unit].square().mean()
    return reference.reader_error(torch.eye(x.shape[1], dtype=x.dtype)[unit][None], x, kept.tolist())
