"""The settings of decorrelation: one frozen record that checks itself."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from decorr_fx.errors import ConfigError

RuleName = Literal["dbp", "dbp-normalized", "crgd", "power"]
StructureName = Literal["auto", "full", "kronecker", "channels", "block"]


RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "rule": "dbp", "structure": "full", "decor_lr": 1e-4, "kappa": 0.01, "sample_fraction": 0.1,
        "max_samples": 4096, "update_every": 1, "preserve_function": False,
    },
    "dbp": {"rule": "dbp", "decor_lr": 0.16, "update_every": 8, "max_samples": 256},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecorrConfig:
    """How the decorrelating matrix R of a layer is shaped, and how it learns.

    Attributes:
        rule: what a step of R does. `power`: a closed form from running moments of x, which shrinks the directions in
            which x is largest. Small steps: `dbp`, decorrelated backpropagation (arXiv 2405.02385); `dbp-normalized`,
            its variant with C divided by d - 1 and V doubled; `crgd`, demeaned rows and a norm-keeping gain (arXiv
            2407.10780).
        rank: of the rule `power`: how many directions R shrinks; in all others it is the identity. A layer of fewer
            features has as many directions as features.
        power: of the rule `power`: exponent p of `R = (I + Sigma / delta)^-p`, in [0, 0.5]. 0.5 is whitening; the steps
            of W are preconditioned by R^T R, which goes with 2 p.
        damping: of the rule `power`: delta as a part of the mean eigenvalue of Sigma. The larger it is, the less is
            shrunk.
        structure: of the rules of small steps: shape of R over the d features of a row. `full`: d x d. `kronecker`:
            channels (x) kernel taps. `channels`: over channels alone, the same for each tap. `block`: blocks of at most
            `max_dim` features. `auto`: the richest that `cost_budget` allows, of full up to `max_dim` features, the
            Kronecker pair for a convolution or its channels alone, and blocks of at most `max_dim` channels.
        cost_budget: most extra FLOP of a training step that `auto` takes, as a part of the model's own; half of it goes
            to the layers by their own FLOP, half evenly. Counted for a batch of 128 examples: how many rows an example
            gives a layer, `transform` learns from its `example_inputs`; without them, 4096 rows a step are assumed.
        decor_lr: step size of R (eps), or a function from the number of the optimizer's steps so far to it. A step is
            shortened where it would be unstable, so that a large value is safe. For the rule `power` it is the rate at
            which running moments follow new ones, after as many first steps as make it their plain mean; 0: always.
        kappa: weight of the variance error against the correlation, in [0, 1]. 0 decorrelates only, 1 normalises only.
            `crgd` and `power` have no such trade-off and ignore it.
        sample_fraction: part of the rows of each forward that is recorded, in (0, 1].
        max_samples: rows that R, or each factor of it, steps on. A layer keeps as many samples of its input between two
            steps of R, or fewer where a patch of a convolution gives a Kronecker pair several rows; later ones then
            replace earlier ones.
        update_every: R moves at one of n steps of the optimizer, on the rows of the forwards right before it; n grows
            from 1 to this number, one every so many steps.
        center: subtract the running mean of the rows in the forward, too. It is folded into the bias, so a layer
            without one is run uncentred; `report` says so.
        preserve_function: let W follow each step of R, so that the step leaves the network's function where it was.
        max_dim: largest side of a factor of R that `auto` and `block` choose.
        share_inputs: let layers that read the same input, as q, k and v do, share one R and one recording.

    Raises:
        ConfigError: a value is out of its range.
    """

    rule: RuleName = "power"
    rank: int = 32
    power: float = 0.5
    damping: float = 0.3
    structure: StructureName = "auto"
    cost_budget: float = 0.05
    decor_lr: float | Callable[[int], float] = 0.08
    kappa: float = 0.5
    sample_fraction: float = 1.0
    max_samples: int = 64
    update_every: int = 16
    center: bool = False
    preserve_function: bool = True
    max_dim: int = 256
    share_inputs: bool = True

    def __post_init__(self) -> None:
        self._one_of("rule", get_args(RuleName))
        self._one_of("structure", get_args(StructureName))
        if self.rule == "power" and self.structure != "auto":
            raise ConfigError(
                f"structure is {self.structure!r}, which is for other rules: R of 'power' has a rank instead; "
                "leave structure at 'auto', or use rule='dbp'"
            )
        if not callable(self.decor_lr):
            self._between("decor_lr", 0.0, math.inf)
        self._between("cost_budget", 0.0, math.inf)
        self._between("kappa", 0.0, 1.0)
        self._between("power", 0.0, 0.5)
        self._between("damping", math.ulp(0.0), math.inf)  # above 0: an input that never varies has no root
        self._between("sample_fraction", math.ulp(0.0), 1.0)  # above 0: no row would ever be recorded
        for name in ("rank", "max_samples", "update_every", "max_dim"):
            self._positive_int(name)
        for name in ("center", "preserve_function", "share_inputs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use True or False")

    @classmethod
    def recipe(cls, name: str) -> "DecorrConfig":
        """Return settings known by a name; `dataclasses.replace` changes some of them.

        `paper`: close to what decorrelated backpropagation was published with (arXiv 2405.02385): a full R, moved by
        small steps after each step of the optimizer, which changes the function. `dbp`: the same rule with this
        library's structures, larger steps, and weights that follow.

        Raises:
            ConfigError: there is no such recipe.
        """
        if name not in RECIPES:
            raise ConfigError(f"there is no recipe {name!r}; use one of {', '.join(RECIPES)}")
        return cls(**RECIPES[name])

    def lr_at(self, step: int) -> float:
        """Return the step size of R at its step number `step`, checked when it comes from a function."""
        if not callable(self.decor_lr):
            return self.decor_lr
        value = self.decor_lr(step)
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ConfigError(f"decor_lr({step}) returned {value!r}; it must return a finite number >= 0")
        return value

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or math.isinf(value):
            limit = f"between {low:g} and {high:g}" if math.isfinite(high) else f"that is finite and >= {low:g}"
            raise ConfigError(f"{name} is {value!r}; use a number {limit}")

    def _positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; use a whole number >= 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
