"""Insertion: put a `record` and a `decorrelate` node before every call of a site, and call it on the folded weight."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call

from decorr_fx.passes.base import Graphs, Pass, as_graph_layer, copy_sharing_tensors
from decorr_fx.passes.check import check_model
from decorr_fx.passes.match import Use, each
from decorr_fx.passes.plan import Plan, SitePlan
from decorr_fx.runtime.attachment import attach
from decorr_fx.runtime.state import Site, Slot, sites_of


@dataclass(frozen=True)
class InsertDecorrelation(Pass[nn.Module]):
    """Return a copy of the model that decorrelates at the sites of the plan.

    The copy has modules of its own and shares all parameters and buffers; R is the identity, so that its outputs are
    those of the model. Only the layers that call a site run a graph, all others keep their forward.
    """

    plan: Plan

    def requires(self, model: nn.Module) -> None:
        """The model is not transformed yet."""
        check_model(model)

    def call(self, model: nn.Module) -> nn.Module:
        """Insert every site."""
        result = copy_sharing_tensors(model)
        changed: dict[str, Graphs] = {}
        for site_plan in self.plan.sites:
            site = _make_site(result, site_plan)
            for use in _one_per_source(site_plan.uses):
                _rewrite_source(use)
            for use in site_plan.uses:
                result.get_submodule(use.piece).add_module(_site_name(use), site)
                changed[use.piece] = self.plan.traced.graphs[use.piece]
                _rewrite_call(use, site)
        for piece, graphs in changed.items():
            as_graph_layer(result.get_submodule(piece), graphs)
        attach(result, self.plan.skipped)
        return result

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


def _site_name(use: Use) -> str:
    return f"{use.call.source.path.replace('.', '__')}_decorr"


def _make_site(model: nn.Module, plan: SitePlan) -> Site:
    use = plan.uses[0]
    bias = _slot(model, use, use.call.bias_path) if plan.spec.centered and use.call.bias_path else None
    weights = dict.fromkeys(_slot(model, use, use.call.source.path) for use in plan.uses)
    return Site(plan.spec, use.call.source.path, tuple(weights), bias)


def _slot(model: nn.Module, use: Use, path: str) -> Slot:
    owner, _, name = path.rpartition(".")
    return Slot(model.get_submodule(use.piece).get_submodule(owner), name)


def _one_per_source(uses: tuple[Use, ...]) -> list[Use]:
    return list({use.call.source.node: use for use in uses}.values())


def _rewrite_source(use: Use) -> None:
    """Put the decorrelated parameter where the graph reads the plain one."""
    source, graph = use.call.source, use.call.node.graph
    if source.inner:
        _rewrite_child_call(use)
        return
    with graph.inserting_after(source.node):
        site = graph.get_attr(_site_name(use))
    with graph.inserting_after(site):
        decorrelated = graph.call_method("decorrelate", (site, source.node))
    source.node.replace_all_uses_with(decorrelated, delete_user_cb=lambda user: user is not decorrelated)


def _rewrite_child_call(use: Use) -> None:
    """Call the child module that computes the weight with the decorrelated parameter in place of its own."""
    source, graph = use.call.source, use.call.node.graph
    child = source.node
    with graph.inserting_before(child):
        site = graph.get_attr(_site_name(use))
        decorrelated = graph.call_method("decorrelate", (site, graph.get_attr(source.path)))
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


def _rewrite_call(use: Use, site: Site) -> None:
    """Record the call's input in the train graph, and shift its bias where the site is centred."""
    node, graph, arguments = use.call.node, use.call.node.graph, use.call.arguments
    with graph.inserting_before(node):
        if use.training:
            state = graph.get_attr(_site_name(use))
            graph.call_method("record", (state, arguments["input"], *_output_padding(use)))
        if site.spec.centered:
            state = graph.get_attr(_site_name(use))
            weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            shifted = graph.call_method("shift_bias", (state, arguments["bias"], weight))
            node.replace_input_with(arguments["bias"], shifted)


def _output_padding(use: Use) -> tuple[Any, ...]:
    if use.call.geometry is None or not use.call.geometry.transposed:
        return ()
    given = use.call.arguments["output_padding"]
    return (given if isinstance(given, fx.Node) else each(given, len(use.call.geometry.kernel)),)
