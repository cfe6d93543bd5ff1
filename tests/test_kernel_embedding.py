"""Embedding against torch: gather, position add, the first LayerNorm's statistics."""

import kernel_harness as harness
import numpy as np
import pytest
import torch

from kernels.embedding import cost, embedding

EPS = 1e-5


def make(rows: int, width: int, dtype: torch.dtype, vocab: int = 50, context: int = 20) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(rows * 1000 + width)
    integers = lambda high: torch.from_numpy(rng.integers(0, high, rows).astype(np.int32))  # noqa: E731
    previous = torch.full((rows,), -1, dtype=torch.int32)
    previous[::3] = integers(7)[::3]
    return {
        "token_ids": harness.guarded_like(integers(vocab)),
        "previous_rows": harness.guarded_like(previous),
        "drawn_ids": harness.guarded_like(torch.from_numpy(rng.integers(0, vocab, 7).astype(np.int32))),
        "positions": harness.guarded_like(integers(context)),
        "tok": harness.guarded_like(torch.from_numpy(rng.normal(size=(vocab, width))), dtype),
        "pos": harness.guarded_like(torch.from_numpy(rng.normal(size=(context, width))), dtype),
    }


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 37), (9, 64), (3, 768), (17, 1023)])
def test_embedding(rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = make(rows, width, dtype)
    x = harness.guarded([rows, width], torch.float32)
    mean, rstd = harness.guarded([rows], torch.float32), harness.guarded([rows], torch.float32)
    harness.run_in_every_order(
        lambda: embedding(**inputs, x=x, mean=mean, rstd=rstd, eps=EPS), [x, mean, rstd], list(inputs.values())
    )
    previous = inputs["previous_rows"].long()
    ids = torch.where(previous >= 0, inputs["drawn_ids"].long()[previous.clamp(min=0)], inputs["token_ids"].long())
    expected = inputs["tok"].float()[ids] + inputs["pos"].float()[inputs["positions"].long()]
    assert harness.same_bits(x, expected)
    wide = expected.double()
    variance = wide.var(dim=1, correction=0)
    torch.testing.assert_close(mean.double(), wide.mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=2e-6, atol=0)


def test_cost_is_what_is_touched() -> None:
    rows, width = 5, 768
    inputs = make(rows, width, torch.bfloat16)
    inputs["previous_rows"].fill_(-1)
    x = torch.empty(rows, width)
    mean, rstd = torch.empty(rows), torch.empty(rows)
    with harness.recording() as trace:
        embedding(**inputs, x=x, mean=mean, rstd=rstd, eps=EPS)
    expected = cost(rows, width, 2, len(inputs["token_ids"].unique()), len(inputs["positions"].unique()))
    assert trace.bytes(False, inputs["tok"], inputs["pos"]) == expected.weights
    assert trace.bytes(True) == expected.writes
    assert trace.bytes(False) == pytest.approx(expected.weights + expected.reads, rel=0.02)
    assert trace.sectors(inputs["tok"]) <= 1.1
