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

from decorr_fx.ops.calls import CALLS, Signature
from decorr_fx.runtime.site.state import Site


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
            self._record(signature, signature.bind(args, kwargs))
        result = func(*args, **kwargs)
        self._follow(args, result)
        return result

    def _record(self, signature: Signature, arguments: Mapping[str, Any]) -> None:
        x, weight = arguments["input"], arguments["weight"]
        if signature.product and self._site_of(weight) is None and isinstance(weight, Tensor) and weight.dim() > 1:
            x, weight = weight.mT, x  # the weight may stand on the left: W x
        site = self._site_of(weight)
        # rows of x may have other features than R works on: a weight may be used the other way round, too
        if site is not None and x.shape[-1 - signature.spatial] * prod(weight.shape[2:]) == site.rows.shape[1]:
            site.record_call(x, signature.geometry(arguments, weight.shape), arguments["output_padding"])

    def _site_of(self, weight: object) -> Site | None:
        return self.weights[id(weight)][1] if id(weight) in self.weights else None

    def _follow(self, args: tuple[Any, ...], result: object) -> None:
        """Watch a cast, reshaped or standardised weight, too: what has the size of a weight and was made of it."""
        made_of = next((arg for arg in args if self._site_of(arg) is not None), None)
        if made_of is not None and isinstance(result, Tensor) and result.numel() == made_of.numel():
            self.weights.setdefault(id(result), (result, self.weights[id(made_of)][1]))


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
