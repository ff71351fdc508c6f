"""Measuring: how many rows each site maps for one example, seen in one forward of a copy of the model."""

from collections.abc import Sequence
from math import ceil, prod

from torch import Tensor, nn

from decorr_fx.inputs import Example, random_numbers_kept
from decorr_fx.ops.calls import one_each
from decorr_fx.ops.cost import REFERENCE_BATCH, Work
from decorr_fx.ops.sample import ConvGeometry
from decorr_fx.passes.copies import computed_tensors, copy_model
from decorr_fx.passes.match.settings import Settings
from decorr_fx.passes.plan import make_plan
from decorr_fx.passes.rewrite.insert import InsertDecorrelation
from decorr_fx.runtime.site.state import LIVE_SITES, Site, sites_of


class MeasuredSite(Site):
    """A site that counts the rows, and the numbers of the inputs, which it is asked to record."""

    seen_rows: int
    seen_inputs: int

    def record_call(self, x: Tensor, geometry: ConvGeometry | None, output_padding: Sequence[int] | int) -> None:
        """Count one call."""
        self.seen_inputs += x.numel()
        if geometry is None:
            self.seen_rows += x.numel() // x.shape[-1]
            return
        spatial = len(geometry.kernel)
        batch = x.shape[0] if x.dim() == spatial + 2 else 1
        padding = one_each(output_padding, spatial) if geometry.transposed else ()
        self.seen_rows += batch * prod(geometry.out_size(x.shape[-spatial:], padding))


def measure_works(model: nn.Module, settings: Settings, example: Example) -> dict[str, Work]:
    """Return the work of each site at the reference batch, by its fqn; the model is not changed.

    Raises:
        ModelError: the model does not run on the example in train mode.
    """
    own = copy_model(model, shared=[*model.parameters()], detached=computed_tensors(model))  # buffers are its own
    probe = InsertDecorrelation(make_plan(own, settings))(own).train()
    sites = list(sites_of(probe))
    for site in sites:
        site.__class__ = MeasuredSite
        vars(site).update(seen_rows=0, seen_inputs=0)
    try:
        with random_numbers_kept(probe):
            example.run(probe, "example_inputs in train mode")
    finally:
        _retire(sites)
    measured = [site for site in sites if isinstance(site, MeasuredSite) and site.seen_rows]
    return {
        site.spec.fqn: Work(_at_reference(site.seen_rows, example), _at_reference(site.seen_inputs, example))
        for site in measured
    }


def _retire(sites: Sequence[Site]) -> None:
    """Let no optimizer see the sites, and give back their memory: the copy is a cycle, and lives until it is found."""
    for site in sites:
        LIVE_SITES.pop(site, None)
        site.to("meta")


def _at_reference(count: int, example: Example) -> int:
    return max(1, ceil(count * REFERENCE_BATCH / example.batch_size))
