"""Where the images come from: one function a data set."""

import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import CIFAR10, FashionMNIST, ImageFolder
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

from tools.common.errors import UsageError, first_line
from tools.train.data import Data, channel_moments, held_out
from tools.train.settings import Settings

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CRC32 = {
    "train": (0xAE65DCCD, 0xAB93C456),
    "t10k": (0x12728439, 0x573905E5),
}  # of images and labels, as published
MOMENT_IMAGES = 512  # images of a folder that its mean and standard deviation are taken from
# what the reader makes of a file that is not what its name says
DAMAGED = (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AssertionError, RuntimeError)


def load_data(settings: Settings) -> Data:
    """Return the data set that the settings name, split and ready."""
    return SOURCES[settings.data](settings).sized(settings.size)


def _digits(settings: Settings) -> Data:
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None], torch.from_numpy(digits.target)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return _in_memory((images[rest], labels[rest]), (images[test], labels[test]), settings.seed)


def check_fashion_mnist(settings: Settings) -> None:
    """Raise UsageError where the files are not Fashion-MNIST as it was published, so that results can be compared."""
    folder = _fashion_mnist_folder(settings)
    for part, published in FASHION_MNIST_CRC32.items():
        if tuple(zlib.crc32(tensor.numpy().tobytes()) for tensor in _idx_pair(folder, part)) != published:
            raise UsageError(f"{folder}: the {part} images are not Fashion-MNIST as published; get the data set again")


def _fashion_mnist_folder(settings: Settings) -> Path:
    default = DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else Path("data")
    return settings.data_dir or default


def _fashion_mnist(settings: Settings) -> Data:
    folder = _fashion_mnist_folder(settings)
    if settings.download and _find_idx(folder, "t10k-labels-idx1-ubyte") is None:
        try:
            FashionMNIST(str(folder), download=True)
        except (OSError, URLError, RuntimeError) as error:
            raise UsageError(f"cannot download Fashion-MNIST into {folder}: {first_line(error)}") from None
    return _in_memory(_idx_pair(folder, "train"), _idx_pair(folder, "t10k"), settings.seed)


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", read_image_file)[:, None]
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", read_label_file)
    if len(images) != len(labels):
        raise UsageError(f"{folder}: {len(images)} {part} images but {len(labels)} labels; get the data set again")
    return images, labels


def _read_idx(folder: Path, name: str, reader: Callable[[str], Tensor]) -> Tensor:
    file = _find_idx(folder, name)
    if file is None:
        raise UsageError(
            f"no {name}[.gz] in {folder}, nor in FashionMNIST/raw there: give --data-dir, add --download, or install "
            "Debian's package dataset-fashion-mnist"
        )
    try:
        with TemporaryDirectory() as scratch:
            plain = extract_archive(str(file), scratch) if file.suffix == ".gz" else str(file)
            return reader(plain)
    except DAMAGED as error:
        raise UsageError(f"{file} cannot be read as an IDX file: {first_line(error)}") from None


def _find_idx(folder: Path, name: str) -> Path | None:
    places = (folder, folder / "FashionMNIST" / "raw")
    candidates = (place / f"{name}{suffix}" for place in places for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _cifar10(settings: Settings) -> Data:
    folder = settings.data_dir or Path("data")
    try:
        parts = [CIFAR10(str(folder), train=train, download=settings.download) for train in (True, False)]
    except (OSError, URLError, RuntimeError) as error:
        advice = "give the folder that holds cifar-10-batches-py as --data-dir, or add --download"
        raise UsageError(f"no CIFAR-10 in {folder}: {first_line(error)}; {advice}") from None
    train, test = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts]
    return _in_memory(train, test, settings.seed)


def _in_memory(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> Data:
    images, labels = train
    kept, held = held_out(labels.numpy(), seed)
    mean, std = channel_moments(images[kept])
    return Data(
        TensorDataset(images[kept], labels[kept]), TensorDataset(images[held], labels[held]), TensorDataset(*test),
        classes=int(labels.max()) + 1, shape=(images.shape[1], images.shape[2], images.shape[3]), mean=mean, std=std,
    )  # fmt: skip


def _image_folder(settings: Settings) -> Data:
    if settings.data_dir is None:
        raise UsageError("--data imagefolder needs --data-dir, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    size = settings.size or 224
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    as_it_is = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    train, seen, test = (
        _open_folder(settings.data_dir / part, transform)
        for part, transform in (("train", augmented), ("train", as_it_is), ("val", as_it_is))
    )
    if train.classes != test.classes:
        raise UsageError(f"{settings.data_dir}: train/ and val/ do not have the same class folders")
    kept, held = held_out(np.array(train.targets), settings.seed)
    some = [seen[i][0] for i in kept[:MOMENT_IMAGES]]  # the split is shuffled
    mean, std = channel_moments(torch.stack(some))
    return Data(
        Subset(train, kept), Subset(seen, held), test, classes=len(train.classes), shape=(3, size, size),
        mean=mean, std=std, in_memory=False, workers=settings.workers,
    )  # fmt: skip


def _open_folder(folder: Path, transform: v2.Transform) -> ImageFolder:
    try:
        return ImageFolder(str(folder), transform)
    except OSError as error:
        advice = "--data-dir needs folders train/CLASS and val/CLASS"
        raise UsageError(f"no images in {folder}: {first_line(error)}; {advice}") from None


SOURCES: dict[str, Callable[[Settings], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "imagefolder": _image_folder,
}
