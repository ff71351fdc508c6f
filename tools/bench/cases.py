"""What is measured: a model on inputs of some shape, and the suites of cases with their bars."""

from dataclasses import dataclass, replace

VIT_S, VIT_B = "vit_small_patch16_224", "vit_base_patch16_224"
LINEARS, MLP, GPT2 = "linears", "mlp", "gpt2"  # models of this tool


@dataclass(frozen=True)
class Bars:
    """Most that decorrelation may take, as a ratio to the plain model; None where nothing is promised."""

    step: float | None = None
    evaluation: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """A training step: of which model, on what.

    Attributes:
        model: name of a torchvision or timm model; `linears` for three linears of `width` features, `mlp` for a
            784-512-512-512-10 perceptron, or `gpt2` for the 124 M parameters of GPT-2, from transformers.
        batch: examples in a step.
        size: pixels of a side, or tokens of a text.
        dtype: `float32`, or `bfloat16` under autocast.
        channels_last: memory format of model and images.
        compile: run under torch.compile.
        device: `cpu`, `cuda`, ...
        methods: that are measured besides the plain model.
        max_samples: rows that R steps on; None for the library's default.
        width: of `linears`.
        timed: measure times.
        memory: measure peak memory.
        ranks: processes of one thread, each with a batch of its own, which average gradients; 0 for this one process.
        bars: of the first method.
    """

    model: str = "resnet18"
    batch: int = 32
    size: int = 64
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    device: str = "cpu"
    methods: tuple[str, ...] = ("power",)
    max_samples: int | None = None
    width: int = 256
    timed: bool = True
    memory: bool = False
    ranks: int = 0
    bars: Bars = Bars()

    @property
    def title(self) -> str:
        """The case in a line."""
        parts = [self.model, self._inputs, self.dtype, "compiled" if self.compile else "eager"]
        parts += ["channels_last"] if self.channels_last else []
        parts += [f"{self.max_samples} rows"] if self.max_samples else []
        parts += [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"] if self.ranks else []
        return ", ".join([*parts, self.device])

    @property
    def _inputs(self) -> str:
        if self.model == LINEARS:
            return f"{self.batch} x {self.width}"
        if self.model == MLP:
            return f"batch {self.batch}"
        return f"batch {self.batch}, {self.size} {'tokens' if self.model == GPT2 else 'px'}"


# SOAP and Shampoo take minutes for a step of ResNet-18 on two cores: they are left to the GPU
_METHODS_ON_CPU = ("power", "dbp-full", "dbp-kronecker", "dbp-block", "textbook", "muon")
SUITES = {
    "cpu": (
        Case(batch=128, bars=Bars(step=1.06, evaluation=1.0)),
        Case(batch=32, methods=_METHODS_ON_CPU, bars=Bars(step=1.10, evaluation=1.0)),
        Case(batch=128, compile=True, bars=Bars(step=1.06, evaluation=1.0)),
        Case(VIT_S, batch=32, size=224, bars=Bars(step=1.05, evaluation=1.0)),
        Case(MLP, batch=64, bars=Bars(step=1.15)),
        Case("resnet50", batch=64, size=224, timed=False, memory=True, bars=Bars(memory=1.01)),
        Case(GPT2, batch=1, size=64, memory=True),
    ),
    "ranks": (Case(ranks=1), Case(ranks=2)),
    "gpu": (
        Case("resnet50", 256, 224, "bfloat16", True, True, "cuda", memory=True, bars=Bars(1.05, 1.0, 1.05)),
        Case(VIT_B, 256, 224, "bfloat16", False, True, "cuda", bars=Bars(1.03, 1.0)),
        Case("resnet50", 64, 224, device="cuda", methods=("power", "dbp-kronecker"), timed=False, memory=True,
             bars=Bars(memory=1.05)),
        Case("resnet18", 128, 64, device="cuda",
             methods=("power", "dbp-full", "textbook", "muon", "soap", "shampoo"), bars=Bars(evaluation=1.0)),
    ),
}  # fmt: skip


def sweep(case: Case, over: str) -> list[Case]:
    """Return the cases of a sweep: over the batch, the features d of a layer, or the rows that R steps on."""
    if over == "batch":
        return [replace(case, batch=batch) for batch in (8, 16, 32, 64, 128)]
    if over == "samples":
        return [replace(case, max_samples=rows) for rows in (32, 64, 128, 256, 512, 1024)]
    widths = (64, 128, 256, 512, 1024, 2048)
    return [replace(case, model=LINEARS, batch=2048, width=d, methods=("power", "dbp-full")) for d in widths]
