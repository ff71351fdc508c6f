"""The verbs. Each one is: check, run these passes, return."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from decorr_fx.config import DecorrConfig
from decorr_fx.errors import ConfigError, ModelError, NotTransformedError
from decorr_fx.inputs import Example
from decorr_fx.ops.prune.orders import Order
from decorr_fx.passes.calibrate import calibrate_sites
from decorr_fx.passes.capture.check import check_model
from decorr_fx.passes.copies import copy_model
from decorr_fx.passes.export import ExportOnnx, ExportReport
from decorr_fx.passes.match.settings import Filter, Overrides, Settings
from decorr_fx.passes.measure import measure_works
from decorr_fx.passes.plan import Plan, make_plan
from decorr_fx.passes.prune.prune import Measure, PruneSettings, PruneUnits, Weighting
from decorr_fx.passes.prune.report import PruneResult
from decorr_fx.passes.rewrite.fold import FoldDecorrelation, FoldInPlace
from decorr_fx.passes.rewrite.insert import InsertDecorrelation
from decorr_fx.runtime.report import Report, Stats, collect_stats, describe, site_records
from decorr_fx.runtime.site.attachment import skipped_of
from decorr_fx.runtime.site.broadcast import follow_registrations
from decorr_fx.runtime.site.shard import reshard
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step import hooks as stepper


def transform(
    model: nn.Module,
    config: DecorrConfig | None = None,
    *,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    overrides: Overrides | None = None,
) -> nn.Module:
    """Return a copy of the model that decorrelates the input of its conv and linear layers while it trains.

    The model itself is not changed; parameters and buffers are shared with it, so that an optimizer made before goes on
    working. Outputs are those of the model until R moves, which happens right after a step of the optimizer that owns
    a layer's weight (any `torch.optim.Optimizer`): the training loop stays as it is. From then on the shared
    weights make sense to the copy only; `fold` it to get a plain model back. Source: arXiv 2405.02385.

    Args:
        model: a plain module: transform before compiling or wrapping it.
        config: the settings of all layers; `DecorrConfig()` if None.
        example_inputs: what the model is called with in training: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments; dimension 0 of each tensor is the batch. A copy of the model runs on them once, to see
            how many rows an example gives each layer: by that `report` counts what R costs, and for rules of small
            steps `structure="auto"` is chosen. How many examples there are makes no difference.
        filter_fn: called with (module, fqn) of each layer; the layer is left alone where it returns False.
        overrides: other settings for layers whose whole fqn matches a regular expression, or None for "leave alone";
            the first pattern that matches counts.

    Raises:
        ModelError: the model is no module, has no layer to decorrelate, is compiled, wrapped or transformed already,
            or does not run on `example_inputs`.
        LayerError: a layer is lazy, or has a complex or integer weight.
        ConfigError: a setting is wrong, or a pattern matches no layer.
    """
    plan = _plan(check_model(model), config, example_inputs, filter_fn, overrides)
    stepper.follow_optimizers()
    follow_registrations()
    return InsertDecorrelation(plan)(model)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set every R of a transformed model by a few batches before training; the network's function stands still.

    Without this, R starts at the identity and is learned from the first steps of training on. Every batch weighs the
    same, with `max_samples` of its rows at most; what R was before does not count. Forwards run without gradients, each
    module in the mode that it is in, but for the decorrelated layers, which record as in train mode. Statistics of
    BatchNorm, random numbers and modes are afterwards what they were. The weights move, so that a plain model which
    shares them no longer computes the same. Needs room for a second copy of the weights and buffers while it runs.

    Args:
        model: a transformed model, of the rule `power`.
        batches: what the model is called with, without labels, one after another: each a tensor, a tuple of positional
            arguments, or a dict of keyword arguments. Of several ranks each gives as many.

    Raises:
        NotTransformedError: the model is plain.
        ConfigError: the rule of a layer is not `power`, it is centred, or its weight does not follow R.
        ModelError: there is no batch, the model does not run on one, or every R is paused or has a frozen weight.
        LayerError: a batch gives a layer inputs that are not finite, or a weight was untied after `transform`.
        DistributedError: R is not the same on all ranks, or a weight that is sharded cannot follow it.

    After any error, of the batches' own too, the model is as it was.
    """
    calibrate_sites(_transformed(model), batches)


