"""Decorrelated backpropagation for PyTorch: faster learning, and a plain model at the end."""

from decorr_fx.api import calibrate, export_onnx, fold, fold_, paused, prune, report, stats, step, transform
from decorr_fx.config import DecorrConfig
from decorr_fx.errors import (
    CheckpointError,
    ConfigError,
    DecorrError,
    DistributedError,
    ExportError,
    LayerError,
    ModelError,
    NotTransformedError,
    PassError,
)
from decorr_fx.ops.prune.subspace import Units
from decorr_fx.passes.capture.adapters import register_layer
from decorr_fx.passes.export import ExportReport
from decorr_fx.passes.prune.report import GroupRecord, ModelSize, PruneReport, PruneResult
from decorr_fx.runtime.report import Report, SiteRecord, SiteStats, Stats
from decorr_fx.runtime.site.spec import SkippedRecord

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DecorrConfig",
    "DecorrError",
    "DistributedError",
    "ExportError",
    "ExportReport",
    "GroupRecord",
    "LayerError",
    "ModelError",
    "ModelSize",
    "NotTransformedError",
    "PassError",
    "PruneReport",
    "PruneResult",
    "Report",
    "SiteRecord",
    "SiteStats",
    "SkippedRecord",
    "Stats",
    "Units",
    "calibrate",
    "export_onnx",
    "fold",
    "fold_",
    "paused",
    "prune",
    "register_layer",
    "report",
    "stats",
    "step",
    "transform",
]
