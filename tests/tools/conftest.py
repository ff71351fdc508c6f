"""Data that tools are tested on."""

import gzip
from pathlib import Path

import numpy as np
import pytest


def idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes in the format that MNIST and its relatives come in."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder in the layout of the Debian package, with random pictures."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 600), ("t10k", 100)):
        idx(folder / f"{part}-images-idx3-ubyte.gz", random.integers(0, 255, (count, 28, 28)))
        idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder
