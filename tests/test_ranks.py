"""Several ranks move R alike, on the rows of all of them: real gloo processes."""

import atexit
import copy
from math import ceil
from time import sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_models import assert_equal_on_all_ranks, batches, network, train
from ranks import distributed_test
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import decorr_fx
from decorr_fx import DecorrConfig, DistributedError
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step.divide import is_divided


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
            if not key.endswith("V"):  # the sign of a direction is anybody's
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


@distributed_test(world_size=[2, 4])
def test_a_rank_has_room_for_the_rows_that_it_gives_and_for_all_when_it_is_alone() -> None:
    ranks, model = dist.get_world_size(), decorr_fx.transform(network(), DecorrConfig(max_samples=9))
    train(DistributedDataParallel(model), batches(3, dist.get_rank()))
    assert {len(site.rows) for site in sites_of(model)} == {ceil(9 / ranks)}
    rows = sum(site.rows.nbytes for site in sites_of(model))
    assert sum(site.row_bytes for site in decorr_fx.report(model).sites) == rows
    dist.destroy_process_group()
    train(model, batches(3, 0))  # the first of these steps is on what there was room for
    assert {len(site.rows) for site in sites_of(model)} == {9}
    assert all((site.steps, site.refused) == (6, 0) for site in decorr_fx.stats(model))


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
def test_a_process_that_has_sent_rows_ends_a_little_later() -> None:
    """What it is for aborts one process of a dozen at its end, which no test can wait for."""
    at_exit: list[tuple[Any, ...]] = []
    model = decorr_fx.transform(network())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atexit, "register", lambda *arguments: at_exit.append(arguments))
        train(DistributedDataParallel(model), batches(2, dist.get_rank()))
    assert at_exit == [(sleep, 0.1)]


@distributed_test(world_size=[2])
def test_an_R_that_differs_is_told_on_every_rank_before_anything_moves() -> None:
    model = decorr_fx.transform(network())
    with torch.no_grad():
        model[3].weight_decorr.V += 0.01 * dist.get_rank()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DistributedError, match="layer '3': its R is not the same on all 2 ranks; load the same"):
        train(DistributedDataParallel(model), batches(1, 0))
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


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
