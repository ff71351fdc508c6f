"""Optimizers by name: torch's, our Muon, SOAP from heavyball."""

import warnings
from collections.abc import Callable, Iterable
from typing import cast

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tools.common.errors import UsageError
from tools.common.muon import Muon


def soap(params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Return heavyball's SOAP (arXiv 2409.11321), not compiled, which would take longer than a short training."""
    warnings.filterwarnings("ignore", message="Learning rate changed")  # as a schedule does at each step
    return from_heavyball("SOAP", compile_mode=None)(params, lr=lr, weight_decay=weight_decay)


def from_heavyball(name: str, compile_mode: str | None) -> Callable[..., Optimizer]:
    """Return a class of heavyball, whose functions are compiled by this mode of torch.compile.

    Raises:
        UsageError: heavyball is not installed.
    """
    try:
        import heavyball
    except ImportError:
        raise UsageError(f"{name.lower()} needs heavyball: pip install 'decorr_fx[bench]'") from None
    heavyball.utils.compile_mode = compile_mode
    return cast(Callable[..., Optimizer], getattr(heavyball, name))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "muon": Muon, "soap": soap}
