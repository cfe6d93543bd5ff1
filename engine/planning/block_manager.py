"""Who holds which block of the paged KV cache. Numbers only: the tensors are the backend's."""

from collections.abc import Sequence


class BlockManager:
    """Hands out the blocks of a KV cache, lowest numbers first, and takes them back.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` blocks; the caller has looked at ``num_free``."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        taken = tuple(self._free.pop() for _ in range(count))
        self._held.update(taken)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        assert self._held.issuperset(blocks), f"blocks {sorted(set(blocks) - self._held)} are not held"
        self._held.difference_update(blocks)
        self._free.extend(reversed(blocks))

    def check_integrity(self) -> None:
        """Every block is free or held, none both, none twice."""
        assert len(self._free) == len(set(self._free))
        assert self._held.isdisjoint(self._free)
        assert self._held.union(self._free) == set(range(self.num_blocks))
