"""Every error that decorr_fx raises: what went wrong, at which layer, and what to do about it."""


class DecorrError(Exception):
    """Base of all errors of decorr_fx."""


class ConfigError(DecorrError, ValueError):
    """A setting is out of range, or an override names no layer."""


class ModelError(DecorrError, ValueError):
    """The model cannot be transformed as it is: wrapped, lazy, already transformed, or without a layer to work on."""


class LayerError(ModelError):
    """One layer cannot be transformed; the message starts with its fully qualified name."""

    def __init__(self, fqn: str, problem: str) -> None:
        super().__init__(f"layer {fqn!r}: {problem}")
        self.fqn = fqn


class NotTransformedError(DecorrError, ValueError):
    """The verb needs a model made by `transform`, and this one is plain (or was folded already)."""


class CheckpointError(DecorrError, ValueError):
    """A checkpoint does not fit the transformed model; the model was left as it was."""


class DistributedError(DecorrError, RuntimeError):
    """R is not the same on all ranks, or ranks hold a weight together in a way in which it cannot be decorrelated."""


class PassError(DecorrError, RuntimeError):
    """A pass broke its own contract: a bug in decorr_fx, with the pass and the place named."""


class ExportError(DecorrError, RuntimeError):
    """The ONNX file could not be made or did not agree with the model; no file was left behind."""
