"""The precision of products with R."""

from contextlib import ExitStack

import torch
from torch.amp import is_autocast_available


def full_precision() -> ExitStack:
    """Return a context without autocast, on whatever device."""
    accelerator, context = torch.accelerator.current_accelerator(), ExitStack()
    for device in ("cpu",) if accelerator is None else ("cpu", accelerator.type):
        if is_autocast_available(device) and torch.is_autocast_enabled(device):
            context.enter_context(torch.autocast(device, enabled=False))
    return context
