"""Which modules of a model are traced, and what is said of the others."""

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, ModelCase
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import decorr_fx
from decorr_fx.passes.capture.trace import trace_model


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layers = nn.Parameter(torch.randn(4, 4)), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](F.linear(x, self.weight))


def test_every_module_with_a_forward_is_traced_with_its_children_as_leaves() -> None:
    traced = trace_model(nn.Sequential(Own(), nn.ReLU(), nn.LSTM(4, 4)))
    assert set(traced.graphs) == {"", "0", "0.layers.0", "1"}  # no ModuleList, which has none
    (graph,) = traced.of("0")
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["layers.0"]
    assert traced.of("0.layers") == () and traced.failed == {}
    assert traced.opaque == {"2": "2"}


def test_the_layers_of_torch_are_known_from_those_of_a_user() -> None:
    class Mine(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layers = [nn.Linear(4, 4), Mine(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Conv2d(1, 1, 1)]
    traced = trace_model(nn.Sequential(*layers, Other(4, 4), nn.LayerNorm(4), Own()))
    assert [traced.is_layer(str(i)) for i in range(7)] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_the_model_is_not_changed_and_nothing_of_a_trace_is_left_in_the_copy(case: ModelCase) -> None:
    plain = case.make()
    before = [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in plain.modules()]
    traced = trace_model(plain)
    after = [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in plain.modules()]
    assert str(after) == str(before)
    for module in traced.scratch.modules():
        values = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        assert not any(isinstance(value, torch.fx.Proxy) for value in values)


def test_all_is_traced_in_train_mode_and_the_model_keeps_its_own() -> None:
    model = MODELS["modes"].make().eval()
    (graph,) = trace_model(model).of("")
    assert any(n.target == "auxiliary" for n in graph.nodes)
    assert not model.training and not model.auxiliary.training


def test_a_replaced_forward_and_a_graph_module_are_left_alone() -> None:
    plain = nn.ModuleDict({"it": nn.Linear(4, 4), "site": nn.Linear(4, 4)})
    plain["it"].forward = lambda x: x
    (skipped,) = decorr_fx.report(plain).skipped
    assert skipped.fqn == "it" and "replaced on the instance" in skipped.reason
    (skipped,) = decorr_fx.report(
        nn.ModuleDict({"it": torch.fx.symbolic_trace(Own()), "site": nn.Linear(4, 4)})
    ).skipped
    assert skipped.fqn == "it" and "it is a GraphModule" in skipped.reason
