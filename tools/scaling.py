"""Print what decorrelation costs a rank of many, counted from the shapes of large models: the table of docs/scaling.md.

    python tools/scaling.py

Models are on the meta device: nothing is allocated or run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.ops.cost import move_flops, own_flops
from decorr_fx.runtime.distributed import exchanged_bytes
from decorr_fx.runtime.state import Site, sites_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": torchvision.models.resnet50,
    "ViT-L/16": lambda: timm.create_model("vit_large_patch16_224"),
    "Llama 7B": lambda: LlamaForCausalLM(LlamaConfig()),
}
RANKS = (1, 8, 64, 1024)
MEBI, GIGA = 2**20, 1e9


def scaling_table(models: Sequence[str] = tuple(MODELS), ranks: Sequence[int] = RANKS) -> str:
    """Return the table as Markdown."""
    headers = [
        "model", "ranks", "R, moments (MiB)", "rows (MiB)", "sent for a step of R (MiB)",
        "on average, of gradients", "a step of R (GFLOP)", "of it sharded (GFLOP)", "sharded, of a training step",
    ]  # fmt: skip
    rows = [row for name in models for row in _rows(name, ranks)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _rows(name: str, ranks: Sequence[int]) -> list[list[str]]:
    with torch.device("meta"):
        plain = MODELS[name]()
    model = decorr_fx.transform(plain)
    sites, every = list(sites_of(model)), DecorrConfig().update_every
    report = decorr_fx.report(model)
    gradients = sum(p.nbytes for p in plain.parameters())
    sent, own = exchanged_bytes(sites), sum(map(_own, sites))
    held, rows = sum(s.bytes for s in report.sites) / MEBI, sum(s.row_bytes for s in report.sites) / MEBI
    found = []
    for count in ranks:
        sharded = sum(_step(site, count) for site in sites)
        found.append([
            name if count == ranks[0] else "", f"{count:,}", f"{held:,.0f}", f"{rows:,.0f}",
            f"{sent / MEBI:,.0f}" if count > 1 else "-", f"{sent / every / gradients:.1%}" if count > 1 else "-",
            f"{sum(_step(site, 1) for site in sites) / GIGA:,.1f}", f"{sharded / GIGA:,.1f}",
            f"{sharded / every / own:.2%}",
        ])  # fmt: skip
    return found


def _own(site: Site) -> int:
    return own_flops([weight.layout for weight in site.spec.weights], site.spec.work)


def _step(site: Site, ranks: int) -> int:
    """Return the FLOP of a step of R on one of the ranks that hold the weights together."""
    layouts = [weight.layout for weight in site.spec.weights]
    held = [replace(layout, d_out=-(-layout.d_out // ranks)) for layout in layouts]
    return move_flops(held, site.spec.work, site.spec.config)


if __name__ == "__main__":
    print(scaling_table())
