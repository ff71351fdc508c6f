"""What ranks send and compute for a step of R, counted, is what docs/scaling.md says."""

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
from decorr_fx import DecorrConfig
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

    def telling(tensor: Tensor, source: int, **kwargs: Any) -> Any:
        counts.append(tensor.nbytes * others if source == rank else 0)
        return originals["broadcast"](tensor, source, **kwargs)

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


def learn_flops(d: int) -> int:
    """Count as docs/scaling.md does, but for eigenvalues, which torch does not count either."""
    sketch = 2 * K * (N + K) * d if d > N + K else 0
    return 4 * N * K * d + 2 * N * d * min(N, d) + 2 * (N + K) * d * min(N + K, d) + sketch


def busiest(ranks: int, sharded: bool) -> float:
    """Return the FLOP of the rank that has most to do: of two layers of 20 features and two of 8."""
    share = {1: [20, 20, 8, 8], 2: [20, 8], 4: [20]}[ranks]
    return sum(map(learn_flops, share)) + follow_flops(ranks if sharded else 1)


def follow_flops(holders: int) -> float:
    """Count V and the weights of all layers, of which each rank holds a part, as docs/scaling.md does."""
    return sum(8 * K * K * d + 8 * o * d * K / holders for d, o in pairwise(WIDTHS))


@distributed_test(world_size=[1, 2, 4])
def test_a_step_of_R_sends_and_computes_what_docs_scaling_says() -> None:
    ranks = dist.get_world_size()
    for wrap in (DistributedDataParallel, fully_shard):
        layers = [nn.Linear(d, o) for d, o in pairwise(WIDTHS)]
        model = decorr_fx.transform(nn.Sequential(*layers), DecorrConfig(rank=K, max_samples=N))
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped(torch.randn(16, 20)).square().mean().backward()
        sites = list(sites_of(model))
        with bytes_sent() as sent, FlopCounterMode(display=False) as flops:
            optimizer.step()
        numbers = sum(N * (d + 1) / ranks + K * d + 1 + 3 for d in WIDTHS[:-1])
        found = over_ranks(sum(sent), dist.ReduceOp.SUM) / ranks
        assert found == 4 * numbers * (ranks - 1) / ranks == exchanged_bytes(sites, ranks)
        looked = [site.d for site in decorr_fx.report(model).sites if site.made_by in (None, dist.get_rank())]
        holders = ranks if wrap is fully_shard else 1
        assert flops.get_total_flops() == sum(map(learn_flops, looked)) + follow_flops(holders)
        most = over_ranks(flops.get_total_flops(), dist.ReduceOp.MAX)
        assert most == busiest(ranks, sharded=wrap is fully_shard)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_work_of_a_rank_falls_with_the_number_of_ranks(sharded: bool) -> None:
    """By the numbers that the test above holds real processes to."""
    one, two, four = (busiest(ranks, sharded) for ranks in (1, 2, 4))
    assert two < 0.7 * one and four < 0.9 * two


@pytest.mark.parametrize("ranks", [2, 4, 8, 1024])
def test_what_is_sent_for_a_resnet50_is_little_beside_its_gradients(ranks: int) -> None:
    plain = torchvision.models.resnet50()
    gradients = 2 * sum(p.nbytes for p in plain.parameters()) * (ranks - 1) / ranks
    sites = list(sites_of(decorr_fx.transform(plain)))
    assert exchanged_bytes(sites, ranks) < 0.1 * gradients  # at each of the first steps
    assert exchanged_bytes(sites, ranks) / DecorrConfig().update_every < 0.005 * gradients
