"""What ranks send and compute for a move of R, and around other steps, counted, is what docs/scaling.md says."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import distributed_test
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import decorr_fx
from decorr_fx import Power
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step.divide import exchanged_bytes


@contextmanager
def bytes_sent() -> Iterator[list[float]]:
    """Count what this rank sends in each message that is asked for by name, which those of gradients are not.

    A broadcast counts for the rank that it starts from; the fingerprints of R, which are sent once, do not count.
    """
    counts: list[float] = []
    names = ("all_reduce", "all_to_all_single", "broadcast")
    originals = {name: getattr(dist, name) for name in names}
    rank, others = dist.get_rank(), dist.get_world_size() - 1

    def reducing(tensor: Tensor, **kwargs: Any) -> Any:
        counts.append(2 * tensor.nbytes * others / (others + 1))
        return originals["all_reduce"](tensor, **kwargs)

    def dealing(into: Tensor, given: Tensor, received: list[int], sent: list[int], **kwargs: Any) -> Any:
        counts.append(given.element_size() * (sum(sent) - sent[rank]))
        return originals["all_to_all_single"](into, given, received, sent, **kwargs)

    def telling(tensor: Tensor, group_src: int, **kwargs: Any) -> Any:
        counts.append(tensor.nbytes * others if group_src == rank else 0)
        return originals["broadcast"](tensor, group_src=group_src, **kwargs)

    for name, counting in zip(names, (reducing, dealing, telling), strict=True):
        setattr(dist, name, counting)
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def over_ranks(number: float, how: Any) -> float:
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, how)
    return tensor.item()


WIDTHS = (20, 8, 20, 8, 4)  # of the layers of a model, from first to last
K, N = 3, 8  # rank, and rows


def reading_flops(d: int) -> int:
    """Count as docs/scaling.md does, but for eigenvalues, which torch does not count either."""
    sketch = 2 * K * (N + K) * d if d > N + K else 0
    return 4 * N * K * d + 2 * N * d * min(N, d) + 2 * (N + K) * d * min(N + K, d) + sketch


def busiest(ranks: int) -> int:
    """Return the FLOP of the rank that has most to do: of two layers of 20 features and two of 8."""
    return sum(map(reading_flops, {1: [20, 20, 8, 8], 2: [20, 8], 4: [20]}[ranks]))


def product_flops(holders: int) -> float:
    """Count the products around a step of the optimizer, of which each rank makes those of the outputs it holds."""
    return sum(8 * o * d * K / holders for d, o in pairwise(WIDTHS))


@distributed_test(world_size=[1, 2, 4])
def test_a_move_of_R_sends_and_computes_what_docs_scaling_says() -> None:
    ranks = dist.get_world_size()
    for wrap in (DistributedDataParallel, fully_shard):
        layers = [nn.Linear(d, o) for d, o in pairwise(WIDTHS)]
        rule = Power(rank=K, max_samples=N, update_every=2, cost_budget=100.0)
        model = decorr_fx.transform(nn.Sequential(*layers), rule)
        wrapped, sites = wrap(model), list(sites_of(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sent, flops = counted_step(wrapped, optimizer)  # the first one, around which R is still the identity
        numbers = sum(N * (d + 1) / ranks + K * d + 1 + 3 for d in WIDTHS[:-1])
        found = over_ranks(sent, dist.ReduceOp.SUM) / ranks
        assert found == 4 * numbers * (ranks - 1) / ranks == exchanged_bytes(sites, ranks)
        read = [site.d for site in decorr_fx.report(model).sites if site.owner_rank in (None, dist.get_rank())]
        assert flops == sum(map(reading_flops, read))
        assert over_ranks(flops, dist.ReduceOp.MAX) == busiest(ranks)
        holders = ranks if wrap is fully_shard else 1
        while sites[0].due:
            sent, flops = counted_step(wrapped, optimizer)
            assert sent > 0 or ranks == 1
        sent, flops = counted_step(wrapped, optimizer)
        assert (sent, flops) == (0, product_flops(holders)), (sent, flops, product_flops(holders))


def product_in_place_flops(_: Any, rows: torch.Size, columns: torch.Size, **__: Any) -> int:
    return 2 * rows.numel() * columns[-1]


def counted_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Return the bytes that this rank sends in a step of the optimizer, and its FLOP."""
    optimizer.zero_grad()
    model(torch.randn(16, 20)).square().mean().backward()
    in_place = {torch.ops.aten.baddbmm_: product_in_place_flops}  # which torch counts out of place only
    with bytes_sent() as sent, FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        optimizer.step()
    return sum(sent), flops.get_total_flops()


def test_the_work_of_a_rank_falls_with_the_number_of_ranks() -> None:
    """By the numbers that the test above holds real processes to."""
    one, two, four = map(busiest, (1, 2, 4))
    assert two < 0.7 * one and four < 0.9 * two


@pytest.mark.parametrize("ranks", [2, 4, 8, 1024])
def test_what_is_sent_for_a_resnet50_is_little_beside_its_gradients(ranks: int) -> None:
    plain = torchvision.models.resnet50()
    gradients = 2 * sum(p.nbytes for p in plain.parameters()) * (ranks - 1) / ranks
    sites = list(sites_of(decorr_fx.transform(plain)))
    assert exchanged_bytes(sites, ranks) < 0.1 * gradients  # at each of the first steps
    assert exchanged_bytes(sites, ranks) / Power().update_every < 0.005 * gradients
