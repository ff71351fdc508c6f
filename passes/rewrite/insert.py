"""Insertion: make the sites of a plan, and let their layers record."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from decorr_fx.passes.base import Pass
from decorr_fx.passes.capture.check import check_model
from decorr_fx.passes.copies import copy_sharing_tensors
from decorr_fx.passes.match.weights import FoundWeight
from decorr_fx.passes.plan import Plan, SitePlan
from decorr_fx.passes.rewrite.layer import as_watched_layer
from decorr_fx.runtime.private import add_recording_hook, has_recording_hook
from decorr_fx.runtime.site.attachment import attach
from decorr_fx.runtime.site.ranks import Ranks
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.site.weight import SiteWeight
from decorr_fx.runtime.watch import HOOKED, Read, record_input


@dataclass(frozen=True)
class InsertDecorrelation(Pass[nn.Module]):
    """Return the model, or a copy over the same parameters and buffers, with the sites of the plan.

    R is the identity. Only what calls a weight itself is changed: see `rewrite.layer`.
    """

    plan: Plan
    ranks: Ranks
    in_place: bool

    def requires(self, model: nn.Module) -> None:
        """The model is not transformed yet."""
        check_model(model)

    def call(self, model: nn.Module) -> nn.Module:
        """Insert every site."""
        result = model if self.in_place else copy_sharing_tensors(model)
        reads: dict[str, list[Read]] = {}
        warned: set[str] = set()
        for planned in self.plan.sites:
            site = _make_site(result, planned, self.ranks, warned)
            self._connect(result, site, planned.weights[0], reads)
        for piece, of_piece in reads.items():
            as_watched_layer(result.get_submodule(piece), tuple(of_piece), self.plan.traced.adapters.get(piece))
        attach(result, self.plan.skipped)
        return result

    def _connect(self, model: nn.Module, site: Site, weight: FoundWeight, reads: dict[str, list[Read]]) -> None:
        """Let every module that calls the first weight of a site find it: the first of them has it as a child."""
        pieces = [piece for piece, _ in weight.places]
        for number, (piece, path) in enumerate(weight.places):
            module, hooked = model.get_submodule(piece), self.plan.is_hooked(weight, piece)
            name = HOOKED if hooked else _site_name(path, weight.rows)
            if number:
                vars(module)[name] = site  # no child: the keys of a site are in a checkpoint once
            else:
                module.add_module(name, site.train(module.training))
            if any(_is_inside(piece, other) for other in pieces):
                continue  # that one sees the calls of this one, too
            if not hooked:
                reads.setdefault(piece, []).append(Read(path, weight.rows, name))
            elif not has_recording_hook(module, record_input):
                add_recording_hook(module, record_input)

    def ensures(self, model: nn.Module, result: nn.Module) -> None:
        """All keys of the model are still there, and every planned site exists."""
        missing = model.state_dict().keys() - result.state_dict().keys()
        if missing:
            raise self.broken(min(missing), "the key of the plain model is gone")
        if len(list(sites_of(result))) != len(self.plan.sites):
            raise self.broken("the model", "a planned site is missing")


def _is_inside(piece: str, other: str) -> bool:
    """Tell whether a module is one of those in another."""
    return piece != other and (not other or piece.startswith(f"{other}."))


def _site_name(path: str, rows: tuple[int, int] | None) -> str:
    """Return the name of the site beside a parameter."""
    part = "" if rows is None else f"_{rows[0]}"
    return f"{path.replace('.', '__')}_decorr{part}"


def _make_site(model: nn.Module, plan: SitePlan, ranks: Ranks, warned: set[str]) -> Site:
    weights = []
    for spec, found in zip(plan.spec.weights, plan.weights, strict=True):
        owner, _, name = found.path.rpartition(".")
        module: Any = model.get_submodule(found.piece).get_submodule(owner)
        weights.append(SiteWeight(spec, module, name, found.rows))
    return Site(plan.spec, tuple(weights), ranks, warned)
