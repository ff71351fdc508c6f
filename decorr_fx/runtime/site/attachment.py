"""What the root of a transformed model carries besides its sites: the skipped layers, and a check on what is loaded."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from decorr_fx.errors import CheckpointError
from decorr_fx.runtime.private import is_placeholder
from decorr_fx.runtime.site.spec import SkippedRecord
from decorr_fx.runtime.site.state import Site

_ATTRIBUTE = "_decorr_attachment"


@dataclass(frozen=True)
class Attachment:
    """What `attach` has put on a model.

    Attributes:
        skipped: the layers that `transform` left as they are.
        checkpoint_check: the handle of the check on checkpoints.
    """

    skipped: tuple[SkippedRecord, ...]
    checkpoint_check: RemovableHandle


def attach(model: nn.Module, skipped: tuple[SkippedRecord, ...]) -> None:
    """Make `model` the root of a transformed model."""
    handle = model.register_load_state_dict_pre_hook(check_checkpoint)  # type: ignore[no-untyped-call]
    vars(model)[_ATTRIBUTE] = Attachment(skipped, handle)


def detach(model: nn.Module) -> None:
    """Undo `attach`, where it was done."""
    attachment = vars(model).pop(_ATTRIBUTE, None)
    if attachment is not None:
        attachment.checkpoint_check.remove()


def skipped_of(model: nn.Module) -> tuple[SkippedRecord, ...]:
    """Return the layers that `transform` left as they are."""
    attachment = vars(model).get(_ATTRIBUTE)
    return attachment.skipped if attachment is not None else ()


def check_checkpoint(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint whose R does not fit, before anything is loaded: a pre-hook of `load_state_dict`.

    Where `set_model_state_dict` has put the model's own values in the place of an R that is missing, they are left out.

    Raises:
        CheckpointError: a part of R has another shape than the model's, or is not finite.
    """
    for name, site in module.named_modules(remove_duplicate=False):
        if not isinstance(site, Site):
            continue
        missing = is_placeholder(state_dict.get(f"{prefix}{name}._extra_state"))
        for key, own in site.state_dict(prefix=f"{prefix}{name}.").items():
            if missing:
                state_dict.pop(key, None)
            elif key in state_dict:
                _check_entry(site.spec.fqn, key, own, state_dict[key])


def _check_entry(fqn: str, key: str, own: Tensor, saved: object) -> None:
    if not isinstance(saved, Tensor) or saved.shape != own.shape:
        found = f"shape {list(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        raise CheckpointError(
            f"layer {fqn!r}: {key!r} has {found} in the checkpoint and shape {list(own.shape)} in the model; transform "
            "the model with the rule that the checkpoint was trained with, or leave out the keys of R "
            "(decorr_fx.state_keys): the weights are right without them"
        )
    if not saved.isfinite().all():
        raise CheckpointError(f"layer {fqn!r}: {key!r} holds NaN or infinity in the checkpoint; load an earlier one, "
                              "or leave out the keys of R (decorr_fx.state_keys)")  # fmt: skip
