"""Print what decorrelation costs a rank of many, counted from the shapes of large models: the table of docs/scaling.md.

    python -m tools.scaling

Models are on the meta device: nothing is allocated or run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import timm
import torch
import torchvision
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import decorr_fx
from decorr_fx import Power
from decorr_fx.ops.cost import ASSUMED_ROWS, around_flops, own_flops, used_rank
from decorr_fx.runtime.site.ranks import given_by_each
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.divide import exchanged_bytes, owner_ranks, update_flops
from tools.common.tables import markdown_table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": torchvision.models.resnet50,
    "ViT-L/16": lambda: timm.create_model("vit_large_patch16_224"),
    "Llama 7B": lambda: LlamaForCausalLM(LlamaConfig()),
}
RANKS = (1, 2, 4, 8, 64, 1024)
MEBI, GIGA = 2**20, 1e9


def scaling_table(models: Sequence[str] = tuple(MODELS), ranks: Sequence[int] = RANKS) -> str:
    """Return the table as Markdown."""
    headers = [
        "model", "ranks", "R (MiB)", "rows (MiB)", "sent for a move of R (MiB)", "of gradients", "on average",
        "a move of R (GFLOP)", "around a step (GFLOP)", "sharded (GFLOP)", "sharded, of a training step",
    ]  # fmt: skip
    rows = [row for name in models for row in _rows(name, ranks)]
    return markdown_table(headers, rows)


def _rows(name: str, ranks: Sequence[int]) -> list[list[str]]:
    with torch.device("meta"):
        plain = MODELS[name]()
    model = decorr_fx.transform(plain)
    sites, every = list(sites_of(model)), Power().update_every
    gradients, own = sum(p.nbytes for p in plain.parameters()), sum(map(_own, sites))
    held = sum(site.bytes for site in decorr_fx.report(model).sites) / MEBI
    found = []
    for count in ranks:
        rows = sum(_row_bytes(site, count) for site in sites) / MEBI
        sent, moving = exchanged_bytes(sites, count), _moving(sites, count)
        part = sent / (2 * gradients * (count - 1) / count) if count > 1 else 0
        whole, sharded = (sum(_around(site, holders) for site in sites) for holders in (1, count))
        found.append([
            name if count == ranks[0] else "", f"{count:,}", f"{held:,.0f}", f"{rows:,.0f}",
            *((f"{sent / MEBI:,.1f}", f"{part:.1%}", f"{part / every:.2%}") if count > 1 else "---"),
            f"{moving / GIGA:,.1f}", f"{whole / GIGA:,.1f}", f"{sharded / GIGA:,.1f}",
            f"{(sharded + moving / every) / own:.3%}",
        ])  # fmt: skip
    return found


def _row_bytes(site: Site, ranks: int) -> int:
    return given_by_each(site.spec.slots, ranks) * site.rows.shape[1] * site.rows.element_size()


def _own(site: Site) -> int:
    return own_flops([weight.layout for weight in site.spec.weights], ASSUMED_ROWS)


def _moving(sites: Sequence[Site], ranks: int) -> int:
    """Return the FLOP of reading the rows of a move of R, on the rank that has most to do."""
    owner, loads = owner_ranks(sites, ranks), [0] * ranks
    for site, rank in owner.items():
        loads[rank] += update_flops(site)
    return max(loads) + sum(update_flops(site) for site in sites if site not in owner)


def _around(site: Site, holders: int) -> int:
    """Return the FLOP of the products around a step, on one of the ranks that hold the weights together."""
    layouts = [weight.layout for weight in site.spec.weights]
    held = [replace(layout, d_out=-(-layout.d_out // holders)) for layout in layouts]
    rule = site.spec.rule
    assert isinstance(rule, Power)
    return around_flops(held, used_rank(site.spec.layout.rank, ASSUMED_ROWS, rule.cost_budget))


if __name__ == "__main__":
    print(scaling_table())
