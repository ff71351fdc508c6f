"""What is known of one model after its checks."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from decorr_fx.runtime.site.spec import SkippedRecord

Status = Literal["passed", "failed", "skipped"]
STAGES = ("build", "transform", "train", "eval", "step", "fold", "reload", "onnx", "compile")
GROUPS = 20  # of skipped layers, at most, in a record
NAMED = 3  # layers of such a group


@dataclass
class Record:
    """The result of one model.

    Attributes:
        name: of the model in its library.
        status: `passed`, `failed` (then with stage and reason) or `skipped` (with the reason).
        stage: where it failed.
        reason: why.
        seconds: that each stage took.
        memory: most that its process held, in GiB.
        parameters: how many numbers are trained.
        weights: parameters that are weights of a conv or linear.
        sites: how many of them are decorrelated.
        left: layers that are left as they are, as the library tells, in groups of the same kind and reason.
        errors: largest error of each comparison, relative to the largest output.
        finite: whether the plain model's own outputs are finite.
        onnx: `exported`, or why the plain model does not export; empty where that was not tried.
        operators: how many nodes the ONNX graph has.
        graph_breaks: of the plain and of the transformed model under torch.compile.
    """

    name: str
    status: Status = "passed"
    stage: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    memory: float = 0.0
    parameters: int = 0
    weights: int = 0
    sites: int = 0
    left: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    onnx: str = ""
    operators: int = 0
    graph_breaks: list[int] = field(default_factory=list)

    def fail(self, stage: str, reason: str) -> None:
        """Note where and why the model failed."""
        self.status, self.stage, self.reason = "failed", stage, reason

    def as_json(self) -> dict[str, Any]:
        """Return the record without what is empty."""
        empty = ("", [], {}, 0) if self.status == "skipped" else ("", [], {})
        return {name: value for name, value in asdict(self).items() if value not in empty}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Return the record that `as_json` was made from; fields that are not known are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    @property
    def total_seconds(self) -> float:
        """Time of all stages."""
        return sum(self.seconds.values())


def grouped(skipped: Iterable[SkippedRecord]) -> list[dict[str, Any]]:
    """Return skipped layers in groups of the same kind and reason, with the names of the first few; largest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for record in skipped:
        groups.setdefault((record.kind, record.reason[:300]), []).append(record.fqn)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        {"kind": kind, "reason": reason, "count": len(layers), "layers": layers[:NAMED]}
        for (kind, reason), layers in ordered[:GROUPS]
    ]
