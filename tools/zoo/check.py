"""The checks of one model, stage by stage: the first that fails ends them, and is named."""

import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

import decorr_fx
from tools.zoo.compare import TOLERANCE, Failed, all_finite, require_close, seed_all
from tools.zoo.examples import Example
from tools.zoo.export import check_onnx, count_graph_breaks
from tools.zoo.record import Record, grouped
from tools.zoo.settings import Limits
from tools.zoo.step import train_two_steps
from tools.zoo.subject import Subject, some
from tools.zoo.weights import WeightFinder, layer_weights, parameter_names, split_weights


class Stages:
    """Tells which stage a model is in, and notes how long each took."""

    def __init__(self, record: Record, heard: Callable[[str], None]) -> None:
        self.record = record
        self._heard = heard

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage; whatever it raises becomes the model's failure, and is raised on."""
        self._heard(name)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # models and libraries raise anything
            self.record.fail(name, reason_of(error))
            raise
        finally:
            self.record.seconds[name] = round(time.perf_counter() - start, 2)


def check_model(
    name: str, build: Callable[[], Example], limits: Limits, heard: Callable[[str], None] = lambda stage: None
) -> Record:
    """Take one model through all stages and return what is known of it; `heard` is told each stage as it begins."""
    record = Record(name)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the models and the exporter
            _run_stages(Stages(record, heard), build, limits)
    except Exception as error:
        if record.status != "failed":  # between two stages
            record.fail("build", reason_of(error))
    record.memory = round(peak_memory(), 2)
    return record


def _run_stages(stages: Stages, build: Callable[[], Example], limits: Limits) -> None:
    stage, record = stages.stage, stages.record
    with stage("build"):
        subject = _build(build, record, limits.device)
    with stage("transform"):
        transform(subject)
    with stage("train"):
        compare_in_mode(subject, "train")
    with stage("eval"):
        compare_in_mode(subject, "eval")
    with stage("step"):
        train_two_steps(subject)
    with stage("fold"):
        fold(subject)
    with stage("reload"):
        reload(subject)
    if limits.onnx:
        with stage("onnx"):
            check_onnx(subject.example, subject.plain, subject.transformed, record)
    if limits.compile:
        with stage("compile"):
            count_graph_breaks(subject.example, subject.plain, subject.transformed, record)


def _build(build: Callable[[], Example], record: Record, device: str) -> Subject:
    seed_all()
    example = build()
    example.model.to(device)
    example = example.on(device)
    record.parameters = sum(parameter.numel() for parameter in example.model.parameters())
    plain = deepcopy(example.model)
    return Subject(example, record, plain, example.model)


def transform(subject: Subject) -> None:
    """Transform the model, and count which of its conv and linear weights are sites."""
    subject.weights = _find_weights(subject)
    transformed = decorr_fx.transform(subject.transformed)
    subject.transformed = transformed
    report = decorr_fx.report(transformed)
    sites, _, unexplained = split_weights(subject.weights, report)
    subject.record.weights, subject.record.sites = len(subject.weights), len(sites)
    subject.record.left = grouped(report.skipped)
    if unexplained:
        raise Failed(f"{len(unexplained)} weights are neither sites nor listed as skipped: {some(unexplained)}")


def _find_weights(subject: Subject) -> list[list[str]]:
    """Return the names of each conv and linear weight, by the classes of the layers and by what a forward calls."""
    model = deepcopy(subject.plain)  # a forward moves the statistics of BatchNorm
    model.train()
    names = parameter_names(model)
    finder = WeightFinder(model)
    seed_all()
    with finder, torch.no_grad():
        subject.example.call(model)
    found = layer_weights(model) | finder.found
    return [own for key, own in names.items() if key in found]


def compare_in_mode(subject: Subject, mode: str) -> None:
    """Compare the outputs of the plain and the transformed model, from the same seed; in eval mode they are equal.

    In train mode attention does not take the kernel that has no forward of its own layers.
    """
    outputs = []
    for model in (subject.plain, subject.transformed):
        model.train(mode == "train")
        seed_all()
        with torch.no_grad():
            outputs.append(subject.example.call(model))
    subject.record.finite &= all_finite(outputs[0])
    allowed = TOLERANCE if mode == "train" else 0
    subject.record.errors[mode] = require_close(outputs[1], outputs[0], f"outputs in {mode} mode", allowed)


def fold(subject: Subject) -> None:
    """Fold the model, which has to be what the plain model is and to compute exactly what the transformed one does."""
    subject.transformed.eval()
    folded = decorr_fx.fold(subject.transformed)
    folded.eval()
    if type(folded) is not type(subject.plain):
        raise Failed(f"the folded model is a {type(folded).__name__}, not a {type(subject.plain).__name__}")
    different = set(folded.state_dict()).symmetric_difference(subject.plain.state_dict())
    if different:
        raise Failed(f"its state_dict has other keys: {some(sorted(different))}")
    with torch.no_grad():
        outputs = [_probed(subject.example, model) for model in (folded, subject.transformed)]
    subject.record.errors["fold"] = require_close(outputs[0], outputs[1], "outputs after folding", 0)
    subject.folded = folded


def reload(subject: Subject) -> None:
    """Load the folded weights into the plain model, which has to compute exactly the same then."""
    assert subject.folded is not None
    subject.plain.eval()
    subject.plain.load_state_dict(subject.folded.state_dict(), strict=True)
    with torch.no_grad():
        outputs = [_probed(subject.example, model) for model in (subject.plain, subject.folded)]
    require_close(outputs[0], outputs[1], "outputs after reloading", 0)
    subject.folded = None  # its memory is needed for the export


def _probed(example: Example, model: nn.Module) -> Any:
    seed_all()
    return example.call_probe(model)


def reason_of(error: BaseException) -> str:
    """Return a failure in one line: the reason alone where a check found it, else the error and its message."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"[:500]


def peak_memory() -> float:
    """Return the most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
