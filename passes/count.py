"""Counting: how many rows each site maps, seen in one forward of a copy of the plain model."""

from typing import Any

from torch import nn

from decorr_fx.inputs import Example, random_numbers_kept
from decorr_fx.ops.sample import rows_of
from decorr_fx.passes.copies import computed_tensors, copy_model
from decorr_fx.passes.plan import Plan
from decorr_fx.runtime.watch import Call, Watch, has_rows


def count_rows(plan: Plan, example: Example) -> dict[str, int]:
    """Return how many rows each site of a plan maps in a forward in train mode, by its fqn.

    Raises:
        ModelError: the model does not run on the example.
    """
    scratch = _with_own_buffers(plan)
    planned = [weight for site in plan.sites for weight in site.weights]
    places = list(dict.fromkeys((weight.piece, weight.path) for weight in planned))
    counted: dict[str, int] = {}

    def count(index: int, rows: tuple[int, int] | None, call: Call) -> None:
        fqns = (w.fqn for w in planned if (w.piece, w.path) == places[index] and has_rows(w.rows, rows))
        if (fqn := next(fqns, None)) is not None:
            W = call.arguments["weight"]
            geometry = call.signature.geometry(call.arguments, W.shape)
            counted[fqn] = counted.get(fqn, 0) + rows_of(call.x, geometry, call.out_size)

    weights = [scratch.get_submodule(piece).get_parameter(path) for piece, path in places]
    with random_numbers_kept(scratch), Watch(weights, count):
        example.run(scratch, "example_inputs in train mode")
    return counted


def _with_own_buffers(plan: Plan) -> Any:
    """Return a copy of what was traced, in which adapters stand for what cannot be seen, with buffers of its own."""
    scratch = plan.traced.scratch
    parameters: list[nn.Parameter] = [*scratch.parameters()]
    return copy_model(scratch, shared=parameters, detached=computed_tensors(scratch))
