"""Who is measured: the plain model, the rules of this library, the textbook form, and peers from PyPI."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import get_args

from torch import nn
from torch.optim import Adam, Optimizer

import decorr_fx
from decorr_fx import Dbp, Power, Rule
from decorr_fx.config import StructureName
from decorr_fx.runtime.site.schedule import moves_at
from decorr_fx.runtime.site.state import sites_of
from tools.bench.cases import Case
from tools.bench.models import build_model
from tools.bench.textbook import textbook
from tools.common.optimizers import from_heavyball

DECORRELATED: Mapping[str, Rule] = {
    "power": Power(),
    **{f"dbp-{shape}": Dbp(structure=shape) for shape in get_args(StructureName)},
}
PEERS = {"muon": "Muon", "soap": "SOAP", "shampoo": "KLShampoo"}  # of heavyball
MOVE_CYCLE = 4  # steps, of which R moves at the first
FIRST = 250  # steps, in which R moves more often than later
PEER_CYCLE = 2  # SOAP and Shampoo renew their preconditioner at every second step
COMPILE_MODE = "default"  # that of heavyball tries out kernels for minutes, and prints what it finds
METHODS = (*DECORRELATED, "textbook", *PEERS)


def prepare(case: Case, method: str) -> tuple[nn.Module, Optimizer]:
    """Return the model as the method trains it, and its optimizer; raise `UsageError` where a package lacks."""
    model = build_model(case)
    if method in DECORRELATED:
        model = decorr_fx.transform(model, rule_of(case, method))
    if method == "textbook":
        model = textbook(model)
    optimizer = from_heavyball(PEERS[method], COMPILE_MODE) if method in PEERS else Adam
    return model, optimizer(model.parameters(), lr=1e-4)


@dataclass(frozen=True)
class Kinds:
    """The kinds of a method's steps.

    Attributes:
        begin: called with the model and the number of the coming step; returns its kind.
        shares: part of the steps of a long training that is of a kind.
        first: likewise of the first `FIRST` steps.
    """

    begin: Callable[[nn.Module, int], Hashable]
    shares: Mapping[Hashable, float]
    first: Mapping[Hashable, float]


def step_kinds(method: str) -> Kinds:
    """Return which steps of a method are alike."""
    if method in DECORRELATED:
        every = DECORRELATED[method].update_every
        first = sum(moves_at(step, every) for step in range(FIRST)) / FIRST
        return Kinds(_let_move, {True: 1 / every, False: 1 - 1 / every}, {True: first, False: 1 - first})
    cycle = PEER_CYCLE if method in PEERS else 1
    shares = dict.fromkeys(range(cycle), 1 / cycle)
    return Kinds(lambda _, number: number % cycle, shares, shares)


def _let_move(model: nn.Module, number: int) -> bool:
    """Let R move at every fourth step, of those that are timed; return whether it does at this one.

    So the kinds of steps are both there, however few are timed; their shares are those of a long training.
    """
    moves = number % MOVE_CYCLE == 0
    for site in sites_of(model):
        every = site.spec.rule.update_every
        later = count(every**2)  # past the first steps, at which it moves more often
        site.schedule.restart(next(step for step in later if moves_at(step, every) is moves))
        site.begin_recording()
    return moves


def rule_of(case: Case, method: str) -> Rule:
    """Return the rule of a method, with what the case asks for."""
    rule = DECORRELATED[method]
    return rule if case.max_samples is None else replace(rule, max_samples=case.max_samples)
