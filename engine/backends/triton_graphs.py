"""Decode steps that are captured once and replayed: one launch from the host in place of five a layer.

A step in which every sequence brings one token is padded to the next of ``SIZES`` rows and to a power of two of KV
splits, so that few different graphs serve any decoding. Padding is a sequence that reads token 0 at position 0, whose
slot is -1 (no key is written) and whose query tile has no query (attention leaves it out); what is drawn for it is
dropped. No row's bits depend on it: rows of a batch do not mix.

A graph knows nothing of the batch: its launches read what was uploaded, at addresses that stay. The first step of a
size runs its launches one by one, which compiles them, and records them behind it; recording runs nothing.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.backends.triton_buffers import Arrays, Layout

SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 257, 32))  # rows of a padded batch
ROW_IDS = np.arange(SIZES[-1], dtype=np.int32)
MAX_GRAPHS = 128  # that are kept; the one that was not used for longest goes
FILL = {"slots": -1, "previous_rows": -1, "allowed": 0xFFFFFFFF, "top_p": 1, "repetition_penalty": 1}  # others: 0
PER_SEQUENCE = (
    "token_ids", "positions", "slots", "previous_rows", "block_tables", "query_tiles", "temperature", "top_k", "top_p",
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seeds", "draw_positions", "sample_index",
    "allowed",
)  # fmt: skip


def padded_rows(rows: int) -> int | None:
    """The smallest of ``SIZES`` that holds ``rows``; None above the largest."""
    return next((size for size in SIZES if size >= rows), None)


def padded_length(longest: int, split: int, context_length: int) -> int:
    """The longest context that a launch for ``longest`` is made for: a power of two of KV splits, or the model's."""
    splits = 1 << (-(-longest // split) - 1).bit_length()
    return min(splits * split, context_length)


def padded_layout(arrays: Arrays, rows: int, table_width: int) -> Layout:
    """Where a decode step's arrays lie, each of ``rows`` rows, with block tables of ``table_width`` columns."""
    shapes = {}
    for name, array in arrays.items():
        assert name in PER_SEQUENCE, f"nobody knows how to pad {name}"
        shapes[name] = (rows, *((table_width,) if name == "block_tables" else array.shape[1:])), array.dtype
    return Layout.of_shapes(shapes | {"row_ids": ((rows,), np.dtype(np.int32))})


def write_padded(arrays: Arrays, padded: Arrays) -> None:
    """Write a decode step's arrays to ``padded``, as ``padded_layout`` has them; what is left of each is padding."""
    for name, array in arrays.items():
        target, rows = padded[name], len(array)
        if name == "block_tables":
            width = target.shape[1]
            target[:rows, : array.shape[1]] = array[:, :width]
            target[:rows, array.shape[1] :] = 0
        else:
            target[:rows] = array
        if rows < len(target):
            target[rows:] = FILL.get(name, 0)
    padded["row_ids"][:] = ROW_IDS[: len(padded["row_ids"])]


class Graph(Protocol):
    """Launches that were captured."""

    def replay(self) -> None:
        """Queue them."""


class CudaGraph:
    """``torch.cuda.CUDAGraph``. Capturing waits for the device once, as PyTorch's does; other threads may go on."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's own is of the first capture's device
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"), _only_views():
            launch()

    def replay(self) -> None:
        """Queue the launches on the current stream."""
        self._graph.replay()


class RecordedGraph:
    """The same for interpreted kernels: every launch with the very arguments, pointers and numbers, it had."""

    def __init__(self, launch: Callable[[], None]) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        run = InterpretedFunction.run

        def record(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self._launches.append((kernel, args, kwargs))

        InterpretedFunction.run = record
        try:
            with _only_views():
                launch()
        finally:
            InterpretedFunction.run = run

    def replay(self) -> None:
        """Run the launches."""
        for kernel, args, kwargs in self._launches:
            kernel.run(*args, **kwargs)


class _Views(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            raise AssertionError(f"{func} while launches are captured: a graph would not run it, or would keep memory")
        return func(*args, **(kwargs or {}))


@contextmanager
def _only_views() -> Iterator[None]:
    """Let PyTorch make views and nothing else: no allocation, no arithmetic outside the kernels."""
    with _Views():  # type: ignore[no-untyped-call]
        yield


def capture(device: torch.device, launch: Callable[[], None]) -> Graph:
    """Capture the launches that ``launch`` makes; they do not run. All of them have run before, so are compiled."""
    return CudaGraph(launch) if device.type == "cuda" else RecordedGraph(launch)


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, the packed input that it reads, the logits it leaves, and everything else that it has pointers to."""

    graph: Graph
    layout: Layout
    inputs: torch.Tensor
    logits: torch.Tensor | None
    kept: tuple[torch.Tensor, ...]


class Graphs:
    """Captured steps by all that their launches depend on but the contents of buffers; the ``MAX_GRAPHS`` last used.

    One that goes while it still runs is freed by the driver after it ended, and its tensors as ``triton_buffers`` says.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def get(self, key: Hashable) -> Captured | None:
        """The captured step, now the most recently used, or None."""
        found = self._captured.pop(key, None)
        if found is not None:
            self._captured[key] = found
        return found

    def put(self, key: Hashable, captured: Captured) -> None:
        """Keep a captured step."""
        if len(self._captured) >= MAX_GRAPHS:
            del self._captured[next(iter(self._captured))]
        self._captured[key] = captured

    def clear(self) -> None:
        """Forget all: weights or cache have moved."""
        self._captured.clear()
