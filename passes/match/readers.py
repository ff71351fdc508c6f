"""Readers: who else reads a weight. Whatever reads it has to read W R; where that cannot be, the weight is no site."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import fx, nn

from decorr_fx.passes.capture.code import METADATA, parameters_in_forward
from decorr_fx.passes.capture.trace import FUSED, Traced
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.passes.match.weights import FoundWeight


@dataclass(frozen=True)
class Readers:
    """Who reads a parameter, by its id.

    `owners`: (name of the parameter, the module) of modules that hold it and show neither graph nor glimpse.
    `forwards`: modules whose forward runs as it is and reads it. `unseen`: a module that does neither, and names it.
    `hidden`: a module that hands it to a function which makes its calls out of sight.
    """

    owners: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    forwards: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    unseen: dict[int, str] = field(default_factory=dict)
    hidden: dict[int, str] = field(default_factory=dict)


def find_readers(traced: Traced) -> Readers:
    """Look through all owners, glimpses and failed forwards for who reads which parameter."""
    readers = Readers()
    for owner_fqn, owner in traced.scratch.named_modules():
        if type(owner).forward is nn.Module.forward or owner_fqn in traced.graphs or owner_fqn in traced.glimpses:
            continue  # a container, or a layer whose graph shows what it reads, or whose forward can be given W R
        for name, parameter in owner.named_parameters(owner_fqn, recurse=False):
            readers.owners[id(parameter)].append((name, f"{owner_fqn!r} ({type(owner).__name__})"))
    for fqn, seen in traced.glimpses.items():
        module = traced.scratch.get_submodule(fqn)
        glimpsed = (p for graph in seen.graphs for p in parameters_in_graph(graph, module))
        inside = module.parameters() if isinstance(module, FUSED) else ()  # its forward may call its parent's
        for parameter in {id(p) for p in (*parameters_in_forward(module), *glimpsed, *inside)}:
            readers.forwards[parameter].append(fqn)
        readers.hidden.update({id(p): fqn for graph in seen.graphs for p in _handed_over(graph, module)})
    for fqn in traced.failed:
        module = traced.scratch.get_submodule(fqn)
        readers.unseen.update({id(parameter): fqn or "(root)" for parameter in parameters_in_forward(module)})
    return readers


def parameters_in_graph(graph: fx.Graph, module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters whose values a graph of `module` reads."""
    known = dict(module.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        read = node.op == "get_attr" and node.target in known
        if read and not all(_reads_metadata(user) for user in node.users):
            yield known[node.target]


def _handed_over(graph: fx.Graph, module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a graph gives to `F.multi_head_attention_forward`, inside which no mode can look."""
    known = dict(module.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.target is F.multi_head_attention_forward:
            yield from (known[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr" and n.target in known)


def find_other_readers(weights: list[FoundWeight], traced: Traced) -> dict[str, str]:
    """Return the modules whose graph reads a weight in a way that is no matched call, with what shows it."""
    calls: dict[int, set[fx.Node]] = defaultdict(set)
    computing: dict[int, set[fx.Node]] = defaultdict(set)  # from the parameter to the weight
    for weight in weights:
        for use in weight.uses:
            calls[id(weight.parameter)].add(use.call.node)
            computing[id(weight.parameter)] |= {use.call.source.node, *use.call.source.between}
    others = {}
    for piece, graphs in traced.graphs.items():
        known = dict(traced.scratch.get_submodule(piece).named_parameters(remove_duplicate=False))
        for node in (*graphs.train.nodes, *graphs.evaluate.nodes):
            key = id(known.get(str(node.target))) if node.op == "get_attr" else 0
            if key not in calls:
                continue
            for read in (node, *(n for n in computing[key] if n.graph is node.graph)):
                for user in read.users:
                    if user not in calls[key] | computing[key] and not _reads_metadata(user):
                        others[piece] = f"{user.name!r} reads {node.target!r}, too"
    return others


def check_readable(weight: FoundWeight, readers: Readers) -> None:
    """Refuse a weight that somebody reads who cannot be given W R: folding R into it would change that reader."""
    key = id(weight.parameter)
    inside_calls = {use.parameter_fqn for use in weight.uses if use.call.source.inner}
    for name, owner in readers.owners[key]:
        if name not in inside_calls:
            raise Unmatched(f"its weight is shared with {owner}")
    if key in readers.unseen:
        raise Unmatched(f"its weight may be read by the forward of {readers.unseen[key]!r}, which cannot be traced")
    if key in readers.hidden:
        raise Unmatched(f"its weight is handed to multi_head_attention_forward in {readers.hidden[key]!r}")
    if readers.forwards[key] and (weight.rows is not None or inside_calls):
        raise Unmatched(
            f"its weight is also read by the forward of {readers.forwards[key][0]!r}, which cannot be traced"
        )


def _reads_metadata(node: fx.Node) -> bool:
    """Tell whether the node reads what R does not change: the type, the device or the shape."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return name in METADATA
