"""A site that nobody owns: its rows are recorded again and again, and no optimizer has its weights."""

import gc
from collections.abc import Iterable
from warnings import warn

from torch import Tensor
from torch.optim import Optimizer

PATIENCE = 20  # backward passes without a step


def warn_if_unowned(fqn: str, weights: Iterable[Tensor]) -> bool:
    """Warn where no optimizer of the process has one of the weights; tell whether that is so.

    All objects are looked through, which takes a moment: an optimizer that has not stepped yet is known to nobody.
    """
    wanted = {id(weight) for weight in weights}
    for optimizer in [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]:
        if any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"]):
            return False
    warn(
        f"layer {fqn!r}: after {PATIENCE} backward passes no optimizer has stepped that owns its weight, so that it is "
        "trained as the plain layer. Give the parameters of the transformed model to a torch.optim.Optimizer, or tell "
        "when weights change: with decorr_fx.stepping(model): ...",
        stacklevel=2,
    )
    return True
