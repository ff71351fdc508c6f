"""The textbook form of decorrelated backpropagation, the yardstick: R is a full matrix and is applied to activations.

    z = R x                                              for every row x of every input
    R <- R - eps * ((1 - kappa) C + kappa D) R           C and D over a tenth of the rows, a d x d times d x d product

Written as the equations read (arXiv 2405.02385, sections 2 and 3), with no thought of time or memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS, KAPPA, SAMPLED = 1e-4, 0.01, 0.1


class TextbookLayer(nn.Module):
    """A conv (of one group, with zero padding) or a linear that decorrelates its own input, and moves R after it."""

    R: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("R", torch.eye(layer.weight[0].numel(), device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `R x`."""
        rows, shape = self._rows(x)
        z = rows @ self.R.T
        if self.training:
            self._move(z.detach())
        return self._back(F.linear(z, self.layer.weight.flatten(1), self.layer.bias), shape)

    def _rows(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x, ()
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        span = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before = zip(x.shape[2:], layer.padding, span, layer.stride, strict=True)
        return patches.mT, tuple((side + 2 * int(p) - s) // stride + 1 for side, p, s, stride in before)

    def _back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        return out.mT.unflatten(2, shape) if shape else out

    @torch.no_grad()
    def _move(self, z: Tensor) -> None:
        z = z.flatten(0, -2)
        z = z[torch.randperm(len(z), device=z.device)[: max(1, int(SAMPLED * len(z)))]]
        M = z.T @ z / len(z)
        variances = M.diagonal().diag()
        C, D = M - variances, variances - torch.eye(len(M), device=z.device)
        self.R = self.R - EPS * ((1 - KAPPA) * C + KAPPA * D) @ self.R


def textbook(model: nn.Module) -> nn.Module:
    """Wrap, in place, every linear and every 2-d convolution of one group; return the model."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1):
            setattr(model, name, TextbookLayer(child))
        else:
            textbook(child)
    return model
