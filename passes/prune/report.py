"""What pruning did, as a table."""

from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from decorr_fx.runtime.site.spec import SkippedRecord


@dataclass(frozen=True)
class GroupRecord:
    """Units that go together.

    Attributes:
        fqn: of the first layer that makes them.
        makers: the layers that make them.
        readers: the layers that read them, and have taken over what the removed ones told.
        units: how many there were.
        kept: how many there are.
        error: expected squared error of the readers' outputs over their squared size, from this group alone.
    """

    fqn: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    units: int
    kept: int
    error: float


@dataclass(frozen=True)
class ModelSize:
    """What a model costs: multiply-adds of its convs and linears for one example, and its parameters."""

    macs: int
    params: int


@dataclass(frozen=True)
class PruneReport:
    """What was removed and what was left; printing it gives a table.

    Attributes:
        groups: the groups of units that were cut, or could have been.
        skipped: layers whose units stay, and why.
        before: size of the model that was given.
        after: size of the result.
        tau: part of what its units carry that each group keeps at least.
    """

    groups: tuple[GroupRecord, ...]
    skipped: tuple[SkippedRecord, ...]
    before: ModelSize
    after: ModelSize
    tau: float

    def __str__(self) -> str:
        """Return the table."""
        rows = [[g.fqn, g.units, g.kept, f"{g.error:.2g}", ", ".join(g.makers[1:]), ", ".join(g.readers)]
                for g in self.groups]  # fmt: skip
        headers = ["layer", "units", "kept", "expected error", "with", "folded into"]
        parts = [tabulate(rows, headers, disable_numparse=True), self._total()]
        if self.skipped:
            left = [[one.fqn or "(root)", one.kind, one.reason] for one in self.skipped]
            parts.append(tabulate(left, ["skipped layer", "kind", "reason"], disable_numparse=True))
        return "\n\n".join(parts)

    def _total(self) -> str:
        before, after = self.before, self.after
        return (
            f"{before.macs / 1e6:,.2f} -> {after.macs / 1e6:,.2f} M multiply-adds ({after.macs / before.macs:.1%}), "
            f"{before.params / 1e6:,.3f} -> {after.params / 1e6:,.3f} M parameters "
            f"({after.params / before.params:.1%}), tau {self.tau:.6g}"
        )


@dataclass(frozen=True)
class PruneResult:
    """A smaller model, and what was done.

    Attributes:
        model: of the same class, with fewer units; an ordinary one.
        report: which units went, and what stayed, with the reasons.
    """

    model: nn.Module
    report: PruneReport
