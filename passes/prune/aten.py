"""Calls in a graph of `torch.export`: operations of ATen with named arguments, and the shapes of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True)
class Call:
    """A call of an operation.

    Attributes:
        node: where it is in the graph.
        operation: its name, the same for that which works in place.
        given: its arguments by the names of the operation's schema, those left out at their defaults.
    """

    node: fx.Node
    operation: str
    given: Mapping[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> "Call":
        """Take a node of a graph."""
        target: Any = node.target
        name = str(getattr(target, "overloadpacket", target).__name__).removesuffix("_")
        schema = target._schema.arguments if hasattr(target, "_schema") else ()
        given = {argument.name: argument.default_value for argument in schema}
        given.update(zip(given, node.args, strict=False))
        return cls(node, name, {**given, **node.kwargs})

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    @property
    def inputs(self) -> list[fx.Node]:
        """The tensors that it takes, each once."""
        return list(self.node.all_input_nodes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it gives."""
        return shape_of(self.node)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a tensor of the graph; () of what is none."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def place_after(before: Sequence[int], dim: int, after: Sequence[int]) -> tuple[int, int] | None:
    """Return where dimension `dim` is after a change of shape, and how many entries each place of it has there.

    None where the places are parted, or have others between them.
    """
    ahead, units, behind = prod(before[:dim]), before[dim], prod(before[dim + 1 :])
    for place, size in enumerate(after):
        inner, rest = divmod(size, units)
        if prod(after[:place]) == ahead and not rest and inner and not behind % inner and (size > 1 or units == 1):
            return place, inner
    return None


def order_after(call: Call) -> list[int]:
    """Return the dimensions that a transposition or permutation has in the place of 0, 1, ..."""
    rank = len(call.shape)
    if call.operation == "permute":
        return [dim % rank for dim in call["dims"]]
    order, first, second = list(range(rank)), call["dim0"], call["dim1"]
    order[first], order[second] = order[second], order[first]
    return order
