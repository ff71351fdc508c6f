"""Train with plain backpropagation and with decorrelation, side by side; then fold, export to ONNX and verify.

    python -m tools.train                                        digits, a small cnn, both methods: under a minute
    python -m tools.train --data fashion-mnist                   a data set that Debian ships: some minutes
    python -m tools.train --model vit --rank 16 --amp            see --help
    torchrun --nproc-per-node 2 -m tools.train                   several processes, which share each batch

Writes metrics.jsonl, curves.png, correlations.png, model.onnx and checkpoint.pt into --out; --resume goes on from it.
"""

import os
import signal
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import decorr_fx
from tools.common.command import INTERRUPTED, exit_code
from tools.common.console import Bar, output
from tools.common.errors import UsageError, first_line
from tools.common.ranks import RankError, joined, rank, ranks
from tools.train.checkpoint import load_checkpoint, save_checkpoint
from tools.train.correlations import Correlation, mean_of, measure_correlations
from tools.train.data import Data
from tools.train.figures import NAMES, draw_correlations, draw_curves
from tools.train.loop import EVALUATION_BATCH, Contender, Score, race, score_of
from tools.train.metrics import Metrics
from tools.train.models import build_model, is_own
from tools.train.report import export_line, result_of, results_table
from tools.train.settings import Settings, parse_settings
from tools.train.sources import load_data

LOST = 1
WIDTH = 100  # of the table in a file
MEASURED_IMAGES = 128  # of the training set, for the correlations


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: who trains, on what, and how correlated the inputs of the layers are by then."""

    settings: Settings
    data: Data
    contenders: list[Contender]
    metrics: Metrics
    measured: Tensor
    at_start: list[Correlation]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return 0, 2 where what was asked for cannot be done, 1 where a rank was lost, 130 after Ctrl-C."""
    try:
        return exit_code("train", lambda: _run_joined(parse_settings(argv)))
    except RankError as error:
        print(f"python -m tools.train: error: {error}; go on from the last evaluation with --resume", file=sys.stderr)
        return LOST


def _run_joined(settings: Settings) -> int:
    with joined(settings.timeout):
        return run(settings)


def run(settings: Settings) -> int:
    """Train, tell what came of it, and write the files."""
    console = output(WIDTH, quiet=rank() > 0)
    job = prepare(settings)
    try:
        _race_with_progress(job)
    except KeyboardInterrupt:
        if rank() == 0:
            console.print("interrupted: this is what was reached; --resume goes on from the last evaluation")
            _tell(job, console, {})
        return INTERRUPTED
    if rank() > 0:
        return 0
    models = _deliverables(job)
    device = settings.torch_device()
    tests = {name: score_of(m, job.data.batches("test", EVALUATION_BATCH, device)) for name, m in models.items()}
    _tell(job, console, tests)
    _draw_correlations(job, console)
    _export(job, models, console)
    return 0


def prepare(settings: Settings) -> Job:
    """Load the data, make the models from one and the same initial weights, and open the folder."""
    device = settings.torch_device()
    data = load_data(settings)
    data = data if is_own(settings.model) else data.coloured()
    steps = settings.epochs * data.steps_per_epoch(settings.batch_size)
    if settings.batch_size % ranks():
        raise UsageError(f"--batch-size {settings.batch_size} is no multiple of the {ranks()} ranks that share it")
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, data.shape, data.classes, settings.batch_size, settings.batch_norm).to(device)
    measured, _ = next(data.batches("train", MEASURED_IMAGES, device))
    models = {name: _of_method(name, model, settings) for name in settings.methods}
    contenders = [Contender(name, of_method, settings, steps) for name, of_method in models.items()]
    if settings.resume:
        load_checkpoint(settings.checkpoint, settings, contenders)
    metrics = _open_folder(settings)
    metrics.header(settings, steps, sum(p.numel() for p in model.parameters()))
    for evaluation in sorted((e for one in contenders for e in one.history), key=lambda e: e.step):
        metrics.append("evaluation", asdict(evaluation))
    return Job(settings, data, contenders, metrics, measured, measure_correlations(model, measured, settings.rule))


def _of_method(method: str, model: nn.Module, settings: Settings) -> nn.Module:
    own = deepcopy(model)
    return own if method == "bp" else decorr_fx.transform(own, settings.rule)


def _open_folder(settings: Settings) -> Metrics:
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        return Metrics(settings.out / "metrics.jsonl" if rank() == 0 else Path(os.devnull))
    except OSError as error:
        raise UsageError(f"--out {settings.out} cannot be written: {first_line(error)}") from None


def _race_with_progress(job: Job) -> None:
    total = job.settings.epochs * job.data.steps_per_epoch(job.settings.batch_size)
    batch = next(job.data.training_batches(job.settings.batch_size, job.settings.seed, job.contenders[0].device))
    for contender in job.contenders:
        contender.warm_up(batch)
    with Bar(total, quiet=rank() > 0) as bar:
        for evaluations in race(job.contenders, job.data, job.settings):
            for evaluation in evaluations:
                job.metrics.append("evaluation", asdict(evaluation))
            if rank() == 0:
                save_checkpoint(job.settings.checkpoint, job.settings, job.contenders)
            told = ", ".join(f"{e.method} {100 * e.val_accuracy:.1f} %" for e in evaluations)
            bar.move(told, completed=evaluations[0].step)


def _deliverables(job: Job) -> dict[str, nn.Module]:
    """Return the plain model that each method leaves."""
    models = {contender.method: contender.model for contender in job.contenders}
    return {name: decorr_fx.fold(model) if name == "decorr" else model for name, model in models.items()}


def _tell(job: Job, console: Console, tests: dict[str, Score]) -> None:
    """Print the table, draw the curves and write the last lines of the metrics."""
    started = [contender for contender in job.contenders if contender.history]
    if not started:
        return
    results = [result_of(c, [o for o in started if o is not c], tests.get(c.method)) for c in started]
    for result in results:
        job.metrics.append("result", result)
    console.print(results_table(results, job.settings))
    title = f"{job.settings.model} on {job.settings.data}: {job.settings.optimizer}, lr {job.settings.lr:g}"
    draw_curves(job.settings.out / "curves.png", {c.method: c.history for c in started}, title)


def _draw_correlations(job: Job, console: Console) -> None:
    stages = {"before training": job.at_start}
    for contender in job.contenders:
        stages[f"after {NAMES[contender.method]}"] = measure_correlations(
            contender.model, job.measured, job.settings.rule
        )
    title = "Inputs of a few layers, in the coordinates that the optimizer works in: correlation of features over rows"
    draw_correlations(job.settings.out / "correlations.png", stages, title)
    told = ", ".join(f"{mean_of(correlations):.2g} {stage}" for stage, correlations in stages.items())
    console.print(f"mean r² of the inputs over {len(job.at_start)} layers: {told}", soft_wrap=True, highlight=False)


def _export(job: Job, models: dict[str, nn.Module], console: Console) -> None:
    """Verify the folded model and export the last contender's, which is the decorrelated one where there are two."""
    contender = job.contenders[-1]
    contender.model.eval()
    with torch.no_grad():
        expected, got = contender.model(job.measured), models[contender.method](job.measured)
    difference = float((got - expected).abs().max() / expected.abs().max())
    if contender.method == "decorr":
        console.print(f"folded: outputs differ by at most {difference:.1e} of the largest", highlight=False)
    report = decorr_fx.export_onnx(contender.model, job.settings.out / "model.onnx", job.measured[:2])
    console.print(export_line(report), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun sends it where another rank has failed
    sys.exit(main())
