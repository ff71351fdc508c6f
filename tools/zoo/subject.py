"""A model on its way through the stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tools.zoo.examples import Example
from tools.zoo.record import Record

TOLD = 3  # names in a reason


@dataclass
class Subject:
    """A model on its way through the stages.

    The transformed model shares parameters and buffers with the one it was made from; `plain` is an independent copy,
    which keeps the weights of the start.
    """

    example: Example
    record: Record
    plain: nn.Module
    transformed: nn.Module
    weights: list[list[str]] = field(default_factory=list)
    folded: nn.Module | None = None


def some(names: Sequence[str]) -> str:
    """Return the first few names, for a reason."""
    return ", ".join(names[:TOLD]) + (", ..." if len(names) > TOLD else "")
