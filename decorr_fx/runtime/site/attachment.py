"""What the root of a transformed model carries besides its sites: the skipped layers, and a check on what is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from decorr_fx.errors import CheckpointError
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


def check_checkpoint(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint whose R does not fit, before anything is loaded: a pre-hook of `load_state_dict`.

    Raises:
        CheckpointError: a factor has another shape than the model's, or is not finite.
    """
    for name, site in module.named_modules(remove_duplicate=False):
        if not isinstance(site, Site):
            continue
        found = {key for key in state_dict if key.startswith(f"{prefix}{name}.")}
        expected = site.state_dict(prefix=f"{prefix}{name}.")
        for key in sorted(found | expected.keys()) if found else []:
            _check_entry(site.spec.fqn, key, expected.get(key), state_dict.get(key))


def _check_entry(fqn: str, key: str, own: object, saved: object) -> None:
    advice = "transform the model with the config and the example_inputs that the checkpoint was trained with"
    if not isinstance(saved, Tensor) or not isinstance(own, Tensor):
        problem = "is not in the checkpoint" if isinstance(own, Tensor) else "of the checkpoint is not in the model"
        raise CheckpointError(f"layer {fqn!r}: {key!r} {problem}; {advice}")
    if saved.shape != own.shape:
        shapes = f"shape {list(saved.shape)} in the checkpoint and {list(own.shape)} in the model"
        raise CheckpointError(f"layer {fqn!r}: {key!r} has {shapes}; {advice}")
    if not key.endswith(".rows") and not saved.isfinite().all():  # a step on such rows is refused anyway
        raise CheckpointError(f"layer {fqn!r}: {key!r} holds NaN or infinity in the checkpoint; load an earlier one")
