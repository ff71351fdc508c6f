"""Checking: what `transform` can take."""

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from decorr_fx.errors import LayerError, ModelError
from decorr_fx.runtime.site.shard import is_fsdp1
from decorr_fx.runtime.site.state import Site


def check_model(model: object) -> nn.Module:
    """Return the model if `transform` can take it.

    Raises:
        ModelError: not a module, compiled, wrapped, scripted or transformed already.
        LayerError: a lazy layer that has not run yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for fqn, module in model.named_modules():
        if isinstance(module, Site):
            raise ModelError("the model is transformed already; train it as it is, or fold it first")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ModelError(f"{fqn or 'the model'!r} is compiled; transform the plain model, then compile the result")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ModelError(
                f"{fqn or 'the model'!r} is wrapped in {type(module).__name__}; transform first, then wrap"
            )
        if is_fsdp1(module):
            raise ModelError(
                f"{fqn or 'the model'!r} is wrapped in FullyShardedDataParallel (FSDP1), which holds weights in flat "
                "parameters; transform the plain model, then shard it by torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{fqn or 'the model'!r} is a ScriptModule; transform the module it was scripted from")
        if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
            raise LayerError(fqn, "is lazy and has no weight yet; run the model once on an example, then transform it")
    return model
