"""Weights that several ranks hold together, by fully_shard: they follow, fold when gathered, and go on when saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_models import train
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

import decorr_fx
from decorr_fx import DistributedError, NotTransformedError
from decorr_fx.runtime.site.state import sites_of


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


@distributed_test(world_size=[1, 2, 4])
def test_a_sharded_model_is_folded_where_it_is_and_trains_on() -> None:
    model, optimizer = sharded_packed()
    go_on(model, optimizer, first=0)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = model.eval()(x)  # which leaves the weights of the root gathered
    with pytest.raises(DistributedError, match=r"sharded over several ranks.*with decorr_fx.fold_\(model\) on every"):
        decorr_fx.fold(model)
    assert decorr_fx.fold_(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert [type(m).__name__ for m in (model, model.first, model.last)] == ["FSDPPacked", "FSDPLinear", "Linear"]
    plain = Packed()
    plain.load_state_dict(whole_state(model))
    torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-5, atol=1e-6)
    first, *_, last = go_on(model.train(), optimizer, first=10)
    assert last < first and not list(sites_of(model))
    with pytest.raises(NotTransformedError, match="was folded already"):
        decorr_fx.fold_(model)


@distributed_test(world_size=[2])
def test_a_forward_without_backward_leaves_weights_gathered_which_is_noticed() -> None:
    model, x = fully_shard(decorr_fx.transform(nn.Linear(6, 4))), torch.randn(9, 6)
    expected = model(x).detach()
    decorr_fx.calibrate(model, [x + dist.get_rank(), -x])
    assert decorr_fx.stats(model)[0].steps == 2
    torch.testing.assert_close(model(x), expected)
    decorr_fx.step(model)
    assert decorr_fx.stats(model)[0].steps == 3
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(DistributedError, match="sharded over several ranks"):
        decorr_fx.fold(model)


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
    """Return a sharded model, of which one layer is sharded by itself, and its optimizer."""
    model = decorr_fx.transform(Packed())
    for module in (model.first, model):
        fully_shard(module)
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
    with pytest.raises(DistributedError, match="layer '0': its weight is sharded; only one"):
        decorr_fx.fold_(model)
    assert all(torch.equal(value, before[key]) for key, value in whole_state(model).items())
