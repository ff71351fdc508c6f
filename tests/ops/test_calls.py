import pytest
import torch
import torch.nn.functional as F
from cases import LayerCase, conv_cases, layer_cases
from hypothesis import given, settings
from torch import nn

from decorr_fx.ops.calls import CALLS, layer_geometry, layer_signature, one_each
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.sample import ConvGeometry


@given(layer_cases())
@settings(max_examples=100)
def test_a_layer_is_read_as_its_type_says(case: LayerCase) -> None:
    layer, _ = case.make()
    signature, groups = layer_signature(layer), getattr(layer, "groups", 1)
    layout = signature.layout(groups, layer.weight.shape)
    assert signature.transposed == layout.transposed == ("Transpose" in case.cls.__name__)
    assert layout.size == layer.weight.numel() and layout.groups == groups
    inputs, outputs = (
        (layer.in_features, layer.out_features) if signature.spatial == 0 else (layer.in_channels, layer.out_channels)
    )
    assert layout.channels * groups == inputs and layout.d_out * groups == outputs
    assert layout.taps == layer.weight.shape[2:].numel()


@given(conv_cases())
def test_the_geometry_of_a_layer_is_that_of_the_call_that_it_makes(case: LayerCase) -> None:
    layer, _ = case.make()
    signature = CALLS[getattr(F, f"conv{layer.weight.dim() - 2}d")]
    arguments = signature.bind(
        ("x", layer.weight, layer.bias, layer.stride), {"padding": layer.padding, "dilation": layer.dilation}
    )
    assert signature.geometry(arguments, layer.weight.shape) == layer_geometry(layer)


def test_arguments_are_bound_by_position_by_name_and_by_default() -> None:
    signature = CALLS[F.conv_transpose2d]
    bound = signature.bind(("x", "W", None, 2), {"dilation": 3})
    assert bound == {
        "input": "x", "weight": "W", "bias": None, "stride": 2, "padding": 0, "output_padding": 0, "groups": 1,
        "dilation": 3,
    }  # fmt: skip
    assert CALLS[torch.addmm].bind(("b", "x", "W"), {"beta": 2})["beta"] == 2
    assert CALLS[torch.addmm].bind(("b", "x", "W"), {})["weight"] == "W"


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        ("valid", (3, 4), (1, 1), ((0, 0), (0, 0))),
        ("same", (3, 4), (1, 1), ((1, 1), (1, 2))),  # an odd total has its extra zero at the end
        ("same", (2, 2), (1, 2), ((0, 1), (1, 1))),
        (2, (3, 4), (1, 1), ((2, 2), (2, 2))),
        ((0, 2), (3, 4), (1, 1), ((0, 0), (2, 2))),
        ([1], (3, 4), (1, 1), ((1, 1), (1, 1))),
    ],
)
def test_padding_is_one_pair_a_dimension(padding: object, kernel: tuple, dilation: tuple, expected: tuple) -> None:
    arguments = {"stride": 1, "padding": padding, "dilation": dilation}
    geometry = CALLS[F.conv2d].geometry(arguments, (5, 2, *kernel))
    assert geometry == ConvGeometry(kernel, (1, 1), expected, dilation)


def test_a_single_number_stands_for_all_dimensions() -> None:
    assert one_each(2, 3) == one_each((2,), 3) == (2, 2, 2)
    assert one_each([1, 2], 2) == (1, 2)


def test_products_have_their_weight_inputs_first() -> None:
    for function in (torch.matmul, torch.mm, torch.addmm):
        signature = CALLS[function]
        assert signature.product and not signature.transposed
        assert signature.layout(1, (6, 4)) == Layout(1, 4, 6, transposed=True)
        assert signature.geometry({}, (6, 4)) is None
    assert CALLS[F.linear].layout(1, (4, 6)) == Layout(1, 4, 6)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(3, 4), nn.Bilinear(2, 2, 2)])
def test_other_modules_call_no_weight_by_their_type(module: nn.Module) -> None:
    assert layer_signature(module) is None and layer_geometry(module) is None
