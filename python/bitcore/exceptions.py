"""The errors that BitLab raises."""


class BitLabError(Exception):
    """Base of every error that BitLab raises on purpose."""


class QuantizationError(BitLabError, ValueError):
    """An argument that cannot be quantized or does not fit the others: shape, dtype, scale, packed bytes, config."""


class KernelNotFoundError(BitLabError, LookupError):
    """No kernel of the asked name exists, runs on this machine, or covers the config."""
