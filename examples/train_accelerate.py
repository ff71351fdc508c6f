"""Train with Accelerate: your loop as it is, `transform` before `prepare` and `fold` at the end.

    python examples/train_accelerate.py
    tensorboard --logdir runs/accelerate

On several processes: `accelerate launch examples/train_accelerate.py`. What `accelerator.save_state` saves holds R,
too: go on with `accelerator.load_state`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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


def prepare(accelerator: Accelerator, training: Batch) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Batch]]:
    """Transform the network first; then it is prepared like any other."""
    model = decorr_fx.transform(cnn())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*training), batch_size=64, shuffle=True)
    return accelerator.prepare(model, optimizer, loader)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, fold, and print how good the plain model is."""
    parser = argparse.ArgumentParser(description="Train a cnn on scikit-learn's digits with Accelerate.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="folder of logs")
    options = parser.parse_args(argv)

    set_seed(0)
    training, (images, labels) = digits()
    accelerator = Accelerator(log_with="tensorboard", project_dir=options.out)
    accelerator.init_trackers("logs")
    model, optimizer, loader = prepare(accelerator, training)
    step = 0
    for _ in range(options.epochs):
        for batch, targets in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch), targets)
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                accelerator.log({"train/loss": loss.item(), **decorr_fx.stats(model).scalars()}, step=step)
    accelerator.end_training()

    plain = decorr_fx.fold(accelerator.unwrap_model(model)).cpu().eval()
    accelerator.save(plain.state_dict(), options.out / "plain.pt")
    with torch.no_grad():
        accuracy = (plain(images).argmax(1) == labels).float().mean()
    accelerator.print(f"validation accuracy of the folded model: {accuracy:.4f}")


if __name__ == "__main__":
    main()
