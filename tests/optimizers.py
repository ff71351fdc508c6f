"""Optimizers that are no plain ones: around others, with copies of the weights, with two gradients a step, ..."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Wrapper(Optimizer):
    """An optimizer that lets another one make its steps, as learning rate searches and mixed precision do."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step() if closure is None else self.inner.step(closure)


class Lookahead(Wrapper):
    """Slow weights, of which the fast ones start again every few steps."""

    def __init__(self, inner: Optimizer, every: int = 5, part: float = 0.5) -> None:
        super().__init__(inner)
        self.every, self.part, self.count = every, part, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        self.count += 1
        if self.count % self.every == 0:
            with torch.no_grad():
                for group, slow in zip(self.param_groups, self.slow, strict=True):
                    for p, old in zip(group["params"], slow, strict=True):
                        p.copy_(old.lerp_(p, self.part))
        return loss


class MasterWeights(Optimizer):
    """SGD on float32 copies of the weights, as optimizers for half precision have it."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.detach().float().clone())
                p.copy_(master.add_(p.grad.float(), alpha=-group["lr"]))


class Assigning(Optimizer):
    """SGD by hand, which gives parameters other data instead of changing them in place."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad


class SAM(Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412), as its usual implementation has it."""

    def __init__(self, parameters: Iterable[Tensor], base: type[Optimizer], rho: float, **settings: Any) -> None:
        super().__init__(parameters, {"rho": rho, **settings})
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()
