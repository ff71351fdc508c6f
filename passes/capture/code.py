"""Reading code: what a forward names, for what a graph cannot show.

The code is that of the forward, of what is defined inside it, of the methods and plain functions that it names, and of
its parents' forwards where it calls `super()`; code of torch is not followed.
"""

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_conv_forward",
    "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear",
}  # fmt: skip
METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad"}


def may_multiply(module: nn.Module) -> bool:
    """Tell whether the forward, as far as its code can be followed, calls a conv, a linear or another product."""
    codes = _reachable(module)
    named = any(PRODUCTS.intersection(code.co_names) for code in codes)
    return named or any(step.argrepr in ("@", "@=") for code in codes for step in dis.get_instructions(code))


def parameters_in_forward(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters whose values the forward reads by name, like `self.head.weight`.

    A `.weight` of what is not found from `self`, as of a loop variable, may be any parameter below the module.
    """
    for code in _reachable(module):
        for start, chain in _attribute_chains(code):
            found, rest = _resolve(module, chain) if start == "self" else (None, chain)
            if isinstance(found, nn.Parameter):
                if not METADATA.intersection(rest[:1]):
                    yield found
            elif isinstance(found, nn.Module) and rest:
                continue  # there is no such attribute: a way that this instance does not take
            elif "weight" in rest and not METADATA.intersection(rest[rest.index("weight") + 1 :][:1]):
                yield from module.parameters()


def _reachable(module: nn.Module) -> list[CodeType]:
    waiting: list[Any] = [type(module).forward]
    codes: dict[CodeType, None] = {}
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, FunctionType) or str(function.__module__).startswith("torch."):
            continue
        for code in _nested(function.__code__):
            if code in codes:
                continue
            codes[code] = None
            names = set(code.co_names)
            waiting += [inspect.getattr_static(type(module), name, None) for name in names]
            waiting += [value for name in names if isinstance(value := vars(module).get(name), FunctionType)]
            waiting += [function.__globals__.get(name) for name in names]
            if "super" in names:
                waiting += [vars(parent).get("forward") for parent in type(module).__mro__]
    return list(codes)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield the code and that of what is defined in it, as comprehensions are."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _attribute_chains(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """Yield ("self", ["head", "weight"]) for `self.head.weight`, and ("", [...]) where the start is no variable."""
    start, chain = "", []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(instruction.argval))
            continue
        if chain:
            yield start, chain
        chain = []
        loads = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL"))
        start = str(instruction.argval) if loads else ""
    if chain:
        yield start, chain


def _resolve(module: nn.Module, chain: list[str]) -> tuple[object, list[str]]:
    """Follow the chain from the module to the first parameter or to where it ends; return that and the rest."""
    found: object = module
    for i, name in enumerate(chain):
        if isinstance(found, nn.Parameter) or not isinstance(found, nn.Module) or not hasattr(found, name):
            return found, chain[i:]
        found = getattr(found, name)
    return found, []
