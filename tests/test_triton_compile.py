"""Kernels compiled by several processes before the first start: what warm-up asks for, once, and never in the way."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends import triton_compile
from engine.config import ModelConfig

MODEL = ModelConfig(vocab_size=97, context_length=150, embed_dim=64, n_heads=2, n_layers=3, hidden_dim=64)
DEVICE = torch.device("cuda")


@pytest.fixture
def on_sm_90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine, taken for one with an H100 and 2 workers; its Triton cache."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv(triton_compile.WORKERS_VARIABLE, "2")
    assert triton.knobs.cache.dir == str(tmp_path)
    return tmp_path


def ahead(model: ModelConfig = MODEL, dtype: str = "float16") -> int:
    return triton_compile.compile_ahead(model, dtype, 16, False, DEVICE)


@pytest.mark.slow
def test_everything_that_warm_up_asks_for_once(on_sm_90: Path) -> None:
    """Two workers fill the cache, and a third that does all of it finds every kernel there."""
    count = ahead()
    made = sorted(on_sm_90.glob("*/*.cubin"))
    assert count == len(made) > 20
    assert ahead() == 0  # noted
    for note in on_sm_90.glob("engine-*"):
        note.unlink()
    times = [path.stat().st_mtime_ns for path in made]
    assert ahead() == count  # asked for again, and found
    assert sorted(on_sm_90.glob("*/*.cubin")) == made
    assert [path.stat().st_mtime_ns for path in made] == times


def test_a_note_is_of_what_the_kernels_depend_on(on_sm_90: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(triton_compile, "run_workers", lambda command, workers: (calls.append(workers), (7, []))[1])
    assert ahead() == 7
    more_layers = ModelConfig(vocab_size=97, context_length=150, embed_dim=64, n_heads=2, n_layers=9, hidden_dim=64)
    assert ahead(more_layers) == 0
    assert ahead(dtype="bfloat16") == 7
    wider = ModelConfig(vocab_size=97, context_length=150, embed_dim=128, n_heads=2, n_layers=3, hidden_dim=64)
    assert ahead(wider) == 7
    assert calls == [2, 2, 2]


def test_what_fails_is_said_and_tried_again(on_sm_90: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine.triton").addHandler(handler)
    code = "import sys; sys.exit('no disk') if sys.argv[-1] == '1' else print(3)"
    run = triton_compile.run_workers
    monkeypatch.setattr(triton_compile, "run_workers", lambda command, n: run([sys.executable, "-c", code], n))
    assert ahead() == 3
    assert not list(on_sm_90.glob("engine-*"))
    assert any("1 of 2 processes" in text and "no disk" in text for text in said)
    logging.getLogger("engine.triton").removeHandler(handler)


def test_where_it_does_nothing(on_sm_90: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_compile, "run_workers", lambda *_: pytest.fail("workers were started"))
    assert triton_compile.compile_ahead(MODEL, "float16", 16, False, torch.device("cpu")) == 0
    monkeypatch.setenv(triton_compile.WORKERS_VARIABLE, "0")
    assert ahead() == 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setenv(triton_compile.WORKERS_VARIABLE, "8")
    assert ahead() == 0
    monkeypatch.setenv(triton_compile.WORKERS_VARIABLE, "many")
    with pytest.raises(ValueError, match=r"ENGINE_COMPILE_WORKERS='many' is not a number.*0 for none"):
        ahead()
