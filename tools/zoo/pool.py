"""Running the checks, each model in a process of its own: a crash, a hang or too much memory costs that model only."""

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from threading import Event
from typing import Any

import torch

from tools.common.pool import as_they_end, begin
from tools.zoo.check import check_model
from tools.zoo.examples import Library
from tools.zoo.record import Record
from tools.zoo.settings import Limits

POLL = 0.1  # seconds between two looks at a process
PRELOADED = (
    "tools.zoo.check",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
)


def load_library(name: str) -> Library:
    """Import a library and return its models."""
    library: Library = importlib.import_module(f"tools.zoo.{name}_models").library()
    return library


@dataclass(frozen=True)
class Task:
    """One model to check."""

    library: str
    name: str
    limits: Limits


@dataclass
class Pool:
    """Checks models, several at once."""

    jobs: int

    def __post_init__(self) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        self._stopped = Event()

    def check(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Record]]:
        """Yield each task with its record, as they end; stops what still runs where the caller stops."""
        if tasks and self._context.get_start_method() == "forkserver":
            start_server(tasks)
        with ThreadPoolExecutor(self.jobs) as threads:
            try:
                yield from as_they_end(threads, self.check_one, tasks)
            finally:
                self._stopped.set()

    def check_one(self, task: Task) -> Record:
        """Check one model in a process of its own, within its limits."""
        with tempfile.TemporaryDirectory() as folder:
            process = self._context.Process(target=check_in_process, args=(task, folder), daemon=True)
            process.start()
            reason = self._watch(process, task.limits)
            return _read(task, Path(folder), reason or _death(process.exitcode))

    def _watch(self, process: Any, limits: Limits) -> str:
        """Wait for the process; return why it was ended, or nothing where it ended by itself."""
        start, reason = time.monotonic(), ""
        while process.is_alive() and not reason:
            process.join(POLL)
            if time.monotonic() - start > limits.seconds:
                reason = f"time limit: more than {limits.seconds:g} s"
            elif resident_memory(process.pid) > limits.memory:
                reason = f"memory limit: more than {limits.memory:g} GiB"
            elif self._stopped.is_set():
                reason = "interrupted"
        process.kill()
        process.join()
        return reason


def start_server(tasks: Sequence[Task]) -> None:
    """Start the process that all others are forked from, with the libraries imported: once, not for every model."""
    forkserver.set_forkserver_preload([*PRELOADED, *sorted({f"tools.zoo.{task.library}_models" for task in tasks})])
    wanted = {
        "OMP_NUM_THREADS": str(tasks[0].limits.threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # it looks for modules nowhere else
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def check_in_process(task: Task, folder: str) -> None:
    """Check a model; stages and the record go to a file of JSON lines, whatever else is printed to another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops what runs
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(sys.__stderr__ or 2)
    begin(task.limits.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with (Path(folder) / "lines").open("a", encoding="utf-8") as lines:

        def tell(kind: str, value: Any) -> None:
            lines.write(json.dumps({kind: value}) + "\n")
            lines.flush()

        build = load_library(task.library).models[task.name]
        record = check_model(task.name, build, task.limits, lambda stage: tell("stage", stage))
        tell("record", record.as_json())


def resident_memory(process_id: int) -> float:
    """Return the memory that a process holds now, in GiB; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _read(task: Task, folder: Path, reason: str) -> Record:
    """Return the record that the process wrote; where it did not come to that, the stage that it was in and why."""
    file = folder / "lines"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if lines and "record" in lines[-1]:
        return Record.from_json(lines[-1]["record"])
    stages = [line["stage"] for line in lines] or ["build"]
    record = Record(task.name)
    record.fail(stages[-1], f"{reason}{_last_words(folder / 'log')}")
    return record


def _death(code: int | None) -> str:
    """Return what the exit code of a process that left no record means."""
    if code is not None and code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def _last_words(log: Path) -> str:
    """Return the last line that the process printed, which is the error where Python ended it."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f": {lines[-1][:300]}" if lines and "Error" in lines[-1] else ""
