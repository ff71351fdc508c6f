import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import MODELS, small_cnn
from torch import Tensor, nn

import decorr_fx
from decorr_fx import ExportError
from decorr_fx.passes import export


def trained(name: str = "cnn") -> tuple[nn.Module, Tensor]:
    case = MODELS[name]
    model = decorr_fx.transform(case.make())
    x = torch.randn(case.shape)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, x


@pytest.mark.parametrize("name", ["cnn", "functional", "weight_norm", "up_sample"])
def test_the_file_runs_at_any_batch_size_and_has_the_operators_of_the_plain_model(name: str, tmp_path: Path) -> None:
    model, x = trained(name)
    report = decorr_fx.export_onnx(model, tmp_path / "model.onnx", x)
    assert model.training
    plain = decorr_fx.export_onnx(MODELS[name].make(), tmp_path / "plain.onnx", x)
    assert report.operators == plain.operators
    counted = Counter(node.op_type for node in onnx.load(report.path).graph.node)
    assert report.operators == dict(counted)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert report.provider == "CPUExecutionProvider"
    assert report.batch_sizes == (len(x), len(x) + 1)
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    more = torch.randn(11, *x.shape[1:])
    (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    np.testing.assert_allclose(got, model.eval()(more).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_still_gives_a_dynamic_file_and_a_fixed_one_stays_fixed(tmp_path: Path) -> None:
    model, x = trained()
    assert decorr_fx.export_onnx(model, tmp_path / "a.onnx", x[:1]).batch_sizes == (1, 2)
    fixed = decorr_fx.export_onnx(model, str(tmp_path / "b.onnx"), (x,), dynamic_batch=False)
    assert fixed.batch_sizes == (len(x),)
    half = decorr_fx.export_onnx(model.half(), tmp_path / "c.onnx", x.half())
    assert 1e-5 < half.max_error < 1e-2
    dims = onnx.load(fixed.path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == list(x.shape)


def test_without_verification_nothing_is_compared(tmp_path: Path) -> None:
    model, x = trained()
    report = decorr_fx.export_onnx(model, tmp_path / "model.onnx", x, verify=False)
    assert (report.max_error, report.provider, report.batch_sizes) == (None, None, ())


def test_several_inputs(tmp_path: Path) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x) + self.b(y), self.a(x)

    model = decorr_fx.transform(TwoInputs())
    report = decorr_fx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(3, 4), torch.randn(3, 5)))
    assert report.max_error is not None


class TestErrors:
    def test_inputs_that_the_model_does_not_accept(self, tmp_path: Path) -> None:
        model, _ = trained()
        for wrong in (torch.randn(5, 4, 8, 8), (torch.randn(5, 3, 8, 8), 3)):
            with pytest.raises(ExportError, match="Sequential does not accept the example inputs of shapes"):
                decorr_fx.export_onnx(model, tmp_path / "model.onnx", wrong)
        with pytest.raises(ExportError, match="holds no tensor"):
            decorr_fx.export_onnx(model, tmp_path / "model.onnx", "image.png")
        assert not list(tmp_path.iterdir())

    def test_a_path_that_cannot_be_written(self, tmp_path: Path) -> None:
        model, x = trained()
        with pytest.raises(ExportError, match="missing or read-only"):
            decorr_fx.export_onnx(model, tmp_path / "nowhere" / "model.onnx", x)
        with pytest.raises(ExportError, match="is a directory"):
            decorr_fx.export_onnx(model, tmp_path, x)

    def test_a_folder_that_is_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = trained()
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        with pytest.raises(ExportError, match="missing or read-only"):
            decorr_fx.export_onnx(model, tmp_path / "model.onnx", x)

    def test_a_mismatch_leaves_no_file_and_keeps_an_older_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = trained()
        path = tmp_path / "model.onnx"
        monkeypatch.setattr(export, "TOLERANCE", 0.0)
        with pytest.raises(ExportError, match="onnxruntime disagrees with the model"):
            decorr_fx.export_onnx(model, path, x)
        assert not list(tmp_path.iterdir())
        path.write_bytes(b"older")
        with pytest.raises(ExportError):
            decorr_fx.export_onnx(model, path, x)
        assert path.read_bytes() == b"older"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_model_that_cannot_be_exported(self, tmp_path: Path) -> None:
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) if x.sum().item() > 0 else self.layer(-x)

        with pytest.raises(ExportError, match=r"torch.onnx.export failed"):
            decorr_fx.export_onnx(decorr_fx.transform(Branching()), tmp_path / "model.onnx", torch.randn(3, 4))
        assert not list(tmp_path.iterdir())

    def test_a_nan_in_any_output_is_a_mismatch(self) -> None:
        one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
        assert export._relative_error(nan, one) == float("inf")
        assert export._relative_error(nan, nan) == 0
        masked = torch.tensor([2.0, -float("inf")])
        assert export._relative_error(masked, masked) == 0
        assert export._relative_error(one, masked) == float("inf")

    def test_weights_that_onnxruntime_cannot_run(self, tmp_path: Path) -> None:
        model = decorr_fx.transform(nn.Sequential(nn.Conv2d(3, 2, 3))).bfloat16()
        with pytest.raises(ExportError, match="onnx refuses the exported file"):
            decorr_fx.export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
        assert not list(tmp_path.iterdir())

    def test_a_model_that_runs_at_one_batch_size_only(self, tmp_path: Path) -> None:
        class OnlyThree(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x.reshape(3, 4))

        model = decorr_fx.transform(OnlyThree())
        with pytest.raises(ExportError, match=r"dynamic_batch=False|does not accept the example inputs"):
            decorr_fx.export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 4))
        assert not list(tmp_path.iterdir())
        decorr_fx.export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 4), dynamic_batch=False)

    def test_a_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
        with pytest.raises(ExportError, match=r"pip install 'decorr_fx\[onnx\]'"):
            decorr_fx.export_onnx(decorr_fx.transform(small_cnn()), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8))
