"""Insertion: put a `record` and a `decorrelate` node before every call of a site, and call it on the folded weight."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call

from decorr_fx.passes.base import Pass
from decorr_fx.passes.capture.check import check_model
from decorr_fx.passes.copies import copy_sharing_tensors
from decorr_fx.passes.match.calls import Use
from decorr_fx.passes.plan import Plan, SitePlan, WeightPlan
from decorr_fx.passes.rewrite.layer import Watched, as_decorrelated_layer
from decorr_fx.runtime.site.attachment import attach
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.site.weight import SiteWeight, Slot
from decorr_fx.runtime.watch import Read


@dataclass(frozen=True)
class InsertDecorrelation(Pass[nn.Module]):
    """Return a copy of the model that decorrelates at the sites of the plan.

    The copy has modules of its own and shares all parameters and buffers; R is the identity, so that its outputs are
    those of the model. Only what calls a site becomes a decorrelated layer, all other modules keep their forward.
    """

    plan: Plan

    def requires(self, model: nn.Module) -> None:
        """The model is not transformed yet."""
        check_model(model)

    def call(self, model: nn.Module) -> nn.Module:
        """Insert every site."""
        result = copy_sharing_tensors(model)
        reads: dict[str, list[Read]] = {}
        called: dict[str, None] = {}
        for site_plan in self.plan.sites:
            site = _make_site(result, site_plan)
            for index, planned in enumerate(site_plan.weights):
                _put_at_places(result, site, planned)
                for use in planned.weight.uses:
                    _rewrite_call(use, index, planned.spec.centered)
                    called[use.piece] = None
                for use in _one_per_source(planned.weight.uses):
                    _rewrite_source(use, index)
                for use in planned.weight.uses if planned.spec.centered else ():
                    _shift_bias(use, index)
                for piece in planned.watched_in:
                    reads.setdefault(piece, []).extend(_reads(result, site, index, planned, piece))
        for piece in (*called, *self._adapted_around(called)):
            as_decorrelated_layer(result.get_submodule(piece), self.plan.traced.graphs[piece])
        for piece, of_piece in reads.items():
            as_decorrelated_layer(result.get_submodule(piece), Watched(tuple(of_piece)))
        attach(result, self.plan.skipped)
        return result

    def _adapted_around(self, called: Iterable[str]) -> list[str]:
        """Return the modules that run an adapter's graph to reach sites inside, and call none themselves."""
        adapted = [fqn for fqn in self.plan.traced.adapted if fqn in self.plan.traced.graphs and fqn not in {*called}]
        return [fqn for fqn in adapted if any(piece.startswith(f"{fqn}." if fqn else "") for piece in called)]

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """All keys of the model are still there, every planned site exists, and the graphs are sound."""
        missing = model.state_dict().keys() - result.state_dict().keys()
        if missing:
            raise self.broken(min(missing), "the key of the plain model is gone")
        if len(list(sites_of(result))) != len(self.plan.sites):
            raise self.broken("the model", "a planned site is missing")
        for graphs in self.plan.traced.graphs.values():
            graphs.train.lint()
            graphs.evaluate.lint()


def _site_name(path: str, rows: tuple[int, int] | None) -> str:
    """Return the name of the site beside a parameter."""
    part = "" if rows is None else f"_{rows[0]}"
    return f"{path.replace('.', '__')}_decorr{part}"


def _make_site(model: nn.Module, plan: SitePlan) -> Site:
    weights = tuple(_make_weight(model, planned) for planned in plan.weights)
    return Site(plan.spec, plan.weights[0].weight.places[0].path, weights)


def _make_weight(model: nn.Module, planned: WeightPlan) -> SiteWeight:
    weight = planned.weight
    slots = dict.fromkeys(_slot(model, place.piece, place.path, weight.rows) for place in weight.places)
    bias = None
    if planned.spec.centered:
        (piece, path) = next((use.piece, use.call.bias_path) for use in weight.uses)
        bias = _slot(model, piece, str(path))
    return SiteWeight(planned.spec, tuple(slots), bias)


