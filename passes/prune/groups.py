"""Units that go together: which axes of which tensors are cut alike when a unit of a layer is removed.

    conv1 -> norm1 -> relu -> conv2

The output channels of conv1 are the *units* of a group. conv1 *makes* them (dimension 0 of its weight and bias), norm1
*carries* them (its weight, bias and running statistics), conv2 *reads* them (dimension 1 of its weight), and can take
over what a removed one told. Where the outputs of two layers are added or multiplied, their units are one group;
where they are concatenated, the axis of the reader has a segment of each. A group with an operation that mixes or moves
its units, or whose units leave the model, is left alone, with the reason.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from decorr_fx.ops.prune.cut import Axis, Priced, Segment

Role = Literal["makes", "carries", "reads"]


@dataclass(frozen=True)
class Slice:
    """One dimension of a parameter or buffer that holds units."""

    tensor: str
    dim: int
    role: Role
    axis: Axis

    @property
    def layer(self) -> str:
        """Return the fqn of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Units that several layers may make and read: a unit of all of them is kept, or none.

    Attributes:
        makers: the fqn of the layers that make them; the first names the group.
        readers: the fqn of the layers that read them.
        units: how many there are.
        added: whether they are sums of what several layers made, as in a residual stream.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    units: int
    added: bool

    @property
    def fqn(self) -> str:
        """Return the name of the group: that of the first layer that makes its units."""
        return self.makers[0]


@dataclass(frozen=True)
class UnitGroups:
    """What may be removed from a model.

    Attributes:
        groups: in the order in which the model runs; segments have the index here.
        slices: every dimension that holds units of a group.
        left: the fqn of layers whose units stay, with the reason.
        works: multiply-adds of an example, for each number of a weight, by its name.
    """

    groups: tuple[Group, ...]
    slices: tuple[Slice, ...]
    left: Mapping[str, str]
    works: Mapping[str, int]

    def priced(self, shapes: Mapping[str, tuple[int, ...]], prices: Mapping[str, int]) -> list[Priced]:
        """Return every tensor of `prices`, which tells what one of its numbers costs, with its axes."""
        axes = {(s.tensor, s.dim): s.axis for s in self.slices}
        return [
            Priced(price, tuple(axes.get((name, dim), (Segment(size),)) for dim, size in enumerate(shapes[name])))
            for name, price in prices.items()
        ]

    def readers(self) -> Iterable[Slice]:
        """Return the weights that can take over what removed units told."""
        return (s for s in self.slices if s.role == "reads")


class Groups:
    """Groups while they are being found: numbers that are joined as the graph tells that they are one."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._units: list[int] = []
        self._makers: list[str] = []
        self._added: set[int] = set()
        self._reasons: dict[int, str] = {}
        self.slices: list[Slice] = []

    def new(self, fqn: str, units: int) -> int:
        """Return the number of a new group, of the units that a layer makes."""
        self._parent.append(len(self._parent))
        self._units.append(units)
        self._makers.append(fqn)
        return self._parent[-1]

    def join(self, a: int, b: int, added: bool) -> None:
        """Let the units of a and b be the same ones."""
        first, second = sorted((self.root(a), self.root(b)))
        self._parent[second] = first
        if added and first != second:
            self._added.add(first)

    def fix(self, axis: Axis, reason: str) -> None:
        """Let the units on an axis stay; the first reason counts."""
        for segment in axis:
            if segment.group is not None:
                self._reasons.setdefault(segment.group, reason)

    def fix_shared(self, tied: Collection[str]) -> None:
        """Let units stay whose tensor holds several, or has another name."""
        found: dict[tuple[str, int], list[Axis]] = {}
        for s in self.slices:
            found.setdefault((s.tensor, s.dim), []).append(s.axis)
        for (tensor, _), axes in found.items():
            if tensor in tied or len(axes) > 1:
                for axis in axes:
                    self.fix(axis, f"{tensor!r} is shared by several calls")

    def root(self, number: int) -> int:
        """Return the number that stands for all that are joined with this one."""
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def found(self, works: Mapping[str, int], refuse: Callable[[Group], str]) -> UnitGroups:
        """Return the groups that can be cut, and those that cannot; `refuse` gives the reason of a user, or none."""
        members: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            members.setdefault(self.root(number), []).append(number)
        groups: dict[int, Group] = {}
        left: dict[str, str] = {}
        for root, numbers in members.items():
            makers = tuple(dict.fromkeys(self._makers[number] for number in numbers))
            group = Group(makers, self._readers(root), self._units[root], not self._added.isdisjoint(numbers))
            reason = next((self._reasons[number] for number in numbers if number in self._reasons), "")
            if reason := reason or ("" if group.readers else "no layer reads its units") or refuse(group):
                for maker in makers:
                    left.setdefault(maker, reason)
            else:
                groups[root] = group
        places = {root: place for place, root in enumerate(groups)}
        kept = (self._placed(s, places) for s in self.slices)
        return UnitGroups(
            tuple(groups.values()),
            tuple(s for s in kept if s is not None),
            left,
            works,
        )

    def _readers(self, root: int) -> tuple[str, ...]:
        reading = (s.layer for s in self.slices if s.role == "reads"
                   for segment in s.axis if segment.group is not None and self.root(segment.group) == root)  # fmt: skip
        return tuple(dict.fromkeys(reading))

    def _placed(self, found: Slice, places: Mapping[int, int]) -> Slice | None:
        """Return the slice with the places of its groups, or None where all of it stays."""
        axis = tuple(
            Segment(s.units, None if s.group is None else places.get(self.root(s.group)), s.inner) for s in found.axis
        )
        alive = any(segment.group is not None for segment in axis)
        return Slice(found.tensor, found.dim, found.role, axis) if alive else None
