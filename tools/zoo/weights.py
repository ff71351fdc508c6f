"""Counting the conv and linear weights of a model, without asking the library that is checked."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from decorr_fx import Report

CALLS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")
Names = dict[int, list[str]]  # of each parameter, by its id: several where it is tied


class WeightFinder(TorchFunctionMode):
    """Within it, the parameters are noted that forwards use as the weight of a conv or linear.

    A weight may be computed from parameters: from a single one, as a slice of several experts' weights is, which counts
    then; or from several, as a weight-normed one is, of which that of the weight's own size counts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[int] = set()
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
        self._sources: dict[int, frozenset[int]] = {key: frozenset([key]) for key in self._sizes}
        self._alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and follow the parameters through it."""
        kwargs = kwargs or {}
        if func in CALLS:
            self._note(kwargs["weight"] if "weight" in kwargs else args[1])
        elif func is F.multi_head_attention_forward:
            self._note_attention(args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, [*_tensors(args), *_tensors(kwargs)])
        return result

    def _follow(self, result: Tensor, arguments: list[Tensor]) -> None:
        known = [self._sources_of(tensor) for tensor in arguments if id(tensor) not in self._buffers]
        if id(result) in self._sizes or not known or any(sources is None for sources in known):
            return
        self._sources[id(result)] = frozenset().union(*(sources for sources in known if sources is not None))
        self._alive[id(result)] = result

    def _sources_of(self, tensor: Tensor) -> frozenset[int] | None:
        if id(tensor) in self._sizes or self._alive.get(id(tensor)) is tensor:
            return self._sources[id(tensor)]
        return None

    def _note(self, weight: Tensor) -> None:
        sources = self._sources_of(weight) or frozenset()
        self.found |= {key for key in sources if len(sources) == 1 or self._sizes[key] == weight.numel()}

    def _note_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [kwargs.get(name) for name in ATTENTION] + [args[i] for i in (5, 11) if len(args) > i]
        for weight in given:
            if isinstance(weight, Tensor):
                self._note(weight)


def parameter_names(model: nn.Module) -> Names:
    """Return all names of each parameter, by its id."""
    names: Names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def layer_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that are weights of a conv or linear by the class of their module."""
    tensors = [tensor for module in model.modules() for tensor in _weights_of(module)]
    return {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}


def split_weights(names: Iterable[list[str]], report: Report) -> tuple[list[str], list[str], list[str]]:
    """Return the first names of the weights that are sites, are listed as skipped, or are neither."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    sites, skipped = {site.fqn for site in report.sites}, {record.fqn for record in report.skipped}
    for own in names:
        part = 0 if _is_site(own, sites) else 1 if _is_skipped(own, skipped) else 2
        parts[part].append(own[0])
    return parts


def _is_site(names: list[str], sites: set[str]) -> bool:
    """Tell whether a site is named after one of a parameter's names: as the layer, the parameter, or a part of it."""
    if any(name in sites or layer_name(name) in sites for name in names):
        return True
    return any(site.startswith((f"{name}.", f"{name}[")) for site in sites for name in names)


def _is_skipped(names: list[str], skipped: set[str]) -> bool:
    """Tell whether a parameter, its layer or the attention around its output projection is listed as skipped."""
    own = {layer for name in names for layer in (name, layer_name(name), name.rpartition(".")[0])}
    attention = {name.removesuffix(".out_proj.weight") for name in names if name.endswith(".out_proj.weight")}
    return bool((own | attention) & skipped)


def layer_name(parameter: str) -> str:
    """Return the name of the layer that a parameter is the weight of."""
    return re.sub(r"(^|\.)(weight(_[vg])?|parametrizations\.weight\..*)$", "", parameter)


def _weights_of(module: nn.Module) -> Iterator[Any]:
    if isinstance(module, nn.MultiheadAttention):
        yield from (getattr(module, name) for name in ATTENTION[:4])
    elif isinstance(module, (nn.Linear, _ConvNd, *_transformers_layers())):
        yield module.weight


def _transformers_layers() -> tuple[type, ...]:
    module = sys.modules.get("transformers.pytorch_utils")  # not imported: no model of it is around
    return (module.Conv1D,) if module is not None else ()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
