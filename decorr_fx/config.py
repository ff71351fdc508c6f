"""The settings of decorrelation: one frozen class a rule, which checks itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from decorr_fx.errors import ConfigError

StructureName = Literal["full", "kronecker", "block"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules have in common: which rows R learns from, and when it moves. Use `Power`, `Dbp` or `Crgd`.

    Attributes:
        max_samples: rows of a layer's input that each factor of R steps on, at most.
        update_every: R moves at one of n steps of the optimizer, on the rows of the forwards right before it; n grows
            from 1 to this number, by one each `update_every` steps.
        preserve_function: let a step of R leave the weights, and so the network's function, as they are. False is the
            published rule (arXiv 2405.02385), by which `theta <- theta R_old^-1 R_new`.
        share_inputs: let layers that read the same input, as q, k and v do, share one R and one recording.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_samples: int = 64
    update_every: int = 16
    preserve_function: bool = True
    share_inputs: bool = True

    def __post_init__(self) -> None:
        if type(self) not in (Power, Dbp, Crgd):
            raise ConfigError(f"{type(self).__name__} is no rule; use decorr_fx.Power, decorr_fx.Dbp or decorr_fx.Crgd")
        for name in ("max_samples", "update_every"):
            self._positive_int(name)
        for name in ("preserve_function", "share_inputs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use True or False")

    def rate_at(self, step: int) -> float:
        """Return the step size of R, or of its running moments, at step number `step` of the optimizer."""
        raise NotImplementedError

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or math.isinf(value):
            limit = f"between {low:g} and {high:g}" if math.isfinite(high) else f"that is finite and >= {low:g}"
            raise ConfigError(f"{name} is {value!r}; use a number {limit}")

    def _positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; use a whole number >= 1")


@dataclass(frozen=True, kw_only=True)
class Power(Rule):
    """The default: R in closed form, from a running second moment of a layer's input.

    `R = gamma ((Sigma + delta) / (rest + delta))^-power` in the `rank` largest directions of the second moment Sigma,
    and gamma in all others, of which `rest` is the mean eigenvalue. Kaldi's online natural gradient (arXiv 1410.7455)
    has the same algebra.

    Attributes:
        rank: how many directions of a layer's input R keeps track of. A layer of fewer features has as many.
        damping: delta over the mean of all eigenvalues of Sigma: directions with smaller ones stay nearly as they are.
        rate: at which the running moment follows new rows, after as many first steps as make it their plain mean.
        power: the exponent, in [0, 0.5]; 0.5 is whitening. Steps of the weights are preconditioned by R^T R.
        gain: exponent q of a scalar on R, `R <- gamma^q R` with `gamma^2 = tr Sigma / tr(R Sigma R)`. At 1 the
            decorrelated input is as large as the input, in the mean square, and R of white inputs is the identity; at 0
            R only shrinks, and so do the steps of the weights.
        cost_budget: most FLOP of the products around a step of the optimizer, as a part of those of the layer's own
            forward and backward. Where a step has few rows, R uses fewer directions, but 4 at least: reading the
            weight is what takes time then.
    """

    rank: int = 32
    damping: float = 0.3
    rate: float = 0.08
    power: float = 0.5
    gain: float = 1.0
    cost_budget: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive_int("rank")
        self._between("damping", math.ulp(0.0), math.inf)  # above 0: an input that never varies has no root
        self._between("rate", 0.0, 1.0)
        self._between("power", 0.0, 0.5)
        self._between("gain", 0.0, 1.0)
        self._between("cost_budget", math.ulp(0.0), math.inf)

    def rate_at(self, step: int) -> float:
        """Return the rate of the running moment."""
        return self.rate


@dataclass(frozen=True, kw_only=True)
class SmallSteps(Rule):
    """What the rules of small steps have in common, by which `R <- R - eps G R`. Use `Dbp` or `Crgd`.

    Attributes:
        decor_lr: step size eps of R, or a function from the number of the optimizer's steps so far to it. A step is
            shortened where it would be unstable.
        structure: shape of R over the d features of a row. `full`: d x d. `kronecker`: channels (x) kernel taps.
            `block`: equal blocks of at most 256 features. None: full up to 256 features, else Kronecker for
            convolutions and blocks for linears.
    """

    max_samples: int = 256
    update_every: int = 8
    decor_lr: float | Callable[[int], float] = 0.16
    structure: StructureName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.decor_lr):
            self._between("decor_lr", 0.0, math.inf)
        if self.structure not in (None, *get_args(StructureName)):
            names = ", ".join(get_args(StructureName))
            raise ConfigError(f"structure is {self.structure!r}; use one of {names}, or None to choose by size")

    def rate_at(self, step: int) -> float:
        """Return eps, checked where it comes from a function."""
        if not callable(self.decor_lr):
            return self.decor_lr
        value = self.decor_lr(step)
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ConfigError(f"decor_lr({step}) returned {value!r}; it must return a finite number >= 0")
        return value


@dataclass(frozen=True, kw_only=True)
class Dbp(SmallSteps):
    """Decorrelated backpropagation (arXiv 2405.02385): `G = (1 - kappa) C + kappa D`.

    C are the correlations of z, D its variances minus 1.

    Attributes:
        kappa: weight of the variance error against the correlation, in [0, 1]. 0 decorrelates only, 1 normalises only.
        sample_fraction: part of the rows of each forward that is recorded, in (0, 1].
    """

    kappa: float = 0.5
    sample_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("kappa", 0.0, 1.0)
        self._between("sample_fraction", math.ulp(0.0), 1.0)  # above 0: no row would ever be recorded

    @classmethod
    def paper(cls) -> "Dbp":
        """Return settings close to the published ones: a full R that moves after each step and changes the function."""
        return cls(
            structure="full", decor_lr=1e-4, kappa=0.01, sample_fraction=0.1, max_samples=4096, update_every=1,
            preserve_function=False,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Crgd(SmallSteps):
    """The rule of "Correlations are ruining your gradient descent" (arXiv 2407.10780).

    G is the second moment of z of demeaned rows, and a gain keeps the norm of z at that of x.
    """


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
