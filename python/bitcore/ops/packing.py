"""The packed ternary weight: a plain uint8 tensor, the same bytes on every machine and device.

docs/packed-format.md describes them. `layout` is "2bit", "1.6bit" (five codes in a byte; it exists where it is smaller,
always from 65 in_features on), or "auto": a fixed rule of the shape, "2bit" for every shape.
"""

from torch import Tensor

from bitcore.operators import checks, native


def pack_weights(qweight: Tensor, layout: str = "auto") -> Tensor:
    """Packs ternary codes.

    Args:
        qweight: int8 (out_features, in_features) of -1, 0, 1.
        layout: "auto", "2bit" or "1.6bit".

    Returns:
        uint8 (out_features, R + T), R = 4 * ceil(in_features / 16) at 2 bits and 4 * ceil(in_features / 20) at 1.6,
        T = ceil(64 / out_features).

    Raises:
        QuantizationError: wrong rank or dtype, a code that is not -1, 0 or 1, a layout that is unknown or does not
            exist for in_features.
    """
    checks.given(qweight=qweight)
    return native.call(native.pack_weights, qweight, layout)


def unpack_weights(qweight: Tensor, in_features: int) -> Tensor:
    """Inverse of pack_weights. Reads and checks every byte; on a GPU it synchronizes.

    Args:
        qweight: uint8, as pack_weights and prepare_weights return it.
        in_features: The columns that were packed.

    Returns:
        int8 (out_features, in_features) of -1, 0, 1.

    Raises:
        QuantizationError: wrong dtype or length, a damaged trailer, checksum or code, other sizes.
    """
    checks.given(qweight=qweight)
    return native.call(native.unpack_weights, qweight, in_features)


def repack(qweight: Tensor, in_features: int, layout: str = "auto") -> Tensor:
    """Rewrites a packed weight in another layout.

    Raises:
        QuantizationError: as unpack_weights, or as pack_weights for the layout.
    """
    return pack_weights(unpack_weights(qweight, in_features), layout)


def check_qweight(qweight: Tensor, in_features: int) -> None:
    """Reads every byte of a packed weight: length, trailer, checksum, codes. On a GPU it synchronizes.

    Raises:
        QuantizationError: says what is damaged.
    """
    checks.given(qweight=qweight)
    native.call(native.check_qweight, qweight, in_features)
