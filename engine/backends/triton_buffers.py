"""Memory of the Triton backends that outlives a step: scratch on the device, packed inputs and outputs, staging.

Who may write when: every tensor of a device belongs to one stream, the current one of ``submit``. A copy to the device
waits there for the kernels queued before it, and a kernel for the copy, so one buffer serves any number of steps in
flight. Host memory has no such order: a step has a ``Slot`` of its own from ``submit`` until it is collected.

A buffer that grows is replaced. The old one goes back to PyTorch's allocator while queued kernels may still use it:
that is safe, because the allocator hands it out again to the same stream only, whose later work runs after them, and
returns memory to the driver only by ``cudaFree``, which waits for the device. A captured graph holds the tensors that
it was captured with, and goes on using those.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

TYPES = {"i4": torch.int32, "u4": torch.int32, "i8": torch.int64, "u8": torch.int64, "f4": torch.float32}
ALIGN = 16  # bytes, and elements of a row: the compiler specialises on both
Arrays = Mapping[str, npt.NDArray[Any]]


def aligned(count: int) -> int:
    """``count`` rounded up so that what follows starts where the compiler likes it."""
    return -(-count // ALIGN) * ALIGN


class Buffers:
    """Device tensors by name, made once and replaced when a larger one is needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and type. New ones are zero; what an old one holds is left."""
        count = int(np.prod(shape, dtype=np.int64))
        flat = self._flat.get(name)
        if flat is None or len(flat) < count:
            size = 1 << (max(count, ALIGN) - 1).bit_length()
            flat = self._flat[name] = torch.zeros(size, dtype=dtype, device=self._device)
        return flat[:count].view(shape)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them as they are now: what a captured graph has to keep."""
        return tuple(self._flat.values())


@dataclass(frozen=True, slots=True)
class Layout:
    """Where arrays lie in one packed buffer: (name, first byte, shape, type) of each. Equal layouts compare equal.

    Unsigned integers arrive on the device as the signed ones with the same bits.
    """

    places: tuple[tuple[str, int, tuple[int, ...], str], ...]
    size: int

    @staticmethod
    def of(arrays: Arrays) -> "Layout":
        """Arrays one after the other, each at a multiple of ``ALIGN`` bytes."""
        places, size = [], 0
        for name, array in arrays.items():
            places.append((name, size, array.shape, array.dtype.str[1:]))
            size += aligned(array.nbytes)
        return Layout(tuple(places), size)

    def write(self, arrays: Arrays, packed: npt.NDArray[np.uint8]) -> None:
        """Copy the arrays into ``packed``."""
        for name, start, _, _ in self.places:
            array = arrays[name]
            packed[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)

    def views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as tensors in ``packed``, uint8."""
        found = {}
        for name, start, shape, kind in self.places:
            dtype = TYPES[kind]
            count = int(np.prod(shape, dtype=np.int64))
            found[name] = packed[start : start + count * dtype.itemsize].view(dtype).view(shape)
        return found


@dataclass(frozen=True, slots=True)
class DrawnLayout:
    """Where drawn rows lie in one packed int32 buffer: tokens first, wherever the step before drew how many.

    Args:
        rows: rows of the launch, padding included.
        top: most probable tokens reported for each.
    """

    rows: int
    top: int

    @property
    def size(self) -> int:
        """int32 words."""
        return 4 * aligned(self.rows) + 2 * aligned(self.rows * self.top)

    def split(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of ``packed`` [size] int32: tokens, ranks, status, logprobs [R], top_ids, top_logprobs [R, N]."""
        row, block = aligned(self.rows), aligned(self.rows * self.top)
        tokens, ranks, status, logprobs = (packed[i * row : i * row + self.rows] for i in range(4))
        ids, values = (packed[4 * row + i * block :][: self.rows * self.top].view(self.rows, self.top) for i in (0, 1))
        return {
            "tokens": tokens,
            "logprobs": logprobs.view(torch.float32),
            "ranks": ranks,
            "status": status,
            "top_ids": ids,
            "top_logprobs": values.view(torch.float32),
        }


class Slot:
    """Host memory of one step in flight, pinned for a GPU, and the event after which it is free again."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._event = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]
        self._up = self._down = torch.empty(0, dtype=torch.uint8)

    def _room(self, old: torch.Tensor, size: int) -> torch.Tensor:
        if len(old) >= size:
            return old
        return torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=self._pinned)

    def upload(self, layout: Layout, arrays: Arrays, packed: torch.Tensor) -> None:
        """Queue a copy of the arrays to ``packed`` on the device, in one transfer."""
        self._up = self._room(self._up, layout.size)
        layout.write(arrays, self._up.numpy())
        packed.copy_(self._up[: layout.size], non_blocking=True)

    def download(self, packed: torch.Tensor) -> None:
        """Queue a copy of ``packed``, int32, to the host."""
        self._down = self._room(self._down, packed.nbytes)
        self._down[: packed.nbytes].view(torch.int32).copy_(packed, non_blocking=True)

    def record(self) -> None:
        """The step ends here: ``wait`` waits for what is queued up to now."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait for the step."""
        if self._event is not None:
            self._event.synchronize()

    def downloaded(self, layout: DrawnLayout, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Copies of the first ``rows`` drawn rows; after ``wait``."""
        parts = layout.split(self._down[: 4 * layout.size].view(torch.int32))
        return {name: part[:rows].numpy().copy() for name, part in parts.items()}


class Slots:
    """A ring of slots, as long as there are steps in flight: one is taken again only after its step was waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Slot] = []

    def take(self) -> Slot:
        """A slot that no step uses."""
        return self._free.pop() if self._free else Slot(self._device)

    def give(self, slot: Slot) -> None:
        """The slot of a step that was waited for."""
        self._free.append(slot)
