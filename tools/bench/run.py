"""A case is measured: in this process, or in several that average their gradients."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from tools.bench.cases import Case
from tools.bench.measure import Contender, race, race_evaluations
from tools.bench.results import Result, result_of
from tools.common.pool import processes

PATIENCE = timedelta(minutes=5)  # with which a rank waits for another one


def results_here(case: Case, seconds: float, peaks: Mapping[str, int]) -> list[Result]:
    """Let the plain model and the methods of the case race; `peaks` is the memory measured of each, in bytes."""
    contenders = [Contender(case, method) for method in ("plain", *case.methods)]
    race(contenders, seconds)
    race_evaluations(contenders, seconds / 4)
    return [result_of(contender, contenders[0], peaks.get(contender.method)) for contender in contenders]


def results_on_ranks(case: Case, seconds: float) -> list[Result]:
    """Let them race on `case.ranks` processes; return what the first one measured."""
    with TemporaryDirectory() as folder, processes(case.ranks, threads=1) as pool:
        runs = [pool.submit(_on_rank, rank, case, seconds, Path(folder) / "store") for rank in range(case.ranks)]
        first, *_ = [run.result() for run in runs]
    return first


def _on_rank(rank: int, case: Case, seconds: float, store: Path) -> list[Result]:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=case.ranks, timeout=PATIENCE
    )  # fmt: skip
    try:
        return results_here(case, seconds, {})
    finally:
        dist.destroy_process_group()
