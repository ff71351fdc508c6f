from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from cases import LayerCase, conv_cases, layer_cases, linear_cases, transposed_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx.ops import reference
from decorr_fx.ops.calls import layer_geometry
from decorr_fx.ops.sample import (
    DUE,
    FORWARDS,
    ROWS,
    ConvGeometry,
    record_rows,
    record_rows_op,
    rows_of,
    sample_indices,
    sample_rows,
)
from decorr_fx.runtime.site.state import Site, sites_of


@dataclass
class Buffer:
    """What a site records into."""

    slots: int
    width: int
    fraction: float = 1.0
    dtype: torch.dtype = torch.float64
    seen: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    host: Tensor = field(default_factory=lambda: torch.tensor((1, 0, 0)))

    def __post_init__(self) -> None:
        self.rows = torch.zeros(self.slots, self.width, dtype=self.dtype)

    def arguments(self, x: Tensor, geometry: ConvGeometry | None = None, out_size: tuple[int, ...] = ()) -> tuple:
        numbers = [] if geometry is None else geometry.numbers
        return (x, self.rows, self.seen, self.steps, self.host, self.fraction, numbers, list(out_size))

    def record(self, x: Tensor, geometry: ConvGeometry | None = None, out_size: tuple[int, ...] = ()) -> None:
        record_rows(*self.arguments(x, geometry, out_size))


def recorded(layer: nn.Module, x: Tensor, rule: decorr_fx.Rule | None = None, steps: int = 0) -> Site:
    """Return the site of a single layer after one forward."""
    model = decorr_fx.transform(layer, rule)
    (site,) = sites_of(model)
    site.steps.fill_(steps)
    model.train()(x)
    return site


def all_patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return every row that the layer maps, in order, from the layer's own forward with an identity weight."""
    transposed = "Transpose" in type(layer).__name__
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    geometry = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
    if transposed:
        geometry["output_padding"] = layer.output_padding
    batch = x if x.dim() == len(layer.kernel_size) + 2 else x[None]
    return reference.patches(batch, layer.weight.shape, layer.groups, transposed, **geometry)


@given(st.one_of(conv_cases(), transposed_cases()), st.integers(0, 5))
@settings(max_examples=200)
def test_a_convolution_records_each_of_its_patches_once(case: LayerCase, steps: int) -> None:
    layer, x = case.make()
    expected = all_patches(layer, x)
    site = recorded(layer, x, decorr_fx.Power(max_samples=len(expected) + 3), steps)
    order = sample_indices(len(expected), len(expected), torch.tensor(steps))
    assert site.seen == site.rows_of_step() == len(expected)
    torch.testing.assert_close(site.rows[: len(expected)], expected[order])
    assert not site.rows[len(expected) :].any()


@given(linear_cases())
def test_a_linear_records_each_of_its_tokens_once(case: LayerCase) -> None:
    layer, x = case.make()
    tokens = x.reshape(-1, x.shape[-1])
    site = recorded(layer, x, decorr_fx.Power(max_samples=len(tokens)))
    order = sample_indices(len(tokens), len(tokens), torch.tensor(0))
    assert torch.equal(site.rows, tokens[order])


