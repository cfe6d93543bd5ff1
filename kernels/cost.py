"""What a launch moves and computes, as every kernel's ``cost()`` states it and the tests count it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes and arithmetic of one launch.

    Args:
        weights: unique bytes read of weights, their scales and biases.
        reads: other unique bytes read that the launch did not write itself: activations, KV cache, tables, statistics.
        writes: unique bytes written.
        flops: multiplications and additions of the matrix products, padding not counted.
        rereads: all that the loads and stores move besides, name -> bytes: what is read again, what one program writes
            for another to read. Caches should hold it.
    """

    weights: int
    reads: int
    writes: int
    flops: int
    rereads: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Unique bytes read and written."""
        return self.weights + self.reads + self.writes
