"""Operations: `bitlinear`, `base` and `packing`."""
