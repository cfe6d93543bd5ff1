"""``gpu_check.py`` takes every path here, interpreted, at a tiny size; what failed or is left is run again, no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu.conformance
import gpu_check
import kernel_harness  # noqa: F401  before Triton is imported
import pytest
from gpu.bench import parameters

pytestmark = pytest.mark.slow


def run(tmp_path: Path, part: str, *options: str) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "report.json"
    chosen = ["--backend", "triton-interpret", "--tiny", "--part", part, "--output", str(output)]
    code = gpu_check.main([*chosen, *options])
    return code, json.loads(output.read_text())


@pytest.mark.versions
def test_conformance(tmp_path: Path) -> None:
    code, report = run(tmp_path, "conformance")
    assert code == 0
    assert {name.rpartition(" ")[2] for name in report["conformance"]} == {
        "float32", "float16", "bfloat16", "int8", "int4", "small", "rows",
    }  # fmt: skip
    assert report["versions"]["device"] == "CPU"


@pytest.mark.versions
def test_graphs_are_eager(tmp_path: Path) -> None:
    code, report = run(tmp_path, "invariance", "--only", "eager")
    assert code == 0
    assert report["invariance"]["graphs = eager in float32"]["graphs captured"] > 3


def test_rows_are_invariant(tmp_path: Path) -> None:
    code, report = run(tmp_path, "invariance", "--only", "in float16")
    assert code == 0
    assert [result["control"] for result in report["invariance"].values()] == [True]


@pytest.mark.versions
def test_operators(tmp_path: Path) -> None:
    code, report = run(tmp_path, "bench", "--only", "operator")
    assert code == 0
    assert {name.split()[1].rstrip(",") for name in report["bench"]} == {
        "embedding", "layer_norm", "linear", "attention", "logits", "sampling", "head_sample", "head_ranks",
    }  # fmt: skip


def test_steps(tmp_path: Path) -> None:
    code, report = run(tmp_path, "bench", "--only", "small batch 1")
    assert code == 0
    assert set(report["bench"]) == {
        f"small batch 1 {mode}" for mode in ("eager", "graphs", "graphs, int8", "graphs, int4")
    }
    assert all(result["tokens/s"] > 0 for result in report["bench"].values())


@pytest.mark.parametrize("engine", ["PyTorch eager", "transformers, small", "torch.compile"])
def test_peers(tmp_path: Path, engine: str) -> None:
    code, report = run(tmp_path, "peers", "--only", f"{engine}" if "small" in engine else f"{engine}, small batch 1")
    assert code == 0
    assert all(result["tokens/s"] > 0 for result in report["peers"].values())


def test_what_failed_or_is_left_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def case(name: str) -> dict[str, Any]:
        ran.append(name)
        if name == "raises" and ran.count("raises") == 1:
            raise RuntimeError("an illegal memory access")
        return {"ok": name != "wrong" or ran.count("wrong") > 1}

    names = ["right", "wrong", "raises", "last"]
    part = SimpleNamespace(cases=lambda machine: ((name, lambda n=name: case(n)) for name in names))
    monkeypatch.setitem(sys.modules, "gpu.conformance", part)
    code, report = run(tmp_path, "conformance")
    assert code == 1
    assert [report["conformance"][name]["ok"] for name in names] == [True, False, False, True]
    assert "an illegal memory access" in report["conformance"]["raises"]["error"]
    ran.clear()
    ran += ["raises", "wrong"]
    assert run(tmp_path, "conformance")[0] == 0
    assert ran[2:] == ["wrong", "raises"]
    ran.clear()
    assert list(run(tmp_path, "conformance", "--again", "--only", "last")[1]["conformance"]) == names
    assert ran == ["last"]
    ran.clear()
    assert run(tmp_path, "conformance", "--again", "--seconds", "-1")[0] == 2
    assert ran == []


def test_a_long_case_begins_where_a_part_has_hardly_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])

    def case(seconds: float) -> dict[str, Any]:
        clock[0] += seconds
        return {}

    lengths = {"short": 100, "compute-sanitizer memcheck": 390, "short too": 1, "compute-sanitizer racecheck": 390}
    part = SimpleNamespace(cases=lambda machine: ((name, lambda n=n: case(n)) for name, n in lengths.items()))
    monkeypatch.setitem(sys.modules, "gpu.conformance", part)
    ends = []
    while (result := run(tmp_path, "conformance"))[0] == 2:
        ends.append(list(result[1]["conformance"]))
    assert ends == [["short", "short too"], ["short", "short too", "compute-sanitizer memcheck"]]
    assert result[0] == 0
    assert clock[0] == sum(lengths.values())


def test_what_compute_sanitizer_runs(tmp_path: Path) -> None:
    """By a stand-in that runs one case interpreted, and then by one that finds something."""
    for ending, exit_code in (
        ('exec "$@" --backend triton-interpret --only "linear, float weights, 1 "', 0),
        ("exit 9", 9),
    ):
        stand_in = tmp_path / "compute-sanitizer"
        stand_in.write_text(f"#!/bin/sh\n[ $1$2 = --toolracecheck ] || exit 1\nshift 4\n{ending}\n")
        stand_in.chmod(0o755)
        result = gpu.conformance._sanitized(str(stand_in), "racecheck")
        assert (result["ok"], result["exit"]) == (exit_code == 0, exit_code), result["end"]


def test_a_report_of_other_versions_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"versions": {"torch": "1"}, "conformance": {"a": {"ok": False}}}))
    code, report = run(tmp_path, "conformance", "--only", "linear, int8 weights, 1 ")
    assert code == 0
    assert list(report["conformance"]) == ["linear, int8 weights, 1 rows"]


def test_arguments_of_a_benchmark() -> None:
    @pytest.mark.parametrize("a", [1, 2])
    @pytest.mark.parametrize("b", ["x"])
    def benchmark(a: int, b: str) -> None: ...

    assert parameters(benchmark) == [{"b": "x", "a": 1}, {"b": "x", "a": 2}]


@pytest.mark.versions
def test_workers_share_what_is_compiled_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker of very many: it compiles its few of a backend's specialisations, into Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    command = [sys.executable, "-m", "gpu.precompile", "sm_90", "invariance", "--of", "100", "--share", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = int(done.stdout)
    assert 0 < compiled < 20
    assert len(list(tmp_path.glob("*/*.cubin"))) == compiled
