"""The stage of training: one step of SGD, after which every R and every weight with a gradient has to have moved."""

from typing import Any

import torch
from torch import Tensor

import decorr_fx
from tools.zoo.compare import Failed, seed_all
from tools.zoo.examples import float_tensors
from tools.zoo.subject import Subject, some

LEARNING_RATE = 1e-3
FACTORS = ("V", "R", "A", "S")


def train_one_step(subject: Subject) -> None:
    """Take one step of SGD; every R and every weight with a gradient has to move."""
    model = subject.transformed
    model.train()
    before = _factors(subject)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    seed_all()
    loss = _loss(subject.example.call(model))
    if not loss.isfinite():
        raise Failed(f"the loss is {loss.item()}")
    loss.backward()
    moved = _with_gradient(subject)
    optimizer.step()
    _check_steps(subject, moved, before)
    optimizer.zero_grad(set_to_none=True)


def _loss(outputs: Any) -> Tensor:
    terms = [t.masked_fill(t.isneginf(), 0).square().mean() for t in float_tensors(outputs) if t.requires_grad]
    if not terms:
        raise Failed("no output of the model in train mode has a gradient")
    return torch.stack(terms).sum()


def _with_gradient(subject: Subject) -> set[str]:
    """Return the names of the parameters that have a gradient."""
    own = subject.transformed.named_parameters(remove_duplicate=False)
    return {name for name, parameter in own if parameter.grad is not None}


def _factors(subject: Subject) -> dict[str, Tensor]:
    """Return copies of the factors of every R, or of V: they are saved under these names."""
    keys = subject.transformed.state_dict().keys() - subject.plain.state_dict().keys()
    state = subject.transformed.state_dict()
    return {key: state[key].clone() for key in keys if key.rpartition(".")[2] in FACTORS}


def _check_steps(subject: Subject, moved: set[str], before: dict[str, Tensor]) -> None:
    stats = decorr_fx.stats(subject.transformed)
    if refused := [site.fqn for site in stats if site.refused]:
        raise Failed(f"{len(refused)} sites refused their step: {some(refused)}")
    due = {name for names in subject.weights if moved.intersection(names) for name in names}
    still = [site.fqn for site in stats if site.steps != 1 and _is_due(site.fqn, due)]
    if still:
        raise Failed(f"{len(still)} sites whose weight has a gradient took no step: {some(still)}")
    stepped = sum(site.steps == 1 for site in stats)
    state = subject.transformed.state_dict()
    changed = sum(not torch.equal(state[key], value) for key, value in before.items())
    if changed < stepped:
        raise Failed(f"{stepped} sites took a step, and only {changed} factors of R changed")
    _check_parameters_moved(subject)


def _is_due(site: str, due: set[str]) -> bool:
    return any(site in (name, name.removesuffix(".weight")) or site.startswith(f"{name}.") for name in due)


def _check_parameters_moved(subject: Subject) -> None:
    start = dict(subject.plain.named_parameters())
    still = []
    for name, parameter in subject.transformed.named_parameters():
        gradient = parameter.grad
        if gradient is None or not gradient.isfinite().all() or not torch.equal(parameter, start[name]):
            continue
        if not torch.equal(start[name] - LEARNING_RATE * gradient, start[name]):  # else it is lost in rounding
            still.append(name)
    if still:
        raise Failed(f"{len(still)} parameters with a gradient did not change: {some(still)}")
