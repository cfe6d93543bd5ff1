"""benchmarks/compare.py runs on a tiny model, and refuses to time engines that disagree."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("engine.backends._native", reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_tiny_run(compare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--preset tiny --threads 1 --dtypes float32 --seqs 2 --tokens 3 --repeats 1 --megabytes 8"
    rows = compare.main(options.split())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == rows
    assert {row["case"] for row in rows} == {"decode 2", "prefill 127"}
    assert {row["engine"] for row in rows} >= {"ours float32"}
    assert any(line.startswith("skipped openvino_genai: ") for line in printed)


def test_engines_that_disagree_are_not_timed(compare: ModuleType) -> None:
    def steady(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return [[1] * tokens for _ in prompts]

    def other(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return [[2] * tokens for _ in prompts]

    compare.check_agreement({"a float32": steady, "b float32": steady, "c bfloat16": other}, [1, 2])
    with pytest.raises(SystemExit, match="disagree"):
        compare.check_agreement({"a float32": steady, "b float32": other}, [1, 2])


def test_the_floor(compare: ModuleType) -> None:
    """Decode of one sequence is the bytes, a prefill the products."""
    config = compare.PRESETS["gpt2"]
    decode = compare.floor_seconds(config, "bfloat16", compare.Case("d", 1, 64, 2), 1e9, 1e15)
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert decode == pytest.approx((2 * matrices + 65 * 2 * 768 * 12 * 2) / 1e9)
    prefill = compare.floor_seconds(config, "bfloat16", compare.Case("p", 1, 512, 1), 1e15, 1e9)
    assert prefill == pytest.approx((512 * 12 * 12 * 768 * 768 + 50257 * 768) / 1e9)
