"""LayerNorm against float64."""

from pathlib import Path

import kernel_harness as harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layer_norm import cost, layer_norm

EPS = 1e-5


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), pytest.param(3, 37, marks=pytest.mark.versions), (9, 768), (2, 1023), (1, 3000), (1, 8192)],
)
def test_layer_norm(rows: int, width: int, has_residual: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x = harness.guarded_like(torch.randn(rows, width) * 3 + 5, dtype)
    residual = harness.guarded_like(torch.randn(rows, width), dtype, gap=13)
    weight, bias = harness.guarded_like(torch.randn(width), dtype), harness.guarded_like(torch.randn(width), dtype)
    y = harness.guarded([rows, width], dtype, gap=7)
    total = harness.guarded([rows, width], torch.float32, gap=19)
    extra = (residual, total) if has_residual else (None, None)
    outputs = [y, total] if has_residual else [y]
    harness.run_in_every_order(
        lambda: layer_norm(x, weight, bias, y, EPS, *extra), outputs, [x, residual, weight, bias]
    )
    wide = x.double() + residual.double() if has_residual else x.double()
    oracle = torch.nn.functional.layer_norm(wide, (width,), weight.double(), bias.double(), EPS)
    theirs = torch.nn.functional.layer_norm(x + residual if has_residual else x, (width,), weight, bias, EPS)
    harness.assert_as_good_as_torch(y, oracle, theirs, floor=2 * torch.finfo(dtype).eps * oracle.abs().max().item())
    if has_residual:
        assert harness.same_bits(total, x.float() + residual.float())


def test_statistics_survive_a_large_mean() -> None:
    """E[x^2] - E[x]^2 would give a variance of 0 or less here."""
    x = torch.randn(4, 768) + 1e4
    y = torch.empty(4, 768)
    layer_norm(x, torch.ones(768), torch.zeros(768), y, EPS)
    oracle = torch.nn.functional.layer_norm(x.double(), (768,), eps=EPS)
    assert (y.double() - oracle).abs().max() < 1e-2


@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_has_the_same_bits_in_any_batch(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(16, 300), torch.randn(300), torch.randn(300)
    whole, part = torch.empty(16, 300), torch.empty(rows, 300)
    layer_norm(x, weight, bias, whole, EPS)
    layer_norm(x[7 : 7 + rows], weight, bias, part, EPS)
    assert harness.same_bits(part, whole[7 : 7 + rows])


def test_rows_past_2_to_the_31(tmp_path: Path) -> None:
    x, residual = (harness.far_rows(torch.randn(3, 37).half(), tmp_path) for _ in range(2))
    y, total = harness.far_rows(torch.zeros(3, 37).half(), tmp_path), harness.far_rows(torch.zeros(3, 37), tmp_path)
    weight, bias = torch.ones(37).half(), torch.zeros(37).half()
    for extra, wide in ((), x), ((residual, total), x.float() + residual.float()):
        layer_norm(x, weight, bias, y, EPS, *extra)
        expected = torch.nn.functional.layer_norm(wide.double(), (37,), eps=EPS)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)
    assert harness.same_bits(total, x.float() + residual.float())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 600), st.sampled_from(harness.DTYPES))
def test_any_shape(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y, one, zero = torch.full((rows, width), torch.nan), torch.ones(width), torch.zeros(width)
    layer_norm(x, one, zero, y, EPS)
    oracle = torch.nn.functional.layer_norm(x.double(), (width,), eps=EPS)
    torch.testing.assert_close(y.double(), oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_residual", [False, True])
def test_cost_is_what_is_touched(has_residual: bool) -> None:
    x, residual, weight, bias, y = (
        torch.randn(shape).bfloat16() for shape in ((9, 768),) * 2 + ((768,),) * 2 + ((9, 768),)
    )
    total = torch.empty(9, 768)
    with harness.recording() as trace:
        layer_norm(x, weight, bias, y, EPS, *((residual, total) if has_residual else (None, None)))
    expected = cost(9, 768, 2, has_residual)
    assert trace.bytes(False, weight, bias) == expected.weights
    assert trace.bytes_from_before() == expected.weights + expected.reads
    assert trace.bytes(True) == expected.writes
    assert trace.traffic() == expected.total_bytes + sum(expected.rereads.values())


def test_refuses() -> None:
    x = torch.zeros(1, 8193)
    with pytest.raises(ValueError, match="8193"):
        layer_norm(x, x[0], x[0], x, EPS)
    with pytest.raises(ValueError, match="together"):
        layer_norm(x[:, :8], x[0, :8], x[0, :8], x[:, :8], EPS, residual=x[:, :8])
