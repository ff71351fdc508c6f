"""Several ranks move R alike, on the rows of all of them: real gloo processes."""

import atexit
import copy
from collections.abc import Callable
from functools import partial
from math import ceil
from time import sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factors import running_moments
from rank_models import assert_equal_on_all_ranks, assert_same_state, batches, network, train
from ranks import distributed_test
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import decorr_fx
from decorr_fx import Crgd, Dbp, DistributedError, ModelError, Power
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step import exchange
from decorr_fx.runtime.step.divide import is_divided

WIDE = Power(cost_budget=100.0)  # all directions are used, however few rows there are


@distributed_test(world_size=[2, 4])
def test_R_is_the_same_bit_by_bit_after_200_steps() -> None:
    model = decorr_fx.transform(network(), Power(max_samples=9, rank=3, cost_budget=100.0))
    train(DistributedDataParallel(model), batches(200, dist.get_rank()))
    assert_equal_on_all_ranks(model)
    assert all(site.steps > 40 and site.refused == 0 for site in decorr_fx.stats(model))


@distributed_test(world_size=[1, 2, 4])
def test_ranks_learn_what_one_rank_learns_from_all_their_batches() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rules = [Power(), WIDE, Dbp(), Crgd(), Dbp(preserve_function=False)]
    together = [decorr_fx.transform(network(), rule) for rule in rules]
    for model in together:
        train(DistributedDataParallel(model), batches(40, rank))
    dist.destroy_process_group()
    joined = [torch.cat(parts) for parts in zip(*(batches(40, rank) for rank in range(world_size)), strict=True)]
    for model, rule in zip(together, rules, strict=True):
        alone = decorr_fx.transform(network(), rule)
        train(alone, joined)
        for (key, got), expected in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
            if not key.endswith((".U", ".scale")):  # directions of equal length are anybody's
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=key)
        for fqn, R in decorr_fx.matrices(model).items():
            torch.testing.assert_close(R, decorr_fx.matrices(alone)[fqn], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(running_moments(model), running_moments(alone), rtol=1e-5, atol=1e-5)


@distributed_test(world_size=[2])
def test_decorrelation_changes_what_ranks_learn() -> None:
    """The tests that compare ways to train on several ranks would hold for the plain model, too."""
    models = [network(), decorr_fx.transform(network(), WIDE)]
    for model in models:
        train(DistributedDataParallel(model), batches(10, dist.get_rank()))
    assert (models[0][3].weight - models[1][3].weight).abs().max() > 1e-3


@distributed_test(world_size=[2, 4])
def test_layers_of_which_one_rank_reads_the_rows_and_layers_of_which_all_do() -> None:
    model = decorr_fx.transform(network(), overrides={"3": Power(max_samples=2, rank=6), "5": Dbp()})
    assert [is_divided(site, dist.get_world_size()) for site in sites_of(model)] == [True, False, False]
    train(DistributedDataParallel(model), batches(20, dist.get_rank()))
    assert_equal_on_all_ranks(model)
    assert all(site.steps > 10 and site.refused == 0 for site in decorr_fx.stats(model))


@distributed_test(world_size=[1, 2])
def test_report_names_the_owner_rank_of_each_layer() -> None:
    model = decorr_fx.transform(network(), overrides={"5": Dbp()})
    report = decorr_fx.report(model)
    if dist.get_world_size() == 1:
        assert [site.owner_rank for site in report.sites] == [None] * 3 and "owner rank" not in str(report)
        return
    assert [site.owner_rank for site in report.sites] == [0, 1, None]
    assert [line.split()[-1] for line in str(report).splitlines()[2:5]] == ["0", "1", "all"]
    model[0].weight.requires_grad_(False)
    assert [site.owner_rank for site in decorr_fx.report(model).sites] == [None, 0, None]


@distributed_test(world_size=[2, 4])
def test_a_rank_has_room_for_the_rows_that_it_gives_and_for_all_when_it_is_alone() -> None:
    ranks, model = dist.get_world_size(), decorr_fx.transform(network(), Power(max_samples=9))
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
        optimizer.zero_grad()
        with wrapped.no_sync():
            wrapped(torch.randn(5, 4)).square().mean().backward()
        wrapped(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert_equal_on_all_ranks(model)
    assert [(site.steps, site.refused) for site in decorr_fx.stats(model)] == [(3, 0), (3, 0), (0, 0)]


@distributed_test(world_size=[2])
def test_directions_that_R_uses_are_those_of_the_rank_with_the_fewest_rows() -> None:
    model = decorr_fx.transform(nn.Linear(20, 8), Power(update_every=1))
    wrapped, used = DistributedDataParallel(model), []
    sizes = [(600, 300), (600, 600), (40, 600)]  # rows of either rank: 16, 8 or 4 directions are worth their cost
    for step in sizes:
        train(wrapped, [torch.randn(step[dist.get_rank()], 20)])
        used += [site.used for site in sites_of(model)]
    assert used == [8, 8, 8]
    assert_equal_on_all_ranks(model)
    assert decorr_fx.stats(model)[0].steps == 3


@distributed_test(world_size=[2])
def test_a_layer_without_rows_on_one_rank_gets_its_directions_once_there_are_some() -> None:
    model, used = decorr_fx.transform(nn.Linear(20, 8), Power(update_every=1)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        if dist.get_rank() == 0 or step:
            model(torch.randn(300, 20)).square().mean().backward()
        optimizer.step()
        used += [site.used for site in sites_of(model)]
    assert used == [20, 8, 8]


@distributed_test(world_size=[2])
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    inputs = batches(8, dist.get_rank())
    models = [decorr_fx.transform(network(), WIDE) for _ in range(2)]
    train(DistributedDataParallel(models[0]), inputs)
    train(torch.compile(DistributedDataParallel(models[1])), inputs)
    assert_equal_on_all_ranks(models[1])
    for (key, eager), compiled in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5, msg=key)


def all_reduce_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)


@distributed_test(world_size=[2])
def test_stepping_closures_and_calibrating() -> None:
    rank = dist.get_rank()
    model = decorr_fx.transform(network())
    decorr_fx.calibrate(model, batches(3, rank))
    model(batches(1, rank)[0]).square().mean().backward()
    all_reduce_gradients(model)
    with decorr_fx.stepping(model), torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batches(1, rank)[0]).square().mean()
        loss.backward()
        all_reduce_gradients(model)
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
def test_an_optimizer_around_another_one_maps_and_moves_once() -> None:
    for views in (False, True):
        models = [decorr_fx.transform(network(), WIDE) for _ in range(2)]
        for model, wrap in zip(models, (Around, lambda optimizer: optimizer), strict=True):
            optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.01))
            train(DistributedDataParallel(model, gradient_as_bucket_view=views), batches(4, dist.get_rank()), optimizer)
        assert_equal_on_all_ranks(models[0])
        assert_same_state(*models)
        assert [site.steps for site in decorr_fx.stats(models[0])] == [4, 4, 4]


