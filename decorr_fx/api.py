"""The verbs that change a model, or make another. Each one is: check, run these passes, return."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decorr_fx.config import Rule
from decorr_fx.inputs import Example
from decorr_fx.inspection import settings_of, transformed, unwrapped
from decorr_fx.ops.prune.orders import Order
from decorr_fx.passes.calibrate import calibrate_sites
from decorr_fx.passes.capture.check import check_model
from decorr_fx.passes.copies import copy_model
from decorr_fx.passes.export import ExportOnnx, ExportReport
from decorr_fx.passes.match.settings import Filter, Overrides, Settings
from decorr_fx.passes.plan import make_plan
from decorr_fx.passes.prune.prune import Measure, PruneSettings, PruneUnits, Weighting
from decorr_fx.passes.prune.report import PruneResult
from decorr_fx.passes.rewrite.fold import FoldDecorrelation
from decorr_fx.passes.rewrite.insert import InsertDecorrelation
from decorr_fx.runtime.site.ranks import Ranks
from decorr_fx.runtime.site.registry import LOCK
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step import hooks


def transform(
    model: nn.Module,
    rule: Rule | None = None,
    *,
    filter_fn: Filter | None = None,
    overrides: Overrides | None = None,
    process_group: Any = None,
) -> nn.Module:
    """Return a copy of the model whose conv and linear layers learn on decorrelated inputs.

    Parameters and buffers are those of the model itself: both compute the same at all times, and an optimizer made
    before goes on working. Around each step of an optimizer that owns a layer's weight (any `torch.optim.Optimizer`;
    see `stepping` for others), the gradient and the move of the weight are multiplied by the layer's R, and R moves;
    the training loop stays as it is. Source: arXiv 2405.02385.

    Args:
        model: a plain module: transform before compiling or wrapping it.
        rule: how R moves, of all layers; `Power()` if None.
        filter_fn: called with (module, fqn) of each layer; the layer is left alone where it returns False.
        overrides: other rules for some layers, or None for "leave alone". A key is the fqn of a layer, as `report`
            prints it, or a regular expression that matches a whole fqn; a name goes before a pattern, then the first
            one counts.
        process_group: the ranks that train the model together; the default group if None.

    Raises:
        ModelError: the model is no module, has no layer to decorrelate, or is compiled, wrapped or transformed already.
        LayerError: a layer is lazy, or has a complex or integer weight.
        ConfigError: a setting is wrong, or a key of `overrides` matches no layer.
        DistributedError: this rank is not in `process_group`, or the model is sharded by `fully_shard` already.
    """
    return _transform(model, settings_of(rule, filter_fn, overrides), process_group, in_place=False)


def transform_(
    model: nn.Module,
    rule: Rule | None = None,
    *,
    filter_fn: Filter | None = None,
    overrides: Overrides | None = None,
    process_group: Any = None,
) -> nn.Module:
    """Do what `transform` does to the model itself, and return it. After an error it is as it was."""
    return _transform(model, settings_of(rule, filter_fn, overrides), process_group, in_place=True)


def _transform(model: nn.Module, settings: Settings, process_group: Any, in_place: bool) -> nn.Module:
    with LOCK, torch.inference_mode(False):  # R is changed in place later on, which an inference tensor cannot be
        plan = make_plan(check_model(model), settings)
        return InsertDecorrelation(plan, Ranks(process_group), in_place)(model)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set every R of a transformed model by a few batches before training; no weight and no output changes.

    Without this, R starts at the identity and is learned from the first steps of training on. Every batch weighs the
    same, with `max_samples` of its rows at most; what R was before does not count. Forwards run without gradients, each
    module in the mode that it is in, but for the decorrelated layers, which record as in train mode. Statistics of
    BatchNorm, random numbers and modes are afterwards what they were.

    Args:
        model: a transformed model, of the rule `Power`.
        batches: what the model is called with, without labels, one after another: each a tensor, a tuple of positional
            arguments, or a dict of keyword arguments. Of several ranks each gives as many.

    Raises:
        NotTransformedError: the model is plain.
        ConfigError: the rule of a layer is not `Power`, or a step of its R changes the function.
        ModelError: there is no batch, the model does not run on one, or every R is paused or has a frozen weight.
        LayerError: a batch gives a layer inputs that are not finite.
        DistributedError: R is not the same on all ranks.

    After any error, of the batches' own too, the model is as it was.
    """
    calibrate_sites(transformed(model), batches)


def fold(model: nn.Module) -> nn.Module:
    """Return a plain copy of a transformed model, or of a part of one: its own classes, without R.

    The weights are those of the model, which is not changed and can train on. A compiled or DDP-wrapped model is
    unwrapped first. `state_dict()` loads into the original class. `fold_` makes no copy.

    Raises:
        NotTransformedError: the model is plain, or was folded already.
        ModelError: the model cannot be copied.
        DistributedError: it is sharded by `fully_shard`; use `fold_`.
    """
    return FoldDecorrelation(in_place=False)(unwrapped(model))


