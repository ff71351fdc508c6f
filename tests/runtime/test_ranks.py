"""What happens under a process group: real gloo processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import decorr_fx
from decorr_fx import DistributedError


def train_one_step(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        model = DistributedDataParallel(decorr_fx.transform(nn.Linear(4, 3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(8, 4)).sum().backward()
        if world_size > 1:
            with pytest.raises(DistributedError, match="2 ranks train together"):
                optimizer.step()
        else:
            optimizer.step()
            assert decorr_fx.stats(model)[0].steps == 1
        x = torch.randn(5, 4)
        torch.testing.assert_close(decorr_fx.fold(model)(x), model.eval()(x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_wrapped_model_folds_and_several_ranks_are_refused(world_size: int, tmp_path: Path) -> None:
    mp.spawn(train_one_step, (world_size, str(tmp_path / "store")), nprocs=world_size)
