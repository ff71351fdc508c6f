"""Every formula once, slow and obvious: the oracle of the tests. Use it in float64.

Here R is always one dense matrix `[d, d]` over the features of a row, rows are vectors, and groups are loops.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decorr_fx.config import RuleName
from decorr_fx.ops.product import CONVOLUTIONS

STEP_BOUND = 0.5  # of eps * lambda_max(G)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def patches(x: Tensor, weight_shape: Sequence[int], groups: int, transposed: bool, **arguments: Any) -> Tensor:
    """Return the rows `[n, C * taps]` that a convolution maps, ordered (image, *output position).

    A convolution whose weight is the identity copies its patches to its output channels; `arguments` are the
    convolution's own (stride, padding, dilation, output_padding).
    """
    kernel = tuple(weight_shape[2:])
    channels = weight_shape[0] // groups if transposed else weight_shape[1]
    taps = int(torch.tensor(kernel).prod())
    eye = torch.eye(channels * taps, dtype=x.dtype).reshape(channels * taps, channels, *kernel)
    if transposed:
        weight = eye.transpose(0, 1).repeat(groups, *[1] * (len(kernel) + 1))
        out = TRANSPOSED[len(kernel) - 1](x, weight, groups=groups, **arguments)
    else:
        out = CONVOLUTIONS[len(kernel) - 1](x, eye.repeat(groups, *[1] * (len(kernel) + 1)), groups=groups, **arguments)
    return out.movedim(1, -1).flatten(0, -2)


def dense(blocks: Sequence[Tensor], taps: Tensor | None = None) -> Tensor:
    """Return R as one matrix: blocks over channels on the diagonal, each with the matrix over taps that they share."""
    on_diagonal = [block if taps is None else torch.kron(block, taps) for block in blocks]
    R: Tensor = torch.block_diag(*on_diagonal)  # type: ignore[no-untyped-call]
    return R


def fold_rows(W: Tensor, R: Tensor) -> Tensor:
    """Return `W R` for rows `W [o, d]`."""
    return W @ R


def decorrelate_rows(x: Tensor, R: Tensor) -> Tensor:
    """Return `z = R x` for rows `x [n, d]`."""
    return x @ R.T


class Measured(NamedTuple):
    """The correlation matrix C, the variance errors V (diagonal) and the second moment M of rows z."""

    C: Tensor
    V: Tensor
    M: Tensor


def measure(z: Tensor) -> Measured:
    """Return C, V and M of rows `z [n, d]` (arXiv 2405.02385)."""
    M = torch.stack([torch.outer(row, row) for row in z]).mean(0)
    D = torch.diag(torch.diag(M))
    return Measured(M - D, D - torch.eye(len(M), dtype=z.dtype), M)


def correlation_loss(z: Tensor) -> float:
    """Return the mean over pairs of units of C^2."""
    C, d = measure(z).C, z.shape[1]
    return sum(float(C[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / max(d * (d - 1), 1)


def variance_loss(z: Tensor) -> float:
    """Return the mean over units of V^2."""
    return float(torch.diag(measure(z).V).square().mean())


def correlation_weight(rule: RuleName, kappa: float, d: int) -> float:
    """Return the weight of C in G."""
    return {"dbp": 1 - kappa, "dbp-normalized": (1 - kappa) / max(d - 1, 1), "crgd": 1.0}[rule]


def gradient(z: Tensor, rule: RuleName, kappa: float) -> Tensor:
    """Return G, the direction against which R moves, for rows `z [n, d]`."""
    C, V, M = measure(z)
    if rule == "crgd":
        return M
    return correlation_weight(rule, kappa, len(M)) * C + (2 if rule == "dbp-normalized" else 1) * kappa * V


def largest_eigenvalue(M: Tensor) -> Tensor:
    """Return the bound `tr(M^4)^(1/4)` of the largest eigenvalue of a positive semidefinite M."""
    return torch.trace(torch.linalg.matrix_power(M, 4)) ** 0.25


def transition(z: Tensor, rule: RuleName, decor_lr: float, kappa: float, gain: float) -> Tensor:
    """Return T of the step `R <- T R`, for rows `z [n, d]`, with `eps * lambda_max(G)` bounded by `STEP_BOUND`."""
    G, M = gradient(z, rule, kappa), measure(z).M
    largest = float(correlation_weight(rule, kappa, len(M)) * largest_eigenvalue(M) + torch.diag(G).abs().max())
    eps = min(decor_lr, STEP_BOUND / largest) if largest > 0 else decor_lr
    return gain * (torch.eye(len(G), dtype=z.dtype) - eps * G)


def norm_gain(x: Tensor, z: Tensor) -> float:
    """Return the gain of CRGD (arXiv 2407.10780): the mean of |x| / |z| over the rows with a z that is not zero."""
    ratios = [float(a.norm() / b.norm()) for a, b in zip(x, z, strict=True) if b.norm() > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


class Stepped(NamedTuple):
    """New blocks and taps of R, and the transitions that led there."""

    blocks: list[Tensor]
    taps: Tensor | None
    T_blocks: list[Tensor]
    T_taps: Tensor | None


def step_factors(
    blocks: Sequence[Tensor], taps: Tensor | None, x: Tensor, rule: RuleName, decor_lr: float, kappa: float
) -> Stepped:
    """Move one R by one step on rows `x [n, d]`: each factor by the rows of its own mode of z."""
    z = decorrelate_rows(x, dense(blocks, taps))
    factors = 1 if taps is None else 2
    gain = norm_gain(x, z) ** (1 / factors) if rule == "crgd" else 1.0
    k = 1 if taps is None else len(taps)
    by_block = z.reshape(len(z), len(blocks), len(blocks[0]), k)
    T_blocks = [transition(by_block[:, b].mT.flatten(0, 1), rule, decor_lr, kappa, gain) for b in range(len(blocks))]
    T_taps = None if taps is None else transition(by_block.flatten(0, 2), rule, decor_lr, kappa, gain)
    moved = [T @ block for T, block in zip(T_blocks, blocks, strict=True)]
    return Stepped(moved, None if T_taps is None or taps is None else T_taps @ taps, T_blocks, T_taps)


def shrinking(Sigma: Tensor, mean: float, rank: int, power: float, damping: float) -> Tensor:
    """Return R with eigenvalues `(1 + value / (damping mean))^-power` in the `rank` largest eigenvectors of Sigma.

    In all other directions R is the identity; `mean` is the mean eigenvalue by which damping is measured.
    """
    values, vectors = torch.linalg.eigh(Sigma)
    R = torch.eye(len(Sigma), dtype=Sigma.dtype)
    for value, u in list(zip(values, vectors.T, strict=True))[-rank:]:
        R = R + ((1 + value / (damping * mean)) ** -power - 1) * torch.outer(u, u)
    return R


def truncated(Sigma: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix to Sigma with so many eigenvalues."""
    values, vectors = torch.linalg.eigh(Sigma)
    nearest: Tensor = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return nearest


def running_moment(Sigma: Tensor, x: Tensor, steps: int, rate: float) -> Tensor:
    """Return the running moment after rows `x [n, d]`, which come after `steps` others."""
    followed = min(max(rate, 1 / (steps + 1)), 1)
    return (1 - followed) * Sigma + followed * measure(x).M


def retreat_rows(W: Tensor, T_blocks: Sequence[Tensor], T_taps: Tensor | None = None) -> Tensor:
    """Return `W T^-1` for rows `W [o, d]`: with `R <- T R`, the product W R stands still."""
    inverse: Tensor = torch.linalg.inv(dense(T_blocks, T_taps))
    return W @ inverse


def fold_removed(W: Tensor, x: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the weight of a reader `W [o, n]` on the kept units alone: least squares of `W x`, `x [rows, n]`."""
    solution: Tensor = torch.linalg.lstsq(x[:, list(kept)], x @ W.T).solution
    return solution.T


def reader_error(W: Tensor, x: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the mean over rows of the squared error of a reader's outputs, on the kept units alone."""
    return (x @ W.T - x[:, list(kept)] @ fold_removed(W, x, kept).T).square().sum(1).mean()