@given(layer_cases(), st.integers(1, 5), st.sampled_from([0.2, 0.5, 1.0]))
@settings(max_examples=100)
def test_rows_that_are_sampled_are_some_of_all(case: LayerCase, count: int, fraction: float) -> None:
    layer, x = case.make()
    geometry, out = layer_geometry(layer), layer(x)
    if geometry is not None and layer.padding_mode != "zeros":
        return  # such a layer pads first
    every = x.reshape(-1, x.shape[-1]) if geometry is None else all_patches(layer, x)
    out_size = () if geometry is None else out.shape[-len(geometry.kernel) :]
    assert rows_of(x, geometry, out_size) == len(every)
    rows = sample_rows(x, count, fraction, torch.tensor(3), geometry, out_size)
    assert len(rows) == min(count, -int(-fraction * len(every) // 1))  # rounded up
    order = sample_indices(len(every), len(rows), torch.tensor(3))
    torch.testing.assert_close(rows, every[order])


@given(st.one_of(conv_cases(), transposed_cases()))
def test_a_geometry_survives_being_written_as_numbers(case: LayerCase) -> None:
    geometry = layer_geometry(case.make()[0])
    assert ConvGeometry.of_numbers(geometry.numbers) == geometry
    assert ConvGeometry.of_numbers([]) is None


@given(st.integers(1, 3000), st.data())
def test_sampled_indices_are_different_rows_and_go_on_from_step_to_step(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    first, second = (sample_indices(total, count, torch.tensor(step)) for step in (0, 1))
    assert len(first.unique()) == count
    assert 0 <= int(first.min()) <= int(first.max()) < total
    both = torch.cat([first, second])
    assert len(both.unique()) == min(2 * count, total)


def test_samples_spread_over_the_columns_of_an_image() -> None:
    indices = sample_indices(64 * 32 * 32, 256, torch.tensor(3))
    for period in (2, 8, 32, 1024):
        counts = torch.bincount(indices % period, minlength=period).float()
        assert counts.max() <= 2 * max(256 / period, 1) + 1


def test_of_no_rows_none_are_sampled() -> None:
    assert len(sample_indices(0, 0, torch.tensor(3))) == 0
    buffer = Buffer(4, 3)
    buffer.record(torch.zeros(0, 3, dtype=torch.float64))
    assert buffer.seen == 0 and buffer.host.tolist() == [1, 1, 0]


@pytest.mark.parametrize(("fraction", "seen"), [(0.25, 25), (0.001, 1), (1.0, 64)])
def test_a_fraction_of_the_rows_is_recorded(fraction: float, seen: int) -> None:
    site = recorded(nn.Linear(3, 2), torch.randn(100, 3), decorr_fx.Dbp(sample_fraction=fraction, max_samples=64))
    assert site.seen == seen
    assert site.rows_of_step() == 100  # which is how many the layer maps


def test_several_forwards_fill_the_buffer_and_then_replace_the_oldest_rows() -> None:
    buffer = Buffer(4, 1)
    for value in (1.0, 2.0, 3.0):
        buffer.record(torch.full((2, 1), value, dtype=torch.float64))
    assert buffer.seen == 6
    assert buffer.rows.flatten().tolist() == [3, 3, 2, 2]
    assert buffer.host[FORWARDS] == 3 and buffer.host[ROWS] == 6


def test_more_rows_than_slots_are_recorded_as_many_as_there_are_slots() -> None:
    buffer, x = Buffer(4, 2), torch.randn(50, 2, dtype=torch.float64)
    buffer.record(x)
    assert torch.equal(buffer.rows, x[sample_indices(50, 4, buffer.steps)])
    assert buffer.seen == 4 and buffer.host[ROWS] == 50


def test_nothing_is_recorded_where_R_does_not_move_next() -> None:
    buffer = Buffer(4, 2)
    buffer.host[DUE] = 0
    buffer.record(torch.randn(3, 2, dtype=torch.float64))
    assert buffer.seen == 0 and not buffer.rows.any() and buffer.host.tolist() == [0, 0, 0]


def test_half_precision_is_recorded_in_float32() -> None:
    buffer, x = Buffer(4, 2, dtype=torch.float32), torch.randn(3, 2, dtype=torch.bfloat16)
    buffer.record(x)
    assert torch.equal(buffer.rows[:3], x[sample_indices(3, 3, buffer.steps)].float())


def test_a_row_of_another_width_raises_and_counts_nothing() -> None:
    buffer = Buffer(4, 2)
    with pytest.raises(RuntimeError, match="shape"):
        buffer.record(torch.randn(3, 5, dtype=torch.float64))
    assert buffer.seen == 0 and buffer.host.tolist() == [1, 0, 0]


def test_recording_leaves_the_random_generator_alone() -> None:
    model, x = decorr_fx.transform(nn.Conv2d(2, 3, 3)), torch.ones(2, 2, 5, 5)
    before = torch.get_rng_state()
    model.train()(x)
    assert next(sites_of(model)).seen > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("use_reentrant", "after_forward"), [(True, 0), (False, 5)])
def test_recomputation_under_checkpointing_records_each_row_once(use_reentrant: bool, after_forward: int) -> None:
    """The reentrant kind runs the forward without gradients, so that the recomputation is the one that counts."""
    model = decorr_fx.transform(nn.Linear(3, 3))
    (site,) = sites_of(model)
    x = torch.randn(5, 3, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    assert site.seen == after_forward
    out.sum().backward()
    assert site.seen == site.rows_of_step() == 5 and site.host[FORWARDS] == (not use_reentrant)
    torch.testing.assert_close(site.rows[:5], x.detach()[sample_indices(5, 5, site.steps)])


def in_backward(function: Callable[[], None]) -> None:
    """Call a function as autograd runs a backward."""
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda grad: function())
    x.sum().backward()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_forward_inside_a_backward_is_recorded_where_none_came_before(before: int) -> None:
    buffer = Buffer(8, 2)
    for _ in range(before):
        buffer.record(torch.ones(2, 2, dtype=torch.float64))
    in_backward(lambda: buffer.record(torch.ones(2, 2, dtype=torch.float64)))
    assert buffer.seen == 2 * max(before, 1) and buffer.host[FORWARDS] == before
    buffer.record(torch.ones(2, 2, dtype=torch.float64))  # and the next forward is one again
    assert buffer.seen == 2 * max(before, 1) + 2


def test_all_forwards_inside_a_backward_are_recorded_where_none_is_outside() -> None:
    """As a layer is called that several reentrant checkpoints share."""
    buffer = Buffer(8, 1)

    def twice() -> None:
        for value in (1.0, 2.0):
            buffer.record(torch.full((2, 1), value, dtype=torch.float64))

    in_backward(twice)
    assert buffer.rows.flatten().tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
    assert buffer.seen == buffer.host[ROWS] == 4


def test_values_outside_the_image_are_zero_even_where_the_image_is_infinite() -> None:
    site = recorded(nn.Conv1d(1, 1, 3, padding=1), torch.tensor([[[float("inf"), 1.0, 2.0]]]))
    assert site.seen == 3
    assert not site.rows.isnan().any()


def test_rows_are_detached_from_the_graph() -> None:
    buffer = Buffer(4, 2)
    buffer.record(torch.randn(3, 2, dtype=torch.float64, requires_grad=True))
    assert not buffer.rows.requires_grad and buffer.seen == 3


CALLS = [
    (None, torch.randn(3, 8), ()),
    (ConvGeometry((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)), torch.randn(3, 2, 7, 8), (4, 4)),
    (
        ConvGeometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
        torch.randn(3, 2, 7, 8).contiguous(memory_format=torch.channels_last),
        (7, 8),
    ),
    (ConvGeometry((3,), (2,), ((0, 0),), (1,), transposed=True), torch.randn(3, 2, 8), (17,)),
]
NAMES = ["linear", "conv", "channels_last", "transposed"]


@pytest.mark.parametrize(("geometry", "x", "out_size"), CALLS, ids=NAMES)
def test_opcheck(geometry: ConvGeometry | None, x: Tensor, out_size: tuple[int, ...]) -> None:
    width = x.shape[-1] if geometry is None else x.shape[1] * torch.Size(geometry.kernel).numel()
    buffer = Buffer(16, width, fraction=0.5, dtype=torch.float32)
    torch.library.opcheck(record_rows_op, buffer.arguments(x, geometry, out_size))


@pytest.mark.parametrize(("geometry", "x", "out_size"), CALLS, ids=NAMES)
def test_a_node_of_a_compiled_graph_records_the_same_rows(
    geometry: ConvGeometry | None, x: Tensor, out_size: tuple[int, ...]
) -> None:
    """Whether it is due is known when the graph runs: nothing is compiled again."""
    width = x.shape[-1] if geometry is None else x.shape[1] * torch.Size(geometry.kernel).numel()
    plain, compiled = (Buffer(16, width, dtype=torch.float32) for _ in range(2))
    graphs = CompileCounterWithBackend("inductor")

    @torch.compile(backend=graphs, fullgraph=True)
    def forward(x: Tensor) -> Tensor:
        record_rows_op(*compiled.arguments(x, geometry, out_size))
        return x + 1

    for due in (1, 0, 1):
        plain.host[DUE] = compiled.host[DUE] = due
        plain.record(x, geometry, out_size)
        forward(x)
        for name in ("rows", "seen", "host"):
            assert torch.equal(getattr(plain, name), getattr(compiled, name)), (due, name)
    assert plain.host[FORWARDS] == 2 and graphs.frame_count == 1
