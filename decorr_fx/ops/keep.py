"""Keeping the folded weight while W and R stand still, so that evaluation costs what it costs the plain model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from decorr_fx.ops.layout import Layout, fold_weight
from decorr_fx.ops.product import full_precision


def keep_folded(kept: Tensor, W: Tensor, factors: Sequence[Tensor], layout: Layout) -> None:
    """Write `W R` into `kept`, in the shape and type of W, if W or a factor of R has changed since the last time.

    A change is what the version counters of torch count, as autograd does: everything but a write through `.data`.
    """
    stamp = _stamp([W, *factors])
    # a CUDA graph replays what it captured, whatever has changed: it has to fold every time
    captured = W.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or stamp is None or stamp != getattr(kept, "stamp", None):
        with full_precision(W.device):
            kept.copy_(fold_weight(W.to(factors[0].dtype), factors, layout))
        setattr(kept, "stamp", None if captured else stamp)  # noqa: B010 - a tensor has no such attribute, says mypy


def _stamp(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...] | None:
    """Return where the tensors are and how often they were written, or None for such as do not know."""
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except RuntimeError:  # inference tensors count no versions, fake ones are nowhere
        return None


@torch.library.custom_op("decorr_fx::keep_folded", mutates_args=("kept",))
def keep_folded_op(kept: Tensor, W: Tensor, factors: list[Tensor], layout: list[int]) -> None:
    """Do the same as a node of a compiled graph; `layout` holds the fields of a `Layout` as numbers."""
    keep_folded(kept, W, factors, Layout.of_numbers(layout))
