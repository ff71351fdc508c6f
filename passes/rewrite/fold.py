"""Folding: every trace of the method is removed. The weights are those of the plain model all along."""

from torch import nn

from decorr_fx.errors import NotTransformedError
from decorr_fx.passes.base import Pass
from decorr_fx.passes.copies import computed_tensors, copy_model
from decorr_fx.passes.rewrite.layer import WatchedLayer, as_plain_layer
from decorr_fx.runtime.private import has_recording_hook
from decorr_fx.runtime.site.attachment import detach
from decorr_fx.runtime.site.registry import LOCK
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.watch import record_input


class FoldDecorrelation(Pass[nn.Module]):
    """Take every site, hook and class of ours from a model, or from a copy of it."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def requires(self, model: nn.Module) -> None:
        """The model is transformed."""
        if not any(is_changed(module) for module in model.modules()):
            raise NotTransformedError(
                f"{type(model).__name__} has no decorrelated layer: it is plain, or was folded already; use it as it is"
            )

    def call(self, model: nn.Module) -> nn.Module:
        """Fold it."""
        result = model if self.in_place else copy_model(model, shared=computed_tensors(model))
        with LOCK:
            for module in list(result.modules()):
                as_plain_layer(module)
                detach(module)
        return result

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """No module, hook or class of ours is left."""
        for fqn, module in result.named_modules():
            if is_changed(module):
                raise self.broken(fqn, "a part of the transformed model is left")


def is_changed(module: nn.Module) -> bool:
    """Tell whether something of ours is on the module itself."""
    return isinstance(module, Site | WatchedLayer) or has_recording_hook(module, record_input)
