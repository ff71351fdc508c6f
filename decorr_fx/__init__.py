"""Decorrelated backpropagation for PyTorch: faster learning, and a plain model at all times."""

from decorr_fx.api import (
    calibrate,
    export_onnx,
    fold,
    fold_,
    paused,
    prune,
    stepping,
    transform,
    transform_,
)
from decorr_fx.config import Crgd, Dbp, Power, Rule
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
from decorr_fx.inspection import matrices, report, state_keys, stats
from decorr_fx.ops.prune.subspace import Units
from decorr_fx.passes.capture.adapters import register_layer
from decorr_fx.passes.export import ExportReport
from decorr_fx.passes.prune.report import GroupRecord, ModelSize, PruneReport, PruneResult
from decorr_fx.runtime.report import Report, SiteRecord
from decorr_fx.runtime.site import broadcast  # noqa: F401 - DistributedDataParallel leaves the buffers of sites alone
from decorr_fx.runtime.site.spec import SkippedRecord
from decorr_fx.runtime.stats import SiteStats, Stats

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Crgd",
    "Dbp",
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
    "Power",
    "PruneReport",
    "PruneResult",
    "Report",
    "Rule",
    "SiteRecord",
    "SiteStats",
    "SkippedRecord",
    "Stats",
    "Units",
    "calibrate",
    "export_onnx",
    "fold",
    "fold_",
    "matrices",
    "paused",
    "prune",
    "register_layer",
    "report",
    "state_keys",
    "stats",
    "stepping",
    "transform",
    "transform_",
]
