"""One linear layer of the native backend by itself: every size and tile, the exactness of int8, activations, bits."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native_steps import ISAS, _native

GROUPS = {"int4": 32, "int4-g64": 64, "int4-g128": 128}  # weights that share a scale
STORAGE = {name: code for code, name in enumerate(("float32", "bfloat16", "int8", *GROUPS))}


def linear(
    x: np.ndarray, w: np.ndarray, dtype: str, isa: str, activation: str = "none", threads: int = 1
) -> np.ndarray:
    bias = np.linspace(-1, 1, len(w), dtype=np.float32) if activation != "none" else np.zeros(len(w), np.float32)
    y: np.ndarray = _native.linear(x, w, bias, isa, threads, STORAGE[dtype], activation)
    return y


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def as_bf16(x: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = torch.from_numpy(x).bfloat16().float().numpy()
    return rounded


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_width(dtype: str, isa: str) -> None:
    """k and n from 1 to past two panels, in float64 within the bound of a sum of k products taken in order."""
    for size in range(1, 102):
        x, w = as_bf16(uniform(size, 3, size)), as_bf16(uniform(size + 500, 103 - size, size))
        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        bound = size * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)) + 1e-30
        assert (np.abs(linear(x, w, dtype, isa) - exact) <= bound).all(), size


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_rows_are_the_same_in_every_tile(dtype: str, isa: str) -> None:
    """1 to 20 rows, and 600, past the row block; k past the blocks, and outputs past the groups, of the caches."""
    for k in (5, 1000):
        x, w = uniform(1, 600, k), uniform(2, 253, k)
        whole = linear(x, w, dtype, isa)
        for rows in (*range(1, 21), 31, 32, 33, 512, 513):
            assert np.array_equal(linear(x[:rows], w, dtype, isa, threads=2), whole[:rows]), (k, rows)
        assert np.array_equal(linear(x[577:], w, dtype, isa), whole[577:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 32, 40])
def test_int8_sums_are_exact(rows: int, isa: str) -> None:
    """Integers up to +-127 with a scale of 1 on both sides: the result is the integer sum, extremes included."""
    generator = np.random.default_rng(rows)
    for k in (1, 2, 3, 4, 5, 31, 33, 255, 1001):
        x = generator.integers(-127, 128, (rows, k)).astype(np.float32)
        w = generator.integers(-127, 128, (50, k)).astype(np.float32)
        x[:, 0], w[:, 0] = 127, -127  # the largest magnitude makes the scale 1
        w[0], w[1], w[2, 1:] = 127, -127, 0
        x[0] = 127  # every product is the largest that there is
        exact = x.astype(np.int64) @ w.T.astype(np.int64)
        assert np.array_equal(linear(x, w, "int8", isa), exact.astype(np.float32)), k


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", GROUPS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11, 13, 23, 25, 40])
def test_int4_sums_are_exact(rows: int, dtype: str, isa: str) -> None:
    """Weights -8..7 with a -8 in every group, so that the scale is 1: integer sums again, extremes included."""
    generator = np.random.default_rng(rows)
    for k in (1, 8, 31, 32, 33, 64, 65, 128, 255, 801):
        x = generator.integers(-127, 128, (rows, k)).astype(np.float32)
        w = generator.integers(-8, 8, (50, k)).astype(np.float32)
        x[:, 0] = 127
        w[0], w[1] = -8, 7
        w[:, :: GROUPS[dtype]] = -8
        x[0] = -127
        exact = x.astype(np.int64) @ w.T.astype(np.int64)
        assert np.array_equal(linear(x, w, dtype, isa), exact.astype(np.float32)), k


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_a_row_has_the_same_bits_among_any_number(dtype: str, isa: str) -> None:
    """Every number of rows up to two tiles and more: whatever cuts it into tiles leaves none out."""
    x, w = uniform(1, 45, 200), uniform(2, 60, 200)
    alone = np.concatenate([linear(x[row : row + 1], w, dtype, isa) for row in range(len(x))])
    for rows in range(2, len(x) + 1):
        assert np.array_equal(linear(x[:rows], w, dtype, isa), alone[:rows]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", GROUPS)
def test_int4_weights_are_near(dtype: str, isa: str) -> None:
    """Read back with unit vectors. The error of a group is that of nibbles whose last place is its largest magnitude,
    and of a scale that is a multiple of a sixteenth of the largest; where that lessens it, the extreme is cut."""
    group = GROUPS[dtype]
    for spread in ([1.0, 1.0, 1.0], [1.0, 100.0, 0.01], [1.0, 3.0, 0.2], [1.0, -0.05, 0.6]):
        w = uniform(8, 45, 3 * group) * np.repeat(spread, group).astype(np.float32)
        errors = linear(np.eye(3 * group, dtype=np.float32), w, dtype, isa).T - w
        assert np.sqrt((errors**2).mean() / (w**2).mean()) < 0.07
        errors, largest = errors.reshape(45, 3, group), np.abs(w).reshape(45, 3, group).max(2, keepdims=True)
        step = largest.max(1, keepdims=True) / (7 * 16)
        assert (np.sqrt((errors**2).mean(2, keepdims=True)) <= 0.36 * (largest / 8 + step)).all(), spread
        assert (np.abs(errors) <= np.maximum(1.6 * largest / 8, step)).all(), spread


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 9])
def test_int8_error_is_the_quantisation(rows: int, isa: str) -> None:
    """Equal to the sum of the rounded operands in float64, times both scales."""
    x, w = uniform(3, rows, 333), uniform(4, 70, 333)
    scale_x = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scale_w = np.abs(w).max(1, keepdims=True) / np.float32(127)
    exact = (np.rint(x * (1 / scale_x)) @ np.rint(w * (1 / scale_w)).T).astype(np.float64) * scale_x * scale_w.T
    assert np.allclose(linear(x, w, "int8", isa), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_activations(activation: str, isa: str) -> None:
    ends = [-1e20, -1e4, 1e4, 1e20, 1e-30, 0, -1e-3]
    x = np.concatenate([np.linspace(-30, 30, 6001), ends]).astype(np.float32)[:, None]
    got = torch.from_numpy(linear(x, np.ones((3, 1), np.float32), "float32", isa, activation))
    z = torch.from_numpy(x).double() + torch.linspace(-1, 1, 3).double()
    wanted = {
        "gelu_tanh": lambda: F.gelu(z, approximate="tanh"),
        "gelu": lambda: F.gelu(z),
        "relu": lambda: F.relu(z),
        "silu": lambda: F.silu(z),
    }[activation]()
    assert ((got - wanted).abs() <= 1e-6 + 1e-6 * wanted.abs()).all()


@pytest.mark.parametrize("isa", ISAS)
def test_exponentials_relative_error(isa: str) -> None:
    """By silu, which is z e^z where z is far below zero: two units in the last place, as far down as e^-80."""
    x = (np.arange(-80 * 64, 10 * 64, dtype=np.float32) / 64)[:, None]  # with a bias of -1, 0 or 1 exact
    z = x.astype(np.float64) + np.linspace(-1, 1, 3)
    wanted = z / (1 + np.exp(-z))
    got = linear(x, np.ones((3, 1), np.float32), "float32", isa, "silu")
    assert (np.abs(got - wanted) <= 2.4e-7 * np.abs(wanted)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_nan_and_infinity_come_through(dtype: str, isa: str) -> None:
    for activation in ("none", "gelu_tanh", "gelu", "relu", "silu"):
        for bad in (np.nan, np.inf, *np.array([0x7FC00101, 0xFFFFFFFF], np.uint32).view(np.float32)):
            for rows in (1, 2, 9):
                x, w = uniform(5, rows, 40), uniform(6, 30, 40)
                x[0, 7] = bad
                y = linear(x, w, dtype, isa, activation)
                assert not np.isfinite(y[0]).any() or (bad == np.inf and not np.isnan(y[0]).all())
                assert np.isfinite(y[1:]).all()
                w[3, 5] = bad
                assert not np.isfinite(linear(uniform(5, rows, 40), w, dtype, isa)[:, 3]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_weights_at_the_ends_of_float32(isa: str) -> None:
    """int4 takes the squares of its errors, int8 the inverse of its step: what these cannot hold is NaN, or nothing."""
    x, w = uniform(5, 3, 64), uniform(6, 30, 64)
    exact = x @ w.T
    for dtype in STORAGE:
        for scale in (1e-30, 1e14, 1e21, 1e30):
            y = linear(x, w * np.float32(scale), dtype, isa) / np.float32(scale)
            if scale > 1e15 and dtype.startswith("int4"):
                assert np.isnan(y).all()
            else:
                assert np.abs(y - exact).max() < (1.5 if dtype.startswith("int4") else 0.2)
    assert np.abs(linear(x, w * np.float32(1e-37), "int8", isa)).max() < 1e-35


@pytest.mark.parametrize("isa", ISAS)
def test_activations_far_out(isa: str) -> None:
    x = np.array([[-2e38], [-1e4], [1e4], [2e38]], np.float32)
    for activation in ("silu", "gelu_tanh", "gelu"):
        got = linear(x, np.ones((1, 1), np.float32), "float32", isa, activation)[:, 0]
        assert np.array_equal(got, np.maximum(x[:, 0] - 1, 0)), activation


# A whole vector to or from the stack; vmovd and vmovq move an address that has lodged in a vector register.
VECTOR_ON_STACK = re.compile(r"\sv(?!mov[dq]\s)\S+\s+(?:.*%[xyz]mm\d+.*\(%r[sb]p|.*\(%r[sb]p.*%[xyz]mm\d+)")


@pytest.fixture(scope="module")
def functions() -> list[str]:
    """The machine code of every function of the extension, its name first."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-dC", "--no-show-raw-insn", _native.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")


