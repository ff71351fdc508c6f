"""The models that are measured, and what they are called with."""

from typing import cast

import torch
import torchvision
from torch import Tensor, nn

from tools.bench.cases import GPT2, LINEARS, MLP, Case
from tools.common import resnet
from tools.common.errors import UsageError
from tools.common.mlp import PIXELS, wide_mlp

CLASSES = 100
HIDDEN = 3  # linears of LINEARS, besides the last one
VOCABULARY = 50257  # of GPT-2


def build_model(case: Case) -> nn.Module:
    """Return a new model of the case, with random weights."""
    torch.manual_seed(0)
    model = _make(case).to(case.device)
    return model.to(memory_format=torch.channels_last) if case.channels_last else model  # type: ignore[call-overload]


def _make(case: Case) -> nn.Module:
    if case.model == MLP:
        return wide_mlp()
    if case.model == GPT2:
        return _gpt2()
    if case.model == LINEARS:
        hidden = [layer for _ in range(HIDDEN) for layer in (nn.Linear(case.width, case.width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(case.width, CLASSES))
    if case.model in torchvision.models.list_models(module=torchvision.models):
        return cast(nn.Module, torchvision.models.get_model(case.model, weights=None, num_classes=CLASSES))
    try:
        import timm
    except ImportError:
        raise UsageError(f"{case.model} is no torchvision model, and timm is not installed") from None
    if not timm.is_model(case.model):
        raise UsageError(f"{case.model} is neither a torchvision classifier nor a timm model")
    return cast(nn.Module, timm.create_model(case.model, pretrained=False, num_classes=CLASSES))


class Logits(nn.Module):
    """The logits of a language model of transformers, `[tokens, vocabulary]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return them for all tokens of a batch."""
        logits: Tensor = self.model(ids).logits
        return logits.flatten(0, 1)


def _gpt2() -> nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UsageError("gpt2 needs transformers: pip install 'decorr_fx[bench]'") from None
    return Logits(GPT2LMHeadModel(GPT2Config(use_cache=False)))


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return a batch of random images, of rows, or of tokens, and labels."""
    generator = torch.Generator().manual_seed(1)
    if case.model == GPT2:
        ids = torch.randint(VOCABULARY, (2, case.batch, case.size), generator=generator).to(case.device)
        return ids[0], ids[1].flatten()
    widths = {LINEARS: case.width, MLP: PIXELS}
    shape = (case.batch, widths[case.model]) if case.model in widths else (case.batch, 3, case.size, case.size)
    x = torch.randn(shape, generator=generator).to(case.device)
    classes = resnet.CLASSES if case.model == MLP else CLASSES
    labels = torch.randint(classes, (case.batch,), generator=generator).to(case.device)
    return (x.contiguous(memory_format=torch.channels_last) if case.channels_last else x), labels
