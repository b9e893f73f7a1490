"""The errors that BitLab raises."""


class BitLabError(Exception):
    """Base of every error that BitLab raises on purpose."""


class QuantizationError(BitLabError, ValueError):
    """An argument that cannot be quantized or does not fit the others: shape, dtype, scale, packed bytes, config."""


class FileError(QuantizationError):
    """A file that is damaged, foreign, or does not belong with those beside it. The message begins with its path."""


class StateError(BitLabError, RuntimeError):
    """A call that the object's present state does not allow, such as `deploy()` of a deployed layer."""


class KernelNotFoundError(BitLabError, LookupError):
    """No kernel of the asked name exists, runs on this machine, or covers the config."""
