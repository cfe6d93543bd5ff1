"""Notices that the weights of a live module changed, cheaply enough to ask at every call.

No single sign is enough. Pointers and version counters see an in-place operation and a replaced Parameter, but not a
fused optimizer step, an edit through ``.data`` or a write through NumPy; the optimizer hook sees every optimizer step;
the fingerprint, some elements of every tensor compared bit for bit, sees what changes a tensor as a whole. What none of
them sees is an edit through ``.data`` of single elements between the sampled ones: that needs ``refresh()``.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

SAMPLES = 32  # elements of each tensor in the fingerprint

_watches: "weakref.WeakSet[WeightWatch]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for watch in _watches:
        watch.after_optimizer_step(stepped)


_hook: list[Any] = []  # the handle of the hook, installed with the first watch


class WeightWatch:
    """Remembers the state of some tensors and says whether it changed.

    Args:
        read: returns the tensors as they are attached to the module now, always in the same order.
    """

    def __init__(self, read: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._read = read
        tensors = read()
        self._ids = {id(tensor) for tensor in tensors}
        self._identity = _identity(tensors)
        self._fingerprint = _Fingerprint(tensors)
        self._values = self._fingerprint.take()
        self._stepped = False
        _watches.add(self)
        if not _hook:
            _hook.append(register_optimizer_step_post_hook(_after_step))

    def after_optimizer_step(self, stepped: set[int]) -> None:
        """Take note of an optimizer's step over the tensors with these ids."""
        if not stepped.isdisjoint(self._ids):
            self._stepped = True

    def changed(self) -> bool:
        """Whether the tensors differ, by any sign, from those remembered."""
        if self._stepped or _identity(self._read()) != self._identity:
            return True
        return not np.array_equal(self._fingerprint.take(), self._values)


def _identity(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int, int]]:
    """Object, memory and version counter of each tensor (inference tensors have no counter)."""
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


class _Fingerprint:
    """The bits of some elements of every tensor, at places spread evenly from the first to the last."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._host: list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]] = []
        self._other: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in tensors:
            bits = tensor.detach()
            bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
            places = np.unique(np.linspace(0, bits.numel() - 1, SAMPLES).astype(np.int64))
            if bits.device.type == "cpu" and bits.is_contiguous():
                self._host.append((bits.view(-1).numpy(), places))  # the tensor's own memory
            else:
                self._other.append((bits, torch.from_numpy(places).to(bits.device)))

    def take(self) -> npt.NDArray[np.int64]:
        """The bits as they are now."""
        parts = [flat[places] for flat, places in self._host]
        if self._other:
            parts.append(torch.cat([bits.reshape(-1)[places] for bits, places in self._other]).cpu().numpy())
        return np.concatenate(parts).astype(np.int64)
