"""What `DistributedDataParallel` leaves alone: every rank has the same R without being told, and rows of its own.

DDP sends buffers from the first rank to all others before each forward, but for those that it is told to ignore. It is
told at the moment when it takes in the module that it wraps, which may hold a transformed model anywhere, as a
LightningModule does.
"""

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from decorr_fx.runtime.site.registry import while_sites_live
from decorr_fx.runtime.site.state import Site


@cache
def _start() -> None:
    register_module_module_registration_hook(_spare_sites)


def _spare_sites(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and child is not None:
        sites = [(fqn, module) for fqn, module in child.named_modules() if isinstance(module, Site)]
        parent.parameters_to_ignore.update(f"{fqn}.{buffer}" for fqn, site in sites for buffer in site._buffers)


while_sites_live(_start, lambda: None)
