"""The settings of the main job, as the command line gives them."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from decorr_fx import Rule
from tools.common.arguments import natural, non_negative, positive, positive_int
from tools.common.devices import device_named
from tools.common.errors import UsageError
from tools.common.ranks import local_rank
from tools.common.rules import name_of
from tools.train.rule_options import add_rule_options, take_rule

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; the names are those of the command line's options."""

    method: str
    data: str
    download: bool
    workers: int
    model: str
    batch_norm: bool
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    seed: int
    evaluations: int
    device: str
    compile: bool
    amp: bool
    rule: Rule
    out: Path
    resume: bool
    timeout: float
    data_dir: Path | None = None
    size: int | None = None
    weight_decay: float | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to train with."""
        return ("bp", "decorr") if self.method == "both" else (self.method,)

    @property
    def checkpoint(self) -> Path:
        """The file to go on from."""
        return self.out / "checkpoint.pt"

    def by_option(self) -> dict[str, Any]:
        """Return all settings under the names of the command line's options, those of the rule among them."""
        return {**vars(self), **asdict(self.rule), "rule": name_of(self.rule)}

    def torch_device(self) -> torch.device:
        """Return the device to train on, checked."""
        if self.device == "auto":
            return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        device = device_named(self.device)
        if device.type not in DEVICE_TYPES:
            raise UsageError(f"--device {self.device}: cannot be trained on; use one of {', '.join(DEVICE_TYPES)}")
        return device


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Return the settings that the command line asks for; exits with code 2 where it is wrong.

    Raises:
        UsageError: an option is one of another rule.
        ConfigError: a setting of the rule is out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.train",
        usage="%(prog)s [options]   (see --help)",
        description="Train with plain backpropagation and with decorrelation from the same initial weights, on the "
        "same batches, side by side; then fold, export to ONNX and verify.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data(parser)
    _add_training(parser)
    add_rule_options(parser)
    given = vars(parser.parse_args(argv))
    rule = take_rule(given)
    return Settings(**{"epochs": 30 if given["data"] == "digits" else 2, "rule": rule, **given})


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    group.add_argument("--data", choices=("digits", "fashion-mnist", "cifar10", "imagefolder"), default="digits",
                       help="digits ships inside scikit-learn; imagefolder needs train/ and val/ in --data-dir, is "
                       "augmented by random crops and flips, and its val/ is the test set")  # fmt: skip
    group.add_argument("--data-dir", type=Path,
                       help="folder of the data set; if not given, that of Debian's dataset-fashion-mnist, or data/",
                       default=argparse.SUPPRESS)  # fmt: skip
    group.add_argument("--download", action="store_true", help="fetch fashion-mnist or cifar10 where it is missing")
    group.add_argument("--size", type=positive_int,
                       help="resize images to SIZE x SIZE; if not given, 224 for imagefolder, else as they are",
                       default=argparse.SUPPRESS)  # fmt: skip
    group.add_argument("--workers", type=natural, default=0, help="processes that read an imagefolder")
    group.add_argument("--model", default="cnn", help="cnn, mlp, vit, or the name of a torchvision classifier")
    group.add_argument("--batch-norm", action="store_true", help="put BatchNorm into the cnn or the mlp")
    group.add_argument("--out", type=Path, default=Path("runs/train"), help="folder for everything that is written")
    group.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt, with the same numbers")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training: the same for both methods")
    group.add_argument("--method", choices=("bp", "decorr", "both"), default="both", help="what to train with")
    group.add_argument("--epochs", type=positive_int, default=argparse.SUPPRESS,
                       help="passes over the training set; if not given, 30 for digits, else 2")  # fmt: skip
    group.add_argument("--batch-size", type=positive_int, default=64, help="images a step, shared by the ranks")
    group.add_argument("--optimizer", choices=("sgd", "adam", "adamw", "muon", "soap"), default="adam",
                       help="sgd has momentum 0.9; muon leaves what is no matrix to AdamW")  # fmt: skip
    group.add_argument("--lr", type=positive, default=1e-3, help="learning rate at the start; falls linearly to 0")
    group.add_argument("--weight-decay", type=non_negative, default=argparse.SUPPRESS,
                       help="weight decay; if not given, the optimizer's own default")  # fmt: skip
    group.add_argument("--seed", type=natural, default=0, help="of the weights, the batches and the validation split")
    group.add_argument("--evaluations", type=positive_int, default=40, help="evaluations on the validation set")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one")
    group.add_argument("--timeout", type=positive, default=600.0,
                       help="seconds that a rank of torchrun waits for another one")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="train through torch.compile")
    group.add_argument("--amp", action="store_true", help="train under bfloat16 autocast")
