"""A dozen models of each library through every stage, graph breaks counted: what CI runs of the whole sweep."""

import json
from pathlib import Path

import pytest
from zoo import main

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


@pytest.mark.parametrize("library", DOZENS)
def test_a_dozen_models_pass_every_stage(library: str, tmp_path: Path) -> None:
    names = [f"{library}:{name}" for name in DOZENS[library].split()]
    assert len(names) == 12
    code = main(["--out", str(tmp_path), "--jobs", "2", "--compile", *names])
    records = json.loads((tmp_path / f"zoo-{library}.json").read_text())["models"]
    failures = {record["name"]: (record["stage"], record["reason"]) for record in records if record["reason"]}
    assert (code, failures) == (0, {})
    assert len(records) == 12
    assert all(record["sites"] > 0 and record["graph_breaks"] for record in records)
