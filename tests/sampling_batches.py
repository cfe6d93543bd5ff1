"""Sampling options for the tests."""

import numpy as np

from engine.backends.base import SamplingBatch


def neutral_sampling(rows: int, **changes: object) -> SamplingBatch:
    """Every option of ``rows`` draws off: temperature 1, seed 0, position 0, with the changes."""
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    neutral: dict[str, object] = {
        "temperature": ones,
        "top_k": np.zeros(rows, np.int32),
        "top_p": ones,
        "min_p": zeros,
        "seeds": np.zeros(rows, np.uint64),
        "positions": np.zeros(rows, np.uint32),
        "sample_index": np.zeros(rows, np.uint32),
        "num_logprobs": 0,
        "presence_penalty": zeros,
        "frequency_penalty": zeros,
        "repetition_penalty": ones,
    }
    return SamplingBatch(**{**neutral, **changes})  # type: ignore[arg-type]
