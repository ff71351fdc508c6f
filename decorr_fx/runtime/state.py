"""A site: one weight whose input is decorrelated, with the factors of its R and the rows recorded for the next step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from decorr_fx.errors import LayerError
from decorr_fx.ops.record import record_conv, record_linear
from decorr_fx.ops.rules import Step, step_factors
from decorr_fx.ops.structure import fold_weight, stack_rows, stack_weight, unstack_weight
from decorr_fx.runtime.spec import SiteSpec

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it

LIVE_SITES: "WeakSet[Site]" = WeakSet()  # every site there is, copies included: the optimizer hook looks here


@dataclass(frozen=True)
class Slot:
    """A parameter by its place, so that it is found again after a copy, a load or a move of its module."""

    owner: nn.Module
    name: str

    def get(self) -> Tensor:
        """Return the tensor that is there now."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor

    def find(self) -> nn.Parameter | None:
        """Return the parameter that is there now, or None where it was removed or replaced by something computed."""
        return self.owner._parameters.get(self.name)


class Site(nn.Module):
    """The factors of R of one weight, and the buffer of rows for their next step.

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

    def __init__(self, spec: SiteSpec, weight_path: str, weights: tuple[Slot, ...], bias: Slot | None) -> None:
        super().__init__()
        self.spec = spec
        self.weight_path = weight_path  # from the module that this one is a child of
        self.weight_slot, *self.tied_slots = weights
        self.bias_slot = bias
        self.paused = False
        self.attempts = 0  # of the optimizer, on the host: which of them move R, and decor_lr, depend on it
        like = self.weight_slot.get()
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
        """Record a few rows of the layer's input `x`; see `ops.record`."""
        fraction, geometry = self.spec.config.sample_fraction, self.spec.geometry
        x = x.detach()
        if geometry is None:
            record_linear(self.rows, self.seen, self.steps, x, fraction)
            return
        pads = [side for pair in geometry.padding for side in pair]
        record_conv(
            self.rows, self.seen, self.steps, x, fraction, list(geometry.kernel), list(geometry.stride), pads,
            list(geometry.dilation), geometry.transposed, list(output_padding),
        )  # fmt: skip

    def decorrelate(self, W: Tensor) -> Tensor:
        """Return `W R`, in the shape and type of W; computed in float32 at least, also under autocast."""
        with _full_precision(W.device):
            return fold_weight(W.to(self.factors[0].dtype), self.factors, self.spec.layout).to(W.dtype)

    def shift_bias(self, bias: Tensor, W_eff: Tensor) -> Tensor:
        """Return `b - W R mu`, the bias of a layer that sees demeaned rows through the folded weight `W_eff`."""
        with _full_precision(bias.device):
            shift = self._output_of_mean(W_eff.to(self.mean.dtype), self.mean)
            return (bias.to(shift.dtype) - shift).to(bias.dtype)

    @torch.no_grad()
    def fold_into_weight(self) -> None:
        """Write `W R` into the weight and `b - W R mu` into the bias; R is to be dropped afterwards."""
        weight = self.weight_slot.get()
        weight.copy_(self.decorrelate(weight))
        if self.spec.centered and self.bias_slot is not None:
            bias = self.bias_slot.get()
            bias.copy_(self.shift_bias(bias, weight))

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

    def check_weight(self) -> None:
        """Raise where the weight is not the one parameter any more that R was made for.

        Raises:
            LayerError: it was pruned or parametrized after `transform`, or weights that were tied are not tied now.
        """
        weight = self.weight_slot.find()
        if weight is None:
            problem = "its weight was pruned or parametrized after transform; undo that, fold, and do it again"
            raise LayerError(self.spec.fqn, problem)
        if any(slot.find() is not weight for slot in self.tied_slots):
            raise LayerError(self.spec.fqn, "the weights that were tied to it are not any more; tie them again")

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
            updates += self._followers(step, mean)
        self._commit(updates, step, count)

    def _followers(self, step: Step, mean: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return (weight, its new value), and the same for the bias, such that the layer's function stands still."""
        W, layout = self.weight_slot.get(), self.spec.layout
        dtype = self.rows.dtype
        moved = unstack_weight(step.retreat(stack_weight(W.to(dtype), layout)), W.shape, layout)
        followers = [(W, moved.to(W.dtype))]
        if self.spec.centered and self.bias_slot is not None and mean is not None:
            bias = self.bias_slot.get()
            shift = self._output_of_mean(fold_weight(W.to(dtype), self.factors, layout), mean - self.mean)
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

    def _output_of_mean(self, W_eff: Tensor, mean: Tensor) -> Tensor:
        """Return `W R mu` `[d_out * groups]`, the layer's response to the mean row."""
        layout = self.spec.layout
        per_block = (stack_weight(W_eff, layout) * mean[:, None]).flatten(2).sum(2)
        return per_block.reshape(layout.groups, layout.blocks, layout.d_out).sum(1).flatten()

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
        LIVE_SITES.add(self)  # a deep copy, or an unpickled one

    def extra_repr(self) -> str:
        """Describe the site in a printed model."""
        return f"{self.spec.kind}, d={self.spec.layout.d}, {self.spec.layout.structure}, rule={self.spec.config.rule}"


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Yield every site of the model once."""
    return (module for module in model.modules() if isinstance(module, Site))


def _has(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
