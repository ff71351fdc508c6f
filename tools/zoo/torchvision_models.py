"""All models of torchvision, as small as each lets itself be called."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model, list_models, optical_flow, segmentation, video

from tools.zoo.examples import Example, Library

CLASSES = 5
SIZE = 64
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # aux logits; windows of 7; patches of 14
DETECTION_SIZE = 96
KEYPOINTS = 17
FRAMES = 4
WHOLE_CLIPS = {"mvit_v1_b", "mvit_v2_s", "s3d"}  # position embeddings and the last pooling are of 16 frames of 224
QUANTIZED = "its weights are integers: it cannot be trained"


def library() -> Library:
    """Return the models of torchvision, the ones that were quantised beforehand as skipped."""
    quantized = {name: QUANTIZED for name in list_models() if name.startswith("quantized_")}
    models = {name: builder(name) for name in list_models() if name not in quantized}
    return Library("torchvision", models, quantized, ("torch", "torchvision"))


def builder(name: str) -> Callable[[], Example]:
    """Return the function that builds the example of a model."""
    rooms = {segmentation: _segment, detection: _detect, video: _classify_clip, optical_flow: _flow}
    for room, build in rooms.items():
        if name in list_models(room):
            return partial(build, name)
    return partial(_classify, name)


def _classify(name: str) -> Example:
    size = SIZES.get(name, SIZE)
    given: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        given["init_weights"] = True  # else they warn that it takes long
    if name.startswith("vit_"):
        given["image_size"] = size
    return Example(get_model(name, weights=None, **given), (torch.randn(2, 3, size, size),))


def _segment(name: str) -> Example:
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **auxiliary)
    return Example(model, (torch.randn(2, 3, SIZE, SIZE),))


def _classify_clip(name: str) -> Example:
    clip = (1, 3, 16, 224, 224) if name in WHOLE_CLIPS else (2, 3, FRAMES, SIZE, SIZE)
    return Example(get_model(name, weights=None, num_classes=CLASSES), (torch.randn(clip),))


def _flow(name: str) -> Example:
    pair = tuple(torch.rand(1, 3, 128, 128) * 2 - 1 for _ in range(2))
    return Example(get_model(name, weights=None), (*pair, 2))  # two updates of the flow in place of 12


def _detect(name: str) -> Example:
    fixed = name.startswith("ssd")  # its size is in its name
    sizes = {} if fixed else {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **sizes)
    images = [torch.rand(3, DETECTION_SIZE, DETECTION_SIZE) for _ in range(2)]
    probe = _probe_heads if hasattr(model, "roi_heads") else _probe_dense
    return Example(model, (images,), (images, [_target() for _ in images]), probe)


def _target() -> dict[str, Tensor]:
    """Return two boxes with everything that any of the detectors learns from."""
    masks = torch.zeros(2, DETECTION_SIZE, DETECTION_SIZE, dtype=torch.uint8)
    masks[0, 10:50, 10:50] = masks[1, 30:90, 20:80] = 1
    keypoints = torch.rand(2, KEYPOINTS, 3) * 40 + 20
    keypoints[..., 2] = 1  # visible
    return {"boxes": _boxes(), "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints}


def _boxes() -> Tensor:
    return torch.tensor([[10.0, 10, 50, 50], [20, 30, 80, 90]])


def _features(model: Any) -> Any:
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    side = 300 if "SSD" in type(model).__name__ else DETECTION_SIZE
    return model.backbone(torch.randn(2, 3, side, side, generator=generator).to(weight))


def _probe_dense(model: nn.Module) -> Any:
    """Return the features and what the head says at each place, before boxes are sorted and suppressed."""
    features = list(_features(model).values())
    return [features, model.head(features)]


def _probe_heads(model: Any) -> Any:
    """Return the features, the proposals' scores, and what the heads say of boxes that are the same for all models."""
    features, heads = _features(model), model.roi_heads
    boxes = [_boxes().to(next(model.parameters())) for _ in range(2)]
    shapes = [(DETECTION_SIZE, DETECTION_SIZE)] * 2
    outputs = [features, model.rpn.head(list(features.values()))]
    outputs.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, shapes))))
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"has_{kind}")():
            pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, shapes)
            outputs.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
    return outputs
