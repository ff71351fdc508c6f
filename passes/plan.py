"""Planning: which weights become sites and with which settings, which share one R, and why the others do not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.config import DecorrConfig
from decorr_fx.errors import LayerError, ModelError
from decorr_fx.ops.cost import Work, choose_layouts, own_flops, share_of_budget
from decorr_fx.passes.capture.code import may_multiply
from decorr_fx.passes.capture.trace import FUSED, Traced, is_opaque, is_quantised, trace_model
from decorr_fx.passes.match.readers import (
    Readers,
    check_readable,
    find_other_readers,
    find_readers,
    parameters_in_graph,
)
from decorr_fx.passes.match.settings import Settings
from decorr_fx.passes.match.shared_inputs import Flow, group_by_input
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.passes.match.weights import FoundWeight, find_weights
from decorr_fx.runtime.site.spec import SiteSpec, SkippedRecord, WeightSpec


@dataclass(frozen=True)
class WeightPlan:
    """A weight that R is to be applied to, and the modules whose forward runs as it is and reads it.

    The layout in `spec` is that of the plain weight until the site's structure is chosen.
    """

    weight: FoundWeight
    spec: WeightSpec
    config: DecorrConfig
    watched_in: tuple[str, ...]


@dataclass(frozen=True)
class SitePlan:
    """A site to be made: its specification and its weights."""

    spec: SiteSpec
    weights: tuple[WeightPlan, ...]

    @property
    def element_size(self) -> int:
        """Bytes of one number of R: R is float32 at least."""
        return max(4, self.weights[0].weight.parameter.element_size())


@dataclass(frozen=True)
class Plan:
    """All sites to be made, the graphs that they are made in, and the layers that are left as they are."""

    traced: Traced
    sites: tuple[SitePlan, ...]
    skipped: tuple[SkippedRecord, ...]


def make_plan(model: nn.Module, settings: Settings, works: Mapping[str, Work] = MappingProxyType({})) -> Plan:
    """Decide for every conv and linear of the model; the model is not changed.

    `works` holds what is known of the work of a site, by its fqn.

    Raises:
        LayerError: a layer that would be a site has a weight that cannot be decorrelated.
        ModelError: the model has no conv or linear that could be a site.
        ConfigError: an override matches no layer.
    """
    traced = trace_model(model)
    weights, skipped = _find_weights(traced)
    readers = find_readers(traced)
    chosen = []
    for weight in weights:
        try:
            config = settings.choose(model.get_submodule(weight.place.piece), weight.fqn)
            chosen.append(_plan_weight(weight, config, traced, readers))
        except Unmatched as reason:
            skipped.append(SkippedRecord(weight.fqn, weight.kind, str(reason)))
    skipped += [*_opaque_layers(traced), *_unseen_products(traced, weights)]
    settings.check_all_match([*(plan.weight.fqn for plan in chosen), *(record.fqn for record in skipped)])
    if not chosen:
        reasons = "".join(f"; {s.fqn or '(root)'}: {s.reason}" for s in skipped[:3])
        raise ModelError(f"{type(model).__name__} has no conv or linear layer to decorrelate{reasons}")
    return Plan(traced, tuple(_sites(chosen, traced, works)), tuple(skipped))


def _find_weights(traced: Traced) -> tuple[list[FoundWeight], list[SkippedRecord]]:
    """Find all weights; a module that reads one of them in another way, too, is to run as it is."""
    weights, skipped = find_weights(traced)
    others = find_other_readers(weights, traced)
    if not others:
        return weights, skipped
    for piece, reason in others.items():
        traced.run_as_it_is(piece, reason)
    return find_weights(traced)


def _plan_weight(weight: FoundWeight, config: DecorrConfig, traced: Traced, readers: Readers) -> WeightPlan:
    fqn, watched_in = weight.fqn, tuple(readers.forwards[id(weight.parameter)])
    _check_dtype(fqn, weight.parameter)
    check_readable(weight, readers)
    for use in weight.uses:
        if (use.call.layout, use.call.geometry) != (weight.layout, weight.geometry):
            raise Unmatched(
                f"its weight is also used by {use.piece!r}, which reads it in another way ({use.call.kind})"
            )
    centered = config.center and not watched_in and _has_own_bias(weight, traced, readers)
    return WeightPlan(weight, WeightSpec(fqn, weight.kind, weight.layout, centered), config, watched_in)


def _check_dtype(fqn: str, weight: Tensor) -> None:
    if not weight.dtype.is_floating_point:
        name = str(weight.dtype).removeprefix("torch.")
        raise LayerError(fqn, f"its weight is {name}; only real floating-point weights can be decorrelated: "
                              f"leave it alone with overrides={{{fqn!r}: None}}")  # fmt: skip


def _has_own_bias(weight: FoundWeight, traced: Traced, readers: Readers) -> bool:
    """Tell whether the calls of a weight have one bias that nothing else reads: a mean can be folded into it."""
    paths = {(use.piece, use.call.bias_path) for use in weight.uses}
    piece, path = paths.pop() if paths else ("", None)
    if paths or path is None:
        return False
    bias = dict(traced.scratch.get_submodule(piece).named_parameters(remove_duplicate=False)).get(path)
    if bias is None or readers.owners[id(bias)] or readers.forwards[id(bias)] or id(bias) in readers.unseen:
        return False
    return _users_of(bias, traced) <= {use.call.node for use in weight.uses}


def _users_of(parameter: Tensor, traced: Traced) -> set[object]:
    """Return all nodes of all graphs that use the parameter."""
    users: set[object] = set()
    for piece, graphs in traced.graphs.items():
        known = dict(traced.scratch.get_submodule(piece).named_parameters(remove_duplicate=False))
        for node in (*graphs.train.nodes, *graphs.evaluate.nodes):
            if node.op == "get_attr" and known.get(str(node.target)) is parameter:
                users.update(node.users)
    return users


def _sites(plans: list[WeightPlan], traced: Traced, works: Mapping[str, Work]) -> Iterator[SitePlan]:
    """Join the weights that share their input, and yield a site a group."""
    flow = Flow.of(traced)
    by_config: dict[DecorrConfig, list[WeightPlan]] = {}
    for plan in plans:
        by_config.setdefault(plan.config, []).append(plan)
    together: list[list[WeightPlan]] = []
    for config, group in by_config.items():
        weights = [plan.weight for plan in group]
        shared = group_by_input(weights, flow) if config.share_inputs else [[weight] for weight in weights]
        of = {id(plan.weight): plan for plan in group}
        together += [[of[id(weight)] for weight in weights] for weights in shared]
    order = {id(plan): number for number, plan in enumerate(plans)}
    return _with_structure(sorted(together, key=lambda group: order[id(group[0])]), works)


def _with_structure(groups: list[list[WeightPlan]], works: Mapping[str, Work]) -> Iterator[SitePlan]:
    """Yield the site of each group of weights, with the structure of its R chosen."""
    plain = [[plan.weight.layout for plan in group] for group in groups]
    work = [works.get(g[0].spec.fqn) or Work.unknown(p[0]) for g, p in zip(groups, plain, strict=True)]
    own = [own_flops(p, w) for p, w in zip(plain, work, strict=True)]
    for i, group in enumerate(groups):
        config, geometry = group[0].config, group[0].weight.geometry
        layouts = choose_layouts(plain[i], config, work[i], share_of_budget(own, i, config.cost_budget))
        plans = [replace(p, spec=replace(p.spec, layout=layout)) for p, layout in zip(group, layouts, strict=True)]
        yield SitePlan(SiteSpec(tuple(p.spec for p in plans), geometry, config, work[i]), tuple(plans))


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
    unseen = {fqn: glimpse.reason for fqn, glimpse in traced.glimpses.items()} | traced.failed
    for fqn, reason in unseen.items():
        module = traced.scratch.get_submodule(fqn)
        containers = [child for child in module.children() if type(child).forward is nn.Module.forward]
        owned = {id(p) for owner in (module, *containers) for p in owner.parameters(recurse=False) if p.dim() > 1}
        seen = {id(p) for graph in traced.train_graphs(fqn) for p in parameters_in_graph(graph, module)}
        hides = fqn in traced.failed or isinstance(module, FUSED) or may_multiply(module)
        if owned - known - seen and hides:
            yield SkippedRecord(fqn, type(module).__name__, f"its forward cannot be traced: {reason}")
