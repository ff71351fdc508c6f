"""The precision of products with R."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp import is_autocast_available


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    if is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
