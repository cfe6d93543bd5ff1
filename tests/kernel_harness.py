"""How kernels are tested without a GPU: guarded buffers, any order of programs, every address recorded.

Import this before anything imports Triton: it chooses the interpreter, and puts the correction in.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from backend_driver import same_bits as same_bits
from triton.runtime.interpreter import InterpreterBuilder

from kernels import interpreter

interpreter.install()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("forward", "reverse", "shuffled")
SECTOR = 32  # bytes that a GPU moves at once
GUARD = 64  # elements before, after and between the rows of a guarded tensor


def guarded(shape: Sequence[int], dtype: torch.dtype, fill: float | None = None, gap: int = GUARD) -> torch.Tensor:
    """A tensor whose rows have ``gap`` elements of poison around them; NaN-filled (integers: -1) unless told.

    The last dimension is contiguous, the others are strided by the padded row.
    """
    rows, width = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    whole = torch.empty((rows + 2, width + gap), dtype=dtype)
    whole.view(torch.uint8)[:] = 0xFF  # a NaN in every float format here, -1 in every integer
    view = whole[1:-1, :width].unflatten(0, shape[:-1]) if len(shape) > 1 else whole[1, :width]
    return view if fill is None else view.fill_(fill)


def guarded_like(values: torch.Tensor, dtype: torch.dtype | None = None, gap: int = GUARD) -> torch.Tensor:
    """A guarded copy of ``values``."""
    return guarded(values.shape, dtype or values.dtype, gap=gap).copy_(values)


def far_rows(values: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy of ``values`` [3, W] whose rows are 2**30 elements apart: the third starts past what 32 bits can count.

    It lies in a sparse file in ``folder``, with as much again before it, where an offset that wraps around leads to.
    """
    rows, width = values.shape
    size = 2**31 + 2**30 * (rows - 1) + width
    whole = torch.from_file(str(folder / f"far_{len([*folder.iterdir()])}"), True, size, dtype=values.dtype)
    return whole.as_strided((rows, width), (2**30, 1), 2**31).copy_(values)


def element_addresses(tensor: torch.Tensor) -> np.ndarray:
    """Sorted byte addresses of every element of a tensor, of any strides."""
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int64) * stride
    return np.unique(offsets.ravel() * tensor.element_size() + tensor.data_ptr())


