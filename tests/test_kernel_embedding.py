"""Embedding against torch: gather, position add, the first LayerNorm."""

from pathlib import Path

import kernel_harness as harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

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
        "pos": harness.guarded_like(torch.from_numpy(rng.normal(size=(context, width))), dtype, gap=11),
        "weight": harness.guarded_like(torch.from_numpy(rng.normal(size=width)), dtype),
        "bias": harness.guarded_like(torch.from_numpy(rng.normal(size=width)), dtype),
    }


def expected_rows(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    previous = inputs["previous_rows"].long()
    ids = torch.where(previous >= 0, inputs["drawn_ids"].long()[previous.clamp(min=0)], inputs["token_ids"].long())
    return inputs["tok"].float()[ids] + inputs["pos"].float()[inputs["positions"].long()]


def assert_normed(normed: torch.Tensor, x: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    weight, bias, width = inputs["weight"], inputs["bias"], x.shape[1:]
    exact = F.layer_norm(x.double(), width, weight.double(), bias.double(), EPS)
    plain = F.layer_norm(x, width, weight.float(), bias.float(), EPS).to(normed.dtype)
    floor = (torch.finfo(normed.dtype).eps / 2 + 4e-7) * exact.abs().max().item()
    harness.assert_as_good_as_torch(normed, exact, plain, floor)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (1, 37), (9, 64), pytest.param(3, 768, marks=pytest.mark.versions), (17, 1023)]
)
def test_embedding(rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = make(rows, width, dtype)
    x, normed = harness.guarded([rows, width], torch.float32), harness.guarded([rows, width], dtype, gap=3)
    harness.run_in_every_order(
        lambda: embedding(**inputs, x=x, normed=normed, eps=EPS), [x, normed], list(inputs.values())
    )
    assert harness.same_bits(x, expected_rows(inputs))
    assert_normed(normed, x, inputs)


def test_rows_past_2_to_the_31(tmp_path: Path) -> None:
    inputs = make(3, 37, torch.float16, vocab=3, context=3)
    inputs |= {name: harness.far_rows(inputs[name], tmp_path) for name in ("tok", "pos")}
    inputs["previous_rows"].fill_(-1)
    inputs["token_ids"].copy_(torch.tensor([2, 1, 0])), inputs["positions"].copy_(torch.tensor([0, 2, 2]))
    x, normed = (harness.far_rows(torch.zeros(3, 37, dtype=d), tmp_path) for d in (torch.float32, torch.float16))
    embedding(**inputs, x=x, normed=normed, eps=EPS)
    assert harness.same_bits(x, inputs["tok"].float()[[2, 1, 0]] + inputs["pos"].float()[[0, 2, 2]])
    assert_normed(normed, x, inputs)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 600), st.sampled_from(harness.DTYPES))
def test_any_shape(rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = make(rows, width, dtype)
    x, normed = torch.full((rows, width), torch.nan), torch.full((rows, width), torch.nan, dtype=dtype)
    embedding(**inputs, x=x, normed=normed, eps=EPS)
    assert harness.same_bits(x, expected_rows(inputs))
    assert_normed(normed, x, inputs)


def test_cost_is_what_is_touched() -> None:
    rows, width = 5, 768
    inputs = make(rows, width, torch.bfloat16)
    inputs["previous_rows"].fill_(-1)
    x, normed = torch.empty(rows, width), torch.empty(rows, width, dtype=torch.bfloat16)
    with harness.recording() as trace:
        embedding(**inputs, x=x, normed=normed, eps=EPS)
    expected = cost(rows, width, 2, len(inputs["token_ids"].unique()), len(inputs["positions"].unique()))
    assert trace.bytes(False, *(inputs[n] for n in ("tok", "pos", "weight", "bias"))) == expected.weights
    assert trace.bytes(True) == expected.writes
    assert trace.bytes_from_before() == expected.weights + expected.reads
    assert trace.traffic() == expected.total_bytes + sum(expected.rereads.values())
    assert trace.sectors(inputs["tok"]) <= 1.1