def one_layer(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=bias))


def adams(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return an optimizer for each half of a model."""
    parameters = list(model.parameters())
    return [torch.optim.Adam(half, lr=0.01) for half in (parameters[:3], parameters[3:])]


@distributed_test(world_size=[2])
def test_gradients_that_are_views_of_one_bucket_are_mapped_once() -> None:
    """All gradients of a bucket have one version: of its first one, too, that is a bucket by itself."""
    for make in (network, partial(one_layer, bias=False)):
        for to_none in (True, False):
            models = [decorr_fx.transform(make(), WIDE) for _ in range(2)]
            for model, views in zip(models, (False, True), strict=True):
                wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
                optimizers = adams(model) if make is network else [torch.optim.Adam(model.parameters(), lr=0.01)]
                for x in batches(6, dist.get_rank()):
                    model.zero_grad(to_none)
                    with wrapped.no_sync():
                        wrapped(x).square().mean().backward()
                    wrapped(x + 1).square().mean().backward()
                    for optimizer in optimizers:
                        optimizer.step()
            assert_same_state(*models)


@distributed_test(world_size=[2, 4])
def test_a_zero_optimizer_makes_the_steps_of_a_plain_one() -> None:
    """Of each weight one rank has the optimizer: here some ranks have none of a decorrelated layer, or none at all."""
    for make in (network, one_layer, partial(one_layer, bias=False)):
        models = [decorr_fx.transform(make(), WIDE) for _ in range(2)]
        wrapped = [DistributedDataParallel(model) for model in models]
        train(wrapped[0], batches(12, dist.get_rank()), torch.optim.Adam(wrapped[0].parameters(), lr=0.01))
        zero = ZeroRedundancyOptimizer(wrapped[1].parameters(), torch.optim.Adam, lr=0.01)
        train(wrapped[1], batches(12, dist.get_rank()), zero)
        assert_same_state(*models)
        assert {site.steps for site in decorr_fx.stats(models[1])} == {12}


@distributed_test(world_size=[2])
def test_a_process_that_has_sent_rows_ends_a_little_later() -> None:
    """What it is for aborts one process of a dozen at its end, which no test can wait for."""
    at_exit: list[tuple[Any, ...]] = []
    model = decorr_fx.transform(network())
    exchange._outlast_threads.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atexit, "register", lambda *arguments: at_exit.append(arguments))
        train(DistributedDataParallel(model), batches(2, dist.get_rank()))
    assert at_exit == [(sleep, 0.1)]


@distributed_test(world_size=[2, 4])
def test_groups_of_ranks_train_a_model_each() -> None:
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    own, other = groups[rank // half], groups[1 - rank // half]
    model = decorr_fx.transform(network(), WIDE, process_group=own)
    train(DistributedDataParallel(model, process_group=own), batches(10, rank))
    assert_equal_on_all_ranks(model, own)
    everyone = decorr_fx.transform(network(), WIDE, process_group=dist.new_group())
    train(DistributedDataParallel(everyone), batches(10, rank))
    assert_equal_on_all_ranks(everyone)
    R = decorr_fx.matrices(model)["3"]
    assert (R - decorr_fx.matrices(everyone)["3"]).abs().max() > 1e-3  # of other rows
    with pytest.raises(DistributedError, match=r"this rank is not in the process group of transform"):
        decorr_fx.transform(network(), process_group=other)
    if half == 1:
        alone = decorr_fx.transform(network(), WIDE, process_group=own)
        train(alone, batches(10, rank))
        assert_same_state(alone, model)


def assert_refused_on_all(model: nn.Module, optimizer: torch.optim.Optimizer, message: str) -> None:
    """Check that a step is refused, on each rank, and leaves parameters, gradients and R as they are."""
    model(batches(1, 0)[0]).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(DistributedError, match=message):
        optimizer.step()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@distributed_test(world_size=[2])
def test_an_R_that_differs_is_refused_on_every_rank_before_anything_moves() -> None:
    model = decorr_fx.transform(network())
    with torch.no_grad():
        model[3].weight_decorr.U += 0.01 * dist.get_rank()
    message = "layer '3': its R is not the same on all 2 ranks; load the same checkpoint on every rank"
    assert_refused_on_all(model, sgd(model), message)


@distributed_test(world_size=[2])
def test_an_R_that_one_rank_alone_has_loaded_is_refused_on_every_rank() -> None:
    groups = [dist.new_group([rank]) for rank in range(2)]
    alone = decorr_fx.transform(network(), process_group=groups[dist.get_rank()])
    train(alone, batches(37, 0))
    checkpoint = alone.state_dict()
    model = decorr_fx.transform(network())
    if dist.get_rank() == 1:
        model.load_state_dict(checkpoint)
        assert not any(site.due for site in sites_of(model))  # at a step at which only the other rank would move R
    assert_refused_on_all(model, sgd(model), "layer '0': its R is not the same on all 2 ranks")
    model.load_state_dict(checkpoint)
    train(DistributedDataParallel(model), batches(5, dist.get_rank()))
    assert_equal_on_all_ranks(model)
    assert model[3].weight_decorr.steps > alone[3].weight_decorr.steps


@distributed_test(world_size=[2])
def test_settings_that_differ_are_refused_on_every_rank() -> None:
    others = [Power(rank=4), Power(damping=0.5), Power(update_every=3), Power(max_samples=9), Dbp()]
    for other in others:
        model = decorr_fx.transform(network(), overrides={"3": other if dist.get_rank() else Power()})
        message = "layer '3': its shape or rule is not the same on all 2 ranks; transform the same model by the same"
        assert_refused_on_all(model, sgd(model), message)


@distributed_test(world_size=[2])
def test_a_function_among_the_settings_is_not_compared() -> None:
    model = decorr_fx.transform(network(), Dbp(decor_lr=lambda step: 0.1 / (1 + step)))
    train(DistributedDataParallel(model), batches(3, dist.get_rank()))
    assert_equal_on_all_ranks(model)


@distributed_test(world_size=[2])
def test_layers_that_differ_are_refused_on_every_rank() -> None:
    fewer: list[Callable[[nn.Module], list[nn.Parameter]]] = [
        lambda model: list(model[:4].parameters()),
        lambda model: [*model[3].parameters(), *model[:3].parameters(), *model[4:].parameters()],
    ]
    for parameters, counts in zip(fewer, ("3, 2", "3, 3"), strict=True):
        model = decorr_fx.transform(network())
        owned = parameters(model) if dist.get_rank() else list(model.parameters())
        message = rf"the ranks do not step the same layers \(they step {counts}\)"
        assert_refused_on_all(model, torch.optim.SGD(owned, lr=0.1), message)


@distributed_test(world_size=[1, 2])
def test_fsdp1_is_refused_by_name() -> None:
    device = torch.device("cpu")
    for original in (True, False):
        message = r"layer '0': FullyShardedDataParallel \(FSDP1\) .*; use torch.distributed.fsdp.fully_shard \(FSDP2\)"
        with pytest.raises(DistributedError, match=message):
            FullyShardedDataParallel(decorr_fx.transform(network()), device_id=device, use_orig_params=original)
        wrapped = FullyShardedDataParallel(network(), device_id=device, use_orig_params=original)
        for model, name in ((wrapped, "the model"), (nn.Sequential(wrapped), "0")):
            with pytest.raises(ModelError, match=rf"'{name}' is wrapped in FullyShardedDataParallel \(FSDP1\).*FSDP2"):
                decorr_fx.transform(model)


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
