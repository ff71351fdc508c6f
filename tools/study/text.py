"""Text for a study: the data, and the model of characters."""

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from tools.train.data import Batch, Split
from tools.train.models import Block

CONTEXT = 64  # characters


class Text:
    """The help texts of Python, character by character: two tenths are held out, for validation and test."""

    def __init__(self) -> None:
        text = "".join(topics[name] for name in sorted(topics))
        self.characters = sorted(set(text))
        numbers = {character: i for i, character in enumerate(self.characters)}
        codes = torch.tensor([numbers[character] for character in text])
        windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
        tenth = len(windows) // 10
        train, validation, test = windows.split([len(windows) - 2 * tenth, tenth, tenth])
        self.splits = {"train": train, "validation": validation, "test": test}

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield windows of text from anywhere in the training part, and the same windows one character later."""
        text, generator = self.splits["train"].flatten(), torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text) - CONTEXT, (batch_size,), generator=generator)
            yield _pair(text[starts[:, None] + torch.arange(CONTEXT + 1)].to(device))

    def batches(self, split: Split, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield the windows of a split once."""
        yield from (_pair(windows.to(device)) for windows in self.splits[split].split(batch_size))


def _pair(windows: Tensor) -> Batch:
    return windows[:, :-1], windows[:, 1:]


class CharacterModel(nn.Module):
    """A causal transformer over characters: `[N, T]` to logits `[N, characters, T]`."""

    def __init__(self, characters: int, dim: int = 96, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, dim)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits of the next character at each position."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(codes) + self.position)))
        return logits.transpose(1, 2)
