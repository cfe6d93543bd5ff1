"""What ``LLM(**options)`` takes of vLLM's names, and says of those that change nothing."""

import re
from typing import Any

import pytest
import torch

from engine.config import MAX_THREADS, EngineConfig
from engine.logs import get_logger
from engine.messages import MAX_LOGPROBS
from engine.options import engine_config

get_logger()  # pytest listens to loggers that do not propagate if they exist before the test begins


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("half", "float16"),
        ("float", "float32"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        ("int8", "int8"),
    ],
)
def test_vllms_names_of_dtypes(given: Any, dtype: str) -> None:
    assert engine_config({"dtype": given}) == EngineConfig(dtype=dtype)


def test_what_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    options = {"enable_prefix_caching": True, "swap_space": 8, "enforce_eager": False, "trust_remote_code": True}
    with caplog.at_level("INFO", logger="engine"):
        assert engine_config(options | {"tokenizer_mode": "slow", "max_num_seqs": 3}) == EngineConfig(max_num_seqs=3)
    named = "enable_prefix_caching=True, swap_space=8, trust_remote_code=True, tokenizer_mode='slow'"
    assert [record.message for record in caplog.records] == [f"without effect in this engine: {named}"]


NEUTRAL = {
    "download_dir": None,
    "enable_lora": False,
    "hf_overrides": None,
    "distributed_executor_backend": None,
    "tokenizer_revision": None,
    "max_logprobs": MAX_LOGPROBS,
}


def test_vllms_defaults_are_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="engine"):
        assert engine_config(NEUTRAL | {"swap_space": 4, "disable_log_stats": True}) == EngineConfig()
    assert not caplog.records
    assert engine_config({"max_logprobs": 5}) == EngineConfig()


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("download_dir", "/models", "None"),
        ("enable_lora", True, "False"),
        ("hf_overrides", {"n_layer": 2}, "None"),
        ("distributed_executor_backend", "ray", "None"),
        ("tokenizer_revision", "main", "None"),
        ("max_logprobs", 50, "an integer from 0 to 20"),
        ("max_logprobs", "5", "an integer from 0 to 20"),
        ("task", "embed", "'auto' or 'generate'"),
    ],
)
def test_any_other_value_is_refused(name: str, value: Any, accepted: str) -> None:
    given = re.escape(f"{name}={value!r}")
    with pytest.raises(ValueError, match=f"^{given} is not supported; it can only be {accepted}$"):
        engine_config({name: value})


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        (1.5, "EngineConfig.threads must be a positive integer, got 1.5"),
        ("2", "EngineConfig.threads must be a positive integer, got '2'"),
        (100_000, f"EngineConfig.threads must be at most {MAX_THREADS}, got 100000"),
    ],
)
def test_threads(threads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        engine_config({"threads": threads})
    assert engine_config({"threads": MAX_THREADS}).threads == MAX_THREADS
