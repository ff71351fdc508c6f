import pytest
import torch
from cases import LayerCase, layer_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decorr_fx.ops import reference
from decorr_fx.ops.structure import Layout, choose_layout, fold_weight, mix, stack_rows, stack_weight, unstack_weight


def plain_layout(case: LayerCase) -> Layout:
    layer, _ = case.make()
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    taps = shape[2:].numel()
    if "Transpose" in case.cls.__name__:
        return Layout(groups, shape[1], shape[0] // groups, taps, transposed=True)
    return Layout(groups, shape[0] // groups, shape[1], taps)


def factors_of(layout: Layout, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.stacks, side, side) for side in layout.modes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense_of_group(factors: list[torch.Tensor], layout: Layout, group: int) -> torch.Tensor:
    """Return R of one group as one matrix over its channel-major features."""
    blocks = range(group * layout.blocks, (group + 1) * layout.blocks)
    return torch.block_diag(*[reference.dense([f[b] for f in factors]) for b in blocks])


structures = st.sampled_from(["auto", "full", "kronecker", "block"])


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=150)
def test_folding_is_the_dense_product_of_every_group(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = choose_layout(plain_layout(case), structure, max_dim)
    W = case.make()[0].weight.detach()
    factors = factors_of(layout)
    folded = fold_weight(W, factors, layout)
    assert folded.shape == W.shape
    axis = 1 if layout.transposed else 0
    by_group = zip(W.chunk(layout.groups, 0), folded.chunk(layout.groups, 0), strict=True)
    for group, (plain, got) in enumerate(by_group):
        rows = (plain.transpose(0, axis)).reshape(layout.d_out, layout.d)
        expected = reference.fold_rows(rows, dense_of_group(factors, layout, group))
        torch.testing.assert_close(got.transpose(0, axis).reshape(layout.d_out, layout.d), expected)


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=60)
def test_rows_are_mixed_by_the_same_matrix_as_weights(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = choose_layout(plain_layout(case), structure, max_dim)
    factors = factors_of(layout)
    x = torch.randn(3, layout.groups * layout.d, dtype=torch.float64)
    z = mix(stack_rows(x, layout), [f.mT for f in factors])
    flat = z.movedim(1, 0).reshape(3, layout.groups, layout.d)
    for group, rows in enumerate(x.reshape(3, layout.groups, layout.d).unbind(1)):
        expected = reference.decorrelate_rows(rows, dense_of_group(factors, layout, group))
        torch.testing.assert_close(flat[:, group], expected)


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=60)
def test_unstacking_inverts_stacking(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = choose_layout(plain_layout(case), structure, max_dim)
    W = case.make()[0].weight.detach()
    assert torch.equal(unstack_weight(stack_weight(W, layout), W.shape, layout), W)


def test_folding_is_differentiable_in_the_weight_and_in_the_factors() -> None:
    layout = Layout(groups=2, d_out=2, channels=4, taps=3, blocks=2, paired=True)
    W = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    factors = [f.requires_grad_() for f in factors_of(layout)]
    assert torch.autograd.gradcheck(lambda W, *f: fold_weight(W, f, layout), (W, *factors))
    assert torch.autograd.gradgradcheck(lambda W, *f: fold_weight(W, f, layout), (W, *factors))


@pytest.mark.parametrize(
    ("layer", "structure", "max_dim", "expected"),
    [
        (nn.Linear(64, 10), "auto", 512, "full"),
        (nn.Linear(768, 10), "auto", 512, "block x2"),
        (nn.Conv2d(16, 16, 3), "auto", 512, "full"),
        (nn.Conv2d(128, 16, 3), "auto", 512, "kronecker"),
        (nn.Conv2d(1024, 16, 3), "auto", 512, "kronecker x2"),
        (nn.Conv2d(32, 32, 31, groups=32), "auto", 512, "full"),
        (nn.Conv2d(2048, 16, 1), "auto", 512, "block x4"),
        (nn.Linear(25088, 10, device="meta"), "auto", 512, "block x49"),
        (nn.Linear(25088, 10, device="meta"), "full", 512, "full"),
        (nn.Conv2d(1024, 16, 3), "kronecker", 512, "kronecker"),
        (nn.Conv2d(64, 16, 3), "block", 90, "block x8"),
        (nn.Linear(1031, 4), "auto", 256, "full"),  # a prime: nothing but slivers would be equal blocks
    ],
)  # fmt: skip
def test_the_structure_is_chosen_as_the_docs_say(layer: nn.Module, structure: str, max_dim: int, expected: str) -> None:
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    plain = Layout(groups, shape[0] // groups, shape[1], shape[2:].numel())
    layout = choose_layout(plain, structure, max_dim)
    assert layout.structure == expected
    if structure == "auto" and expected != "full":
        assert max(layout.modes) <= max_dim
