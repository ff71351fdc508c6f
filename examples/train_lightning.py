"""Train with Lightning: its `Trainer` as it is, `transform` in the module and `fold` at the end.

    python examples/train_lightning.py
    tensorboard --logdir runs/lightning

A checkpoint of the trainer holds R, too: go on with `trainer.fit(module, loader, ckpt_path=...)`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import decorr_fx

Batch = tuple[Tensor, Tensor]
LOG_EVERY = 10  # steps


def digits() -> tuple[Batch, Batch]:
    """Return images and labels for training, and for validation."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, validation = order[360:], order[:360]
    return (images[training], labels[training]), (images[validation], labels[validation])


def cnn() -> nn.Module:
    """Return a small network for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Classifier(lightning.LightningModule):
    """Any module of yours; its network is transformed where it is made, so that checkpoints find R in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = decorr_fx.transform(cnn())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss, as ever."""
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return any optimizer, at whose steps R moves."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class LogDecorrelation(lightning.Callback):
    """Log what `stats` tells as often as the trainer logs the rest."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log after a step of the optimizer."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            module.log_dict(decorr_fx.stats(module).scalars())


def main(argv: Sequence[str] | None = None) -> None:
    """Train, fold, and print how good the plain model is."""
    parser = argparse.ArgumentParser(description="Train a cnn on scikit-learn's digits with Lightning.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="folder of logs and checkpoints")
    options = parser.parse_args(argv)

    lightning.seed_everything(0)
    training, (images, labels) = digits()
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        log_every_n_steps=LOG_EVERY,
        logger=TensorBoardLogger(options.out, name=None),
        callbacks=[LogDecorrelation()],
    )
    trainer.fit(module, DataLoader(TensorDataset(*training), batch_size=64, shuffle=True))

    if trainer.is_global_zero:
        plain = decorr_fx.fold(module.net).cpu().eval()
        torch.save(plain.state_dict(), options.out / "plain.pt")
        with torch.no_grad():
            accuracy = (plain(images).argmax(1) == labels).float().mean()
        print(f"validation accuracy of the folded model: {accuracy:.4f}")


if __name__ == "__main__":
    main()
