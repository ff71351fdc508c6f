"""Measuring: how many rows each site maps for one example, seen in one forward of a copy of the model."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from decorr_fx.errors import ModelError
from decorr_fx.ops.cost import REFERENCE_BATCH, Work
from decorr_fx.passes.base import computed_tensors, copy_model
from decorr_fx.passes.choose import Settings
from decorr_fx.passes.example import Example
from decorr_fx.passes.insert import InsertDecorrelation
from decorr_fx.passes.plan import make_plan
from decorr_fx.runtime.state import Site, sites_of


class RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the rows, and the numbers of the inputs, that sites are asked to record."""

    def __init__(self, sites: list[Site]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites = {id(site.rows): site for site in sites}
        self.rows: Counter[str] = Counter()
        self.inputs: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at one operator."""
        if func in (torch.ops.decorr_fx.record_linear.default, torch.ops.decorr_fx.record_conv.default):
            site, x = self.sites[id(args[0])], args[3]
            self.rows[site.spec.fqn] += _rows(site, x, args[-1])
            self.inputs[site.spec.fqn] += x.numel()
            return None
        return func(*args, **(kwargs or {}))


def _rows(site: Site, x: Tensor, output_padding: Any) -> int:
    geometry = site.spec.geometry
    if geometry is None:
        return x.numel() // x.shape[-1]
    spatial = len(geometry.kernel)
    batch = len(x) if x.dim() == spatial + 2 else 1
    return batch * prod(geometry.out_size(x.shape[-spatial:], output_padding))


def measure_works(model: nn.Module, settings: Settings, example: Example) -> dict[str, Work]:
    """Return the work of each site at the reference batch, by its fqn; the model is not changed.

    Raises:
        ModelError: the model does not run on the example in train mode.
    """
    own = copy_model(model, shared=[*model.parameters()], detached=computed_tensors(model))  # buffers are its own
    probe = InsertDecorrelation(make_plan(own, settings))(own).train()
    sites = list(sites_of(probe))
    devices = [tensor.device for tensor in probe.parameters() if tensor.is_cuda]
    with torch.random.fork_rng(list(dict.fromkeys(devices))), RecordingMode(sites) as seen:
        try:
            example.call(probe)
        except Exception as error:  # whatever the user's code makes of the inputs
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"the model does not run on example_inputs in train mode: {problem}") from error
    return {
        fqn: Work(_at_reference(rows, example), _at_reference(seen.inputs[fqn], example))
        for fqn, rows in seen.rows.items()
    }


def _at_reference(count: int, example: Example) -> int:
    return max(1, ceil(count * REFERENCE_BATCH / example.batch_size))
