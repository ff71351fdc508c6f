"""One run of a study: train, and return what happened as one JSON object."""

import math
import platform
from itertools import islice
from time import perf_counter
from typing import Any

import torch

import decorr_fx
from tools.study.grid import CALIBRATE, PLAIN, Run, rule_of
from tools.study.workloads import WORKLOADS, Source, Workload
from tools.train.loop import Contender, score_of
from tools.train.settings import Settings, parse_settings

EVALUATION_BATCH = 500
CPU = torch.device("cpu")


def contender_of(run: Run, steps: int) -> Contender:
    """Return the run's model, from weights that depend on the seed alone, ready to train for so many steps.

    Its clock shows what calibrating took.
    """
    torch.manual_seed(run.seed)
    workload = WORKLOADS[run.workload]
    model, seconds = workload.build(), 0.0
    if run.method != PLAIN:
        model = decorr_fx.transform(model, rule_of(run.config))
    if CALIBRATE in run.config:
        batches = workload.data.load(run.seed).training_batches(workload.batch_size, run.seed, CPU)
        inputs = [x for x, _ in islice(batches, run.config[CALIBRATE])]
        start = perf_counter()
        decorr_fx.calibrate(model, inputs)
        seconds = perf_counter() - start
    contender = Contender(run.method, model, _settings(run), steps)
    contender.seconds = seconds
    return contender


def _settings(run: Run) -> Settings:
    return parse_settings(
        ["--optimizer", run.optimizer, "--lr", str(run.lr), "--seed", str(run.seed), "--device", "cpu"]
    )


def perform(run: Run) -> dict[str, Any]:
    """Train, evaluating on the validation split, and once on the test split at the end.

    Returns:
        `run`, and `history`: rows of (step, training loss since the last row, validation loss, validation accuracy);
        `diverged`: the step where numbers were no longer finite, else None; `test` (loss, accuracy), None then.
    """
    workload = WORKLOADS[run.workload]
    source, contender = workload.data.load(run.seed), contender_of(run, workload.steps)
    finite = _train(contender, source, workload, run)
    test = score_of(contender.model, source.batches("test", EVALUATION_BATCH, CPU)) if finite else None
    return {
        "run": run.as_json(),
        "budget": workload.steps,
        "history": [
            [e.step, e.train_loss, e.val_loss, e.val_accuracy] for e in contender.history if _finite(e.val_loss)
        ],
        "diverged": None if finite else contender.step,
        "test": test and [test.loss, test.accuracy],
        "seconds": contender.seconds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _train(contender: Contender, source: Source, workload: Workload, run: Run) -> bool:
    """Train to the end of the budget; return False as soon as the losses are not finite."""
    batches = source.training_batches(workload.batch_size, run.seed, CPU)
    interval = max(1, workload.steps // run.evaluations)
    while contender.step < workload.steps:
        contender.train(list(islice(batches, min(interval, workload.steps - contender.step))))
        evaluation = contender.evaluate(source.batches("validation", EVALUATION_BATCH, CPU), interval)
        if not _finite(evaluation.val_loss) or not _finite(evaluation.train_loss or 0.0):
            return False
    return True


def _finite(loss: float) -> bool:
    return math.isfinite(loss)