def fold_(model: nn.Module) -> nn.Module:
    """Make a transformed model plain where it is, and return it: what `fold` does, without a copy.

    A model that `fully_shard` has cut stays sharded. An optimizer goes on as for the plain model.

    Raises:
        NotTransformedError: the model is plain, or was folded already.
    """
    return FoldDecorrelation(in_place=True)(unwrapped(model))


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> ExportReport:
    """Fold the model and write it as an ONNX file that has no trace of the method and no cost at inference.

    Args:
        model: a transformed model, which is not changed; a plain one is exported as it is.
        path: the file to write; it appears, or is replaced, only after every check has passed.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Dimension 0 of each tensor is the batch.
        dynamic_batch: let the file take any batch size.
        verify: run the file in onnxruntime, at two batch sizes where the batch is dynamic, and compare with the model.

    Raises:
        ExportError: the path cannot be written, the model does not accept the inputs or cannot be exported, a package
            is missing, or onnxruntime does not agree with the model. No file is left then.
    """
    model = unwrapped(model)
    changed = next(sites_of(model), None) is not None
    plain = FoldDecorrelation(in_place=False)(model) if changed else copy_model(model, shared=[])
    plain.eval()  # which a user's own train() may let return None
    return ExportOnnx(Path(path), Example.of(example_inputs), dynamic_batch, verify)(plain)


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep: float = 0.5,
    measure: Measure = "macs",
    order: str | Order = "backward",
    weighting: Weighting = "output",
    example_inputs: Any,
    round_to: int = 1,
    min_units: int = 1,
    residual_streams: bool = False,
    filter_fn: Filter | None = None,
) -> PruneResult:
    """Return a smaller copy of a trained model: units are removed, and what they told is folded into their readers.

    A unit is an output channel of a convolution or an output feature of a linear. Its readers, the next layers, get the
    weights that are best, in least squares, for the units that are left, by the second moments of what they read. How
    many units each layer keeps follows from one threshold for all, set so that the budget is met. Statistics of
    BatchNorm are estimated anew. The model is not changed; the result is an ordinary model of the same class with
    smaller layers: fine-tune it, transform it, export it. Source: subspace node pruning, arXiv 2405.17506.

    Args:
        model: a plain, trained model; `fold` a transformed one first. Graphs are made by `torch.export`.
        calibration: what the model is called with, without labels: batches, each a tensor, a tuple of positional
            arguments, or a dict of keyword arguments. Training examples will do, and more rows than there are units in
            any layer are needed. Run twice where there is BatchNorm: a list or a loader, not a generator.
        keep: the part of the model that is to stay, in (0, 1]; met to within a unit, from below.
        measure: of what: `macs`, multiply-adds of convs and linears for an example like `example_inputs`, or `params`.
        order: which units go first. `backward`: one after another that whose removal costs the readers least; `zca`:
            those with the least `1 / [C^-1/2]_ii^2`, C the second moment of the units, as published; `l1`: those with
            the least L1 norm of the weights that make them; or a function of `Units` that returns a score for each, of
            which the largest are kept.
        weighting: what the threshold is of: `output`, the squared error of the readers' outputs, or `variance`, the
            second moment of the units that the kept ones do not tell.
        example_inputs: what the model is called with; dimension 0 of each tensor is the batch.
        round_to: layers keep multiples of it, or all of their units. With onnxruntime on CPUs the result is much
            faster with 16 than with 1.
        min_units: no layer keeps fewer, unless it has fewer.
        residual_streams: cut units that are sums of what several layers made, too, all in the same places.
        filter_fn: called with (module, fqn) of each layer; its units all stay where it returns False.

    Raises:
        ConfigError: a setting is wrong, or the budget cannot be met: it says the smallest that can.
        ModelError: the model is transformed, cannot be exported, has no units to remove, or does not run; or
            there is no batch.
        LayerError: a layer reads what is not finite, or fewer rows than it has units.
    """
    settings = PruneSettings(
        keep=keep, measure=measure, order=order, weighting=weighting, round_to=round_to, min_units=min_units,
        residual_streams=residual_streams, filter_fn=filter_fn,
    )  # fmt: skip
    return PruneUnits(calibration, Example.of(example_inputs), settings)(unwrapped(model))


def stepping(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context for a step that is not that of a `torch.optim.Optimizer`: weights are to move inside of it.

    `with decorr_fx.stepping(model): ...` does what is otherwise done around `optimizer.step()`: on entry the gradients
    are mapped to coordinates of the decorrelated inputs, in place; on exit the moves of the weights are mapped back,
    and R moves where it is due.

    Raises:
        NotTransformedError: the model is plain.
        DistributedError: R is not the same on all ranks, or a weight is sharded in a way in which rows are not whole.
        LayerError: a weight was pruned or parametrized after `transform`.
    """
    return hooks.stepping_sites(transformed(model))


def paused(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which no R of the model moves; steps of weights go through R as it is.

    Raises:
        NotTransformedError: the model is plain.
    """
    return hooks.paused_sites(transformed(model))
