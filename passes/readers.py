"""Readers: who else reads the parameter of a site. What is shared cannot be folded."""

from collections import defaultdict
from dataclasses import dataclass, field

from torch import fx, nn

from decorr_fx.passes.match import Unmatched, Use
from decorr_fx.passes.source import METADATA, parameters_in_forward
from decorr_fx.passes.trace import Traced


@dataclass(frozen=True)
class Readers:
    """Who reads a parameter, by its id.

    `nodes`: (piece, node) in the graphs. `owners`: (name of the parameter, the module) of modules that hold it and show
    no graph. `unseen`: a module whose forward cannot be traced and names that parameter.
    """

    nodes: dict[int, list[tuple[str, fx.Node]]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    unseen: dict[int, str] = field(default_factory=dict)


def find_readers(traced: Traced) -> Readers:
    """Look through all graphs, owners and failed forwards for who reads which parameter."""
    readers = Readers()
    for piece, graphs in traced.graphs.items():
        parameters = dict(traced.scratch.get_submodule(piece).named_parameters(remove_duplicate=False))
        for node in [*graphs.train.nodes, *graphs.evaluate.nodes]:
            if node.op == "get_attr" and node.target in parameters:
                readers.nodes[id(parameters[node.target])].append((piece, node))
    for owner_fqn, owner in traced.scratch.named_modules():
        if type(owner).forward is nn.Module.forward or owner_fqn in traced.graphs:
            continue  # a container, or a layer whose graph shows what it reads
        for name, parameter in owner.named_parameters(owner_fqn, recurse=False):
            readers.owners[id(parameter)].append((name, f"{owner_fqn!r} ({type(owner).__name__})"))
    for failed in traced.failed:
        module = traced.scratch.get_submodule(failed)
        readers.unseen.update({id(parameter): failed or "(root)" for parameter in parameters_in_forward(module)})
    return readers


def check_exclusive(uses: list[Use], readers: Readers) -> None:
    """Refuse a parameter that anything but the matched calls reads: folding R into it would change that reader."""
    key = id(uses[0].call.source.parameter)
    calls = {use.call.node for use in uses}
    known = calls.union(*(use.call.source.between for use in uses))
    for piece, node in readers.nodes[key]:
        for user in node.users:
            if user not in known and not _reads_metadata(user):
                raise Unmatched(f"its weight is also read by {user.name!r} in {piece or '(root)'!r}")
    for node in known - calls:
        for user in node.users:
            if user not in known and not _reads_metadata(user):
                raise Unmatched(f"what is computed from its weight is also used by {user.name!r}")
    inside_calls = {use.parameter_fqn for use in uses if use.call.source.inner}
    for name, owner in readers.owners[key]:
        if name not in inside_calls:
            raise Unmatched(f"its weight is shared with {owner}")
    if key in readers.unseen:
        raise Unmatched(f"its weight may be read by the forward of {readers.unseen[key]!r}, which cannot be traced")


def _reads_metadata(node: fx.Node) -> bool:
    """Tell whether the node reads what R does not change: the type, the device or the shape."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return name in METADATA
