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


def is_exact(device: torch.device) -> bool:
    """Tell whether products of float32 keep all digits, so that the difference of two may be small.

    They do not where TF32 or bfloat16 is allowed inside of them, as by `torch.set_float32_matmul_precision("high")`.
    """
    backends = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}  # type: ignore[attr-defined]
    return device.type in backends and backends[device.type].fp32_precision in ("none", "ieee")
