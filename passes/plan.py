"""Planning: which weights become sites and with which settings, which share one R, and why the others do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.config import Rule
from decorr_fx.errors import LayerError, ModelError
from decorr_fx.ops.cost import choose_layouts
from decorr_fx.passes.capture.code import may_multiply
from decorr_fx.passes.capture.trace import Traced, has_own_forward, is_opaque, is_quantised, trace_model
from decorr_fx.passes.match.readers import check_readers, find_readers
from decorr_fx.passes.match.settings import Settings
from decorr_fx.passes.match.shared_inputs import Flow, group_by_input
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.passes.match.weights import FoundWeight, find_weights
from decorr_fx.runtime.site.spec import SiteSpec, SkippedRecord, WeightSpec


@dataclass(frozen=True)
class SitePlan:
    """A site to be made: its specification and its weights."""

    spec: SiteSpec
    weights: tuple[FoundWeight, ...]

    @property
    def element_size(self) -> int:
        """Bytes of one number of R: R is float32 at least."""
        return max(4, self.weights[0].parameter.element_size())


@dataclass(frozen=True)
class Plan:
    """All sites to be made, the graphs that they were found in, and the layers that are left as they are."""

    traced: Traced
    sites: tuple[SitePlan, ...]
    skipped: tuple[SkippedRecord, ...]

    def is_hooked(self, weight: FoundWeight, piece: str) -> bool:
        """Tell whether the input of `piece` is that of its call of the weight: torch's own layers, but padded ones."""
        calls = [use.call for use in weight.uses if use.piece == piece]
        return self.traced.is_layer(piece) and weight.rows is None and all(call.takes_input for call in calls)


def make_plan(model: nn.Module, settings: Settings) -> Plan:
    """Decide for every conv and linear of the model; the model is not changed.

    Raises:
        LayerError: a layer that would be a site has a weight that cannot be decorrelated.
        ModelError: the model has no conv or linear that could be a site.
        ConfigError: an override matches no layer.
    """
    traced = trace_model(model)
    weights, skipped = find_weights(traced)
    readers = find_readers(traced)
    chosen: list[tuple[FoundWeight, Rule]] = []
    for weight in weights:
        try:
            rule = settings.choose(model.get_submodule(weight.piece), weight.fqn)
            _check_dtype(weight.fqn, weight.parameter)
            check_readers(weight, readers)
            chosen.append((weight, rule))
        except Unmatched as reason:
            skipped.append(SkippedRecord(weight.fqn, weight.kind, str(reason)))
    skipped += [*_opaque_layers(traced), *_unseen_products(traced, weights)]
    settings.check_all_match([*(weight.fqn for weight, _ in chosen), *(record.fqn for record in skipped)])
    if not chosen:
        reasons = "".join(f"; {s.fqn or '(root)'}: {s.reason}" for s in skipped[:3])
        raise ModelError(f"{type(model).__name__} has no conv or linear layer to decorrelate{reasons}")
    return Plan(traced, tuple(_sites(chosen, traced)), tuple(skipped))


def _check_dtype(fqn: str, weight: Tensor) -> None:
    if not weight.dtype.is_floating_point:
        name = str(weight.dtype).removeprefix("torch.")
        raise LayerError(fqn, f"its weight is {name}; only real floating-point weights can be decorrelated: "
                              f"leave it alone with overrides={{{fqn!r}: None}}")  # fmt: skip


def _sites(chosen: list[tuple[FoundWeight, Rule]], traced: Traced) -> Iterator[SitePlan]:
    """Join the weights that share their input and their rule, and yield a site a group, in the order of the model."""
    flow = Flow.of(traced)
    by_rule: dict[Rule, list[FoundWeight]] = {}
    for weight, rule in chosen:
        by_rule.setdefault(rule, []).append(weight)
    together: list[tuple[Rule, list[FoundWeight]]] = []
    for rule, weights in by_rule.items():
        groups = group_by_input(weights, flow) if rule.share_inputs else [[weight] for weight in weights]
        together += [(rule, group) for group in groups]
    order = {id(weight): number for number, (weight, _) in enumerate(chosen)}
    for rule, group in sorted(together, key=lambda one: order[id(one[1][0])]):
        layouts = choose_layouts([weight.layout for weight in group], rule)
        specs = (WeightSpec(w.fqn, w.kind, layout) for w, layout in zip(group, layouts, strict=True))
        planned = (replace(w, layout=layout) for w, layout in zip(group, layouts, strict=True))
        yield SitePlan(SiteSpec(tuple(specs), rule), tuple(planned))


def _opaque_layers(traced: Traced) -> Iterator[SkippedRecord]:
    for fqn, outer in traced.opaque.items():
        module, around = traced.scratch.get_submodule(fqn), traced.scratch.get_submodule(outer)
        if is_quantised(module):
            yield SkippedRecord(fqn, type(module).__name__, "its weight is quantised, and cannot be trained")
        elif is_opaque(module) or isinstance(module, nn.Linear | _ConvNd):
            where = "" if fqn == outer else f", inside {outer!r}"
            reason = f"{type(around).__name__} hands raw weights to a kernel of its own{where}"
            yield SkippedRecord(fqn, type(module).__name__, reason)


def _unseen_products(traced: Traced, weights: list[FoundWeight]) -> Iterator[SkippedRecord]:
    """Yield the modules that multiply in a forward of which too little could be seen to tell by what."""
    known = {id(weight.parameter) for weight in weights}
    unseen = {fqn: graphs.reason for fqn, graphs in traced.graphs.items() if graphs.reason} | traced.failed
    for fqn, reason in unseen.items():
        module = traced.scratch.get_submodule(fqn)
        if fqn in traced.graphs and not has_own_forward(module):
            continue
        containers = [child for child in module.children() if type(child).forward is nn.Module.forward]
        owned = {id(p) for owner in (module, *containers) for p in owner.parameters(recurse=False) if p.dim() > 1}
        read = dict(module.named_parameters(remove_duplicate=False))
        nodes = (node for graph in traced.of(fqn) for node in graph.nodes if node.op == "get_attr")
        seen = {id(read[str(node.target)]) for node in nodes if node.target in read}
        multiplies = fqn in traced.failed or isinstance(module, nn.MultiheadAttention) or may_multiply(module)
        if owned - known - seen and multiplies:
            yield SkippedRecord(fqn, type(module).__name__, f"its forward cannot be traced: {reason}")