def _slot(model: nn.Module, piece: str, path: str, rows: tuple[int, int] | None = None) -> Slot:
    owner, _, name = path.rpartition(".")
    return Slot(model.get_submodule(piece).get_submodule(owner), name, rows)


def _put_at_places(model: nn.Module, site: Site, planned: WeightPlan) -> None:
    """Let every module that calls the weight find its site: the first one of all has it as a child."""
    for place in planned.weight.places:
        _put(model.get_submodule(place.piece), _site_name(place.path, planned.weight.rows), site)


def _put(module: nn.Module, name: str, site: Site) -> None:
    if hasattr(module, name):
        return
    if site.placed:
        vars(module)[name] = site  # no child: the keys of a site are in a checkpoint once
    else:
        module.add_module(name, site.train(module.training))
        site.placed = True


def _reads(model: nn.Module, site: Site, index: int, planned: WeightPlan, piece: str) -> Iterator[Read]:
    """Yield how the forward of `piece` finds the weight and its site, under every name that it has there."""
    module, parameter = model.get_submodule(piece), planned.weight.parameter
    for path, found in module.named_parameters(remove_duplicate=False):
        if found is parameter:
            name = _site_name(path, None)
            _put(module, name, site)
            yield Read(path, name, index)


def _one_per_source(uses: tuple[Use, ...]) -> list[Use]:
    return list({use.call.source.node: use for use in uses}.values())


def _get_site(use: Use) -> fx.Node:
    source = use.call.source
    return use.call.node.graph.get_attr(_site_name(source.path, source.rows))


def _rewrite_source(use: Use, index: int) -> None:
    """Put the decorrelated parameter where the graph reads the plain one."""
    source, graph = use.call.source, use.call.node.graph
    if source.inner:
        _rewrite_child_call(use, index)
        return
    readers = [user for user in source.node.users if user.target != "decorrelate_call"]
    if not readers:
        return
    with graph.inserting_after(source.node):
        site = _get_site(use)
    with graph.inserting_after(site):
        decorrelated = graph.call_method("decorrelate", (site, source.node, index))
    source.node.replace_all_uses_with(decorrelated, delete_user_cb=lambda user: user in readers)


def _rewrite_child_call(use: Use, index: int) -> None:
    """Call the child module that computes the weight with the decorrelated parameter in place of its own."""
    source, graph = use.call.source, use.call.node.graph
    child = source.node
    with graph.inserting_before(child):
        site = _get_site(use)
        decorrelated = graph.call_method("decorrelate", (site, graph.get_attr(source.path), index))
        module = graph.get_attr(str(child.target))
        arguments = (module, source.inner, decorrelated, child.args, child.kwargs)
        call = graph.call_function(call_with_parameter, arguments)
    child.replace_all_uses_with(call)
    graph.erase_node(child)


def call_with_parameter(
    module: nn.Module, name: str, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call the module with `value` as its parameter `name`."""
    return functional_call(module, {name: value}, args, kwargs)


def _rewrite_call(use: Use, index: int, centered: bool) -> None:
    """Record the call's input in the train graph, once for all weights of a site, and let R act on input or weight."""
    node, graph, arguments = use.call.node, use.call.node.graph, use.call.arguments
    x, W = arguments["input"], arguments["weight"]
    with graph.inserting_before(node):
        if use.training and index == 0:
            graph.call_method("record", (_get_site(use), x, *_output_padding(use)))
        if use.call.direct and not centered:
            operands = graph.call_method("decorrelate_call", (_get_site(use), x, W, index))
            node.replace_input_with(x, graph.call_function(getitem, (operands, 0)))
            node.replace_input_with(W, graph.call_function(getitem, (operands, 1)))


def _shift_bias(use: Use, index: int) -> None:
    """Fold the running mean into the bias of a call, which is made on the folded weight by now."""
    node, graph, bias = use.call.node, use.call.node.graph, use.call.arguments["bias"]
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    with graph.inserting_before(node):
        shifted = graph.call_method("shift_bias", (_get_site(use), bias, weight, index))
        node.replace_input_with(bias, shifted)


def _output_padding(use: Use) -> tuple[Any, ...]:
    if use.call.geometry is None or not use.call.geometry.transposed:
        return ()
    return (use.call.arguments["output_padding"],)
