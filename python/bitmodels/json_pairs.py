"""What json.loads() takes silently and no file of ours or of others should hold."""

from typing import Any


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses a name that stands there twice.

    Raises:
        ValueError
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{sorted({name for name in names if names.count(name) > 1})} stands there twice")
    return values
