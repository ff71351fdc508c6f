"""The last two stages: ONNX files of the plain and the transformed model, and their graph breaks when compiled."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import decorr_fx
from decorr_fx import ExportError, ExportReport
from tools.zoo.compare import TOLERANCE, Failed, seed_all
from tools.zoo.examples import Example
from tools.zoo.record import Record

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
REFUSED_INPUTS = "does not accept the example inputs"


def check_onnx(example: Example, plain: nn.Module, transformed: nn.Module, record: Record) -> None:
    """Export the transformed model, if the plain one exports, and compare operators; the library compares outputs."""
    with tempfile.TemporaryDirectory() as folder:
        expected = _export_plain(example, plain, Path(folder), record, verify=False)
        if expected is None:
            return
        try:
            report = _export(transformed, example, Path(folder) / "folded.onnx", verify=True)
        except ExportError:
            if _export_plain(example, plain, Path(folder), record, verify=True) is None:
                return
            raise
    record.onnx = "exported"
    record.operators = sum(report.operators.values())
    _compare(report, expected, record)


def _export_plain(example: Example, plain: nn.Module, folder: Path, record: Record, verify: bool) -> Any:
    try:
        return _export(plain, example, folder / "plain.onnx", verify)
    except ExportError as error:
        if REFUSED_INPUTS in str(error):
            raise
        record.onnx = f"plain does not export: {root_cause(error)}"
        return None


def root_cause(error: BaseException) -> str:
    """Return the first line of the error that an error goes back to: the exporter's own says which step failed only."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _export(model: nn.Module, example: Example, path: Path, verify: bool) -> ExportReport:
    seed_all()
    return decorr_fx.export_onnx(model, path, example.inputs, dynamic_batch=False, verify=verify)


def _compare(report: ExportReport, expected: ExportReport, record: Record) -> None:
    if report.operators != expected.operators:
        ours, theirs = set(report.operators.items()), set(expected.operators.items())
        raise Failed(f"its operators differ from the plain model's: {sorted(ours ^ theirs)[:6]}")
    record.errors["onnx"] = error = report.max_error if report.max_error is not None else float("inf")
    if not error <= TOLERANCE:
        raise Failed(f"onnxruntime differs by {error:.2g} of the largest output (allowed: {TOLERANCE:g})")


def count_graph_breaks(example: Example, plain: nn.Module, transformed: nn.Module, record: Record) -> None:
    """Count the graph breaks of both models in train mode; the transformed one may not have more."""
    record.graph_breaks = [_graph_breaks(example, model) for model in (plain, transformed)]
    before, after = record.graph_breaks
    if after > before:
        raise Failed(f"torch.compile breaks the graph {after} times, that of the plain model {before} times")


def _graph_breaks(example: Example, model: nn.Module) -> int:
    model.train()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(lambda: example.call(model))()
    return int(explained.graph_break_count)
