"""Operations: `bitlinear`, `base` and `packing`."""

from bitcore import _requirements as _requirements  # first: without torch it says what to install
