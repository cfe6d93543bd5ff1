"""Memory of the Triton backends that outlives a step: scratch on the device, packed inputs and outputs, staging.

Who may write when: every tensor of a device belongs to one stream, the current one of ``submit``. A copy to the device
waits there for the kernels queued before it, and a kernel for the copy, so one buffer serves any number of steps in
flight. Host memory has no such order: a step has a ``Slot`` of its own from ``submit`` until it is collected.

A buffer that grows is replaced. The old one goes back to PyTorch's allocator while queued kernels may still use it:
that is safe, because the allocator hands it out again to the same stream only, whose later work runs after them, and
returns memory to the driver only by ``cudaFree``, which waits for the device. A captured graph holds the tensors that
it was captured with, and goes on using those.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

TYPES = {"i4": torch.int32, "u4": torch.int32, "i8": torch.int64, "u8": torch.int64, "f4": torch.float32}
ALIGN = 16  # bytes, and elements of a row: the compiler specialises on both
MOST_LAYOUTS = 256  # whose views a slot keeps
Arrays = Mapping[str, npt.NDArray[Any]]
Words = TypeVar("Words", torch.Tensor, npt.NDArray[Any])


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
        count = math.prod(shape)
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
        return Layout.of_shapes({name: (array.shape, array.dtype) for name, array in arrays.items()})

    @staticmethod
    def of_shapes(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> "Layout":
        """The layout of arrays of these shapes and types."""
        places, size = [], 0
        for name, (shape, dtype) in shapes.items():
            places.append((name, size, shape, dtype.str[1:]))
            size += aligned(math.prod(shape) * dtype.itemsize)
        return Layout(tuple(places), size)

    def arrays(self, packed: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """The arrays as views of ``packed``."""
        found = {}
        for name, start, shape, kind in self.places:
            dtype = np.dtype(kind)
            found[name] = packed[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return found

    def views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as tensors in ``packed``, uint8."""
        found = {}
        for name, start, shape, kind in self.places:
            dtype = TYPES[kind]
            count = math.prod(shape)
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

    def split(self, packed: Words) -> dict[str, Words]:
        """The parts of ``packed`` [size] int32: tokens, ranks, status, logprobs [R], top_ids, top_logprobs [R, N]."""
        row, block = aligned(self.rows), aligned(self.rows * self.top)
        tokens, ranks, status, logprobs = (packed[i * row : i * row + self.rows] for i in range(4))
        ids, values = (
            packed[4 * row + i * block :][: self.rows * self.top].reshape(self.rows, self.top) for i in (0, 1)
        )
        floats: Any = torch.float32 if isinstance(packed, torch.Tensor) else np.float32
        return {
            "tokens": tokens,
            "logprobs": logprobs.view(floats),
            "ranks": ranks,
            "status": status,
            "top_ids": ids,
            "top_logprobs": values.view(floats),
        }


class Slot:
    """Host memory of one step in flight, pinned for a GPU, and the event after which it is free again.

    What it is asked for again is not made again: views of its memory take longer to make than to write.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._event = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]
        self._up = self._down = torch.empty(0, dtype=torch.uint8)
        self._uploads: dict[int, tuple[Layout, dict[str, npt.NDArray[Any]], torch.Tensor]] = {}  # by the layout's id
        self._downloads: dict[int, torch.Tensor] = {}  # by their bytes

    def _room(self, old: torch.Tensor, size: int) -> torch.Tensor:
        if len(old) >= size:
            return old
        self._uploads.clear()
        self._downloads.clear()
        return torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=self._pinned)

    def arrays(self, layout: Layout) -> dict[str, npt.NDArray[Any]]:
        """Where the arrays of an upload go. They hold what earlier ones left."""
        return self._upload(layout)[1]

    def _upload(self, layout: Layout) -> tuple[Layout, dict[str, npt.NDArray[Any]], torch.Tensor]:
        found = self._uploads.get(id(layout))
        if found is None:
            if len(self._uploads) >= MOST_LAYOUTS:
                self._uploads.clear()
            self._up = self._room(self._up, layout.size)
            found = layout, layout.arrays(self._up.numpy()), self._up[: layout.size]
            self._uploads[id(layout)] = found  # which keeps the layout, so that no other one gets its id
        return found

    def upload(self, layout: Layout, packed: torch.Tensor) -> None:
        """Queue a copy of ``arrays(layout)`` to ``packed`` on the device, in one transfer."""
        packed.copy_(self._upload(layout)[2], non_blocking=True)

    def download(self, packed: torch.Tensor) -> None:
        """Queue a copy of ``packed``, int32, to the host."""
        size = packed.nbytes
        target = self._downloads.get(size)
        if target is None:
            self._down = self._room(self._down, size)
            target = self._downloads[size] = self._down[:size].view(torch.int32)
        target.copy_(packed, non_blocking=True)

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
        parts = layout.split(self._downloads[4 * layout.size].numpy())
        return {name: part[:rows].copy() for name, part in parts.items()}


class Slots:
    """A ring of slots, as long as there are steps in flight: one that is taken again has its step behind it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Slot] = []

    def take(self) -> Slot:
        """A slot that no step uses. One whose step was collected, but is not over, is waited for."""
        if not self._free:
            return Slot(self._device)
        slot = self._free.pop()
        slot.wait()
        return slot

    def give(self, slot: Slot) -> None:
        """The slot of a step that was collected, whether or not it is over."""
        self._free.append(slot)
