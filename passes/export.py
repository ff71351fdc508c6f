"""Export: a plain model becomes an ONNX file, which appears at its path only after onnxruntime agreed with it."""

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decorr_fx.errors import ExportError, ModelError
from decorr_fx.inputs import Example, tensors_in
from decorr_fx.passes.base import Pass
from decorr_fx.runtime.site.state import sites_of

TOLERANCE = 1e-4  # largest difference from a float32 model, relative to its largest output, that a file may show


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: where the file is.
        operators: how often each ONNX operator occurs.
        max_error: largest difference between onnxruntime and the model, relative to the largest output; None if not
            verified.
        provider: the onnxruntime provider that ran the file; None if not verified.
        batch_sizes: the batch sizes that were compared.
    """

    path: Path
    operators: dict[str, int]
    max_error: float | None
    provider: str | None
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class ExportOnnx(Pass[ExportReport]):
    """Export a plain model in eval mode with `torch.onnx.export(dynamo=True)`, and check the file in onnxruntime."""

    path: Path
    example: Example
    dynamic_batch: bool
    verify: bool

    def requires(self, model: nn.Module) -> None:
        """The model is plain and in eval mode, accepts the example inputs, and the path can be written."""
        if next(sites_of(model), None) is not None or model.training:
            raise ModelError("only a plain model in eval mode can be exported; fold it first")
        folder = self.path.parent
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            problem = (
                "is a directory" if self.path.is_dir() else "cannot be written: its folder is missing or read-only"
            )
            raise ExportError(f"{self.path} {problem}; give the path of a file in a folder that exists")
        self._require_onnx()
        if not self.example.tensors:
            raise ExportError(
                "example_inputs holds no tensor; give what the model takes: a tensor, a tuple of arguments, or "
                "a dict of keyword arguments"
            )
        _run(model, self.example)

    def call(self, model: nn.Module) -> ExportReport:
        """Export into a temporary folder beside the path, verify there, then move the file to its place."""
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.") as folder:
            file = Path(folder) / self.path.name
            self._write(model, file)
            operators = _check_file(file)
            compared = self._compare(model, file) if self.verify else (None, None, ())
            for written in sorted(Path(folder).iterdir(), reverse=True):  # external weights before the graph
                os.replace(written, self.path.parent / written.name)
        return ExportReport(self.path, operators, *compared)

    def ensures(self, model: nn.Module, result: ExportReport) -> None:
        """The file is there."""
        if not self.path.is_file():
            raise self.broken(str(self.path), "no file was written")

    def _require_onnx(self) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ExportError(f"{error.name} is not installed; pip install 'decorr_fx[onnx]'") from None

    def _write(self, model: nn.Module, file: Path) -> None:
        example = self.example.of_batch(2) if self.dynamic_batch else self.example  # 1 would be taken for a constant
        shapes = example.dynamic_shapes() if self.dynamic_batch else None
        try:
            program = torch.onnx.export(
                model, example.args, kwargs=example.kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            program.save(str(file))
        except Exception as error:  # the exporter raises whatever the model's code makes it raise
            advice = "; if its forward needs a fixed batch, use dynamic_batch=False" if self.dynamic_batch else ""
            raise ExportError(f"torch.onnx.export failed: {_first_line(error)}{advice}") from error

    def _compare(self, model: nn.Module, file: Path) -> tuple[float, str, tuple[int, ...]]:
        import onnxruntime

        own = self.example.batch_size
        sizes = (own, own + 1) if self.dynamic_batch else (own,)
        try:
            session = onnxruntime.InferenceSession(str(file), providers=_providers(onnxruntime))
            errors = [self._error(model, session, size) for size in sizes]
        except ExportError:  # the model itself does not run at this batch size, and says so
            raise
        except Exception as error:  # onnxruntime has no base class of its errors
            raise ExportError(f"onnxruntime cannot run the file: {_first_line(error)}") from error
        allowed = _tolerance(model)
        if not max(errors) <= allowed:
            raise ExportError(
                f"onnxruntime disagrees with the model by {max(errors):.2g} of its largest output "
                f"(allowed: {allowed:g}) at batch sizes {sizes}; no file was left at {self.path}"
            )
        return max(errors), session.get_providers()[0], sizes

    def _error(self, model: nn.Module, session: Any, batch: int) -> float:
        example = self.example.of_batch(batch) if self.dynamic_batch else self.example
        expected = tensors_in(_run(model, example))
        got = session.run(None, example.feeds([i.name for i in session.get_inputs()]))
        return max(_relative_error(torch.from_numpy(g), e.cpu()) for g, e in zip(got, expected, strict=True))


def _tolerance(model: nn.Module) -> float:
    """Return the largest difference that is allowed: more for weights of half precision."""
    coarsest = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return max(TOLERANCE, 10 * coarsest if coarsest > torch.finfo(torch.float32).eps else 0.0)


def _providers(onnxruntime: Any) -> list[str]:
    available = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]


def _run(model: nn.Module, example: Example) -> Any:
    try:
        return example.call(model)
    except Exception as error:  # whatever the model makes of inputs that it was not written for
        shapes = [tuple(t.shape) for t in example.tensors]
        raise ExportError(
            f"{type(model).__name__} does not accept the example inputs of shapes {shapes}: {_first_line(error)}"
        ) from error


def _check_file(file: Path) -> dict[str, int]:
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # onnx has several unrelated errors, one of each part
        raise ExportError(f"onnx refuses the exported file: {_first_line(error)}") from error
    graph = onnx.load(str(file), load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((got != expected).any())
    same = (got == expected) | (got.isnan() & expected.isnan())  # infinities of a mask agree, too
    difference = (got - expected).abs().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    scale = expected.abs().masked_fill(~expected.isfinite(), 0).max().clamp(min=1e-12) if expected.numel() else 1.0
    return float(difference.max() / scale) if expected.numel() else 0.0


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
