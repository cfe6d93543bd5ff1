"""The correction of Triton's interpreter: exact with it, wrong without it."""

import re
import subprocess
import sys
from pathlib import Path

import kernel_harness as harness
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels import interpreter

pytestmark = pytest.mark.versions


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    c = tl.dot(a, b, tl.zeros([M, N], tl.float32), input_precision="ieee")
    tl.store(c_ptr + m * N + n, c.to(c_ptr.dtype.element_ty))


def matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    _matmul_kernel[(1,)](a, b, c, a.shape[0], b.shape[1], a.shape[1])
    return c


@pytest.fixture
def plain_triton():
    interpreter.uninstall()
    yield
    interpreter.install()


def operands(dtype: torch.dtype, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 64).to(dtype), torch.randn(64, 32).to(dtype)


def test_bf16_dot_and_store_are_the_rounded_exact_product() -> None:
    a, b = operands(torch.bfloat16)
    exact = (a.double() @ b.double()).float().bfloat16()
    assert torch.equal(matmul(a, b, torch.bfloat16), exact)


def test_sums_are_rounded_to_float32_after_every_sixteen_products() -> None:
    """As the tensor cores add, nearly: not once at the end, which would be more exact than any GPU."""
    a, b = operands(torch.bfloat16)
    total = torch.zeros(16, 32)
    for k in range(0, 64, 16):
        total = (total.double() + a[:, k : k + 16].double() @ b[k : k + 16].double()).float()
    assert harness.same_bits(matmul(a, b, torch.float32), total)
    assert not harness.same_bits((a.double() @ b.double()).float(), total)


def test_plain_triton_is_wrong_in_bf16(plain_triton: None) -> None:
    """The day this fails, Triton is mended and the correction can go."""
    a, b = operands(torch.bfloat16)
    exact = a.double() @ b.double()
    assert (matmul(a, b, torch.float32).double() - exact).abs().max() > 1e3


def test_plain_triton_truncates_to_bf16(plain_triton: None) -> None:
    """The day this fails, the corrected casts can go."""
    a = torch.full((16, 16), 1.0 + 2**-8 + 2**-9)
    assert torch.equal(matmul(a, torch.eye(16), torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_row_has_the_same_bits_in_any_tile(dtype: torch.dtype) -> None:
    a, b = operands(dtype, rows=64)
    whole = matmul(a, b, torch.float32)
    for rows in (1, 2, 4, 16):
        assert harness.same_bits(matmul(a[:rows].contiguous(), b, torch.float32), whole[:rows])
    assert harness.same_bits(matmul(a, b[:, :8].contiguous(), torch.float32), whole[:, :8].contiguous())


def test_casts_round_to_nearest_even_for_every_bf16_and_its_neighbours() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    exact = interpreter.bf16_to_float32(bits)
    finite = np.isfinite(exact)
    assert np.array_equal(interpreter.float32_to_bf16(exact)[finite], bits[finite])
    low = bits.astype(np.uint32) << 16
    for below in (0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (low + below).view(np.float32)
        ours = interpreter.bf16_to_float32(interpreter.float32_to_bf16(values))
        torchs = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        assert np.array_equal(ours, torchs, equal_nan=True)


@triton.jit
def _loop_kernel(bounds_ptr, out_ptr):
    total = 0
    for i in range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1), 2):
        total += i
    tl.store(out_ptr, total)


def test_a_loop_may_have_loaded_bounds() -> None:
    """Triton 3.6 raises here with NumPy 2.4. The day 3.6 is no longer admitted, ``_with_index`` can go."""
    out = torch.empty(1, dtype=torch.int32)
    _loop_kernel[(1,)](torch.tensor([3, 8], dtype=torch.int32), out)
    assert out.item() == 3 + 5 + 7


def test_compiled_triton_is_refused() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import triton\nfrom kernels import interpreter\n"
        "try:\n    interpreter.install()\nexcept ValueError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "set TRITON_INTERPRET=1 before anything imports triton" in out


def test_the_ends_of_the_admitted_versions_are_tested() -> None:
    """``make test-versions`` takes the oldest that setup.py admits, and one of the newest minor version."""
    root = Path(__file__).parent.parent
    oldest, below = re.search(r"triton>=([\d.]+),<3\.(\d+)", (root / "setup.py").read_text()).groups()
    tested = re.search(r"^TRITONS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert tested[0] == oldest
    assert tested[-1].startswith(f"3.{int(below) - 1}.")
