"""Every formula once, slow and obvious: the oracle of the tests. Use it in float64.

Here R is always one dense matrix `[d, d]` over the features of a row, rows are vectors, and groups are loops.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decorr_fx.config import Crgd, Dbp, SmallSteps

STEP_BOUND = 0.5  # of eps * lambda_max(G)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
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


def theta_of(W: Tensor, R: Tensor) -> Tensor:
    """Return `theta = W R`, the weight that acts on x as W acts on `z = R x`, for rows `W [o, d]`."""
    return W @ R


def gradient_to_z(g: Tensor, R: Tensor) -> Tensor:
    """Return the gradient of W for that of theta, `g [o, d]`: `delta z^T` of the paper, for `delta x^T`."""
    return g @ R.T


def move_to_x(old: Tensor, moved: Tensor, R: Tensor) -> Tensor:
    """Return theta after a step in which an optimizer, by the gradient of W, has moved it from `old` to `moved`."""
    return old + (moved - old) @ R


def follow(theta: Tensor, R_old: Tensor, R_new: Tensor) -> Tensor:
    """Return theta where W stands still while R moves: by the published rule, which changes the function."""
    W: Tensor = theta @ torch.linalg.inv(R_old)
    return W @ R_new


def preserve(W: Tensor, R_old: Tensor, R_new: Tensor) -> Tensor:
    """Return W such that `W R` stands still while R moves."""
    inverse: Tensor = torch.linalg.inv(R_new)
    return W @ R_old @ inverse


def gain(Sigma: Tensor, R: Tensor, exponent: float) -> Tensor:
    """Return `gamma^exponent` with `gamma^2 = tr Sigma / tr(R Sigma R^T)`: gamma R keeps the mean square of x."""
    return (torch.trace(Sigma) / torch.trace(R @ Sigma @ R.T)) ** (exponent / 2)


def decorrelate_rows(x: Tensor, R: Tensor) -> Tensor:
    """Return `z = R x` for rows `x [n, d]`."""
    return x @ R.T


class Measured(NamedTuple):
    """The correlation matrix C, the variance errors D (diagonal) and the second moment M of rows z."""

    C: Tensor
    D: Tensor
    M: Tensor


def measure(z: Tensor) -> Measured:
    """Return C, D and M of rows `z [n, d]` (arXiv 2405.02385)."""
    M = torch.stack([torch.outer(row, row) for row in z]).mean(0)
    diagonal = torch.diag(torch.diag(M))
    return Measured(M - diagonal, diagonal - torch.eye(len(M), dtype=z.dtype), M)


def correlation_loss(z: Tensor) -> float:
    """Return the mean over pairs of units of C^2."""
    C, d = measure(z).C, z.shape[1]
    return sum(float(C[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / max(d * (d - 1), 1)


def variance_loss(z: Tensor) -> float:
    """Return the mean over units of D^2."""
    return float(torch.diag(measure(z).D).square().mean())


def gradient(z: Tensor, rule: SmallSteps) -> Tensor:
    """Return G, the direction against which R moves, for rows `z [n, d]`."""
    C, D, M = measure(z)
    return (1 - rule.kappa) * C + rule.kappa * D if isinstance(rule, Dbp) else M


def largest_eigenvalue(M: Tensor) -> Tensor:
    """Return the bound `tr(M^4)^(1/4)` of the largest eigenvalue of a positive semidefinite M."""
    return torch.trace(torch.linalg.matrix_power(M, 4)) ** 0.25


def transition(z: Tensor, rule: SmallSteps, eps: float, gain: float) -> Tensor:
    """Return T of the step `R <- T R`, for rows `z [n, d]`, with `eps * lambda_max(G)` bounded by `STEP_BOUND`."""
    G, M = gradient(z, rule), measure(z).M
    weight = 1 - rule.kappa if isinstance(rule, Dbp) else 1.0
    largest = float(weight * largest_eigenvalue(M) + torch.diag(G).abs().max())
    eps = min(eps, STEP_BOUND / largest) if largest > 0 else eps
    return gain * (torch.eye(len(G), dtype=z.dtype) - eps * G)


def norm_gain(x: Tensor, z: Tensor) -> float:
    """Return the gain of CRGD (arXiv 2407.10780): the mean of |x| / |z| over the rows with a z that is not zero."""
    ratios = [float(a.norm() / b.norm()) for a, b in zip(x, z, strict=True) if b.norm() > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


def step_factors(
    blocks: Sequence[Tensor], taps: Tensor | None, x: Tensor, rule: SmallSteps, eps: float
) -> tuple[list[Tensor], Tensor | None]:
    """Return blocks and taps of R after one step on rows `x [n, d]`: each factor by the rows of its own mode of z."""
    z = decorrelate_rows(x, dense(blocks, taps))
    gain = norm_gain(x, z) ** (1 if taps is None else 1 / 2) if isinstance(rule, Crgd) else 1.0
    k = 1 if taps is None else len(taps)
    by_block = z.reshape(len(z), len(blocks), len(blocks[0]), k)
    moved = [transition(by_block[:, b].mT.flatten(0, 1), rule, eps, gain) @ block for b, block in enumerate(blocks)]
    return moved, None if taps is None else transition(by_block.flatten(0, 2), rule, eps, gain) @ taps


def shrinking(Sigma: Tensor, trace: float, rank: int, power: float, damping: float) -> Tensor:
    """Return R with eigenvalues `((value + delta) / (rest + delta))^-power` in the `rank` largest eigenvectors.

    In all other directions, whose mean eigenvalue is `rest`, R is the identity. `delta` is `damping` times the mean of
    all eigenvalues; `trace` is their sum, also of those that Sigma lacks.
    """
    values, vectors = torch.linalg.eigh(Sigma)
    d, largest = len(Sigma), values[-rank:]
    delta, rest = damping * trace / d, max(0.0, trace - float(largest.sum())) / max(1, d - rank) * (rank < d)
    R = torch.eye(d, dtype=Sigma.dtype)
    for value, u in zip(largest, vectors.T[-rank:], strict=True):
        R = R + (((value.clamp(min=rest) + delta) / (rest + delta)) ** -power - 1) * torch.outer(u, u)
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


def fold_removed(W: Tensor, x: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the weight of a reader `W [o, n]` on the kept units alone: least squares of `W x`, `x [rows, n]`."""
    solution: Tensor = torch.linalg.lstsq(x[:, list(kept)], x @ W.T).solution
    return solution.T


def reader_error(W: Tensor, x: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the mean over rows of the squared error of a reader's outputs, on the kept units alone."""
    return (x @ W.T - x[:, list(kept)] @ fold_removed(W, x, kept).T).square().sum(1).mean()
