"""Notices that a caller edited the logits it was given where no version counter sees it: through NumPy or ``.data``."""

import numpy as np
import torch

from engine.live.weights import integers

SAMPLES = 4  # elements that are remembered of every position at most


class EditWatch:
    """Remembers a buffer of logits: all of the position shown last, up to ``SAMPLES`` elements of every other one.

    A loop edits what it draws from, the last position, and one element there may be all that it edits. An edit of
    earlier positions is one of whole positions as a rule: a temperature, a softmax, all but the k largest.

    Of a buffer on a GPU, where NumPy does not reach, nothing is remembered: every call would have to wait for it.

    Args:
        tensor: ``[B, room, V]``.
        length: positions that are filled.
    """

    def __init__(self, tensor: torch.Tensor, length: int) -> None:
        kept = tensor if tensor.device.type == "cpu" else torch.empty(*tensor.shape[:2], 0, dtype=tensor.dtype)
        rows, _, width = kept.shape
        step = max(1, -(-width // SAMPLES))
        self._bits = integers(kept).numpy()  # which wakes none of PyTorch's threads
        self._sampled = self._bits[:, :, step // 2 :: step]
        self._samples = np.empty_like(self._sampled)
        self._shown: int | None = None  # the position that ``_last`` is of
        self._last = torch.empty(rows, width, dtype=tensor.dtype)
        self._last_bits = integers(self._last).numpy()
        self.filled(0, length)

    def filled(self, start: int, end: int) -> None:
        """Positions ``start`` to ``end`` have been filled."""
        self._samples[:, start:end] = self._sampled[:, start:end]

    def showing(self, position: int) -> None:
        """The caller gets the positions up to this one now."""
        if position != self._shown:
            self._shown = position
            self._last_bits[...] = self._bits[:, position]

    def earlier_edited(self, length: int) -> bool:
        """Whether the first ``length`` positions changed, but for the one shown last, as far as they are remembered."""
        shown = length if self._shown is None else self._shown
        parts = (slice(0, shown), slice(shown + 1, length))
        return not all(np.array_equal(self._sampled[:, part], self._samples[:, part]) for part in parts)

    def last_edited(self) -> bool:
        """Whether the position shown last changed."""
        return self._shown is not None and not np.array_equal(self._bits[:, self._shown], self._last_bits)

    def restore(self, copy: torch.Tensor) -> None:
        """Put the position shown last, if it changed, as it was into a copy ``[B, N, V]`` of the first positions."""
        if self._shown is not None and self._shown < copy.shape[1] and self.last_edited():
            copy[:, self._shown] = self._last
