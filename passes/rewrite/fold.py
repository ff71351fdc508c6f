"""Folding: `W <- W R` and, where centred, `b <- b - W R mu`, then every trace of the method is removed."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from decorr_fx.errors import NotTransformedError
from decorr_fx.passes.base import Pass
from decorr_fx.passes.copies import computed_tensors, copy_model
from decorr_fx.passes.rewrite.layer import DecorrelatedLayer, as_plain_layer
from decorr_fx.runtime.site.attachment import detach
from decorr_fx.runtime.site.shard import reshard
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.site.weight import SiteWeight


class FoldDecorrelation(Pass[nn.Module]):
    """Return a plain copy of a transformed model: the original classes, names and shapes, with R folded in."""

    def requires(self, model: nn.Module) -> None:
        """The model is transformed, and its weights are whole."""
        for weight in _weights(model):
            weight.check_whole()
            weight.check()

    def call(self, model: nn.Module) -> nn.Module:
        """Fold every site into the parameters of a copy."""
        plain = copy_model(model, shared=computed_tensors(model))
        _fold_sites(plain)
        return plain

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """No module, class or key of ours is left, and nothing else is missing."""
        _check_no_trace(self, result)
        sites = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Site)]
        plain = {key for key in model.state_dict() if not any(key.startswith(f"{name}.") for name in sites)}
        if result.state_dict().keys() != plain:
            raise self.broken("state_dict", "the keys are not those of the plain model")


class FoldInPlace(Pass[nn.Module]):
    """Fold R into the weights of the model itself, of which each rank may hold a part."""

    def requires(self, model: nn.Module) -> None:
        """The model is transformed, and its weights can follow R."""
        for weight in _weights(model):
            weight.check()

    def call(self, model: nn.Module) -> nn.Module:
        """Fold every site into the parameters that there are."""
        _fold_sites(model)
        return model

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """No module or class of ours is left."""
        _check_no_trace(self, result)


def _weights(model: nn.Module) -> Iterator[SiteWeight]:
    """Return the weights that R is applied to, of sharded ones the part that this rank holds.

    Raises:
        NotTransformedError: there is none.
    """
    if next(sites_of(model), None) is None:
        raise NotTransformedError(
            f"{type(model).__name__} has no decorrelated layer: it is plain, or was folded already; use it as it is"
        )
    reshard(model)
    return (weight for site in sites_of(model) for weight in site.weights)


def _fold_sites(model: nn.Module) -> None:
    for site in sites_of(model):
        site.fold_into_weights()
    for module in list(model.modules()):
        as_plain_layer(module)
        detach(module)


def _check_no_trace(folding: Pass[Any], result: nn.Module) -> None:
    for fqn, module in result.named_modules():
        if isinstance(module, Site | DecorrelatedLayer):
            raise folding.broken(fqn, "a part of the transformed model is left")
