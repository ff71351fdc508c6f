"""What all passes share: one contract, checked before and after."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import nn

from decorr_fx.errors import PassError

Result = TypeVar("Result")


class Pass(ABC, Generic[Result]):
    """A step of a verb: `requires` checks what comes in, `call` works, `ensures` checks what comes out."""

    def __call__(self, model: nn.Module) -> Result:
        """Run the pass, with its contract checked before and after; the model stays as it is, or the pass says so."""
        self.requires(model)
        result = self.call(model)
        self.ensures(model, result)
        return result

    @abstractmethod
    def requires(self, model: nn.Module) -> None:
        """Raise a `DecorrError` that tells the user what to do, where the pass cannot work on `model`."""

    @abstractmethod
    def call(self, model: nn.Module) -> Result:
        """Do the work."""

    @abstractmethod
    def ensures(self, model: nn.Module, result: Result) -> None:
        """Call `broken` where the result is not what the pass promises."""

    def broken(self, place: str, problem: str) -> PassError:
        """Return the error for a promise that was not kept at `place`."""
        return PassError(
            f"{type(self).__name__}, at {place!r}: {problem}; this is a bug in decorr_fx, please report it"
        )
