"""When R moves: which steps of the optimizer, counted on the host."""

from functools import lru_cache

from decorr_fx.ops.sample import GOLDEN


class Schedule:
    """The clock of a site.

    Attributes:
        update_every: R moves at one of so many steps, in the end.
        attempts: steps of an optimizer so far.
        due: whether R moves at the next one.
        unowned: backward passes since the last one.
        recording: whether rows have been recorded for the next one.
    """

    __slots__ = ("attempts", "due", "recording", "unowned", "update_every")

    def __init__(self, update_every: int) -> None:
        self.update_every, self.recording = update_every, True
        self.restart(0)

    def restart(self, attempts: int) -> None:
        """Go on after so many steps."""
        self.attempts, self.unowned, self.due = attempts, 0, moves_at(attempts, self.update_every)

    def count(self) -> bool:
        """Count a step; tell whether R moved at it, or may move at the next one."""
        was_due = self.due
        self.attempts, self.unowned = self.attempts + 1, 0
        self.due = moves_at(self.attempts, self.update_every)
        return was_due or self.due


@lru_cache(maxsize=4096)
def moves_at(step: int, update_every: int) -> bool:
    """Tell whether R moves at a step: at one of n, where n grows from 1 to `update_every`, for at first all moves fast.

    Steps are spread by the golden ratio: strictly every n-th one would never come for a layer that is used at every
    second one, or whose weights two optimizers have.
    """
    return step * GOLDEN % 1 < 1 / min(update_every, 1 + step // update_every)
