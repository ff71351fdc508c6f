"""How the inputs of layers are seen while a forward runs as it was written.

torch's own convs and linears have a hook, which gets the input of each call. In all other forwards the calls of torch's
functions are watched, and the rows that meet a weight are recorded. Both come after the call itself, so that an input
that does not fit raises torch's own error.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from decorr_fx.ops.calls import CALLS, OTHER_PRODUCTS, Signature, layer_geometry
from decorr_fx.runtime.site.state import Site

HOOKED = "weight_decorr"  # the attribute of a hooked layer that holds its site


@dataclass(frozen=True)
class Read:
    """A weight that a forward calls: its path from the module, which rows of it, and the name of its site there."""

    path: str
    rows: tuple[int, int] | None
    site: str


@dataclass(frozen=True)
class Call:
    """A call of a conv or linear on a watched weight."""

    signature: Signature
    arguments: Mapping[str, Any]
    x: Tensor
    output: Tensor

    @property
    def out_size(self) -> list[int]:
        """Spatial size of the output; empty for a linear."""
        spatial = self.signature.spatial
        return list(self.output.shape[-spatial:]) if spatial else []


def record_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    """Record the input of a layer: a forward hook."""
    if not module.training:
        return
    site: Site = getattr(module, HOOKED)
    if torch.compiler.is_compiling() or site.schedule.due:  # in this order: compiled code must not depend on the latter
        x = args[0] if args else kwargs["input"]
        geometry = layer_geometry(module)
        site.record(x, geometry, [] if geometry is None else output.shape[-len(geometry.kernel) :])


class Watch(TorchFunctionMode):
    """Tells of every conv and linear that is called on one of the weights, on rows of one, or on what is made of it."""

    def __init__(self, weights: Iterable[Tensor], tell: Callable[[int, tuple[int, int] | None, Call], None]) -> None:
        """Let `tell` be called with the number of a weight, the rows of it that are used if not all, and the call."""
        super().__init__()
        self.tell = tell
        self.known: list[tuple[Tensor, int, tuple[int, int] | None]] = [(W, i, None) for i, W in enumerate(weights)]
        self.lengths = [len(W) for W, _, _ in self.known]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make one call of a torch function, then look at it."""
        result = func(*args, **(kwargs or {}))
        signature = CALLS.get(func)
        layer = False
        if signature is not None and isinstance(result, Tensor):
            layer = self._look(signature, signature.bind(args, kwargs or {}), result)
        if not layer:
            self._follow(func, args, result)
        return result

    def _look(self, signature: Signature, arguments: Mapping[str, Any], output: Tensor) -> bool:
        """Tell of a call; return whether it maps an input, so that its output is no weight."""
        x, weight = arguments["input"], arguments["weight"]
        found = self._find(weight)
        if found is None and signature.product and isinstance(weight, Tensor) and weight.dim() > 1:
            x, weight = weight.mT, x  # the weight may stand on the left: W x
            found = self._find(weight)
        if found is None or not isinstance(x, Tensor) or self._find(x) is not None:
            return False  # what is computed of weights alone, as a penalty is, has no input
        _, index, rows = found
        self.tell(index, rows, Call(signature, {**arguments, "weight": weight}, x, output))
        return True

    def _find(self, tensor: object) -> tuple[Tensor, int, tuple[int, int] | None] | None:
        return next((known for known in self.known if known[0] is tensor), None)

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], result: object) -> None:
        """Watch a cast, reshaped or standardised weight, too, and rows that are cut from a packed one."""
        made_of = next((found for arg in args if (found := self._find(arg)) is not None), None)
        if made_of is None or getattr(func, "__name__", "") in OTHER_PRODUCTS:
            return
        W, index, rows = made_of
        if isinstance(result, Tensor) and result.numel() == W.numel():
            if self._find(result) is None:
                self.known.append((result, index, rows))
            return
        first, last = rows or (0, self.lengths[index])
        if not first < last or W.numel() % (last - first):
            return
        if isinstance(result, tuple | list):
            self._follow_parts(index, first, W.numel() // (last - first), result)
        elif isinstance(result, Tensor) and (start := _first_row(func, args, W, last - first)) is not None:
            self._follow_parts(index, first + start, W.numel() // (last - first), [result])

    def _follow_parts(self, index: int, first: int, size: int, parts: Iterable[Any]) -> None:
        """Watch parts that follow each other from a row on, each of some rows of this size."""
        for part in parts:
            if not isinstance(part, Tensor) or part.numel() % size:
                return
            last = first + part.numel() // size
            self.known.append((part, index, (first, last)))
            first = last


def _first_row(func: Callable[..., Any], args: tuple[Any, ...], W: Tensor, rows: int) -> int | None:
    """Return the first of the rows that a call cuts from the weight, None where it cuts nothing of the kind."""
    if func in (torch.narrow, Tensor.narrow) and len(args) == 4 and args[1] == 0:
        return int(args[2])
    if func is not Tensor.__getitem__:
        return None
    cut, *others = args[1] if isinstance(args[1], tuple) else (args[1],)
    if isinstance(cut, int):  # of a weight that was unflattened
        cut = slice(cut, cut + 1 or None)
    if not isinstance(cut, slice) or rows % len(W) or any(other not in (slice(None), ...) for other in others):
        return None
    start, _, step = cut.indices(len(W))
    return start * (rows // len(W)) if step == 1 else None


def has_rows(part: tuple[int, int] | None, rows: tuple[int, int] | None) -> bool:
    """Tell whether a part of a weight has all of some rows; None is all of it."""
    return part is None or (rows is not None and part[0] <= rows[0] and rows[1] <= part[1])


def run_watched(
    module: nn.Module, reads: Iterable[Read], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `forward(module, ...)` and record the input of each call of the weights of `reads`."""
    named = list(dict.fromkeys(read.path for read in reads))
    sites = [(named.index(read.path), read.rows, getattr(module, read.site)) for read in reads]

    def record(index: int, rows: tuple[int, int] | None, call: Call) -> None:
        site = next((site for i, part, site in sites if i == index and has_rows(part, rows)), None)
        W = call.arguments["weight"]
        # rows of x may have other features than R works on: a weight may be used the other way round, too
        if site is not None and call.x.shape[-1 - call.signature.spatial] * prod(W.shape[2:]) == site.rows.shape[1]:
            site.record(call.x, call.signature.geometry(call.arguments, W.shape), call.out_size)

    with Watch([_parameter(module, path) for path in named], record):
        return forward(module, *args, **kwargs)


def _parameter(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    parameter: Tensor = getattr(module.get_submodule(owner) if owner else module, name)
    return parameter
