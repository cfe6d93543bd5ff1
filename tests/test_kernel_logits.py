"""The head on chosen rows, against float64."""

from pathlib import Path

import kernel_harness as harness
import pytest
import torch
import torch.nn.functional as F

from kernels.logits import cost, logits
from kernels.weights import pack, unpack


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize(
    ("total", "row_ids", "vocab", "width"),
    [(1, [0], 37, 37), pytest.param(9, [8, 0, 3, 3], 97, 100, marks=pytest.mark.versions)],
)
def test_logits(total: int, row_ids: list[int], vocab: int, width: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(total)
    x = harness.guarded_like(torch.randn(total, width), dtype)
    weights = pack(torch.randn(vocab, width) / width**0.5, dtype, kind)
    ids = harness.guarded_like(torch.tensor(row_ids, dtype=torch.int32))
    y = harness.guarded([len(row_ids), vocab], torch.float32)
    scales = [] if weights.scales is None else [weights.scales]
    harness.run_in_every_order(lambda: logits(x, weights, ids, y), [y], [x, weights.data, *scales, ids])
    w = unpack(weights)
    oracle = F.linear(x.double()[ids.long()], w.double())
    theirs = F.linear(x[ids.long()], w.to(dtype))
    harness.assert_as_good_as_torch(y, oracle, theirs, floor=2e-6 * oracle.abs().max().item())


def test_a_wide_model() -> None:
    """Odd sizes of GPT-2's order: 1023 entries, 768 columns, and the other way round."""
    torch.manual_seed(0)
    for vocab, width in ((1023, 768), (768, 1023)):
        x, weights = torch.randn(2, width).bfloat16(), pack(torch.randn(vocab, width) / width**0.5, torch.bfloat16)
        y = torch.full((2, vocab), torch.nan)
        logits(x, weights, torch.tensor([1, 0], dtype=torch.int32), y)
        oracle = F.linear(x.double()[[1, 0]], unpack(weights).double())
        torch.testing.assert_close(y.double(), oracle, rtol=0, atol=1e-5)


def test_rows_past_2_to_the_31(tmp_path: Path) -> None:
    x, weights = harness.far_rows(torch.randn(3, 70), tmp_path), pack(torch.randn(80, 70), torch.float32)
    y = harness.far_rows(torch.zeros(3, 80), tmp_path)
    logits(x, weights, torch.tensor([2, 0, 1], dtype=torch.int32), y)
    expected = F.linear(x.double()[[2, 0, 1]], unpack(weights).double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(70, 200).to(dtype), pack(torch.randn(70, 200), dtype)
    whole = torch.empty(70, 70)
    logits(x, weights, torch.arange(70, dtype=torch.int32), whole)
    for row_ids in ([3], [69, 3], [*range(20)]):
        y = torch.empty(len(row_ids), 70)
        logits(x, weights, torch.tensor(row_ids, dtype=torch.int32), y)
        assert harness.same_bits(y, whole[row_ids])


def test_cost_is_what_is_touched() -> None:
    x, weights = torch.randn(20, 256).bfloat16(), pack(torch.randn(150, 256), torch.bfloat16)
    y = torch.empty(3, 150)
    with harness.recording() as trace:
        logits(x, weights, torch.tensor([1, 5, 19], dtype=torch.int32), y)
    expected = cost(3, weights, 2)
    assert trace.bytes(False) == pytest.approx(expected.weights + expected.reads, rel=0.02)
    assert trace.bytes(True) == expected.writes
    assert trace.sectors(weights.data) <= 1.1
