"""What `DistributedDataParallel` leaves alone: every rank has the same R without being told, and rows of its own.

DDP sends buffers from the first rank to all others before each forward, but for those that it is told to ignore. It is
told at the moment when it takes in the module that it wraps, which may hold a transformed model anywhere, as a
LightningModule does. That is also when FSDP1, which cannot be supported, is refused.
"""

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from decorr_fx.errors import DistributedError
from decorr_fx.runtime.site.registry import while_sites_live
from decorr_fx.runtime.site.shard import is_fsdp1
from decorr_fx.runtime.site.state import Site


@cache
def _start() -> None:
    register_module_module_registration_hook(_spare_sites)


def _spare_sites(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Look at each module that becomes a child of another.

    Raises:
        DistributedError: FSDP1 wraps a transformed model.
    """
    if isinstance(parent, DistributedDataParallel) and child is not None:
        sites = [(fqn, module) for fqn, module in child.named_modules() if isinstance(module, Site)]
        parent.parameters_to_ignore.update(f"{fqn}.{buffer}" for fqn, site in sites for buffer in site._buffers)
    elif is_fsdp1(parent) and child is not None:
        site = next((module for module in child.modules() if isinstance(module, Site)), None)
        if site is not None:
            raise DistributedError(
                f"layer {site.spec.fqn!r}: FullyShardedDataParallel (FSDP1) holds its weight in a flat parameter, so "
                "that it cannot be decorrelated; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


while_sites_live(_start, lambda: None)