def fold(model: nn.Module) -> nn.Module:
    """Return a plain copy of a transformed model: the original class, names and shapes, with R folded into the weights.

    The transformed model is not changed and can train on. A compiled or DDP-wrapped model is unwrapped first. Outputs
    equal those of the model in eval mode; `state_dict()` loads into the original class. `fold_` makes no copy.

    Raises:
        NotTransformedError: the model is plain, or was folded already.
        LayerError: a weight was pruned, parametrized or untied after `transform`.
        DistributedError: a weight is sharded over several ranks.
    """
    return FoldDecorrelation()(_unwrapped(model))


def fold_(model: nn.Module) -> nn.Module:
    """Make a transformed model plain where it is, and return it: what `fold` does, without a copy.

    For models of which a second copy has no room, and for those that `fully_shard` has cut: each rank folds the rows
    that it holds, the model stays sharded, and is saved as any sharded model is. All ranks call it; nothing is sent.
    An optimizer goes on owning the parameters, but what it remembers of their gradients is of the weights before.

    Raises:
        NotTransformedError: the model is plain, or was folded already.
        LayerError: a weight was pruned, parametrized or untied after `transform`.
        DistributedError: a weight is sharded in a way in which it cannot follow R.

    After an error the model is as it was.
    """
    return FoldInPlace()(_unwrapped(model))


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
        LayerError, DistributedError: the model cannot be folded, see `fold`.
    """
    model = _unwrapped(model)
    transformed = next(sites_of(model), None) is not None
    plain = FoldDecorrelation()(model) if transformed else copy_model(model, shared=[])
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
            those with the least `1 / [C^-1/2]_ii^2`, C the second moment of the units; `loo`: `1 / [C^-1]_ii`, what the
            others do not tell; `variance`: `C_ii`; `l1`: the L1 norm of the weights that make them; `random`; or a
            function of `Units` that returns a score for each, of which the largest are kept.
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
    return PruneUnits(calibration, Example.of(example_inputs), settings)(_unwrapped(model))


def report(
    model: nn.Module,
    config: DecorrConfig | None = None,
    *,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    overrides: Overrides | None = None,
) -> Report:
    """List every conv and linear of the model as a site or as skipped with the reason; printing it gives a table.

    Before `transform` it is the plan that the same arguments would lead to; of a transformed model it is what was done.

    Raises:
        ConfigError: settings were given for a model that is transformed already.
        ModelError: as `transform`, for a plain model.
    """
    inner = _unwrapped(model)
    if next(sites_of(inner), None) is not None:
        if any(setting is not None for setting in (config, example_inputs, filter_fn, overrides)):
            raise ConfigError("the model is transformed already: report(model) alone tells what was done")
        return Report(tuple(site_records(inner)), skipped_of(inner))
    plan = _plan(check_model(model), config, example_inputs, filter_fn, overrides)
    records = (record for site in plan.sites for record in describe(site.spec, site.element_size))
    return Report(tuple(records), plan.skipped)


def stats(model: nn.Module) -> Stats:
    """Return residual correlation, variance error, steps taken and refused of every site; printing it gives a table.

    Raises:
        NotTransformedError: the model is plain.
    """
    return collect_stats(sites_of(_transformed(model)))


def step(model: nn.Module) -> None:
    """Tell the model that its weights have changed, for a loop whose optimizer is not a `torch.optim.Optimizer`.

    Every R moves at one of `update_every` calls, the first one among them; a site that recorded nothing does not move.

    Raises:
        NotTransformedError: the model is plain.
        DistributedError: R is not the same on all ranks, or a weight that is sharded cannot follow it.
        LayerError: a weight was untied after `transform`.
    """
    reshard(inner := _transformed(model))
    stepper.step_sites(sites_of(inner))


def paused(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which no R of the model moves; rows not used by its end are dropped.

    Raises:
        NotTransformedError: the model is plain.
    """
    return stepper.paused_sites(_transformed(model))


def _plan(
    model: nn.Module,
    config: DecorrConfig | None,
    example_inputs: Any,
    filter_fn: Filter | None,
    overrides: Overrides | None,
) -> Plan:
    if config is not None and not isinstance(config, DecorrConfig):
        raise ConfigError(f"config is {config!r}; use a DecorrConfig")
    settings = Settings(config or DecorrConfig(), filter_fn, overrides or {})
    works = {} if example_inputs is None else measure_works(model, settings, Example.of(example_inputs))
    return make_plan(model, settings, works)


def _transformed(model: nn.Module) -> nn.Module:
    inner = _unwrapped(model)
    if next(sites_of(inner), None) is None:
        raise NotTransformedError(f"{type(inner).__name__} is not transformed; call decorr_fx.transform on it first")
    return inner


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