def compiled(functions: list[str], name: str) -> list[str]:
    """Those that x86's vector instruction sets have under a name."""
    of_name = re.compile(rf"[0-9a-f]+ <(?:void )?native::(?:avx\w+|amx)::(?:{name})")
    found = [function for function in functions if of_name.match(function)]
    if not found:
        pytest.skip("the extension has no symbols of its kernels: stripped, or not x86")
    vectors = {"avx2", "avx512", "avx512_vnni", "avx512_bf16"}  # and those that a compiler may not have
    assert {isa for isa in vectors if any(f"native::{isa}::" in function for function in found)} == vectors
    return found


def test_tiles_keep_their_sums_in_registers(functions: list[str]) -> None:
    """No tile of a vector instruction set moves a vector to or from the stack, those that cannot run here included.

    The largest tiles of groups do, with 16 registers or without VNNI: faster than fewer rows all the same."""
    tiles = compiled(functions, "(?:widening_|group_)?tile<")
    few = re.compile(r"native::(?:avx2\w*::group_tile<.*, [456]>|avx512::group_tile<.*, 12>)")
    spilling = [tile.splitlines()[0] for tile in tiles if VECTOR_ON_STACK.search(tile)]
    spilling = [name for name in spilling if not few.search(name)]
    assert spilling == []


