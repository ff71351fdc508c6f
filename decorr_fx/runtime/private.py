"""What is used of torch that is not public, each with the reason; exercised against every supported version."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["WeakTensorKeyDictionary"]

# WeakTensorKeyDictionary: a parameter compares elementwise, so that it cannot be a key of a WeakKeyDictionary.


def add_recording_hook(module: nn.Module, hook: Any) -> None:
    """Let a forward hook see each call of the module, before hooks that are registered later."""
    module.register_forward_hook(hook, with_kwargs=True)


def has_recording_hook(module: nn.Module, hook: Any) -> bool:
    """Tell whether the hook is there. A handle would not be that of a deep copy, so the hook is found by itself."""
    return hook in module._forward_hooks.values()


def remove_recording_hook(module: nn.Module, hook: Any) -> None:
    """Take the hook from the module, in whatever copy of it."""
    for key in [key for key, known in module._forward_hooks.items() if known is hook]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)


def is_placeholder(value: object) -> bool:
    """Tell whether `set_model_state_dict` has put a value where a whole checkpoint has no extra state: a plain one."""
    return type(value).__name__ == "_EXTRA_STATE"


def mapped_version(gradient: torch.Tensor) -> int | None:
    """Return the version at which a gradient was mapped to coordinates of z; None if it was not."""
    version: int | None = getattr(gradient, "_decorr_version", None)
    return version


def note_mapped(gradient: torch.Tensor) -> None:
    """Note that the gradient is mapped, as it is now: any later write gives it another version."""
    setattr(gradient, "_decorr_version", gradient._version)  # noqa: B010 - a tensor has no such attribute, says mypy


def is_recordable(x: torch.Tensor) -> bool:
    """Tell whether rows of an input can be copied into a buffer of a site.

    Not those of nested, sparse and fake tensors, nor inside a transform of `torch.func`, which allows no write to what
    is outside of it, nor while a trace is made for `torch.jit`.
    """
    plain = x.layout is torch.strided and not x.is_nested and not isinstance(x, FakeTensor) and not x.is_meta
    C: Any = torch._C
    return plain and C._functorch.maybe_current_level() is None and C._get_tracing_state() is None
