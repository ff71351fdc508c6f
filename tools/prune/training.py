"""Training the networks that are pruned, and training them on afterwards."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from tools.common.errors import UsageError, first_line
from tools.common.files import replaced
from tools.prune.nets import NETS
from tools.train.data import Batch, Data, Split
from tools.train.loop import Contender, score_of
from tools.train.settings import parse_settings
from tools.train.sources import load_data

BATCH, EVALUATION_BATCH = 128, 500
TRAINING_RATE, TUNING_RATE = 3e-3, 1e-3  # of Adam, at the start; they fall linearly to 0
CPU = torch.device("cpu")


def load(arguments: Sequence[str], seed: int) -> Data:
    """Return the data that options of tools.train name."""
    return load_data(parse_settings([*arguments, "--seed", str(seed), "--device", "cpu"]))


def trained(net: str, data: Data, seed: int, epochs: int, file: Path) -> nn.Module:
    """Return a network trained for so many epochs: that in the file, or a new one, which is then written there.

    Raises:
        UsageError: the file does not hold such a network.
    """
    torch.manual_seed(seed)
    model = NETS[net]()
    if file.exists():
        try:
            model.load_state_dict(torch.load(file, weights_only=True))
        except Exception as error:  # whatever a damaged file raises
            raise UsageError(f"{file} does not hold a trained {net}: {first_line(error)}; remove it") from error
        return model.eval()
    train(model, data, seed, epochs, TRAINING_RATE)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as temporary:
        torch.save(model.state_dict(), temporary)
    return model.eval()


def train(model: nn.Module, data: Data, seed: int, epochs: int, lr: float) -> nn.Module:
    """Train a network for so many epochs, with Adam and a rate that falls linearly to 0; return it in eval mode."""
    settings = parse_settings(["--lr", str(lr), "--seed", str(seed), "--device", "cpu"])
    steps = epochs * data.steps_per_epoch(BATCH)
    contender = Contender("plain", model, settings, steps)
    batches = data.training_batches(BATCH, seed, CPU)
    for _ in range(steps):
        contender.train(list(islice(batches, 1)))
    return model.eval()


def accuracy(model: nn.Module, data: Data, split: Split) -> float:
    """Return the part of the images of a split that is classified correctly."""
    return score_of(model, data.batches(split, EVALUATION_BATCH, CPU)).accuracy


def calibration(data: Data, seed: int, batches: int) -> list[Batch]:
    """Return the first training batches of another order than that of training."""
    return list(islice(data.training_batches(BATCH, 1000 + seed, CPU), batches))
