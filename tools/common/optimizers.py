"""Optimizers by name: torch's, Muon from timm, SOAP from heavyball."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tools.common.errors import UsageError

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "nesterov": False}  # as torch has it


def muon(params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Return timm's Muon: parameters of two dimensions or more are stepped as matrices, the others by AdamW.

    Steps of both are of like length, so that one learning rate is right for both; Nesterov's momentum and the
    coefficients are those of the original Muon.

    Raises:
        UsageError: timm is not installed.
    """
    try:
        from timm.optim.muon import Muon
    except ImportError:
        raise UsageError("muon needs timm: pip install 'decorr_fx[bench]'") from None
    whole = list(params)
    matrices = {"params": [p for p in whole if p.dim() >= 2], "use_muon": True}
    others = {"params": [p for p in whole if p.dim() < 2], "use_fallback": True, **ADAMW}
    options: dict[str, Any] = {"nesterov": True, "ns_coefficients": "original", "adjust_lr_fn": "match_rms_adamw"}
    return cast(Optimizer, Muon([matrices, others], lr=lr, weight_decay=weight_decay, **options))


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


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "muon": muon, "soap": soap}
