"""What `DistributedDataParallel` leaves alone: every rank has the same R without being told, and rows of its own.

DDP sends buffers from the first rank to all others before each forward, but for those that the module which it wraps
names. That may be a module around a transformed model, as a LightningModule is: whatever takes such a model in is told.
"""

from collections.abc import Iterable
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from decorr_fx.runtime.state import Site

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # DDP reads it off the module that it wraps
_BEFORE = "_decorr_ignored_by_ddp_before"  # what the module itself had said; None if nothing


def keep_from_broadcast(model: nn.Module) -> None:
    """Let DDP leave the buffers of all sites of a model alone, wherever the model will be put."""
    follow_registrations()
    _ignore(model, _site_buffers(model))


def allow_broadcast(module: nn.Module) -> None:
    """Undo `keep_from_broadcast` for one module, where it was done, or passed on to it."""
    if _BEFORE not in vars(module):
        return
    before = vars(module).pop(_BEFORE)
    del vars(module)[_IGNORED]
    if before is not None:
        vars(module)[_IGNORED] = before


@cache
def follow_registrations() -> None:
    """Tell every module of what it takes in, from now on; calling it again does nothing."""
    register_module_module_registration_hook(_pass_on)


def _pass_on(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is not None and _BEFORE in vars(child):
        _ignore(parent, [f"{name}.{buffer}" for buffer in _site_buffers(child)])


def _ignore(module: nn.Module, names: Iterable[str]) -> None:
    before = vars(module).get(_IGNORED)
    vars(module).setdefault(_BEFORE, before)
    vars(module)[_IGNORED] = list(dict.fromkeys([*(before or ()), *names]))


def _site_buffers(model: nn.Module) -> list[str]:
    sites = [(fqn, module) for fqn, module in model.named_modules() if isinstance(module, Site)]
    return [f"{fqn}.{buffer}" for fqn, site in sites for buffer in site._buffers]
