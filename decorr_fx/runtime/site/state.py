"""A site: one R with the weights that it is applied to, its factors, and the rows recorded for its next step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from decorr_fx.ops.calls import one_each
from decorr_fx.ops.keep import keep_folded, keep_folded_op
from decorr_fx.ops.layout import Layout, fold_taps, fold_weight, identity_factors, mix_channels, output_of_mean
from decorr_fx.ops.product import full_precision
from decorr_fx.ops.sample import GOLDEN, ConvGeometry, conv_rows, linear_rows, recomputing, store_rows
from decorr_fx.runtime.site.ranks import given_by_each, ranks
from decorr_fx.runtime.site.shard import is_sharded
from decorr_fx.runtime.site.spec import SiteSpec
from decorr_fx.runtime.site.weight import SiteWeight

# Every site there is, copies included, in the order in which they were made: the optimizer hook looks here.
LIVE_SITES: "WeakKeyDictionary[Site, None]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Recorded:
    """Rows of a site's input for a step of R, `[n, groups * d]`, and which of them are in use, `[n]`."""

    rows: Tensor
    used: Tensor


class Site(nn.Module):
    """The factors of one R, the weights that it is applied to, and the buffer of rows for its next step.

    `record` and `decorrelate` are what the graph calls; R moves between an optimizer's step and the next forward, see
    `runtime.move`. Factors and counters are saved with the model; recorded rows are not, since they never wait longer
    than for the next step of the optimizer. Factors and rows are float32 at least, whatever the model is cast to.
    """

    steps: Tensor
    refused: Tensor
    rows: Tensor
    seen: Tensor
    losses: Tensor
    mean: Tensor

    def __init__(self, spec: SiteSpec, weight_path: str, weights: tuple[SiteWeight, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.weight_path = weight_path  # from the module that this one is a child of
        self.weights = weights
        self.placed = False  # a module has this one as its child
        self.in_place: dict[int, Tensor] = {}  # `W R` where it stands in the place of W, while a forward runs
        self.paused = False
        self.sharded = False
        self.attempts = 0  # of the optimizer, on the host: which of them move R, and decor_lr, depend on it
        self.same_on_all_ranks = False  # R has been checked to be
        like = self.weights[0].get()
        device, dtype = like.device, _at_least_float32(like.dtype)
        layout, slots = spec.layout, given_by_each(spec.slots, ranks())
        for name, factor in zip(spec.factor_names, identity_factors(layout, device, dtype), strict=True):
            self.register_buffer(name, factor)
        for name, shape in spec.moment_shapes.items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=dtype))
        if spec.demeaned:
            self.register_buffer("mean", torch.zeros(layout.stacks, *layout.modes, device=device, dtype=dtype))
        for name in ("steps", "refused"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.int64))
        width = layout.groups * layout.d
        self.register_buffer("rows", torch.zeros(slots, width, device=device, dtype=dtype), persistent=False)
        self.register_buffer("seen", torch.zeros((), device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("losses", torch.zeros(2, device=device, dtype=dtype), persistent=False)
        LIVE_SITES[self] = None

    @property
    def factors(self) -> list[Tensor]:
        """The factors of R, or V; see `ops.structure`."""
        buffers: dict[str, Any] = self._buffers  # get_buffer would look up each name in four ways
        return [buffers[name] for name in self.spec.factor_names]

    @property
    def moments(self) -> list[Tensor]:
        """What is remembered of x; nothing where the rule does not."""
        return [self.get_buffer(name) for name in self.spec.moment_shapes]

    def record(self, x: Tensor, output_padding: Sequence[int] = ()) -> None:
        """Record a few rows of the layer's input `x`, as a graph sees it; see `ops.record`."""
        if 0 not in self.in_place:  # else whoever put the weight in place watches this call, too
            self.record_call(x, self.spec.geometry, output_padding)

    def record_call(self, x: Tensor, geometry: ConvGeometry | None, output_padding: Sequence[int] | int) -> None:
        """Record a few rows of the input `x` of a call with this geometry, where R moves at the coming step.

        A compiled forward records always: it would be compiled twice, otherwise. What is not used is dropped.
        """
        if not torch.compiler.is_compiling() and (not self.due or recomputing()):
            return
        slots, fraction, x = self.rows.shape[0], self.spec.config.sample_fraction, x.detach()
        if geometry is None:
            picked = linear_rows(x, slots, fraction, self.steps)
        else:
            padding = one_each(output_padding, len(geometry.kernel)) if geometry.transposed else ()
            picked = conv_rows(x, slots, fraction, self.steps, geometry, padding)
        store_rows(self.rows, self.seen, picked.to(self.rows.dtype))

    def stands_in(self, W: object, index: int) -> bool:
        """Tell whether `W` is not the weight number `index`, but `W R` that was put in its place."""
        return index in self.in_place and self.in_place[index] is W

    def decorrelate(self, W: Tensor, index: int = 0) -> Tensor:
        """Return `W R` in the shape and type of W, weight number `index`; in float32 at least, under autocast, too."""
        if self.stands_in(W, index):
            return W
        kept = self._kept(W, index)
        return self._fold(W, self.weights[index].spec.layout) if kept is None else kept

    def _fold(self, W: Tensor, layout: Layout) -> Tensor:
        """Return `W R`, computed anew."""
        with full_precision(W.device):
            return fold_weight(W.to(self.factors[0].dtype), self.factors, layout).to(W.dtype)

    def _kept(self, W: Tensor, index: int) -> Tensor | None:
        """Return the kept `W R` where this one keeps it: in eval mode, where no gradient goes to W."""
        kept = self._buffers.get(f"kept{index}")
        if kept is None or self.sharded or not self.weights[index].is_parameter:
            return None
        if torch.is_grad_enabled() and W.requires_grad:
            return None
        if (kept.shape, kept.dtype, kept.device) != (W.shape, W.dtype, W.device):
            return None
        layout = self.weights[index].spec.layout
        if torch.compiler.is_compiling():
            keep_folded_op(kept, W.detach(), self.factors, layout.numbers)
        else:
            keep_folded(kept, W.detach(), self.factors, layout)
        return kept

    def make_room(self) -> None:
        """Have room for the rows that this rank gives; those that are recorded stay, as far as they fit."""
        slots = given_by_each(self.spec.slots, ranks())
        if len(self.rows) != slots:
            kept = self.rows[:slots]
            self.rows = self.rows.new_zeros(slots, self.rows.shape[1])
            self.rows[: len(kept)] = kept
            self.seen.clamp_(max=len(kept))

    def note_sharding(self) -> None:
        """Notice that a weight is sharded: one that is gathered anew for each forward does not tell that it changed."""
        self.sharded = self.sharded or any(is_sharded(weight.find()) for weight in self.weights)

    def train(self, mode: bool = True) -> "Site":
        """Make room for what is kept in eval mode, or give it back; what was kept before is forgotten."""
        self.note_sharding()
        for index, weight in enumerate(self.weights):
            room = None if mode or not weight.is_parameter or self.sharded else _empty_like(weight.get())
            self.register_buffer(f"kept{index}", room, persistent=False)
        return super().train(mode)

    def decorrelate_call(self, x: Tensor, W: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return what a call on input x and weight W is to be made on: `(x, W R)`, or `(R x, W)` where x is smaller.

        The outputs are the same but for rounding. Applied to the smaller of the two, R costs less time, and no more
        memory. Of a Kronecker pair only the factor over channels can go to the input.
        """
        layout = self.weights[index].spec.layout
        if self.stands_in(W, index) or not self._on_input(x, W, layout):
            return x, self.decorrelate(W, index)
        with full_precision(W.device):
            taps = fold_taps(W.to(self.factors[0].dtype), self.factors).to(W.dtype)
        return mix_channels(x, self.factors[0], self.spec.spatial, layout), taps

    def _on_input(self, x: Tensor, W: Tensor, layout: Layout) -> bool:
        return self.training and layout.on_channels and not self.spec.demeaned and x.numel() < W.numel()

    def shift_bias(self, bias: Tensor, W_eff: Tensor, index: int = 0) -> Tensor:
        """Return `b - W R mu`, the bias of a layer that sees demeaned rows through the folded weight `W_eff`."""
        with full_precision(bias.device):
            layout = self.weights[index].spec.layout
            shift = output_of_mean(W_eff.to(self.mean.dtype), self.mean, layout)
            return (bias.to(shift.dtype) - shift).to(bias.dtype)

    @torch.no_grad()
    def fold_into_weights(self) -> None:
        """Write `W R` into every weight, or the part of it that this rank holds, and `b - W R mu` into its bias.

        R is to be dropped afterwards.
        """
        for index, weight in enumerate(self.weights):
            W, layout = weight.held()
            W.copy_(self._fold(W, layout))
            if weight.spec.centered and weight.bias is not None:
                bias = weight.bias.get()
                bias.copy_(self.shift_bias(bias, W, index))

    def advance(self) -> float | None:
        """Count a step of the optimizer; return the step size of R if R is to move now, else None."""
        config = self.spec.config
        due, decor_lr = self.due, config.lr_at(self.attempts)
        self.attempts += 1
        return decor_lr if due else None

    @property
    def due(self) -> bool:
        """Whether R moves at the next step of the optimizer.

        It does at one of n steps, where n grows from 1 to `update_every`: at first everything moves fast. They are
        spread by the golden ratio: strictly every n-th step would never come for a layer that is used at every second
        one, or under an optimizer that wraps another and counts twice.
        """
        most = self.spec.config.update_every
        return self.attempts * GOLDEN % 1 < 1 / min(most, 1 + self.attempts // most)

    def recorded(self) -> Recorded:
        """Return what this process has recorded since the last step of R."""
        return Recorded(self.rows, torch.arange(len(self.rows), device=self.seen.device) < self.seen)

    def forget(self) -> None:
        """Drop the rows recorded so far."""
        self.seen.zero_()

    def reset(self) -> None:
        """Set R to the identity and every counter to zero, as `transform` leaves them."""
        identity = identity_factors(self.spec.layout, self.rows.device, self.rows.dtype)
        for factor, start in zip(self.factors, identity, strict=True):
            factor.copy_(start)
        self.reset_moments()
        if self.spec.demeaned:
            self.mean.zero_()
        self.reset_counters()
        self.same_on_all_ranks = False

    def reset_moments(self) -> None:
        """Let running moments start anew, with the next step as the first one."""
        for moment in self.moments:
            moment.zero_()
        self.steps.zero_()

    def reset_counters(self) -> None:
        """Let the site be as before its first step, but for R."""
        for buffer in (self.steps, self.refused, self.seen, self.losses):
            buffer.zero_()
        self.attempts = 0

    def get_extra_state(self) -> Tensor:
        """Return the number of optimizer steps seen, as a tensor: some checkpoint formats hold nothing else."""
        return torch.tensor(self.attempts)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.attempts = int(state)

    def expect(self, checkpoint: Mapping[str, Any], prefix: str, name: str) -> None:
        """Set R to the identity where the checkpoint has the weight and no R: its weight then acts on plain inputs.

        `prefix` is that of the layer which has this site as its child `name`.
        """
        if prefix + self.weight_path in checkpoint and not _has(checkpoint, f"{prefix}{name}."):
            with torch.no_grad():
                self.reset()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if not _has(state_dict, prefix):
            return  # the checkpoint of a plain model, or a part of one: nothing of ours is missing
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.forget()
        self.same_on_all_ranks = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Site":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():  # a cast to half precision must not reach R or its statistics
            old = before[name]
            if name.startswith("kept"):
                continue  # it has the type of its weight
            if buffer is not None and old is not None and buffer.dtype != (keep := _at_least_float32(buffer.dtype)):
                self._buffers[name] = old.to(buffer.device, keep)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.paused = False
        self.in_place = {}
        LIVE_SITES[self] = None  # a deep copy, or an unpickled one

    def extra_repr(self) -> str:
        """Describe the site in a printed model."""
        kind, layout = self.spec.weights[0].kind, self.spec.layout
        shared = f", shared by {len(self.weights)} weights" if len(self.weights) > 1 else ""
        return f"{kind}, d={layout.d}, {layout.structure}, rule={self.spec.config.rule}{shared}"


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Yield every site of the model once."""
    return (module for module in model.modules() if isinstance(module, Site))


def _empty_like(W: Tensor) -> Tensor:
    with torch.inference_mode(False):  # it may be written outside, too
        return torch.empty_like(W.detach())


def _has(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
