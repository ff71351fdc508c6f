"""Folding: `W <- W R` and, where centred, `b <- b - W R mu`, then every trace of the method is removed."""

from torch import nn

from decorr_fx.errors import NotTransformedError
from decorr_fx.passes.base import DecorrelatedLayer, Pass, as_plain_layer, computed_tensors, copy_model
from decorr_fx.runtime.attachment import detach
from decorr_fx.runtime.state import Site, sites_of


class FoldDecorrelation(Pass[nn.Module]):
    """Return a plain copy of a transformed model: the original classes, names and shapes, with R folded in."""

    def requires(self, model: nn.Module) -> None:
        """The model is transformed, and its weights are whole."""
        if next(sites_of(model), None) is None:
            raise NotTransformedError(
                f"{type(model).__name__} has no decorrelated layer: it is plain, or was folded already; use it as it is"
            )
        for site in sites_of(model):
            for weight in site.weights:
                weight.check_whole()
                weight.check()

    def call(self, model: nn.Module) -> nn.Module:
        """Fold every site into the parameters of a copy."""
        plain = copy_model(model, shared=computed_tensors(model))
        for site in sites_of(plain):
            site.fold_into_weights()
        for module in list(plain.modules()):
            as_plain_layer(module)
            detach(module)
        return plain

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """No module, class or key of ours is left, and nothing else is missing."""
        for fqn, module in result.named_modules():
            if isinstance(module, Site | DecorrelatedLayer):
                raise self.broken(fqn, "a part of the transformed model is left")
        sites = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Site)]
        plain = {key for key in model.state_dict() if not any(key.startswith(f"{name}.") for name in sites)}
        if result.state_dict().keys() != plain:
            raise self.broken("state_dict", "the keys are not those of the plain model")
