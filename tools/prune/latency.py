"""How long a network and a pruned one take in onnxruntime, side by side."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import decorr_fx

WARM, RUNS = 10, 200


def compare(whole: nn.Module, small: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return milliseconds of a forward on one thread, medians, and the quartiles of their ratio; they take turns."""
    with TemporaryDirectory() as folder:
        sessions = [_session(model, images, Path(folder) / name) for name, model in (("a", whole), ("b", small))]
    feed = images.numpy()
    times = np.array([[_time(session, feed) for session in sessions] for _ in range(WARM + RUNS)])[WARM:]
    ratios = times[:, 1] / times[:, 0]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "batch": len(images), "whole_ms": float(np.median(times[:, 0])), "small_ms": float(np.median(times[:, 1])),
        "ratio": middle, "quartiles": [low, high], "n": RUNS, "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }  # fmt: skip


def compare_batches(whole: nn.Module, small: nn.Module, images: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the comparison for one image and for all of them at once."""
    for batch in (1, len(images)):
        yield compare(whole, small, images[:batch])


def _session(model: nn.Module, images: Tensor, path: Path) -> onnxruntime.InferenceSession:
    file = decorr_fx.export_onnx(model, path.with_suffix(".onnx"), images[:1]).path
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _time(session: onnxruntime.InferenceSession, feed: np.ndarray) -> float:
    start = perf_counter()
    session.run(None, {session.get_inputs()[0].name: feed})
    return 1000 * (perf_counter() - start)
