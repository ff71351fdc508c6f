"""A dozen models of each library through the zoo, and the graph breaks of a dozen: what CI runs of the whole sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.zoo.__main__ import main

DOZENS = {
    "torchvision": """
        resnet18 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 efficientnet_b0 convnext_tiny swin_t
        lraspp_mobilenet_v3_large ssdlite320_mobilenet_v3_large mc3_18 raft_small
    """,
    "timm": """
        resnet10t tf_mobilenetv3_small_075 nf_regnet_b0 vit_tiny_patch16_224 ghostnet_050 mobilevit_xxs levit_128s
        convnextv2_atto hardcorenas_b skresnet18 eva02_tiny_patch14_224 xcit_nano_12_p8_224
    """,
    "transformers": "bert gpt2 llama mixtral falcon t5 vit swin segformer wav2vec2 whisper clip",
}
COMPILED = {
    "torchvision": "resnet18 squeezenet1_1 mc3_18 swin_t",
    "timm": "resnet10t tf_mobilenetv3_small_075 nf_regnet_b0 vit_tiny_patch16_224",
    "transformers": "bert gpt2 llama vit",
}


def passed(library: str, names: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the zoo without export; return the records, all of models that passed."""
    common = ["--out", str(out), "--jobs", "2", "--no-onnx", "--library", library]
    code = main([*common, *arguments, *names.split()])
    records: list[dict[str, Any]] = json.loads((out / f"zoo-{library}.json").read_text())["models"]
    failures = {record["name"]: record["reason"] for record in records if record["status"] != "passed"}
    assert (code, failures) == (0, {})
    assert [record["name"] for record in records] == sorted(names.split())
    return records


@pytest.mark.parametrize("library", DOZENS)
def test_a_dozen_models_pass(library: str, tmp_path: Path) -> None:
    records = passed(library, DOZENS[library], tmp_path)
    assert len(records) == 12
    assert all(record["sites"] > 0 for record in records)


@pytest.mark.parametrize("library", COMPILED)
def test_compiling_breaks_no_graph_that_the_plain_model_keeps(library: str, tmp_path: Path) -> None:
    for record in passed(library, COMPILED[library], tmp_path, "--compile"):
        plain, transformed = record["graph_breaks"]
        assert transformed <= plain