VECTOR_TO_STACK = re.compile(r"\svmov\S+\s+%[yz]mm\d+,.*\(%r[sb]p")


def test_attention_keeps_its_sums_in_registers(functions: list[str]) -> None:
    """One sum on the stack makes every token wait for the one before; single values may go there."""
    attention = compiled(functions, r"attend(?:_dots)?<")
    spilling = [code.splitlines()[0] for code in attention if VECTOR_TO_STACK.search(code)]
    assert spilling == []


def test_what_streams_is_fetched(functions: list[str]) -> None:
    """A compiler may drop a call that does nothing but fetch, as GCC 12 did: the same results, later."""
    streaming = r"tile<[^(]*, [12]>\(|group_tile<|tile_sums<[^(]*Fetch\)[12]>\("
    streaming += r"|pair_sums<|write_cache\(|attend_one\(|attend_dots<1>"
    without = [code.splitlines()[0] for code in compiled(functions, streaming) if "prefetch" not in code]
    assert without == []


def test_the_register_test_can_fail() -> None:
    """The negative control: what GCC 12 writes when it runs out of registers."""
    assert VECTOR_ON_STACK.search("  2bf7: vfmadd213ps -0x18(%rsp),%ymm5,%ymm2")
    assert VECTOR_ON_STACK.search("  2b29: vmovaps %ymm7,-0x38(%rsp)")
    assert not VECTOR_ON_STACK.search("  2adb: vmovups 0x140(%r8),%ymm7")
    assert not VECTOR_ON_STACK.search("  2adb: vmovq  %xmm24,-0x30(%rsp)")
    assert VECTOR_TO_STACK.search("  72c00: vmovaps %ymm7,0x180(%rsp)")
    assert not VECTOR_TO_STACK.search("  72bdd: vmovdqa %xmm7,0x180(%rsp)")
    assert not VECTOR_TO_STACK.search("  72fa0: vpbroadcastq 0x170(%rsp),%ymm3")


