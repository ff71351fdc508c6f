"""Train with the `Trainer` of transformers: as it is, `transform` before it and `fold` at the end.

    python examples/train_transformers.py
    tensorboard --logdir runs/transformers

A checkpoint of the trainer holds R, too: go on with `trainer.train(resume_from_checkpoint=True)`. Its weights are
those of the plain model; for `from_pretrained` save the folded model, as here, which has no keys besides them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

import decorr_fx

Batch = dict[str, Tensor]
LOG_EVERY = 10  # steps


def digits() -> tuple[list[Batch], list[Batch]]:
    """Return examples for training, and for validation."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [{"pixel_values": images[i], "labels": labels[i]} for i in order]
    return examples[360:], examples[:360]


def convnext() -> ConvNextForImageClassification:
    """Return a small model for images of 8 x 8 pixels, with random weights."""
    sizes = {"patch_size": 2, "num_stages": 2, "depths": [1, 1], "hidden_sizes": [32, 64]}
    return ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **sizes))


class LogDecorrelation(TensorBoardCallback):
    """Log what `stats` tells beside all that the trainer logs."""

    def on_log(self, *states: Any, logs: dict[str, Any], model: nn.Module, **given: Any) -> None:
        """Log to TensorBoard whenever the trainer does."""
        super().on_log(*states, logs=logs | decorr_fx.stats(model).scalars(), model=model, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, fold, and print how good the plain model is."""
    parser = argparse.ArgumentParser(description="Train a ConvNeXt on scikit-learn's digits with transformers.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"), help="folder of logs and checkpoints")
    options = parser.parse_args(argv)

    set_seed(0)
    training, validation = digits()
    trainer = Trainer(
        decorr_fx.transform(convnext()),
        TrainingArguments(
            options.out, num_train_epochs=options.epochs, per_device_train_batch_size=64, learning_rate=3e-3,
            logging_steps=LOG_EVERY, report_to="none",
        ),
        train_dataset=training,
        callbacks=[LogDecorrelation()],
    )  # fmt: skip
    trainer.train()

    if trainer.is_world_process_zero():
        plain = decorr_fx.fold(trainer.model).cpu().eval()
        plain.save_pretrained(options.out / "plain")
        images, labels = (torch.stack([example[key] for example in validation]) for key in ("pixel_values", "labels"))
        with torch.no_grad():
            accuracy = (plain(images).logits.argmax(1) == labels).float().mean()
        print(f"validation accuracy of the folded model: {accuracy:.4f}")


if __name__ == "__main__":
    main()
