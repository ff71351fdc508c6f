"""The precision of products with R."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp import is_autocast_available


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
