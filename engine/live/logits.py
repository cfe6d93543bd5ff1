"""The logits that an optimized module has answered, kept so that a longer context computes only what is new."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.config import ModelConfig
from engine.live.edits import EditWatch

MAX_BYTES = 4 << 30  # a context whose logits take more is answered, and computed again at the next call
FIRST_LENGTH = 64  # positions that a buffer has room for at least
SERIAL = (1 << 15) - 1  # elements that PyTorch copies on the calling thread
MANY = 1 << 20  # elements whose copying is worth all threads, whatever comes after it


class _NoGradient(torch.autograd.Function):
    """A new tensor that belongs to the graph of ``source``, and through which no backward goes."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=source.device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "these logits come from engine.optimize, which generates and has no gradients: "
            "to train, call the module that was passed to it"
        )


def logits_tensor(
    rows: int,
    length: int,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    gradient_source: torch.Tensor | None,
) -> torch.Tensor:
    """An uninitialised ``[rows, room, V]`` with room for ``length`` positions, twice as many if ``MAX_BYTES`` allows.

    With a ``gradient_source`` it is part of that tensor's graph, and a backward through it raises.
    """
    affordable = MAX_BYTES // (rows * model.vocab_size * dtype.itemsize)
    room = max(length, min(model.context_length, max(FIRST_LENGTH, 2 * length), affordable))
    shape = (rows, room, model.vocab_size)
    if gradient_source is None:
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.enable_grad():
        tensor: torch.Tensor = _NoGradient.apply(gradient_source, shape, dtype)  # type: ignore[no-untyped-call]
    return tensor


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """``source`` to ``target``; a few rows in main memory on the calling thread alone.

    PyTorch's threads, once they took part, wait for more of it in a loop of some milliseconds, on the cores that the
    next step needs.
    """
    count = target.numel()
    if target.device.type != "cpu" or not SERIAL < count <= MANY:
        target.copy_(source)
        return
    target, source = target.reshape(-1), source.reshape(-1)
    for first in range(0, count, SERIAL):
        target[first : first + SERIAL] = source[first : first + SERIAL]


class LogitsBuffer:
    """Logits of the first ``length`` positions of one context; what it returned stays valid as it grows.

    A caller's edit in place of a returned view is seen by the version counter that views share, and one through NumPy
    or ``.data`` by an ``EditWatch``. After an edit of the position shown last, which the watch has whole, the rest goes
    on in new memory; after any other the buffer is not used again. It is replaced, never overwritten where it was read.
    """

    def __init__(self, ids: npt.NDArray[np.int64], tensor: torch.Tensor) -> None:
        self._ids = ids  # [B, length]
        self._tensor = tensor  # [B, room, V]
        self._version = tensor._version
        self._edits = EditWatch(tensor, len(ids[0]))

    @classmethod
    def after(
        cls,
        old: "LogitsBuffer | None",
        ids: npt.NDArray[np.int64],
        requires_grad: bool,
        new_tensor: Callable[[int, int], torch.Tensor],
    ) -> "LogitsBuffer":
        """The buffer to answer ``ids`` ``[B, T]`` with: ``old`` if it can go on, or a new one with what can be kept.

        Its ``length`` says how many positions it knows. ``new_tensor(B, T)`` makes room, ``[B, at least T, V]``;
        it belongs to a graph if ``requires_grad``.
        """
        known = 0 if old is None else old.common_length(ids)
        rows, length = ids.shape
        if old is not None and known and old.can_answer(known, length, requires_grad):
            return old
        tensor = new_tensor(rows, length)
        if old is not None and known:
            tensor[:, :known] = old._tensor[:, :known]
            old._edits.restore(tensor[:, :known])
        return cls(ids[:, :known], tensor)

    @property
    def length(self) -> int:
        """Positions that are known."""
        return len(self._ids[0])

    @property
    def is_bounded(self) -> bool:
        """Whether it may be kept."""
        return self._tensor.numel() * self._tensor.element_size() <= MAX_BYTES

    def common_length(self, ids: npt.NDArray[np.int64]) -> int:
        """How many positions of ``ids`` the buffer knows: 0 for another number of rows, and after an edit in place.

        The position shown last may have been edited through NumPy or ``.data`` nevertheless.
        """
        if self._tensor._version != self._version or len(ids) != len(self._ids):
            return 0
        length = min(self.length, ids.shape[1])
        same = self._ids[:, :length] == ids[:, :length]
        known = length if bool(same.all()) else int(same.all(axis=0).argmin())
        return 0 if self._edits.earlier_edited(self.length) else known

    def can_answer(self, known: int, length: int, requires_grad: bool) -> bool:
        """Whether its memory can be shown for ``length`` positions, of which it knows the first ``known``."""
        fits = known == length or (known == self.length and length <= self._tensor.shape[1])
        return fits and self._tensor.requires_grad == requires_grad and not self._edits.last_edited()

    def write(self, row: int, start: int, logits: torch.Tensor) -> None:
        """Fill positions ``start`` on of a row with ``logits`` ``[N, V]``."""
        _copy(self._tensor[row, start : start + len(logits)], logits)

    def extend_to(self, ids: npt.NDArray[np.int64]) -> None:
        """The positions of ``ids`` are filled now, and will be shown."""
        if ids.shape[1] > self.length:
            self._edits.filled(self.length, ids.shape[1])
            self._ids = ids.copy()
        self._edits.showing(ids.shape[1] - 1)
        self._version = self._tensor._version

    def view(self, length: int) -> torch.Tensor:
        """The logits of the first ``length`` positions, ``[B, length, V]``."""
        view = self._tensor[:, :length]
        return view if torch.is_grad_enabled() else view.detach()  # which shares the version counter too
