"""The verbs that change nothing: what a model would become, what it is, and what the others need to know of it."""

from typing import Any

from torch import Tensor, nn

from decorr_fx.config import Power, Rule
from decorr_fx.errors import ConfigError, ModelError, NotTransformedError
from decorr_fx.inputs import Example
from decorr_fx.passes.capture.check import check_model
from decorr_fx.passes.count import count_rows
from decorr_fx.passes.match.settings import Filter, Overrides, Settings
from decorr_fx.passes.plan import Plan, make_plan
from decorr_fx.passes.rewrite.fold import FoldDecorrelation
from decorr_fx.runtime.report import Report, describe, site_records
from decorr_fx.runtime.site.attachment import skipped_of
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.stats import Stats, collect_stats


def report(
    model: nn.Module,
    rule: Rule | None = None,
    *,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    overrides: Overrides | None = None,
) -> Report:
    """List every conv and linear of the model as a site or as skipped with the reason; printing it gives a table.

    Before `transform` it is the plan that the same arguments would lead to; of a transformed model it is what was done.

    Args:
        model: plain or transformed.
        rule: as in `transform`.
        example_inputs: what the model is called with in a training step: a tensor, a tuple of positional arguments, or
            a dict of keyword arguments. A copy of the plain model runs on them once, and the rows of each layer are
            counted, by which costs are given; without them 4096 rows are assumed.
        filter_fn: as in `transform`.
        overrides: as in `transform`.

    Raises:
        ConfigError: settings were given for a model that is transformed already.
        ModelError: as `transform`, for a plain model; or it does not run on `example_inputs`.
    """
    inner, example = unwrapped(model), None if example_inputs is None else Example.of(example_inputs)
    if next(sites_of(inner), None) is None:
        plan = make_plan(check_model(model), settings_of(rule, filter_fn, overrides))
        rows = count_rows(plan, example) if example else {}
        counted = ((site, rows.get(site.spec.fqn, 0)) for site in plan.sites)
        records = (one for site, count in counted for one in describe(site.spec, site.element_size, count))
        return Report(tuple(records), plan.skipped, example is not None)
    if any(setting is not None for setting in (rule, filter_fn, overrides)):
        raise ConfigError("the model is transformed already: report(model, example_inputs=...) tells what was done")
    rows = count_rows(_plan_of_plain(inner), example) if example else {}
    return Report(tuple(site_records(inner, rows)), skipped_of(inner), example is not None)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return R of every site as dense matrices `[groups, d, d]`, by the name of the site, for inspection.

    `z = R x` for rows x of the layer's input, of which the features are channel-major.

    Raises:
        NotTransformedError: the model is plain.
    """
    return {site.spec.fqn: site.dense() for site in sites_of(transformed(model))}


def state_keys(model: nn.Module) -> set[str]:
    """Return the keys of `model.state_dict()` that are of R, and not of the plain model.

    They let training go on bit for bit. A checkpoint without them is one of the plain model: its weights are right in
    either, and R of a transformed model that loads it stays as it is.

    Raises:
        NotTransformedError: the model is plain.
    """
    inner = transformed(model)
    names = [name for name, module in inner.named_modules(remove_duplicate=False) if isinstance(module, Site)]
    return {key for key in inner.state_dict() if key.startswith(tuple(f"{name}." for name in names))}


def stats(model: nn.Module) -> Stats:
    """Return residual correlation, variance error, steps taken and refused of every site; printing it gives a table.

    Raises:
        NotTransformedError: the model is plain.
    """
    return collect_stats(sites_of(transformed(model)))


def _plan_of_plain(model: nn.Module) -> Plan:
    """Return a plan for the plain copy of a transformed model that has the sites of the model, by their names."""
    return make_plan(FoldDecorrelation(in_place=False)(model), settings_of(None, None, None))


def settings_of(rule: Rule | None, filter_fn: Filter | None, overrides: Overrides | None) -> Settings:
    """Return the settings that the arguments of `transform` come to."""
    return Settings(Power() if rule is None else rule, filter_fn, {} if overrides is None else overrides)


def transformed(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers.

    Raises:
        NotTransformedError: it is plain.
    """
    inner = unwrapped(model)
    if next(sites_of(inner), None) is None:
        raise NotTransformedError(f"{type(inner).__name__} is not transformed; call decorr_fx.transform on it first")
    return inner


def unwrapped(model: nn.Module) -> nn.Module:
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
