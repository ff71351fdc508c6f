"""Several ranks move R alike, on the rows of all of them: real gloo processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import distributed_test
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import decorr_fx
from decorr_fx import DecorrConfig, DistributedError
from decorr_fx.runtime.distributed import exchanged_bytes
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
    configs = [DecorrConfig(), DecorrConfig(rule="dbp", center=True), DecorrConfig(rule="crgd")]
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


class Sometimes(nn.Module):
    """A layer that one rank alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

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
    assert [site.steps for site in decorr_fx.stats(model)] == [3, 3]


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


@distributed_test(world_size=[2])
def test_an_R_that_differs_is_told_on_every_rank_before_anything_moves() -> None:
    model = decorr_fx.transform(network())
    with torch.no_grad():
        model[3].weight_decorr.V += 0.01 * dist.get_rank()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DistributedError, match="layer '3': its R is not the same on all 2 ranks; load the same"):
        train(DistributedDataParallel(model), batches(1, 0))
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


def test_ddp_leaves_buffers_of_R_alone_until_the_model_is_folded() -> None:
    plain = network()
    plain._ddp_params_and_buffers_to_ignore = ["0.bias"]
    model = decorr_fx.transform(plain)
    names = {name for name, _ in model.named_buffers() if "_decorr" in name}
    assert {"0.bias", *names} <= set(model._ddp_params_and_buffers_to_ignore)
    assert decorr_fx.fold(model)._ddp_params_and_buffers_to_ignore == ["0.bias"]
    assert not hasattr(decorr_fx.fold(decorr_fx.transform(network())), "_ddp_params_and_buffers_to_ignore")


def test_what_is_sent_for_a_resnet50_is_little_beside_its_gradients() -> None:
    plain = torchvision.models.resnet50()
    gradients = sum(p.nbytes for p in plain.parameters())
    sites = list(sites_of(decorr_fx.transform(plain)))
    every = DecorrConfig().update_every
    assert exchanged_bytes(sites) / every < 0.02 * gradients
    assert exchanged_bytes(sites) < 0.3 * gradients  # at each of the first steps
