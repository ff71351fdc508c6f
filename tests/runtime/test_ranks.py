"""Several ranks move R alike, on the rows of all of them: real gloo processes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import distributed_test, on_ranks
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import decorr_fx
from decorr_fx import DecorrConfig, DistributedError
from decorr_fx.runtime.divide import exchanged_bytes, is_divided
from decorr_fx.runtime.state import sites_of

ROWS = 6  # of a rank in a step: all ranks together have fewer than R steps on


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def batches(count: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + torch.randn(ROWS, 3, 2, generator=generator) for _ in range(count)]


def train(model: nn.Module, inputs: list[Tensor], lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - 0.3).square().mean().backward()
        optimizer.step()


def assert_equal_on_all_ranks(model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first), key


@distributed_test(world_size=[2, 4])
def test_R_is_the_same_bit_by_bit_after_200_steps() -> None:
    model = decorr_fx.transform(network(), DecorrConfig(max_samples=9, rank=3))
    train(DistributedDataParallel(model), batches(200, dist.get_rank()))
    assert_equal_on_all_ranks(model)
    assert all(site.steps > 40 and site.refused == 0 for site in decorr_fx.stats(model))


@distributed_test(world_size=[1, 2, 4])
def test_ranks_learn_what_one_rank_learns_from_all_their_batches() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rules = [DecorrConfig(center=True), DecorrConfig(rule="dbp", center=True), DecorrConfig(rule="crgd")]
    configs = [DecorrConfig(), *rules]
    together = [decorr_fx.transform(network(), config) for config in configs]
    for model in together:
        train(DistributedDataParallel(model), batches(40, rank))
    dist.destroy_process_group()
    joined = [torch.cat(parts) for parts in zip(*(batches(40, rank) for rank in range(world_size)), strict=True)]
    for model, config in zip(together, configs, strict=True):
        alone = decorr_fx.transform(network(), config)
        train(alone, joined)
        for (key, got), expected in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
            if not key.endswith(("V", "sketch")):  # the sign of a direction is anybody's
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=key)
        x = joined[0]
        torch.testing.assert_close(model.eval()(x), alone.eval()(x), rtol=1e-5, atol=1e-5)


@distributed_test(world_size=[2, 4])
def test_layers_of_which_one_rank_looks_at_the_rows_and_layers_at_which_all_do() -> None:
    few, small = DecorrConfig(max_samples=2, rank=6), DecorrConfig(rule="dbp")
    model = decorr_fx.transform(network(), overrides={"3": few, "5": small})
    assert [is_divided(site, dist.get_world_size()) for site in sites_of(model)] == [True, False, False]
    train(DistributedDataParallel(model), batches(20, dist.get_rank()))
    assert_equal_on_all_ranks(model)
    assert all(site.steps > 10 and site.refused == 0 for site in decorr_fx.stats(model))


@distributed_test(world_size=[1, 2])
def test_report_says_which_rank_makes_what() -> None:
    model = decorr_fx.transform(network(), overrides={"5": DecorrConfig(rule="dbp")})
    report = decorr_fx.report(model)
    if dist.get_world_size() == 1:
        assert [site.made_by for site in report.sites] == [None] * 3 and "made by" not in str(report)
        return
    assert [site.made_by for site in report.sites] == [0, 1, None]
    assert [line.split()[-1] for line in str(report).splitlines()[2:5]] == ["0", "1", "all"]
    model[0].weight.requires_grad_(False)
    assert [site.made_by for site in decorr_fx.report(model).sites] == [None, 0, None]


@distributed_test(world_size=[2])
def test_rows_of_one_rank_that_are_not_finite_are_refused_on_all() -> None:
    model = decorr_fx.transform(network())
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped(batches(1, dist.get_rank())[0]).square().mean().backward()
    if dist.get_rank() == 1:
        model[3].weight_decorr.rows[0, 0] = torch.nan
    optimizer.step()
    assert_equal_on_all_ranks(model)
    assert [(site.steps, site.refused) for site in decorr_fx.stats(model)] == [(1, 0), (0, 1), (1, 0)]


class Sometimes(nn.Module):
    """A layer that one rank alone uses, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.sometimes(x) if dist.get_rank() == 0 else x


