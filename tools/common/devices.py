"""The device that the command line names."""

import torch

from tools.common.errors import UsageError, first_line


def device_named(name: str) -> torch.device:
    """Return the device; raise `UsageError` where nothing can be put on it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {first_line(error)}; use --device cpu") from None
    return device
