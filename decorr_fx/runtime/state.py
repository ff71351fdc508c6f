"""A site: one R with the weights that it is applied to, its factors, and the rows recorded for its next step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from decorr_fx.ops.calls import one_each
from decorr_fx.ops.record import ConvGeometry, record_conv, record_linear
from decorr_fx.ops.rules import Step, step_factors
from decorr_fx.ops.structure import fold_weight, output_of_mean, stack_rows, stack_weight, unstack_weight
from decorr_fx.runtime.spec import SiteSpec
from decorr_fx.runtime.weight import SiteWeight

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it

LIVE_SITES: "WeakSet[Site]" = WeakSet()  # every site there is, copies included: the optimizer hook looks here


class Site(nn.Module):
    """The factors of one R, the weights that it is applied to, and the buffer of rows for its next step.

    `record` and `decorrelate` are what the graph calls; `step` is called between an optimizer's step and the next
    forward. Factors and counters are saved with the model; recorded rows only where `update_every` above 1 lets them
    wait from step to step. Factors and rows are float32 at least, whatever the model is cast to.
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
        self.attempts = 0  # of the optimizer, on the host: which of them move R, and decor_lr, depend on it
        like = self.weights[0].get()
        device, dtype = like.device, _at_least_float32(like.dtype)
        layout, slots = spec.layout, spec.config.max_samples
        for name, side in zip(spec.factor_names, layout.modes, strict=True):
            self.register_buffer(name, torch.eye(side, device=device, dtype=dtype).repeat(layout.stacks, 1, 1))
        if spec.demeaned:
            self.register_buffer("mean", torch.zeros(layout.stacks, *layout.modes, device=device, dtype=dtype))
        for name in ("steps", "refused"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.int64))
        width = layout.groups * layout.d
        # rows wait for the next move of R; with update_every at 1 there are none after a step of the optimizer
        waiting = spec.config.update_every > 1
        self.register_buffer("rows", torch.zeros(slots, width, device=device, dtype=dtype), persistent=waiting)
        self.register_buffer("seen", torch.zeros((), device=device, dtype=torch.int64), persistent=waiting)
        self.register_buffer("losses", torch.zeros(2, device=device, dtype=dtype), persistent=False)
        LIVE_SITES.add(self)

    @property
    def factors(self) -> list[Tensor]:
        """The factors of R, `[stacks, modes[i], modes[i]]`."""
        return [self.get_buffer(name) for name in self.spec.factor_names]

    def record(self, x: Tensor, output_padding: Sequence[int] = ()) -> None:
        """Record a few rows of the layer's input `x`, as a graph sees it; see `ops.record`."""
        if 0 not in self.in_place:  # else whoever put the weight in place watches this call, too
            self.record_call(x, self.spec.geometry, output_padding)

    def record_call(self, x: Tensor, geometry: ConvGeometry | None, output_padding: Sequence[int] | int) -> None:
        """Record a few rows of the input `x` of a call with this geometry."""
        fraction = self.spec.config.sample_fraction
        x = x.detach()
        if geometry is None:
            record_linear(self.rows, self.seen, self.steps, x, fraction)
            return
        pads = [side for pair in geometry.padding for side in pair]
        padding = list(one_each(output_padding, len(geometry.kernel))) if geometry.transposed else []
        record_conv(
            self.rows, self.seen, self.steps, x, fraction, list(geometry.kernel), list(geometry.stride), pads,
            list(geometry.dilation), geometry.transposed, padding,
        )  # fmt: skip

    def stands_in(self, W: object, index: int) -> bool:
        """Tell whether `W` is not the weight number `index`, but `W R` that was put in its place."""
        return index in self.in_place and self.in_place[index] is W

    def decorrelate(self, W: Tensor, index: int = 0) -> Tensor:
        """Return `W R` in the shape and type of W, weight number `index`; in float32 at least, under autocast, too."""
        if self.stands_in(W, index):
            return W
        with _full_precision(W.device):
            return fold_weight(W.to(self.factors[0].dtype), self.factors, self.weights[index].spec.layout).to(W.dtype)

    def shift_bias(self, bias: Tensor, W_eff: Tensor, index: int = 0) -> Tensor:
        """Return `b - W R mu`, the bias of a layer that sees demeaned rows through the folded weight `W_eff`."""
        with _full_precision(bias.device):
            layout = self.weights[index].spec.layout
            shift = output_of_mean(W_eff.to(self.mean.dtype), self.mean, layout)
            return (bias.to(shift.dtype) - shift).to(bias.dtype)

    @torch.no_grad()
    def fold_into_weights(self) -> None:
        """Write `W R` into every weight and `b - W R mu` into its bias; R is to be dropped afterwards."""
        for index, weight in enumerate(self.weights):
            W = weight.get()
            W.copy_(self.decorrelate(W, index))
            if weight.spec.centered and weight.bias is not None:
                bias = weight.bias.get()
                bias.copy_(self.shift_bias(bias, W, index))

    def step(self) -> None:
        """Move R by one step on the rows recorded since the last one, and forget them.

        A step without rows does nothing. One whose rows or results are not finite is refused and counted. With
        `update_every` above 1 the steps between collect rows only. Nothing here waits for the device.
        """
        decor_lr = self.spec.config.lr_at(self.attempts // self.spec.config.update_every)
        self.attempts += 1
        if self.attempts % self.spec.config.update_every == 0:
            with torch.no_grad(), _full_precision(self.rows.device):
                self._move(decor_lr)
            self.forget()

    def forget(self) -> None:
        """Drop the rows recorded so far."""
        self.seen.zero_()

    def _move(self, decor_lr: float) -> None:
        config, layout = self.spec.config, self.spec.layout
        used = torch.arange(len(self.rows), device=self.rows.device) < self.seen
        count = used.sum()
        x = stack_rows(self.rows.where(used[:, None], 0), layout)
        mean = None
        if self.spec.demeaned:
            mean = self.mean + MEAN_MOMENTUM * (x.sum(1) / count - self.mean)
            in_use = used.reshape(-1, *[1] * len(layout.modes))
            x = (x - mean[:, None]).where(in_use, 0)
        step = step_factors(self.factors, x, count, config.rule, decor_lr, config.kappa)
        updates = list(zip(self.factors, step.factors, strict=True))
        if mean is not None:
            updates.append((self.mean, mean))
        if config.preserve_function:
            updates += [update for weight in self.weights for update in self._followers(weight, step, mean)]
        self._commit(updates, step, count)

    def _followers(self, weight: SiteWeight, step: Step, mean: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return (weight, its new value), and the same for the bias, such that the layer's function stands still."""
        W, layout = weight.get(), weight.spec.layout
        dtype = self.rows.dtype
        moved = unstack_weight(step.retreat(stack_weight(W.to(dtype), layout)), W.shape, layout)
        followers = [(W, moved.to(W.dtype))]
        if weight.spec.centered and weight.bias is not None and mean is not None:
            bias = weight.bias.get()
            shift = output_of_mean(fold_weight(W.to(dtype), self.factors, layout), mean - self.mean, layout)
            followers.append((bias, (bias.to(dtype) + shift).to(bias.dtype)))
        return followers

    def _commit(self, updates: list[tuple[Tensor, Tensor]], step: Step, count: Tensor) -> None:
        recorded = count > 0
        finite = torch.stack([new.isfinite().all() for _, new in updates]).all()
        accepted = recorded & finite
        for old, new in updates:
            old.copy_(new.where(accepted, old))
        losses = torch.stack([step.correlation(), step.variance_error()])
        self.losses.copy_(losses.where(accepted, self.losses))
        self.steps += accepted
        self.refused += recorded & ~finite

    def reset(self) -> None:
        """Set R to the identity and every counter to zero, as `transform` leaves them."""
        for factor in self.factors:
            factor.copy_(torch.eye(factor.shape[-1], device=factor.device, dtype=factor.dtype).expand_as(factor))
        for buffer in (self.steps, self.refused, self.seen, self.losses, *([self.mean] if self.spec.demeaned else [])):
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
        if self.spec.config.update_every == 1:
            self.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Site":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():  # a cast to half precision must not reach R or its statistics
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != (keep := _at_least_float32(buffer.dtype)):
                self._buffers[name] = old.to(buffer.device, keep)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.paused = False
        self.in_place = {}
        LIVE_SITES.add(self)  # a deep copy, or an unpickled one

    def extra_repr(self) -> str:
        """Describe the site in a printed model."""
        kind, layout = self.spec.weights[0].kind, self.spec.layout
        shared = f", shared by {len(self.weights)} weights" if len(self.weights) > 1 else ""
        return f"{kind}, d={layout.d}, {layout.structure}, rule={self.spec.config.rule}{shared}"


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Yield every site of the model once."""
    return (module for module in model.modules() if isinstance(module, Site))


def _has(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
