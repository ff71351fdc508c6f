"""Muon for whole models: torch's own for matrices, of convolutions the flattened weight, and AdamW for what is left."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as MatrixMuon


class Muon(Optimizer):
    """Steps every weight of two dimensions or more by Muon, as a matrix `[d_out, d_in]`, and the others by AdamW.

    The learning rate is scaled such that steps are as long as those of AdamW: one rate is right for both.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})
        whole: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        self._matrices = [
            (p, nn.Parameter(p.detach().flatten(1))) for p in whole if p.dim() >= 2
        ]  # views of one storage
        others = [p for p in whole if p.dim() < 2]
        self._inner: list[Optimizer] = [
            MatrixMuon([m for _, m in self._matrices], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        self._inner += [AdamW(others, weight_decay=weight_decay)] if others else []

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the optimizers inside."""
        return {**super().state_dict(), "inner": [optimizer.state_dict() for optimizer in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Be what `state_dict` was returned of."""
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "inner"})
        for optimizer, state in zip(self._inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what `closure` returns, which computes the gradients anew."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for p, matrix in self._matrices:
            matrix.data = p.detach().flatten(1)  # a view, of wherever p is now
            grad: Tensor | None = p.grad
            matrix.grad = None if grad is None else grad.flatten(1)
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()
        return loss
