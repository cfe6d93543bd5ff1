"""The harness itself can fail: what it is to see in a kernel, on kernels that do just that."""

from collections.abc import Callable

import kernel_harness as harness
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.versions


@triton.jit
def _neighbour_kernel(x_ptr, y_ptr, SHIFT: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(x_ptr + pid + SHIFT) + 1.0)


@triton.jit
def _count_kernel(counter_ptr, y_ptr):
    """Writes when each program came: the order of programs shows."""
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.atomic_add(counter_ptr, 1))


@triton.jit
def _strided_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(y_ptr + at, tl.load(x_ptr + at * STRIDE))


def guarded_pair(fill: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return harness.guarded([4], torch.float32, 1.0), harness.guarded([4], torch.float32, fill)


def neighbour(x: torch.Tensor, y: torch.Tensor, shift: int, programs: int = 4) -> Callable[[], None]:
    return lambda: _neighbour_kernel[(programs,)](x, y, shift)


def test_a_kernel_that_keeps_to_its_own_passes() -> None:
    x, y = guarded_pair()
    harness.run_in_every_order(neighbour(x, y, 0), [y], [x])
    assert (y == 2).all()


def test_reads_out_of_bounds() -> None:
    x, y = guarded_pair()
    with pytest.raises(AssertionError, match="program 3 reads a place that is not its tensors', 1 in all"):
        harness.run_in_every_order(neighbour(x, y, 1), [y], [x])


def test_writes_out_of_bounds() -> None:
    x, y = guarded_pair()
    with pytest.raises(AssertionError, match="program 3 writes a place that is not its tensors', 1 in all"):
        harness.run_in_every_order(neighbour(x, y, 0), [y[:3]], [x])


@pytest.mark.parametrize("dtype", [*harness.DTYPES, torch.int32])
def test_guard_bands_are_poison(dtype: torch.dtype) -> None:
    """All round a tensor and between its rows, so that a stray read shows in the result, too."""
    x = harness.guarded([2, 3], dtype, 1.0, gap=5)
    around = x.as_strided([4, 8], [8, 1], x.storage_offset() - 8).clone()
    around[1:3, :3] = torch.nan if dtype.is_floating_point else -1
    assert bool(around.isnan().all() if dtype.is_floating_point else (around == -1).all())
    assert (x == 1).all()


def test_a_race() -> None:
    x = harness.guarded([5], torch.float32, 1.0)
    with harness.recording() as trace:
        neighbour(x, x, 1)()
    with pytest.raises(AssertionError, match="program 0 reads what program 1 wrote"):
        trace.check([x])
    trace.check([], [x])  # unless the kernel declares it


def test_two_writers() -> None:
    counter, y = harness.guarded([1], torch.int32, 0), harness.guarded([4], torch.int32)
    with harness.recording() as trace:
        _count_kernel[(4,)](counter, y)
    trace.check([y], [counter])
    with pytest.raises(AssertionError, match="program 1 reads what program 0 wrote"):
        trace.check([y, counter])


def test_an_output_that_is_not_written() -> None:
    """Nor one that held the right values before."""
    for fill in (None, 2.0):
        x, y = guarded_pair(fill)
        with pytest.raises(AssertionError, match="not written"):
            harness.run_in_every_order(neighbour(x, y, 0, programs=3), [y], [x])


@pytest.mark.parametrize("order", harness.ORDERS)
def test_orders(order: str) -> None:
    counter, y = torch.zeros(1, dtype=torch.int32), torch.empty(6, dtype=torch.int32)
    with harness.program_order(order):
        _count_kernel[(6,)](counter, y)
    came = y.tolist()
    assert sorted(came) == [*range(6)]
    assert (came == [*range(6)]) == (order == "forward")
    assert (came == [*reversed(range(6))]) == (order == "reverse")


def test_a_result_that_depends_on_the_order() -> None:
    counter, y = torch.zeros(1, dtype=torch.int32), torch.empty(6, dtype=torch.int32)

    def launch() -> None:
        counter.zero_()
        _count_kernel[(6,)](counter, y)

    with pytest.raises(AssertionError, match="the order of programs shows"):
        harness.run_in_every_order(launch, [y], [], [counter])


@pytest.mark.parametrize(("stride", "sectors"), [(1, 1), (2, 2), (8, 8)])
def test_bytes_and_sectors_are_counted(stride: int, sectors: int) -> None:
    """16 floats, read twice: 64 unique bytes, in 2, 4 or 16 sectors of 32."""
    at = np.empty(16 * stride + 8, np.float32)
    aligned = torch.from_numpy(at)[(-at.ctypes.data // 4) % 8 :]
    y = torch.empty(16)
    with harness.recording() as trace:
        _strided_kernel[(2,)](aligned, y, stride)
    assert trace.bytes(False) == trace.bytes(False, aligned) == trace.bytes(True) == 64
    assert trace.bytes(True, aligned) == 0
    assert trace.sectors(aligned) == sectors


def test_the_tolerance_rule() -> None:
    oracle = torch.zeros(3, dtype=torch.float64)
    harness.assert_as_good_as_torch(oracle + 2, oracle, oracle + 1)
    harness.assert_as_good_as_torch(oracle + 3, oracle, oracle + 1, floor=3.0)
    with pytest.raises(AssertionError, match=r"error 2\.100e\+00, PyTorch's is 1\.000e\+00"):
        harness.assert_as_good_as_torch(oracle + 2.1, oracle, oracle + 1)
