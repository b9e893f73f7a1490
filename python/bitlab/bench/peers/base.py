"""What a peer is: another implementation of the same linear."""

from typing import Protocol

from bitlab.bench.layer import Layer, Prepared


class Peer(Protocol):
    """One way to compute `x @ weight.T` with the layer's weight, timed as its users would call it."""

    @property
    def name(self) -> str:
        """In tables and files."""

    @property
    def group(self) -> str:
        """What `--peers` selects it by."""

    @property
    def family(self) -> str | None:
        """Whose multiply-add peak bounds it: "int8", "float32", or None where that peak is not measured."""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Why it cannot compute this shape, or None. Asked only where it is not missing."""

    def prepare(self, layer: Layer) -> Prepared:
        """Holds the layer's weight, in as many copies as the layer asks for, with the threads that torch has when
        `bind` is called."""
