import pytest
import torch
from cases import LayerCase, conv_cases, linear_cases, transposed_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx.ops import reference
from decorr_fx.ops.sample import sample_indices, sample_indices_op, store_rows
from decorr_fx.runtime.site.state import Site, sites_of


def buffers(slots: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows and seen of a site."""
    return torch.zeros(slots, width, dtype=torch.float64), torch.zeros((), dtype=torch.int64)


def recorded(layer: nn.Module, x: Tensor, steps: int = 0, **config: object) -> Site:
    """Return the site of a single layer after one forward."""
    model = decorr_fx.transform(layer, decorr_fx.DecorrConfig(**config))
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
    site = recorded(layer, x, steps, rule="dbp", structure="full", max_samples=len(expected) + 3)
    order = sample_indices(len(expected), len(expected), torch.tensor(steps))
    assert site.seen == len(expected)
    torch.testing.assert_close(site.rows[: len(expected)], expected[order])
    assert not site.rows[len(expected) :].any()


@given(linear_cases())
def test_a_linear_records_each_of_its_tokens_once(case: LayerCase) -> None:
    layer, x = case.make()
    tokens = x.reshape(-1, x.shape[-1])
    site = recorded(layer, x, max_samples=len(tokens))
    order = sample_indices(len(tokens), len(tokens), torch.tensor(0))
    assert torch.equal(site.rows, tokens[order])


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


def test_a_fraction_of_the_rows_is_recorded() -> None:
    site = recorded(nn.Linear(3, 2), torch.randn(100, 3), sample_fraction=0.25, max_samples=64)
    assert site.seen == 25
    site = recorded(nn.Linear(3, 2), torch.randn(100, 3), sample_fraction=1.0, max_samples=64)
    assert site.seen == 64


def test_several_forwards_fill_the_buffer_and_then_replace_the_oldest_rows() -> None:
    rows, seen = buffers(4, 1)
    for value in (1.0, 2.0, 3.0):
        store_rows(rows, seen, torch.full((2, 1), value, dtype=torch.float64))
    assert seen == 6
    assert rows.flatten().tolist() == [3, 3, 2, 2]


def test_recording_leaves_the_random_generator_alone() -> None:
    before = torch.get_rng_state()
    recorded(nn.Conv2d(2, 3, 3), torch.ones(2, 2, 5, 5))  # the layer draws its weights here
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3), torch.ones(2, 2, 5, 5)
    model = decorr_fx.transform(layer)
    before = torch.get_rng_state()
    model.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_under_checkpointing_records_nothing_twice(use_reentrant: bool) -> None:
    model = decorr_fx.transform(nn.Linear(3, 3))
    (site,) = sites_of(model)
    x = torch.randn(5, 3, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    assert site.seen == 5
    out.sum().backward()
    assert site.seen == 5


def test_values_outside_the_image_are_zero_even_where_the_image_is_infinite() -> None:
    site = recorded(nn.Conv1d(1, 1, 3, padding=1), torch.tensor([[[float("inf"), 1.0, 2.0]]]), max_samples=3)
    assert not site.rows.isnan().any()


def test_opcheck() -> None:
    torch.library.opcheck(store_rows, (*buffers(6, 4), torch.randn(3, 4, dtype=torch.float64)))
    torch.library.opcheck(sample_indices_op, (torch.tensor(3), 50, 7))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 2), torch.randn(3, 8)),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(3, 2, 7, 8)),
        (nn.Conv2d(2, 3, 3, padding=1), torch.randn(3, 2, 7, 8).contiguous(memory_format=torch.channels_last)),
        (nn.ConvTranspose1d(2, 3, 3, stride=2), torch.randn(3, 2, 8)),
    ],
    ids=["linear", "conv", "channels_last", "transposed"],
)
def test_a_compiled_forward_gathers_the_same_rows_in_one_kernel(layer: nn.Module, x: Tensor) -> None:
    """Between the choice of the rows and the write into the buffer."""
    expected = recorded(layer, x, max_samples=16)
    model = decorr_fx.transform(layer, decorr_fx.DecorrConfig(max_samples=16))
    (site,) = sites_of(model)
    geometry, padding = site.spec.geometry, (0,)

    def gather(x: Tensor) -> None:
        site.record_call(x, geometry, padding)

    torch._dynamo.reset()
    _, (code,) = run_and_get_code(torch.compile(gather, fullgraph=True), x)
    assert torch.equal(site.rows, expected.rows) and torch.equal(site.seen, expected.seen)
    called = code[code.index("def call(") :]
    assert called.count("cpp_fused") == 1 and "extern_kernels" not in called