@distributed_test(world_size=[2])
def test_accumulated_rows_and_layers_that_one_rank_alone_uses() -> None:
    model = decorr_fx.transform(Sometimes())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with wrapped.no_sync():
            wrapped(torch.randn(5, 4)).square().mean().backward()
        wrapped(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert_equal_on_all_ranks(model)
    assert [(site.steps, site.refused) for site in decorr_fx.stats(model)] == [(3, 0), (3, 0), (0, 0)]


@distributed_test(world_size=[2])
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    inputs = batches(8, dist.get_rank())
    models = [decorr_fx.transform(network()) for _ in range(2)]
    train(DistributedDataParallel(models[0]), inputs)
    train(torch.compile(DistributedDataParallel(models[1])), inputs)
    assert_equal_on_all_ranks(models[1])
    for (key, eager), compiled in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5, msg=key)


@distributed_test(world_size=[2])
def test_steps_by_hand_closures_and_calibrating() -> None:
    rank = dist.get_rank()
    model = decorr_fx.transform(network())
    decorr_fx.calibrate(model, batches(3, rank))
    model(batches(1, rank)[0])
    decorr_fx.step(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batches(1, rank)[0]).square().mean()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step(closure)
    assert_equal_on_all_ranks(model)
    assert [site.steps for site in decorr_fx.stats(model)] == [5, 5, 5]


class Around(torch.optim.Optimizer):
    """An optimizer that steps another one."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self) -> None:
        self.inner.step()


@distributed_test(world_size=[2])
def test_an_optimizer_around_another_one_moves_R_once() -> None:
    model = decorr_fx.transform(network())
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.01))
    for x in batches(4, dist.get_rank()):
        model(x).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    assert_equal_on_all_ranks(model)
    assert [site.steps for site in decorr_fx.stats(model)] == [4, 4, 4]


@distributed_test(world_size=[2])
def test_an_R_that_differs_is_told_on_every_rank_before_anything_moves() -> None:
    model = decorr_fx.transform(network())
    with torch.no_grad():
        model[3].weight_decorr.V += 0.01 * dist.get_rank()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DistributedError, match="layer '3': its R is not the same on all 2 ranks; load the same"):
        train(DistributedDataParallel(model), batches(1, 0))
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


class Packed(nn.Module):
    """Layers of all kinds of weights that may be sharded, one of them a part of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.attention(x, x, x, need_weights=False)[0]).tanh())


