"""Which launches draw a batch, and that all ways give the same: every row alone beside the whole batch, bit for bit."""

import kernel_harness as harness  # before Triton is imported
import numpy as np
import pytest
import torch
from backend_driver import BLOCK, Driver, random_weights, tokens
from sampling_batches import neutral_sampling

from engine.backends.base import Batch, SamplingBatch, Sparse, StepOutput
from engine.backends.triton_backend import TritonInterpretBackend
from engine.backends.triton_head import ascending, choose_head
from engine.config import ModelConfig

MODEL = ModelConfig(vocab_size=97, context_length=60, embed_dim=32, n_heads=2, n_layers=1, hidden_dim=40)
FLOATS = {"cold": np.zeros(3, np.float32), "hot": np.array([0, 1, 0.5], np.float32)}
BIAS = Sparse(np.array([0, 2, 2, 3], np.int32), np.array([90, 3, 5], np.int32), np.array([4, 9, -2], np.float32))
COUNTS = Sparse(np.array([0, 1, 3, 3], np.int32), np.array([3, 70, 7], np.int32), np.array([2, 1, 0], np.float32))


@pytest.mark.parametrize(
    ("changes", "fused", "ranks"),
    [
        ({"temperature": FLOATS["cold"]}, True, False),
        ({"temperature": FLOATS["hot"]}, True, True),
        ({"temperature": FLOATS["hot"], "ranks": False}, True, False),
        ({"temperature": FLOATS["hot"], "ranks": False, "num_logprobs": 2}, True, True),
        ({"temperature": FLOATS["cold"], "num_logprobs": 1}, True, True),
        ({"temperature": FLOATS["cold"], "logit_bias": BIAS}, True, True),
        ({"temperature": FLOATS["cold"], "allowed": np.zeros((3, 4), np.uint32), "ranks": False}, True, False),
        ({"temperature": FLOATS["hot"], "top_k": np.array([5, 97, 200], np.int32)}, True, True),
        ({"temperature": FLOATS["hot"], "top_k": np.array([0, 96, 0], np.int32)}, False, True),
        ({"temperature": FLOATS["hot"], "top_p": np.array([1, 1, 0.9], np.float32)}, False, True),
        ({"temperature": FLOATS["hot"], "top_p": np.array([0.9, 1, 1], np.float32)}, True, True),
        ({"temperature": FLOATS["hot"], "min_p": np.array([0, 0, 0.1], np.float32)}, False, True),
    ],
)
def test_the_choice(changes: dict[str, object], fused: bool, ranks: bool) -> None:
    assert choose_head(neutral_sampling(3, **changes), 97) == (fused, ranks)


def test_ascending_ids() -> None:
    ordered = ascending(BIAS)
    assert ordered.ids.tolist() == [3, 90, 5]
    assert ordered.values.tolist() == [9, 4, -2]
    assert ordered.starts.tolist() == [0, 2, 2, 3]


def drawn(options: SamplingBatch, rows: int = 3) -> StepOutput:
    made = TritonInterpretBackend(MODEL, random_weights(MODEL), dtype="float32", device="cpu", block_size=BLOCK)
    made.allocate(60)
    driver = Driver(made)
    return driver.run([(driver.sequence(9), tokens(5 + i, i)) for i in range(rows)], options)


def test_same_bits_beside_a_neighbour_that_wants_top_k() -> None:
    """Biased, penalised, masked rows with logprobs, in one fused launch and through logits in memory."""
    allowed = np.full((3, 4), 0xFFFFFFFF, np.uint32)
    allowed[1, 2] = 0
    options = {
        "temperature": np.array([0, 1, 0.7], np.float32), "seeds": np.arange(3, dtype=np.uint64), "num_logprobs": 3,
        "frequency_penalty": np.full(3, 0.5, np.float32), "logit_bias": BIAS, "output_counts": COUNTS,
        "allowed": allowed,
    }  # fmt: skip
    fused = drawn(neutral_sampling(3, **options))
    apart = drawn(neutral_sampling(3, **options, top_k=np.array([0, 0, 40], np.int32)))
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        ours, theirs = (torch.from_numpy(getattr(output, name)[:2].copy()) for output in (fused, apart))
        assert harness.same_bits(ours, theirs), name


def test_logits_of_other_rows_change_nothing() -> None:
    """A step that returns logits too draws from them; a step that does not, fused."""
    made = TritonInterpretBackend(MODEL, random_weights(MODEL), dtype="float32", device="cpu", block_size=BLOCK)
    made.allocate(60)
    driver, outputs = Driver(made), []
    for asked in (0, 2):
        options = neutral_sampling(1, seeds=np.array([7], np.uint64))
        batch = driver.batch([(driver.sequence(9), tokens(6))], options)
        fields = {n: getattr(batch, n) for n in batch.__slots__} | {"logits_rows": np.arange(asked, dtype=np.int32)}
        outputs.append(made.collect(made.submit(Batch(**fields))))
    assert outputs[0].token_ids.tobytes() == outputs[1].token_ids.tobytes()
    assert outputs[0].logprobs.tobytes() == outputs[1].logprobs.tobytes()
    assert outputs[0].ranks.tobytes() == outputs[1].ranks.tobytes()
