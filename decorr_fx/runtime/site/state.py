"""A site: one R, the weights that it belongs to, what is remembered of their input, and rows for its next step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple
from warnings import warn

import torch
from torch import Tensor, nn

from decorr_fx.config import Dbp, Power
from decorr_fx.ops.cost import used_rank
from decorr_fx.ops.layout import Factored, identity_factors, stack_weight, unstack_weight
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.sample import DUE, ROWS, ConvGeometry, record_rows, record_rows_op
from decorr_fx.runtime.private import is_recordable
from decorr_fx.runtime.site.owner import PATIENCE, warn_if_unowned
from decorr_fx.runtime.site.ranks import Ranks, given_by_each
from decorr_fx.runtime.site.registry import list_parameters, mark, register
from decorr_fx.runtime.site.schedule import Schedule
from decorr_fx.runtime.site.spec import SiteSpec
from decorr_fx.runtime.site.weight import SiteWeight


class Recorded(NamedTuple):
    """Rows of a site's input for a step of R, `[n, groups * d]`, and which of them are in use, `[n]`."""

    rows: Tensor
    used: Tensor


class Site(nn.Module):
    """The state of one R and the buffer of rows for its next step.

    A forward calls `record`, and nothing else of it: R acts on gradients and on moves of the weights, around the steps
    of their optimizers. What is in `state_dict` is R, what is remembered of the input, and counters; recorded rows are
    not, since they never wait longer than for the next step. All is float32 at least, whatever the model is cast to.
    """

    steps: Tensor
    refused: Tensor
    rows: Tensor
    seen: Tensor
    losses: Tensor

    def __init__(self, spec: SiteSpec, weights: tuple[SiteWeight, ...], ranks: Ranks, warned: set[str]) -> None:
        super().__init__()
        self.spec = spec
        self.weights = weights
        self.ranks = ranks
        self.warned = warned  # what was said once, of all sites of a model
        self.paused = False
        self.recording_all = False  # `calibrate` records forwards without gradients, too
        self.known: list[int] = []  # ids of the weights when rows were recorded last
        self.used = spec.layout.rank  # directions that R uses
        self.same_on_all_ranks = False  # R has been checked to be
        self.used_is_agreed = False  # all ranks use as many directions, by their rows
        self.is_identity = True  # R has never moved
        self.schedule = Schedule(spec.rule.update_every)
        self.host = torch.tensor((1, 0, 0), device="cpu")  # for recordings of compiled graphs, too: see ops.sample
        like = weights[0].parameter()
        device, dtype = like.device, _at_least_float32(like.dtype)
        for name, shape in spec.state_shapes.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))
        for name in ("steps", "refused"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.int64))
        slots, width = given_by_each(spec.slots, ranks.count), spec.layout.groups * spec.layout.d
        self.register_buffer("rows", torch.zeros(slots, width, device=device, dtype=dtype), persistent=False)
        self.register_buffer("seen", torch.zeros((), device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("losses", torch.zeros(2, device=device, dtype=dtype), persistent=False)
        self.reset()
        register(self)
        list_parameters(self)

    @property
    def state(self) -> list[Tensor]:
        """R and what is remembered, in the order of `SiteSpec.state_shapes`."""
        buffers: dict[str, Any] = self._buffers  # get_buffer would look up each name in four ways
        return [*map(buffers.__getitem__, self.spec.state_shapes)]

    def matrix(self) -> LowRank | Factored:
        """Return R as it is now, of all stacks."""
        if isinstance(self.spec.rule, Power):
            gain = self._buffers["gain"] if self.spec.rule.gain else None
            return LowRank(self._buffers["U"][:, -self.used :], gain)  # type: ignore[index]
        return Factored(self.state[: 2 if self.spec.layout.paired else 1])

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return R as dense matrices `[groups, d, d]`."""
        layout = self.spec.layout
        eye = torch.eye(layout.d, device=self.rows.device, dtype=self.rows.dtype).repeat(layout.groups, 1, 1)
        rows = replace(layout, d_out=layout.d, transposed=False)
        return unstack_weight(self.matrix().times(stack_weight(eye, rows)), eye.shape, rows)

    @property
    def trained(self) -> bool:
        """Whether one of the weights is."""
        for weight in self.weights:
            found = weight.owner._parameters.get(weight.name)  # read often: as `find` does
            if found is not None and found.requires_grad:
                return True
        return False

    def record(self, x: Tensor, geometry: ConvGeometry | None, out_size: Sequence[int]) -> None:
        """Record a few rows of the input `x` of a call with this geometry, where R moves at the coming step.

        Nothing is recorded of a forward without gradients, of frozen weights, or of inputs that are no plain tensors.
        """
        if not (torch.is_grad_enabled() or self.recording_all) or torch.compiler.is_exporting():
            return
        rule, numbers = self.spec.rule, [] if geometry is None else geometry.numbers
        fraction = rule.sample_fraction if isinstance(rule, Dbp) else 1.0
        recorded = (self.rows, self.seen, self.steps, self.host, fraction, numbers, list(out_size))
        if torch.compiler.is_compiling():  # whether a move is due is known when the graph runs
            record_rows_op(x.detach(), *recorded)
        elif self.schedule.due and is_recordable(x) and self._count_backward():
            record_rows(x.detach(), *recorded)

    def _count_backward(self) -> bool:
        """Count forwards that begin a new gradient, and warn where none of them leads to a step.

        Tell whether there is a gradient at all: one of the weights is trained.
        """
        weights = [p for w in self.weights if (p := w.owner._parameters.get(w.name)) is not None]  # as `find` does
        if not any(map(attrgetter("requires_grad"), weights)):
            return False
        if [*map(id, weights)] != self.known:  # replaced by hand
            self.known = [*map(id, weights)]
            mark(self)
        self.schedule.unowned += torch.is_grad_enabled() and {*map(attrgetter("grad"), weights)} == {None}
        if (
            self.schedule.unowned == PATIENCE
            and "unowned" not in self.warned
            and warn_if_unowned(self.spec.fqn, weights)
        ):
            self.warned.add("unowned")
        return True

    def make_room(self, ranks: int) -> None:
        """Have room for the rows that one of so many ranks gives; what is recorded stays, as far as it fits."""
        slots = given_by_each(self.spec.slots, ranks)
        if len(self.rows) != slots:
            kept = self.rows[:slots]
            self.rows = self.rows.new_zeros(slots, self.rows.shape[1])
            self.rows[: len(kept)] = kept
            self.seen.clamp_(max=len(kept))

    def recorded(self) -> Recorded:
        """Return what this process has recorded since the last step of R."""
        return Recorded(self.rows, torch.arange(len(self.rows), device=self.seen.device) < self.seen)

    @property
    def due(self) -> bool:
        """Whether R moves at the next step of an optimizer that has one of the weights."""
        return self.schedule.due

    def begin_recording(self) -> None:
        """Drop the rows recorded so far, and record those of the next step if R moves at it."""
        schedule = self.schedule
        schedule.due = schedule.due and not self.paused and self.trained
        if schedule.due or schedule.recording:
            self.host.copy_(torch.tensor((int(schedule.due), 0, 0), device="cpu"))
            self.seen.zero_()
        schedule.recording = schedule.due

    def rows_of_step(self) -> int:
        """Return how many rows of its input the layers have mapped since the last step, as far as was recorded."""
        return int(self.host[ROWS])

    def fit_budget(self, rows: int | None = None) -> None:
        """Let R use as many directions as `cost_budget` allows in steps of so many rows; None: of the last one."""
        rule, rows = self.spec.rule, int(self.host[ROWS]) if rows is None else rows
        if isinstance(rule, Power) and rows:
            self.used = used_rank(self.spec.layout.rank, rows, rule.cost_budget)

    @torch.no_grad()
    def reset(self) -> None:
        """Set R to the identity and every counter to zero, as `transform` leaves them."""
        for buffer in (*self.state, self.steps, self.refused, self.losses):
            buffer.zero_()
        if not isinstance(self.spec.rule, Power):
            for factor, start in zip(self.state, identity_factors(self.spec.layout, self.rows.device, self.rows.dtype),
                                     strict=False):  # fmt: skip
                factor.copy_(start)
        else:
            self.state[-1].fill_(1)
        self.is_identity = True
        self.used, self.same_on_all_ranks, self.used_is_agreed = self.spec.layout.rank, False, False
        self.schedule.restart(0)
        self.begin_recording()

    def get_extra_state(self) -> Tensor:
        """Return the steps of the optimizer and the directions used, as a tensor: some formats hold nothing else."""
        return torch.tensor((self.schedule.attempts, self.used), device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        attempts, self.used = state.tolist()
        self.schedule.restart(attempts)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load R; where there is no key of it, it stays as it is, and where some are missing, it starts anew."""
        self.follow_weights()
        found = {key for key in state_dict if key.startswith(prefix)}
        if not found:
            return  # the checkpoint of a plain model, or a part of one: nothing of ours is missing
        missing = sorted(self.state_dict(prefix=prefix).keys() - found)
        if missing:
            self.reset()
            self._warn_of_partial(missing[0])
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.same_on_all_ranks = self.used_is_agreed = self.is_identity = False
        self.begin_recording()

    def _warn_of_partial(self, key: str) -> None:
        if "partial" not in self.warned:
            self.warned.add("partial")
            warn(
                f"layer {self.spec.fqn!r}: {key!r} is not in the checkpoint, so that its R starts anew from the "
                "identity, as that of each layer of which a part is missing; weights are those of the checkpoint",
                stacklevel=2,
            )

    def follow_weights(self) -> None:
        """Be where the weights are, after they were replaced by others: from a meta device, or by `assign=True`."""
        mark(self)
        device = self.weights[0].parameter().device
        if device != self.rows.device:
            lost = self.rows.is_meta
            self.to_empty(device=device) if lost else self.to(device)
            if lost:
                self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Site":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():  # a cast to half precision must not reach R or its statistics
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != (keep := _at_least_float32(buffer.dtype)):
                self._buffers[name] = old.to(buffer.device, keep)
        if before["rows"] is not None and before["rows"].is_meta and not self.rows.is_meta:
            self.reset()  # there was nothing on the meta device
        mark(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.paused:  # which a copy is not
            self.schedule.restart(self.schedule.attempts)
            self.host[DUE] = self.schedule.due
        self.paused = self.recording_all = False
        register(self)  # a deep copy, or an unpickled one,
        mark(self)  # of which the weights may not be there yet

    def extra_repr(self) -> str:
        """Describe the site in a printed model."""
        kind, layout = self.spec.weights[0].kind, self.spec.layout
        shared = f", shared by {len(self.weights)} weights" if len(self.weights) > 1 else ""
        return f"{kind}, d={layout.d}, {layout.structure}, {type(self.spec.rule).__name__}{shared}"


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Yield every site of the model once."""
    return (module for module in model.modules() if isinstance(module, Site))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the type itself where it is no floating-point type."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
