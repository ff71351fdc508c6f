"""Running a forward as it is, on decorrelated weights: for what a graph cannot hold.

While such a forward runs, W R is in the place of W, so that whatever reads the weight, in whatever way, reads W R:
folding is exact for any forward. In train mode the calls of convs and linears are watched, and the rows that meet a
weight are recorded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from decorr_fx.ops.calls import CALLS
from decorr_fx.runtime.state import Site


@dataclass(frozen=True)
class Read:
    """A weight that a forward reads: its path from the module, the name of its site there, its number in the site."""

    path: str
    site: str
    index: int


class Watch(TorchFunctionMode):
    """Records the input of every conv and linear that is called on one of the weights, or on what is made of it."""

    def __init__(self, weights: Iterable[tuple[Tensor, Site]]) -> None:
        super().__init__()
        self.weights = {id(weight): (weight, site) for weight, site in weights}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at one call of a torch function, then make it."""
        kwargs = kwargs or {}
        signature = CALLS.get(func)
        if signature is not None:
            arguments = signature.bind(args, kwargs)
            site = self._site_of(arguments["weight"])
            if site is not None and _fits(arguments["input"], arguments["weight"], site, signature.spatial):
                geometry = signature.geometry(arguments, arguments["weight"].shape)
                site.record_call(arguments["input"], geometry, arguments["output_padding"])
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._follow(args, result)
        return result

    def _site_of(self, weight: object) -> Site | None:
        return self.weights[id(weight)][1] if id(weight) in self.weights else None

    def _follow(self, args: tuple[Any, ...], result: object) -> None:
        """Watch a cast or standardised weight, too: what has the shape of a weight and was made of it."""
        site = next((found for arg in args if (found := self._site_of(arg)) is not None), None)
        if site is not None and isinstance(result, Tensor) and self._site_of(result) is None:
            shapes = [arg.shape for arg in args if self._site_of(arg) is site]
            if result.shape in shapes:
                self.weights[id(result)] = (result, site)


def _fits(x: Tensor, weight: Tensor, site: Site, spatial: int) -> bool:
    """Tell whether rows of `x` have the features that R works on: a weight may be used the other way round, too."""
    return x.shape[-1 - spatial] * prod(weight.shape[2:]) == site.rows.shape[1]


def run_watched(
    module: nn.Module, reads: Iterable[Read], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `forward(module, ...)` with W R in the place of every weight of `reads`, and put W back."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    put: list[tuple[Site, int]] = []
    try:
        for read in reads:
            site = getattr(module, read.site)
            owner, _, name = read.path.rpartition(".")
            parameters: dict[str, Any] = module.get_submodule(owner)._parameters
            W = parameters[name]
            if site.stands_in(W, read.index):
                continue  # a module around this one has put it there, and watches
            if read.index not in site.in_place:
                site.in_place[read.index] = site.decorrelate(W, read.index)
                put.append((site, read.index))
            parameters[name] = site.in_place[read.index]
            replaced.append((parameters, name, W))
        if not module.training or not put:
            return forward(module, *args, **kwargs)
        # one recording for all weights of a site: by its first one
        with Watch([(site.in_place[index], site) for site, index in put if index == 0]):
            return forward(module, *args, **kwargs)
    finally:
        for parameters, name, W in replaced:
            parameters[name] = W
        for site, index in put:
            del site.in_place[index]
