"""Weights that several ranks hold together, by fully_shard: each maps the rows that it holds, and sends nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factors import running_moments
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import decorr_fx
from decorr_fx import Dbp, DistributedError, NotTransformedError, Power
from decorr_fx.runtime.site.state import sites_of

WIDE = Power(cost_budget=100.0)  # all directions are used, however few rows there are


class Packed(nn.Module):
    """Layers of all kinds of weights that may be sharded, one of them a part of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.attention(x, x, x, need_weights=False)[0]).tanh())


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    """Shard one layer by itself: of 5 rows the last of 4 ranks have fewer, or none."""
    for module in (model.first, model):
        fully_shard(module, **settings)
    return model


def inputs(count: int, rank: int, first: int = 0) -> list[Tensor]:
    seeds = range(first, first + count)
    return [rank + torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def whole_state(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def assert_close_states(sharded: nn.Module, whole: nn.Module) -> None:
    expected = whole_state(whole)
    for key, value in whole_state(sharded).items():
        if not key.endswith((".U", ".scale")):  # directions of equal length are anybody's
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=f"{key}")
    for fqn, R in decorr_fx.matrices(whole).items():
        torch.testing.assert_close(decorr_fx.matrices(sharded)[fqn], R, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(running_moments(sharded), running_moments(whole), rtol=1e-4, atol=1e-5)


def assert_R_equal_on_all_ranks(model: nn.Module) -> None:
    for key in sorted(decorr_fx.state_keys(model)):
        value = model.state_dict()[key]
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first), key


@distributed_test(world_size=[2, 4])
def test_a_sharded_model_trains_as_a_whole_one() -> None:
    rank = dist.get_rank()
    for rule in (WIDE, Power(), Dbp(), Dbp(preserve_function=False)):
        sharded, whole = shard(decorr_fx.transform(Packed(), rule)), decorr_fx.transform(Packed(), rule)
        train(sharded, inputs(20, rank))
        train(DistributedDataParallel(whole), inputs(20, rank))
        assert_R_equal_on_all_ranks(sharded)
        assert_close_states(sharded, whole)
        x = inputs(1, 9)[0]
        torch.testing.assert_close(sharded.eval()(x), expected := whole.eval()(x), rtol=1e-4, atol=1e-5)
        gathered = decorr_fx.transform(Packed(), rule)
        gathered.load_state_dict(whole_state(sharded))
        torch.testing.assert_close(decorr_fx.fold(gathered).eval()(x), expected, rtol=1e-4, atol=1e-5)


@distributed_test(world_size=[2])
def test_decorrelation_changes_what_a_sharded_model_learns() -> None:
    """The test above would hold if neither model were decorrelated."""
    models = [shard(Packed()), shard(decorr_fx.transform(Packed(), WIDE))]
    for model in models:
        train(model, inputs(20, dist.get_rank()))
    weights = [whole_state(model)["first.weight"] for model in models]
    assert (weights[0] - weights[1]).abs().max() > 1e-3


@distributed_test(world_size=[2])
def test_nothing_is_gathered_around_a_step() -> None:
    model = shard(decorr_fx.transform(Packed(), Power(update_every=2, cost_budget=100.0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, inputs(3, dist.get_rank()), optimizer)
    assert not any(site.due for site in sites_of(model))
    optimizer.zero_grad()
    model(inputs(1, dist.get_rank())[0]).square().mean().backward()
    before = model.first.weight.to_local().clone()
    with CommDebugMode() as messages:
        optimizer.step()
    assert messages.get_total_counts() == 0
    assert isinstance(model.first.weight, DTensor) and not torch.equal(model.first.weight.to_local(), before)


@distributed_test(world_size=[2])
def test_gradients_of_several_backward_passes_that_are_set_to_zero_in_place() -> None:
    """FSDP2 adds to the part that a rank holds, and not to the gradient itself."""
    models = [shard(decorr_fx.transform(Packed(), WIDE)), decorr_fx.transform(Packed(), WIDE)]
    for model, wrapped in zip(models, (models[0], DistributedDataParallel(models[1])), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in inputs(8, dist.get_rank()):
            optimizer.zero_grad(set_to_none=False)
            for part in x.chunk(2):
                wrapped(part).square().mean().backward()
            optimizer.step()
    assert_close_states(*models)


@distributed_test(world_size=[2])
def test_a_compiled_sharded_model_trains_as_the_eager_one() -> None:
    """Nothing tells that fully_shard has replaced the parameters, and compiled forwards do not notice it."""
    models = [shard(decorr_fx.transform(Packed(), WIDE)) for _ in range(2)]
    for model, wrap in zip(models, (torch.compile, lambda model: model), strict=True):
        train(wrap(model), inputs(8, dist.get_rank()))
        assert {site.steps for site in decorr_fx.stats(model)} == {8}
    assert_close_states(*models)


@distributed_test(world_size=[4])
def test_replicas_of_shards_and_half_precision() -> None:
    whole = decorr_fx.transform(Packed(), WIDE)
    train(DistributedDataParallel(whole), inputs(10, dist.get_rank()))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    sharded = shard(decorr_fx.transform(Packed(), WIDE), mesh=mesh)
    train(sharded, inputs(10, dist.get_rank()))
    assert_R_equal_on_all_ranks(sharded)
    assert_close_states(sharded, whole)
    half = shard(decorr_fx.transform(Packed(), WIDE), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(half, inputs(10, dist.get_rank()))
    assert_R_equal_on_all_ranks(half)
    for fqn, R in decorr_fx.matrices(half).items():
        assert R.dtype is torch.float32
        torch.testing.assert_close(R, decorr_fx.matrices(whole)[fqn], rtol=0.1, atol=0.1)


@distributed_test(world_size=[2])
def test_a_model_that_is_initialised_after_it_was_sharded() -> None:
    with torch.device("meta"):
        model = decorr_fx.transform(Packed())
    shard(model).to_empty(device="cpu")
    assert all(R.equal(torch.eye(R.shape[1]).expand_as(R)) for R in decorr_fx.matrices(model).values())
    set_state_dict(
        model, (), model_state_dict=Packed().state_dict(), optim_state_dict={},
        options=StateDictOptions(full_state_dict=True, strict=False),
    )  # fmt: skip
    other = shard(decorr_fx.transform(Packed()))
    for one in (model, other):
        train(one, inputs(5, dist.get_rank()))
    assert_R_equal_on_all_ranks(model)
    for value, expected in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(value.to_local() if isinstance(value, DTensor) else value,
                           expected.to_local() if isinstance(expected, DTensor) else expected)  # fmt: skip


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
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert [type(m).__name__ for m in (model, model.first, model.last)] == ["FSDPPacked", "FSDPLinear", "Linear"]
    plain = Packed()
    plain.load_state_dict(whole_state(model))
    torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-5, atol=1e-6)
    first, *_, last = go_on(model.train(), optimizer, first=10)
    assert last < first and not list(sites_of(model))
    with pytest.raises(NotTransformedError, match="was folded already"):
        decorr_fx.fold_(model)


@distributed_test(world_size=[2])
def test_a_forward_without_backward_leaves_weights_gathered() -> None:
    model, x = fully_shard(decorr_fx.transform(nn.Linear(6, 4))), torch.randn(9, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(x).detach()
    decorr_fx.calibrate(model, [x + dist.get_rank(), -x])
    assert decorr_fx.stats(model)[0].steps == 2
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    train(model, [x + dist.get_rank()] * 3, optimizer)
    assert decorr_fx.stats(model)[0].steps == 5
    assert_R_equal_on_all_ranks(model)
    with pytest.raises(DistributedError, match="sharded over several ranks"):
        decorr_fx.transform(decorr_fx.fold_(model))


@distributed_test(world_size=[2])
def test_a_weight_that_is_not_finite_on_one_rank_leaves_R_the_same_on_all() -> None:
    for rule in (Power(), Dbp(preserve_function=False)):
        model = shard(decorr_fx.transform(Packed(), rule))
        model(torch.randn(4, 3, 6)).square().mean().backward()
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.first.weight.to_local()[0, 0] = torch.inf
        torch.optim.Adam(model.parameters(), lr=0.01).step()
        assert_R_equal_on_all_ranks(model)
        assert {site.steps for site in decorr_fx.stats(model)} == {1}


def sharded_packed() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a sharded model and its optimizer."""
    model = shard(decorr_fx.transform(Packed(), WIDE))
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    """Take five steps, on the same batch on all ranks; return the losses."""
    losses = []
    for x in inputs(5, 0, first):
        optimizer.zero_grad()
        loss = model(x).square().mean()
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
def test_what_cannot_be_decorrelated_while_it_is_sharded_is_refused_before_anything_moves() -> None:
    grouped = fully_shard(decorr_fx.transform(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))))
    columns = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4)))
    fully_shard(columns, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    for model, x in ((grouped, torch.randn(3, 4, 5)), (columns, torch.randn(3, 4))):
        before = whole_state(model)
        with pytest.raises(
            DistributedError, match=r"layer '0': its weight is sharded; only one.*overrides={'0': None}"
        ):
            train(model, [x])
        assert all(torch.equal(value, before[key]) for key, value in whole_state(model).items())
        decorr_fx.fold_(model)
        train(model, [x])
        assert not torch.equal(whole_state(model)["0.weight"], before["0.weight"])
