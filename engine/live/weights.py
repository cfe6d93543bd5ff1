"""Notices that the weights of a live module changed, cheaply enough to ask at every call.

No single sign is enough. Pointers and version counters see an in-place operation and a replaced Parameter, but not a
fused optimizer step, an edit through ``.data`` or a write through NumPy; the optimizer hook sees every optimizer step;
the fingerprint, some elements of every tensor compared bit for bit, sees what changes a tensor as a whole, or a 30th of
it in one piece. What none of them sees is an edit through ``.data`` or NumPy that falls between the sampled elements,
as one of an element, a row or a column does mostly: that needs ``refresh()``.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

SAMPLES = 32  # elements of each tensor in the fingerprint at least, where it has as many; fewer than twice that

Places = tuple[torch.Tensor, ...]  # an index for each dimension

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_watches: "weakref.WeakSet[WeightWatch]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for watch in _watches:
        watch.after_optimizer_step(stepped)


_hook: list[Any] = []  # the handle of the hook, installed with the first watch


class WeightWatch:
    """Remembers the state of some tensors and says whether it changed.

    Args:
        tensors: the parameters of a module.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._ids = {id(tensor) for tensor in tensors}
        self._identity = _identity(tensors)
        self._fingerprint = _Fingerprint(tensors)
        self._values, _ = self._fingerprint.take(torch.empty(0, dtype=torch.int64))
        self._stepped = False
        _watches.add(self)
        if not _hook:
            _hook.append(register_optimizer_step_post_hook(_after_step))

    def after_optimizer_step(self, stepped: set[int]) -> None:
        """Take note of an optimizer's step over the tensors with these ids."""
        if not stepped.isdisjoint(self._ids):
            self._stepped = True

    def touched(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a sign on the host says that they changed: object, memory, version counter, an optimizer's step.

        ``tensors`` are those that the module has now in their places.
        """
        return self._stepped or _identity(tensors) != self._identity

    def compare(self, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Integer ``ids`` as int64 on the CPU, and whether the fingerprint differs: on a GPU one wait serves both."""
        values, host_ids = self._fingerprint.take(ids)
        return host_ids, not all(map(np.array_equal, values, self._values))


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the elements' size, out of the graph: NaN is equal to itself there."""
    bits = tensor.detach()
    return bits.view(INTEGERS[bits.element_size()])


def _identity(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Objects, memory and version counters (inference tensors have none)."""
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return list(map(id, tensors)), list(map(torch.Tensor.data_ptr, tensors)), versions


class _Fingerprint:
    """The bits of elements of every tensor, equally far apart: the first is its first, the last within 30 of its end.

    They are strided views, made once, of the tensors' own memory: what is left for a call is one concatenation, which
    a GPU does in a launch for dozens of tensors. Of tensors with gaps they are gathered by index, one by one.

    Args:
        tensors: on any devices.
        through_numpy: read those on the CPU through NumPy, which takes a quarter of the time that PyTorch takes.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], through_numpy: bool = True) -> None:
        self._host: dict[np.dtype[Any], list[npt.NDArray[Any]]] = {}
        self._views: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        self._gathered: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, Places]]] = {}
        for tensor in tensors:
            bits = integers(tensor)
            if bits.dim() == 2 and bits.t().is_contiguous():
                bits = bits.t()  # as the elements lie in memory
            step = max(1, (bits.numel() - 1) // (SAMPLES - 1))
            key = bits.device, bits.dtype
            if not bits.is_contiguous():
                self._views.setdefault(key, [])
                places = torch.unravel_index(torch.arange(0, bits.numel(), step, device=bits.device), bits.shape)
                self._gathered.setdefault(key, []).append((bits, places))
            elif bits.device.type == "cpu" and through_numpy:
                array = bits.view(-1)[::step].numpy()
                self._host.setdefault(array.dtype, []).append(array)
            else:
                self._views.setdefault(key, []).append(bits.view(-1)[::step])

    def take(self, ids: torch.Tensor) -> tuple[list[npt.NDArray[Any]], torch.Tensor]:
        """The bits as they are now, in arrays of one dtype each, and integer ``ids`` as int64 on the CPU.

        Where ids and tensors are on one GPU, they come in one copy.
        """
        ids, host_ids = ids.detach().to(torch.int64), None
        values = [np.concatenate(arrays) for arrays in self._host.values()]
        for (device, dtype), views in self._views.items():
            parts = [*views, *(bits[places] for bits, places in self._gathered.get((device, dtype), ()))]
            if host_ids is None and device == ids.device:
                both = torch.cat([ids.reshape(-1).view(dtype), *parts]).cpu()
                words = ids.numel() * ids.element_size() // both.element_size()
                host_ids = both[:words].view(torch.int64).view(ids.shape)
                values.append(both[words:].numpy())
            elif parts:
                values.append(torch.cat(parts).cpu().numpy())
        return values, ids.cpu() if host_ids is None else host_ids
