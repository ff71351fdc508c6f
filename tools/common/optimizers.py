"""SOAP from heavyball (arXiv 2409.11321), with its own defaults but for the learning rate and the weight decay."""

import warnings
from collections.abc import Iterable
from typing import cast

from torch import nn
from torch.optim import Optimizer

from tools.train.settings import UsageError


def soap(params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Return a new optimizer; its functions are not compiled, which would take longer than a short training.

    Raises:
        UsageError: heavyball is not installed.
    """
    try:
        import heavyball
    except ImportError:
        raise UsageError("--optimizer soap needs heavyball: pip install 'decorr_fx[bench]'") from None
    heavyball.utils.compile_mode = None
    warnings.filterwarnings("ignore", message="Learning rate changed")  # as a schedule does at each step
    return cast(Optimizer, heavyball.SOAP(params, lr=lr, weight_decay=weight_decay))
