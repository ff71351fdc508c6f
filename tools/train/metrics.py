"""The lines of metrics.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tools.train.settings import Settings


class Metrics:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("", encoding="utf-8")

    def append(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null, which JSON can hold."""
        safe = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **safe}, default=str) + "\n")

    def header(self, settings: Settings, steps: int, parameters: int) -> None:
        """Write the settings, and what they ran on."""
        device = settings.torch_device()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        machine = {"torch": torch.__version__, "on": name, "threads": torch.get_num_threads()}
        self.append("settings", {**settings.by_option(), **machine, "steps": steps, "parameters": parameters})
