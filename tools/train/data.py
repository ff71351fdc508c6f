"""What a data set is to the main job: three splits, how images become the model's input, and the order of batches.

Curves and every "best" are on the validation split, held out from the training images. The test split is used once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from tools.common.errors import UsageError
from tools.common.ranks import share

VALIDATION_PART, VALIDATION_MOST = 0.2, 5000  # of the training images: the smaller of the two is held out

Batch = tuple[Tensor, Tensor]
Images: TypeAlias = TensorDataset | Subset[Any] | ImageFolder
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        train, validation, test: data sets of (image `[C, H, W]`, label), the images as they were stored.
        classes: number of classes.
        shape: (channels, height, width) that the model sees.
        mean, std: of each channel over the training images, `[C, 1, 1]`.
        in_memory: the data sets are `TensorDataset`s, which a list of indices reads at once.
        workers: processes that read, where they are not in memory.
    """

    train: Images
    validation: Images
    test: Images
    classes: int
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    in_memory: bool = True
    workers: int = 0

    def sized(self, size: int | None) -> "Data":
        """Return the data with images resized to `size` x `size`, or as they are if None."""
        return self if size is None else replace(self, shape=(self.shape[0], size, size))

    def coloured(self) -> "Data":
        """Return the data with grey images repeated to 3 channels."""
        return replace(self, shape=(3, *self.shape[1:]))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of full batches in the training split."""
        if not (steps := len(self.train) // batch_size):
            raise UsageError(f"--batch-size {batch_size} is more than the {len(self.train)} training images")
        return steps

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield full batches for ever, of each this rank's share.

        Their order is drawn anew for each epoch from a generator of its own.
        """
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(self.train, generator=generator)
        loader = self._loader(self.train, _Shares(sampler, batch_size, drop_last=True), generator)
        while True:
            for images, labels in loader:
                yield self._fitted(images, device), labels.to(device)

    def batches(self, split: Split, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield the whole split once, in its own order."""
        dataset: Images = getattr(self, split)
        sampler = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
        for images, labels in self._loader(dataset, sampler):
            yield self._fitted(images, device), labels.to(device)

    def _loader(
        self, dataset: Images, sampler: BatchSampler, generator: torch.Generator | None = None
    ) -> DataLoader[Any]:
        if self.in_memory:
            return DataLoader(dataset, sampler=sampler, batch_size=None, generator=generator)
        return DataLoader(dataset, batch_sampler=sampler, num_workers=self.workers, generator=generator)

    def _fitted(self, images: Tensor, device: torch.device) -> Tensor:
        """Return images normalised, resized and with the channels that the model sees."""
        images = (images.to(device, torch.float32) - self.mean.to(device)) / self.std.to(device)
        channels, *size = self.shape
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.expand(-1, channels, -1, -1).contiguous()


class _Shares(BatchSampler):
    """A rank's share of every batch."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield list(share(batch))


def held_out(labels: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices to train on and the indices to validate on, with the same mix of classes."""
    count = min(round(VALIDATION_PART * len(labels)), VALIDATION_MOST)
    try:
        kept, held = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UsageError(f"cannot hold {count} of {len(labels)} images out for validation: {error}") from None
    return kept.tolist(), held.tolist()


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of `images [N, C, H, W]`, as `[C, 1, 1]`."""
    channels = images.transpose(0, 1).flatten(1)
    mean = torch.stack([channel.float().mean() for channel in channels])
    std = torch.stack([channel.float().std() for channel in channels])
    return mean[:, None, None], std.clamp(min=1e-6)[:, None, None]
