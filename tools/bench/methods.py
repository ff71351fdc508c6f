"""Who is measured: the plain model, the rules of this library, the textbook form, and peers from PyPI."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import decorr_fx
from decorr_fx.config import DecorrConfig, StructureName
from decorr_fx.runtime.site.state import sites_of
from tools.bench.cases import Case
from tools.bench.textbook import textbook
from tools.common.errors import UsageError
from tools.common.optimizers import from_heavyball

CLASSES = 100
LINEARS = 3
DECORRELATED = {
    "power": DecorrConfig(),
    **{f"dbp-{shape}": replace(DecorrConfig.recipe("dbp"), structure=shape) for shape in get_args(StructureName)},
}
PEERS = {"muon": "Muon", "soap": "SOAP", "shampoo": "KLShampoo"}  # of heavyball
MOVE_CYCLE = 4  # steps, of which R moves at the first
PEER_CYCLE = 2  # SOAP and Shampoo renew their preconditioner at every second step
COMPILE_MODE = "default"  # that of heavyball tries out kernels for minutes, and prints what it finds
METHODS = (*DECORRELATED, "textbook", *PEERS)


def build_model(case: Case) -> nn.Module:
    """Return a new model of the case, with random weights."""
    torch.manual_seed(0)
    model = _make(case).to(case.device)
    return model.to(memory_format=torch.channels_last) if case.channels_last else model  # type: ignore[call-overload]


def _make(case: Case) -> nn.Module:
    if case.model == "linears":
        hidden = [layer for _ in range(LINEARS) for layer in (nn.Linear(case.width, case.width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(case.width, CLASSES))
    if case.model in torchvision.models.list_models(module=torchvision.models):
        return cast(nn.Module, torchvision.models.get_model(case.model, weights=None, num_classes=CLASSES))
    try:
        import timm
    except ImportError:
        raise UsageError(f"{case.model} is no torchvision model, and timm is not installed") from None
    if not timm.is_model(case.model):
        raise UsageError(f"{case.model} is neither a torchvision classifier nor a timm model")
    return cast(nn.Module, timm.create_model(case.model, pretrained=False, num_classes=CLASSES))


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return a batch of random images, or of rows, and labels."""
    shape = (case.batch, case.width) if case.model == "linears" else (case.batch, 3, case.size, case.size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(case.device)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(case.device)
    return (x.contiguous(memory_format=torch.channels_last) if case.channels_last else x), labels


def prepare(case: Case, method: str) -> tuple[nn.Module, Optimizer]:
    """Return the model as the method trains it, and its optimizer; raise `UsageError` where a package lacks."""
    model = build_model(case)
    if method in DECORRELATED:
        model = decorr_fx.transform(model, decorr_config(case, method), example_inputs=make_batch(case)[0])
    if method == "textbook":
        model = textbook(model)
    optimizer = from_heavyball(PEERS[method], COMPILE_MODE) if method in PEERS else Adam
    return model, optimizer(model.parameters(), lr=1e-4)


@dataclass(frozen=True)
class Kinds:
    """The kinds of a method's steps: `begin(model, number)` returns that of the coming step, `shares` is how often."""

    begin: Callable[[nn.Module, int], Hashable]
    shares: Mapping[Hashable, float]


def step_kinds(method: str) -> Kinds:
    """Return which steps of a method are alike."""
    if method in DECORRELATED:
        often = 1 / DECORRELATED[method].update_every
        return Kinds(_let_move, {True: often, False: 1 - often})
    if method in PEERS:
        return Kinds(lambda _, number: number % PEER_CYCLE, dict.fromkeys(range(PEER_CYCLE), 1 / PEER_CYCLE))
    return Kinds(lambda *_: 0, {0: 1.0})


def _let_move(model: nn.Module, number: int) -> bool:
    """Let R move at every fourth step, of those that are timed; return whether it does at this one.

    So the kinds of steps are both there, however few are timed; their shares are those of a long training.
    """
    moves = number % MOVE_CYCLE == 0
    for site in sites_of(model):
        site.attempts = site.spec.config.update_every**2  # past the first steps, at which it moves more often
        while site.due is not moves:
            site.attempts += 1
    return moves


def decorr_config(case: Case, method: str) -> DecorrConfig:
    """Return the settings of a method, with what the case asks for."""
    config = DECORRELATED[method]
    return config if case.max_samples is None else replace(config, max_samples=case.max_samples)
