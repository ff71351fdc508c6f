"""Matching: find every call of a conv or linear in a graph. Matchers return data and change nothing.

What is matched is the functional call: `F.linear`, `F.conv*`, or a product with a matrix that only parameters make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from decorr_fx.ops.calls import CALLS, METHODS, OTHER_PRODUCTS, Signature
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.sample import ConvGeometry
from decorr_fx.passes.match.source import Source, Unmatched, ancestors_of, find_source


@dataclass(frozen=True)
class Call:
    """One call of a conv or linear in a graph, with its arguments by name and its weight's source.

    `geometry` is None for a linear, and where it is computed in the forward.
    """

    node: fx.Node
    kind: str
    arguments: Mapping[str, Any]
    source: Source
    geometry: ConvGeometry | None

    @property
    def layout(self) -> Layout:
        """How the parameter is read as rows."""
        return self.source.layout

    @property
    def takes_input(self) -> bool:
        """Whether the call is made on the very input of the module."""
        x = self.arguments["input"]
        return isinstance(x, fx.Node) and x.op == "placeholder"


@dataclass(frozen=True)
class Use:
    """One call of a site's weight: in graph number `graph` of the module `piece`."""

    piece: str
    graph: int
    call: Call


def signature_of(node: fx.Node, module: nn.Module) -> Signature | None:
    """Return the signature of the conv or linear that a node of a graph of `module` calls, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    signature = CALLS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))
    if signature is not None and signature.product:
        weight = signature.bind(node.args, node.kwargs)["weight"]
        return signature if isinstance(weight, fx.Node) and _is_weight(weight, module) else None
    return signature


def name_of_call(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_other_product(node: fx.Node, module: nn.Module) -> bool:
    """Tell whether the node multiplies by a parameter in a way that is not matched: by `einsum`, or from the left."""
    known = CALLS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))
    product = known.product if known is not None else name_of_call(node) in OTHER_PRODUCTS
    if not product or signature_of(node, module) is not None:
        return False
    return any(_is_weight(argument, module) for argument in node.all_input_nodes)


def is_unwatched(node: fx.Node) -> bool:
    """Tell whether no `Watch` sees rows in the product that a node makes, since they are not written in the call."""
    return name_of_call(node) in OTHER_PRODUCTS


def parameters_of(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """Return what reads the parameters, or calls the modules, from which alone the node's value is computed, if so.

    One of them is a matrix at least.
    """
    reads = [n for n in ancestors_of(node) if n.op not in ("call_function", "call_method")]
    if any(n.op == "placeholder" for n in reads):
        return []
    found = [t for n in reads for t in _tensors_of(module, str(n.target))]
    return reads if any(isinstance(t, nn.Parameter) and t.dim() > 1 for t in found) else []


def _is_weight(node: fx.Node, module: nn.Module) -> bool:
    return bool(parameters_of(node, module))


def _tensors_of(module: nn.Module, path: str) -> list[Any]:
    found = _attribute(module, path)
    return list(found.parameters()) if isinstance(found, nn.Module) else [found]


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def match_call(node: fx.Node, module: nn.Module) -> Call:
    """Read one call in a graph of `module`.

    Raises:
        Unmatched: the call cannot be decorrelated; the message is the reason.
    """
    signature = signature_of(node, module)
    if signature is None:
        raise Unmatched("it is no conv or linear")
    arguments = signature.bind(node.args, node.kwargs)
    if isinstance(arguments["groups"], fx.Node):
        raise Unmatched("its number of groups is computed in the forward")
    source = find_source(arguments["weight"], module, lambda shape: signature.layout(arguments["groups"], shape))
    if len(source.shape) != signature.spatial + 2:
        dimensions = f"{len(source.shape)} dimensions, a {signature.kind} needs {signature.spatial + 2}"
        raise Unmatched(f"its weight has {dimensions}")
    settings = [arguments[name] for name in ("stride", "padding", "dilation")]
    fixed = not any(isinstance(leaf, fx.Node) for setting in settings for leaf in tree_leaves(setting))
    geometry = signature.geometry(arguments, source.shape) if fixed else None
    return Call(node, signature.kind, arguments, source, geometry)