def bf16_of(bits: np.ndarray) -> np.ndarray:
    """Floats of bf16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def coded_weights(seed: int, n: int, k: int) -> np.ndarray:
    """Normally distributed, and some of every exponent that is rare: few enough for twelve bits each."""
    generator = np.random.default_rng(seed)
    w = as_bf16(generator.normal(0, 0.02, (n, k)).astype(np.float32))
    for panel in range(0, n, 48):
        for _ in range(6):
            lane, column = panel + generator.integers(min(48, n - panel)), generator.integers(k)
            w[lane, column] = bf16_of(generator.integers(1, 200, 1) << 7 | generator.integers(128, size=1))[0]
    return w


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_weights_are_kept(isa: str) -> None:
    """Read back with unit vectors, by one tile and by many: all that are not denormal, whatever their exponents."""
    for k in (8, 40, 72, 400, 777):
        for wild in (False, True):  # exponents of every size: too many for codes
            w = coded_weights(k, 101, k)
            w[0, 0], w[50, k - 1], w[100, k // 2], w[3, 3] = 0.0, -0.0, 2.0**100, -(2.0**-100)
            if wild:
                bits = np.random.default_rng(k).integers(0, 2**16, (101, k))
                w = bf16_of(np.where(bits >> 7 & 255 == 255, bits & 0xBFFF, bits))
            w[np.abs(w) < 2.0**-126] = 0
            for rows in (1, 8, 40):
                for first in range(0, k, max(rows, k // 7)):
                    x = np.eye(rows, k, first, dtype=np.float32)
                    found = linear(x, w, "bfloat16", isa)
                    wanted = np.zeros((rows, 101), np.float32)
                    count = min(rows, k - first)
                    wanted[:count] = w.T[first : first + count]
                    assert np.array_equal(found, wanted), (k, wild, rows, first)


@pytest.mark.parametrize("isa", ISAS)
def test_coding_changes_no_bits(isa: str) -> None:
    """The same outputs in a matrix with others that cannot be coded, which takes two bytes a weight."""
    n, k = 149, 900
    w = coded_weights(5, n, k)
    wild = bf16_of(np.random.default_rng(6).integers(1 << 7, 250 << 7, (48, k)))
    x = uniform(7, 40, k)
    for rows in (1, 2, 5, 8, 9, 16, 40):
        coded = linear(x[:rows], w, "bfloat16", isa)
        plain = linear(x[:rows], np.concatenate([w, wild]), "bfloat16", isa)
        assert np.array_equal(coded, plain[:, :n]), rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bfloat16_weight_that_is_no_number(value: float, isa: str) -> None:
    """Its output is none, in every row that has something for it, and the others are what they were."""
    w, x = coded_weights(9, 60, 64), uniform(8, 12, 64)
    usual = linear(x, w, "bfloat16", isa)
    w[33, 9] = value
    for rows in (1, 12):
        found = linear(x[:rows], w, "bfloat16", isa)
        assert not np.isfinite(found[:, 33]).any()
        others = np.arange(60) != 33
        assert np.array_equal(found[:, others], usual[:rows, others])
