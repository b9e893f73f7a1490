"""What a peer is: another implementation of the same linear."""

from typing import Protocol

from bitlab.bench.layer import Layer, Prepared


class Peer(Protocol):
    """One way to compute `x @ weight.T` with the layer's weight, timed as its users would call it.

    Attributes:
        name: In tables and files.
        group: What `--peers` selects it by.
        family: Whose multiply-add peak bounds it: "int8", "float32", or None where that peak is not measured.
    """

    name: str
    group: str
    family: str | None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Why it cannot compute this shape, or None. Asked only where it is not missing."""

    def prepare(self, layer: Layer) -> Prepared:
        """Holds the layer's weight, in as many copies as the layer asks for, with the threads that torch has when
        `bind` is called."""