def whole_state(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@distributed_test(world_size=[2, 4])
def test_sharded_weights_follow_as_whole_ones_do_and_fold_when_gathered() -> None:
    rank = dist.get_rank()
    inputs = [rank + torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    sharded, whole = (decorr_fx.transform(Packed()) for _ in range(2))
    for module in (sharded.attention.out_proj, sharded.first, sharded):  # of 5 rows the last ranks have fewer, or none
        fully_shard(module)
    train(sharded, inputs)
    train(DistributedDataParallel(whole), inputs)
    expected, x = whole.eval()(inputs[0]), inputs[0]
    for _ in range(2):  # nothing is kept of weights that are gathered anew
        torch.testing.assert_close(sharded.eval()(x), expected, rtol=1e-4, atol=1e-5)
    gathered = decorr_fx.transform(Packed())
    gathered.load_state_dict(whole_state(sharded))
    torch.testing.assert_close(decorr_fx.fold(gathered).eval()(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DistributedError, match="its weight is sharded over several ranks; gather"):
        decorr_fx.fold(sharded)


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


@distributed_test(world_size=[2])
def test_a_weight_that_is_not_finite_on_one_rank_leaves_R_the_same_on_all() -> None:
    model, optimizer = sharded_packed()
    model(torch.randn(4, 3, 6)).square().mean().backward()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.first.weight.to_local()[0, 0] = torch.inf
    optimizer.step()
    for key, value in model.state_dict().items():
        if "_decorr" in key:
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(value, first), key
    assert {site.steps for site in decorr_fx.stats(model)} == {1}


def sharded_packed() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = decorr_fx.transform(Packed())
    fully_shard(model)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    """Take five steps, on the same batch on all ranks; return the losses."""
    losses = []
    for i in range(first, first + 5):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(i))).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_in_between(folder: Path) -> None:
    model, optimizer = sharded_packed()
    go_on(model, optimizer, first=0)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    losses = go_on(model, optimizer, first=5)
    if dist.get_rank() == 0:
        torch.save(losses, folder / "losses")


def resume(folder: Path, same_bits: bool) -> None:
    model, optimizer = sharded_packed()
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    expected, losses = torch.load(folder / "losses"), go_on(model, optimizer, first=5)
    assert losses == (expected if same_bits else pytest.approx(expected, rel=1e-4))
    assert {site.steps for site in decorr_fx.stats(model)} == {10}


def test_a_sharded_checkpoint_of_four_ranks_goes_on_there_and_on_fewer(tmp_path: Path) -> None:
    for number, (world_size, check, arguments) in enumerate(
        [(4, save_in_between, ()), (4, resume, (True,)), (2, resume, (False,)), (1, resume, (False,))]
    ):
        (tmp_path / str(number)).mkdir()
        on_ranks(world_size, check, tmp_path / str(number), tmp_path, *arguments)


@distributed_test(world_size=[2])
def test_what_cannot_follow_while_it_is_sharded_is_told() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)))
    fully_shard(model)
    before = whole_state(model)
    with pytest.raises(DistributedError, match=r"layer '0': its weight is sharded; only one.*overrides={'0': None}"):
        train(model, [torch.randn(3, 4, 5)])
    with pytest.raises(DistributedError, match="layer '0': its weight is sharded over several ranks; gather"):
        decorr_fx.fold(model)  # for which there is other advice
    assert all(torch.equal(value, before[key]) for key, value in whole_state(model).items())


class Task(nn.Module):
    """A module that holds a model, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(model, nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


@distributed_test(world_size=[2])
def test_ddp_leaves_buffers_of_R_alone_wherever_they_are_and_no_others() -> None:
    late, plain = Task(network()), network()
    late.backbone[0] = decorr_fx.transform(late.backbone[0])  # what holds it, holds it by now
    listed = Task(decorr_fx.transform(network()))
    listed.backbone.insert(0, nn.BatchNorm1d(3))  # which moves the others on
    plain._ddp_params_and_buffers_to_ignore = ["0.bias"]
    for model in (late, listed, torch.compile(Task(decorr_fx.transform(network()))), decorr_fx.transform(plain)):
        wrapped = DistributedDataParallel(model)
        sent = set(wrapped.named_module_buffers)
        assert sent == {name for name, _ in model.named_buffers() if "_decorr" not in name}
    assert "0.bias" in wrapped.parameters_to_ignore
    assert decorr_fx.fold(wrapped)._ddp_params_and_buffers_to_ignore == ["0.bias"]


@pytest.mark.parametrize("ranks", [2, 4, 8, 1024])
def test_what_is_sent_for_a_resnet50_is_little_beside_its_gradients(ranks: int) -> None:
    plain = torchvision.models.resnet50()
    gradients = 2 * sum(p.nbytes for p in plain.parameters()) * (ranks - 1) / ranks
    sites = list(sites_of(decorr_fx.transform(plain)))
    assert exchanged_bytes(sites, ranks) < 0.1 * gradients  # at each of the first steps
    assert exchanged_bytes(sites, ranks) / DecorrConfig().update_every < 0.005 * gradients