def _last_byte(tensor: torch.Tensor) -> int:
    """Bytes from the start of a tensor's first element to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


@dataclass
class Trace:
    """What the programs of the launches inside ``recording`` touched: (program, is it a write, addresses, bytes)."""

    touches: list[tuple[int, bool, np.ndarray, int]] = field(default_factory=list)
    program: int = -1

    def _extents(self, write: bool | None, tensor: torch.Tensor | None = None) -> np.ndarray:
        """[n, 2] sorted and disjoint: first byte, and the one after the last, of all that was read or written (of a
        tensor); of either where ``write`` is None.
        """
        found = []
        for _, wrote, addresses, size in self.touches:
            if write is None or wrote is write:
                cuts = np.flatnonzero(np.diff(addresses) != size) + 1
                firsts, lasts = addresses[np.r_[0, cuts]], addresses[np.r_[cuts - 1, len(addresses) - 1]]
                found.append(np.stack([firsts, lasts + size], axis=1))
        extents = np.concatenate(found) if found else np.empty((0, 2), np.int64)
        if tensor is not None:
            elements = tensor.data_ptr() + np.array([0, _last_byte(tensor)])
            extents = np.clip(extents, *elements)
        extents = extents[extents[:, 0] < extents[:, 1]]
        extents = extents[np.argsort(extents[:, 0], kind="stable")]
        if not len(extents):
            return extents
        reached = np.maximum.accumulate(extents[:, 1])
        starts = np.r_[True, extents[1:, 0] > reached[:-1]]
        return np.stack([extents[starts, 0], reached[np.r_[np.flatnonzero(starts)[1:] - 1, len(extents) - 1]]], axis=1)

    def bytes(self, write: bool, *tensors: torch.Tensor) -> int:
        """Unique bytes read (or written) of these tensors together, all tensors if none is given."""
        parts = [self._extents(write, tensor) for tensor in tensors or (None,)]
        return sum(int((part[:, 1] - part[:, 0]).sum()) for part in parts)

    def bytes_from_before(self) -> int:
        """Unique bytes read that none of the launches wrote."""
        both, written = self._extents(None), self._extents(True)
        return int((both[:, 1] - both[:, 0]).sum() - (written[:, 1] - written[:, 0]).sum())

    def traffic(self) -> int:
        """Bytes that programs read and wrote, as often as they did; within one load or store each byte counts once."""
        return sum(len(addresses) * size for _, _, addresses, size in self.touches)

    def sectors(self, tensor: torch.Tensor) -> float:
        """Bytes of the 32-byte sectors that the reads of ``tensor`` touch, over the bytes read, both unique."""
        extents = self._extents(False, tensor)
        first, last = (extents - [tensor.data_ptr(), tensor.data_ptr() + 1]).T // SECTOR
        shared = int((first[1:] == last[:-1]).sum())  # with the extent before
        return ((last - first + 1).sum() - shared) * SECTOR / (extents[:, 1] - extents[:, 0]).sum()

    def check(self, tensors: Sequence[torch.Tensor], shared: Sequence[torch.Tensor] = ()) -> None:
        """Every touch is an element of one of ``tensors`` or ``shared``; only ``shared`` is written across programs."""
        addresses = np.concatenate([a for _, _, a, _ in self.touches])
        programs = np.concatenate([np.full(len(a), program) for program, _, a, _ in self.touches])
        wrote = np.concatenate([np.full(len(a), w) for _, w, a, _ in self.touches])
        outside = ~np.isin(addresses, np.concatenate([element_addresses(t) for t in (*tensors, *shared)]))
        if outside.any():
            i = np.flatnonzero(outside)[0]
            verb = "writes" if wrote[i] else "reads"
            raise AssertionError(
                f"program {programs[i]} {verb} a place that is not its tensors', {outside.sum()} in all"
            )
        exempt = np.concatenate([element_addresses(t) for t in shared]) if shared else np.empty(0, np.int64)
        kept = ~np.isin(addresses, exempt)
        addresses, programs, wrote = addresses[kept], programs[kept], wrote[kept]
        if not wrote.any():
            return
        places, first = np.unique(addresses[wrote], return_index=True)
        writers = programs[wrote][first]
        at = np.minimum(np.searchsorted(places, addresses), len(places) - 1)
        foreign = (places[at] == addresses) & (writers[at] != programs)
        if foreign.any():
            i = np.flatnonzero(foreign)[0]
            verb = "writes" if wrote[i] else "reads"
            raise AssertionError(f"program {programs[i]} {verb} what program {writers[at][i]} wrote")


@contextmanager
def recording() -> Iterator[Trace]:
    """Record the addresses that every program touches."""
    trace = Trace()
    builder = InterpreterBuilder
    load, store, rmw, set_idx = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        builder.set_grid_idx,
    )

    def note(write: bool, pointers, mask) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        hit = addresses[np.broadcast_to(mask.data.astype(bool), addresses.shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if len(hit):
            in_order = (hit[1:] > hit[:-1]).all()  # most are, and sorting is most of the time
            trace.touches.append((trace.program, write, hit if in_order else np.unique(hit), size))

    def recorded_load(self, pointers, mask, *rest):
        note(False, pointers, mask)
        return load(self, pointers, mask, *rest)

    def recorded_store(self, pointers, value, mask, *rest):
        note(True, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def recorded_rmw(self, op, pointers, value, mask, *rest):
        note(False, pointers, mask)
        note(True, pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def counted_idx(self, x, y, z):
        trace.program += 1
        return set_idx(self, x, y, z)

    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    builder.create_atomic_rmw, builder.set_grid_idx = recorded_rmw, counted_idx
    try:
        yield trace
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.set_grid_idx = rmw, set_idx


@contextmanager
def program_order(order: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of every launch inside in this order: forward, reverse or shuffled."""
    set_idx = InterpreterBuilder.set_grid_idx

    def reordered(self, x, y, z):
        nx, ny, nz = self.grid_dim
        linear, total = (x * ny + y) * nz + z, nx * ny * nz
        if order == "reverse":
            linear = total - 1 - linear
        elif order == "shuffled":
            linear = int(np.random.default_rng(seed).permutation(total)[linear])
        return set_idx(self, linear // (ny * nz), linear // nz % ny, linear % nz)

    InterpreterBuilder.set_grid_idx = reordered
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_idx


def poison(*tensors: torch.Tensor) -> None:
    """Fill outputs with NaN, or -1 where they are integers."""
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -1)


def run_in_every_order(
    launch: Callable[[], None],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor] = (),
) -> Trace:
    """Run ``launch`` with its programs forward, reversed and shuffled: the same bits, and only touches it may make.

    Args:
        outputs: poisoned before each run; all their elements have to be written, and not by two programs.
        shared: what programs hand to each other (partials, counters, rows whose statistics the last to arrive makes);
            those among ``outputs`` are compared too, the others are left as they are.
    """
    results = []
    for order in ORDERS:
        poison(*outputs)
        with recording() as trace, program_order(order):
            launch()
        trace.check([*outputs, *inputs], shared)
        results.append([output.clone() for output in outputs])
    for output in results[0]:
        assert not output.dtype.is_floating_point or not output.isnan().any(), "an element was not written, or is NaN"
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), "the order of programs shows"
    return trace


def assert_as_good_as_torch(ours: torch.Tensor, oracle: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> None:
    """The tolerance rule: our largest error against float64 is at most twice that of plain PyTorch in the precision.

    Args:
        floor: error that is allowed in any case, for outputs where PyTorch happens to be exact.
    """
    our_error = (ours.double() - oracle).abs().max().item()
    their_error = (theirs.double() - oracle).abs().max().item()
    limit = max(2 * their_error, floor)
    assert our_error <= limit, f"error {our_error:.3e}, PyTorch's is {their_error:.3e}"
