"""Planning: which weights become sites and with which settings, and why the other layers do not.

A site is one *parameter*, with all calls that use it: a layer called twice, or two layers with tied weights, share one
R. A parameter that something else reads too cannot be folded, and is refused with the reason.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.config import DecorrConfig
from decorr_fx.errors import LayerError, ModelError
from decorr_fx.ops.structure import choose_layout
from decorr_fx.passes.choose import Settings
from decorr_fx.passes.match import CALLS, Unmatched, Use, is_call, match_call
from decorr_fx.passes.readers import Readers, check_exclusive, find_readers
from decorr_fx.passes.trace import OPAQUE, Traced, trace_model
from decorr_fx.runtime.report import SkippedRecord
from decorr_fx.runtime.spec import SiteSpec


@dataclass(frozen=True)
class SitePlan:
    """A site to be made: its specification and every use of its weight."""

    spec: SiteSpec
    uses: tuple[Use, ...]

    @property
    def element_size(self) -> int:
        """Bytes of one number of R: R is float32 at least."""
        return max(4, self.uses[0].call.source.parameter.element_size())


@dataclass(frozen=True)
class Plan:
    """All sites to be made, the graphs that they are made in, and the layers that are left as they are."""

    traced: Traced
    sites: tuple[SitePlan, ...]
    skipped: tuple[SkippedRecord, ...]


def make_plan(model: nn.Module, settings: Settings) -> Plan:
    """Decide for every conv and linear of the model; the model is not changed.

    Raises:
        LayerError: a layer that would be a site has a weight that cannot be decorrelated.
        ModelError: the model has no conv or linear that could be a site.
        ConfigError: an override matches no layer.
    """
    traced = trace_model(model)
    skipped = [*_opaque_layers(traced), *_failed_layers(traced)]
    by_parameter = _uses_by_parameter(traced, skipped)
    readers = find_readers(traced)
    sites = []
    for uses in by_parameter:
        fqn = _layer_name(uses[0].parameter_fqn)
        try:
            config = settings.choose(model.get_submodule(uses[0].piece), fqn)
            _check_dtype(fqn, uses[0].call.source.parameter)
            check_exclusive(uses, readers)
            centered = config.center and _has_own_bias(traced, uses, readers)
            sites.append(SitePlan(_specify(fqn, uses, config, centered), tuple(uses)))
        except Unmatched as reason:
            skipped.append(SkippedRecord(fqn, uses[0].call.kind, str(reason)))
    skipped = list(dict.fromkeys(skipped))  # the train and the eval graph give the same reasons
    settings.check_all_match([*(site.spec.fqn for site in sites), *(record.fqn for record in skipped)])
    if not sites:
        reasons = "".join(f"; {s.fqn or '(root)'}: {s.reason}" for s in skipped[:3])
        raise ModelError(f"{type(model).__name__} has no conv or linear layer to decorrelate{reasons}")
    return Plan(traced, tuple(sites), tuple(skipped))


def _uses_by_parameter(traced: Traced, skipped: list[SkippedRecord]) -> list[list[Use]]:
    """Return the calls of all graphs, by parameter; append those that cannot be sites to `skipped`."""
    uses: dict[int, list[Use]] = {}
    for piece, training, node in _calls(traced):
        try:
            call = match_call(node, traced.scratch.get_submodule(piece))
            uses.setdefault(id(call.source.parameter), []).append(Use(piece, training, call))
        except Unmatched as reason:
            skipped.append(SkippedRecord(piece, CALLS[node.target][0], str(reason)))  # type: ignore[index]
    return list(uses.values())


def _calls(traced: Traced) -> Iterator[tuple[str, bool, fx.Node]]:
    for piece, graphs in traced.graphs.items():
        for training, graph in ((True, graphs.train), (False, graphs.evaluate)):
            yield from ((piece, training, node) for node in graph.nodes if is_call(node))


def _layer_name(parameter_fqn: str) -> str:
    """Return the name of the layer that a person would give: `fc` for `fc.weight` or its parametrization."""
    return re.sub(r"(^|\.)(weight|parametrizations\.weight\..*)$", "", parameter_fqn)


def _specify(fqn: str, uses: list[Use], config: DecorrConfig, centered: bool) -> SiteSpec:
    first = uses[0].call
    for use in uses:
        if (use.call.layout, use.call.geometry) != (first.layout, first.geometry):
            raise Unmatched(
                f"its weight is also used by {use.piece!r}, which reads it in another way ({use.call.kind})"
            )
    layout = choose_layout(first.layout, config.structure, config.max_dim)
    return SiteSpec(fqn, first.kind, layout, first.geometry, config, centered)


def _check_dtype(fqn: str, weight: Tensor) -> None:
    if not weight.dtype.is_floating_point:
        name = str(weight.dtype).removeprefix("torch.")
        raise LayerError(fqn, f"its weight is {name}; only real floating-point weights can be decorrelated: "
                              f"leave it alone with overrides={{{fqn!r}: None}}")  # fmt: skip


def _has_own_bias(traced: Traced, uses: list[Use], readers: Readers) -> bool:
    """Tell whether the calls of a site have one bias that nothing else reads: a mean can be folded into it."""
    paths = {(use.piece, use.call.bias_path) for use in uses}
    piece, path = paths.pop()
    if paths or path is None:
        return False
    bias = dict(traced.scratch.get_submodule(piece).named_parameters(remove_duplicate=False)).get(path)
    calls = {use.call.node for use in uses}
    if bias is None or readers.owners[id(bias)] or id(bias) in readers.unseen:
        return False
    return all(user in calls for _, node in readers.nodes[id(bias)] for user in node.users)


def _opaque_layers(traced: Traced) -> Iterator[SkippedRecord]:
    for fqn, outer in traced.opaque.items():
        module = traced.scratch.get_submodule(fqn)
        if isinstance(module, (*OPAQUE, nn.Linear, _ConvNd)):
            kind = type(traced.scratch.get_submodule(outer)).__name__
            where = "" if fqn == outer else f", inside {outer!r}"
            yield SkippedRecord(fqn, type(module).__name__, f"{kind} hands raw weights to a kernel of its own{where}")


def _failed_layers(traced: Traced) -> Iterator[SkippedRecord]:
    for fqn, problem in traced.failed.items():
        module = traced.scratch.get_submodule(fqn)
        containers = [child for child in module.children() if type(child).forward is nn.Module.forward]
        owned = [p for owner in (module, *containers) for p in owner.parameters(recurse=False)]
        if any(parameter.dim() > 1 for parameter in owned):
            yield SkippedRecord(fqn, type(module).__name__, f"its forward cannot be traced: {problem}")
