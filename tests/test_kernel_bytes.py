"""Bytes are counted, not claimed: the real launches of a step, run with every address recorded, against ``cost()``."""

from collections.abc import Sequence

import kernel_harness as harness
import pytest
import torch
from test_kernel_sampling import Row, options, outputs

from kernels.launches import MODELS, Launch, ModelShape, step_launches
from kernels.sampling import cost as sampling_cost
from kernels.sampling import sampling

SMALL = ModelShape(300, 256, 128, 2, 3, 512)
SPANS = {"decode": [(99, 1)] * 3, "prefill": [(0, 70)], "mixture": [(200, 3), (5, 40), (0, 1)]}


def counted(launch: Launch) -> harness.Trace:
    """Run one launch and hold its ``cost()`` against what it touched."""
    with harness.recording() as trace:
        launch.run()
    cost = launch.cost
    written = trace.bytes(True) - sum(trace.bytes(True, tensor) for tensor in launch.scratch)
    assert trace.bytes_from_before() == pytest.approx(cost.weights + cost.reads, rel=0.02), launch.name
    assert written == pytest.approx(cost.writes, rel=0.02), launch.name
    moved = cost.total_bytes + sum(cost.rereads.values())
    assert trace.traffic() == pytest.approx(moved, rel=0.02), f"{launch.name}: re-reads that are not declared"
    for tensor in launch.streamed:
        assert trace.sectors(tensor) <= 1.1, launch.name
    return trace


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_every_launch_moves_what_its_cost_says(spans: Sequence[tuple[int, int]], kind: str) -> None:
    launches = step_launches(SMALL, spans, torch.bfloat16, kind, "cpu")
    launches += step_launches(SMALL, spans, torch.bfloat16, kind, "cpu", fused=True)[-1:]
    assert {launch.name for launch in launches} == {
        "embedding", "qkv", "attention", "proj", "fc", "fc2", "logits", "sampling", "head_sample",
    }  # fmt: skip
    for launch in launches:
        counted(launch)


def test_a_cost_that_is_wrong_shows() -> None:
    """The negative control: a launch beside another one's cost."""
    decode, prefill = (
        step_launches(SMALL, SPANS[name], torch.bfloat16, device="cpu") for name in ("decode", "prefill")
    )
    for ours, theirs in zip(decode[:-1], prefill[:-1], strict=True):
        wrong = Launch(ours.name, 1, ours.rows, ours.run, theirs.cost, ours.streamed, ours.scratch)
        with pytest.raises(AssertionError):
            counted(wrong)


@pytest.mark.slow
def test_gpt2_small_moves_little_more_than_its_weights_and_keys() -> None:
    """Unique bytes of a decode step, counted on one layer and the head at full size, multiplied by the layers.

    One sequence of 512 tokens, bfloat16.
    """
    shape, context = MODELS["gpt2"], 512
    step = 0
    for launch in step_launches(shape, [(context - 1, 1)], torch.bfloat16, device="cpu"):
        trace = counted(launch)
        scratch = sum(trace.bytes(True, tensor) for tensor in launch.scratch)
        step += launch.times * (trace.bytes_from_before() + trace.bytes(True) - scratch)
    blocks = shape.layers * (4 * shape.width**2 + 2 * shape.width * shape.hidden + 13 * shape.width)
    weights = 2 * (blocks + 2 * shape.width + shape.vocab_size * shape.width)
    cache = 2 * shape.layers * 2 * context * shape.width
    assert weights + cache < step <= 1.05 * (weights + cache)


@pytest.mark.parametrize(("top_k", "top_p", "filtered"), [(0, 1.0, 0), (7, 0.9, 1)])
def test_sampling_reads_the_logits_as_often_as_it_says(top_k: int, top_p: float, filtered: int) -> None:
    vocab = 5000
    logits, drawn = torch.randn(1, vocab), outputs(1, 2)
    with harness.recording() as trace:
        sampling(logits, options([Row(top_k=top_k, top_p=top_p)], vocab), drawn, logits)
    expected = sampling_cost(1, vocab, 2, 1, filtered)
    assert trace.bytes(False) == pytest.approx(expected.reads, rel=0.02)
    assert trace.bytes(True) == expected.writes
    assert trace.traffic() == pytest.approx(expected.total_bytes + sum(expected.rereads.values()), rel=0.02)
