"""The stage of training: two steps of SGD, at each of which every R moves whose weight has a gradient.

The first step begins with the identity as R. At the second one gradients and moves of the weights go through R.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import decorr_fx
from tools.zoo.compare import Failed, seed_all
from tools.zoo.examples import float_tensors
from tools.zoo.subject import Subject, some

LEARNING_RATE = 1e-3
FACTORS = ("U", "R", "A", "S")  # of R, as they are called where they are saved


def train_two_steps(subject: Subject) -> None:
    """Take two steps of SGD; at each every R has to move whose weight has a gradient."""
    model = subject.transformed
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    _step(subject, optimizer)
    _check_parameters_moved(subject)
    optimizer.zero_grad(set_to_none=True)
    _step(subject, optimizer)
    if lost := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise Failed(f"{len(lost)} parameters are not finite after two steps: {some(lost)}")
    optimizer.zero_grad(set_to_none=True)


def _step(subject: Subject, optimizer: torch.optim.Optimizer) -> None:
    model = subject.transformed
    factors, steps = _factors(subject), _steps(model)
    seed_all()
    loss = _loss(subject.example.call(model))
    if not loss.isfinite():
        raise Failed(f"the loss is {loss.item()}")
    loss.backward()
    with_gradient = _with_gradient(model)
    optimizer.step()
    _check_steps(subject, with_gradient, factors, steps)


def _loss(outputs: Any) -> Tensor:
    terms = [t.masked_fill(t.isneginf(), 0).square().mean() for t in float_tensors(outputs) if t.requires_grad]
    if not terms:
        raise Failed("no output of the model in train mode has a gradient")
    return torch.stack(terms).sum()


def _with_gradient(model: nn.Module) -> set[str]:
    """Return the names of the parameters that have a gradient."""
    own = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in own if parameter.grad is not None}


def _factors(subject: Subject) -> dict[str, Tensor]:
    """Return copies of the factors of every R."""
    state = subject.transformed.state_dict()
    keys = decorr_fx.state_keys(subject.transformed)
    return {key: state[key].clone() for key in keys if key.rpartition(".")[2] in FACTORS}


def _steps(model: nn.Module) -> dict[str, int]:
    """Return how many steps each R has taken, by the name of its site."""
    return {site.fqn: site.steps for site in decorr_fx.stats(model)}


def _check_steps(
    subject: Subject, with_gradient: set[str], before: Mapping[str, Tensor], steps: Mapping[str, int]
) -> None:
    stats = decorr_fx.stats(subject.transformed)
    if refused := [site.fqn for site in stats if site.refused]:
        raise Failed(f"{len(refused)} sites refused their step: {some(refused)}")
    due = {name for names in subject.weights if with_gradient.intersection(names) for name in names}
    stepped = {site.fqn for site in stats if site.steps == steps[site.fqn] + 1}
    still = [site.fqn for site in stats if site.fqn not in stepped and _is_due(site.fqn, due)]
    if still:
        raise Failed(f"{len(still)} sites whose weight has a gradient took no step: {some(still)}")
    state = subject.transformed.state_dict()
    changed = sum(not torch.equal(state[key], value) for key, value in before.items())
    of_zeros = sum(not value.any() for key, value in state.items() if key.endswith("_decorr.trace"))  # R stays as it is
    if changed < len(stepped) - of_zeros:
        raise Failed(f"{len(stepped)} sites took a step, and only {changed} factors of R changed")


def _is_due(site: str, due: set[str]) -> bool:
    return any(site in (name, name.removesuffix(".weight")) or site.startswith(f"{name}.") for name in due)


def _check_parameters_moved(subject: Subject) -> None:
    """Check the weights after the first step, whose gradients are those of the plain model."""
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
