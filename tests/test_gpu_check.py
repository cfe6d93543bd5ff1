"""``gpu_check.py`` takes every path here, interpreted, at a tiny size; what failed or is left is run again, no more."""

import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu.bench
import gpu.conformance
import gpu.machine
import gpu.precompile
import gpu_check
import kernel_timing
import pytest
import test_kernels
import torch
from gpu.bench import parameters

from engine.backends.triton_compile import WORKERS_VARIABLE

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
    assert [result.get("control") for result in report["invariance"].values()] == [True, None]


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
    names.append("new")  # never tried: it goes before those that failed
    ran.clear()
    ran += ["raises", "wrong"]
    assert run(tmp_path, "conformance")[0] == 0
    assert ran[2:] == ["new", "wrong", "raises"]
    ran.clear()
    assert set(run(tmp_path, "conformance", "--again", "--only", "last")[1]["conformance"]) == set(names)
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


def test_what_compute_sanitizer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that runs one case interpreted, then by one that finds something, then by one that hangs."""
    stand_in, child = tmp_path / "compute-sanitizer", tmp_path / "child"

    def result(ending: str) -> dict[str, Any]:
        stand_in.write_text(f"#!/bin/sh\n[ $1$2 = --toolracecheck ] || exit 1\nshift 4\n{ending}\n")
        stand_in.chmod(0o755)
        return gpu.conformance._sanitized(str(stand_in), "racecheck")

    found = result('exec "$@" --backend triton-interpret --only "linear, float weights, 1 "')
    assert (found["ok"], found["exit"]) == (True, 0), found["end"]
    assert (result("exit 9")["ok"], result("exit 9")["exit"]) == (False, 9)
    monkeypatch.setattr(gpu.conformance, "LONG_SECONDS", 1)
    assert result(f"sleep 300 &\necho $! > {child}\nwait") == {"ok": False, "error": "not through after 1 s"}
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    gone = False
    for _ in range(100):  # the signal is on its way
        gone = gone or not status.exists() or status.read_text().split()[2] == "Z"
        time.sleep(0 if gone else 0.1)
    assert gone, "what it watched goes on"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that says it has an H100, to list cases by; running them would not work."""
    machine = gpu.machine.Machine("triton-interpret", tiny=False)
    for name, value in (("on_gpu", True), ("has_dependent_launch", True), ("target", "sm_90")):
        monkeypatch.setattr(gpu.machine.Machine, name, property(lambda self, value=value: value))
    monkeypatch.setattr(kernel_timing, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    return machine


def names_of(part: str, machine: Any) -> list[str]:
    listed = [name for name, _ in importlib.import_module(f"gpu.{part}").cases(machine)]
    assert len(set(listed)) == len(listed)
    return listed


def test_the_cases_of_a_gpu(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.conformance.shutil, "which", lambda name, path: f"/opt/{name}")
    expected = {
        "conformance": ["logits of gpt2 with 2 layers in int4", "logits with heads of 256 in bfloat16",
                        "compute-sanitizer memcheck", "compute-sanitizer racecheck"],
        "invariance": ["draws of gpt2 with 2 layers in int8", "dependent launch in graphs = eager in float16"],
        "bench": ["copy", "operator head_ranks, kind int4, rows 256", "gpt2-xl batch 256 eager",
                  "gpt2 batch 1 graphs, dependent launch", "gpt2-xl batch 256 graphs, int8"],
        "peers": ["ours, gpt2 batch 1", "transformers, torch.compile, gpt2-xl batch 256"],
    }  # fmt: skip
    for part, some in expected.items():
        listed = names_of(part, on_a_gpu)
        assert [name for name in some if name not in listed] == [], listed
    monkeypatch.setattr(gpu.conformance.shutil, "which", lambda name, path: None)
    assert "no compute-sanitizer racecheck" in names_of("conformance", on_a_gpu)


def test_what_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dependent launch where the target has it; and a failure is said."""
    for target, ways in (("sm_80", {False}), ("sm_90", {False, True})):
        assert {dependent for *_, dependent in gpu.precompile.asked(target, gpu_check.PARTS)} == ways
    said = iter([(3, []), (2, ["no disk"])])
    monkeypatch.setattr(gpu.precompile.triton_compile, "run_workers", lambda command, workers: next(said))
    assert gpu.precompile.precompile("sm_90", ["bench"], 4)[0]
    well, text = gpu.precompile.precompile("sm_90", ["bench"], 4)
    assert not well
    assert "no disk" in text


@pytest.mark.parametrize("well", [True, False])
def test_backends_do_not_compile_again_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, well: bool) -> None:
    monkeypatch.setattr(gpu.machine.Machine, "target", property(lambda self: "sm_90"))
    monkeypatch.setattr(gpu.precompile, "precompile", lambda target, parts, workers: (well, f"{target} {workers}"))
    monkeypatch.setenv(WORKERS_VARIABLE, "5")
    monkeypatch.setitem(sys.modules, "gpu.conformance", SimpleNamespace(cases=lambda machine: [("one", dict)]))
    assert run(tmp_path, "conformance")[0] == 0
    assert os.environ[WORKERS_VARIABLE] == ("0" if well else "5")


def test_an_operator_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's report holds of an operator; the graph is replayed by a stand-in for PyTorch's."""
    monkeypatch.setattr(kernel_timing, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copy = kernel_timing.copy_bandwidth("cpu")
    place = kernel_timing.Machine("cpu", False, copy, 1 << 15)
    found = gpu.bench._operator(test_kernels, place, test_kernels.test_layer_norm, {"rows": 1})
    assert found["GB/s"] == pytest.approx(found["share of copy"] * copy / 1e9)
    assert found["bytes"] == pytest.approx(found["GB/s"] * found["us"] * 1e3)
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    replay = kernel_timing.Machine("cuda", False, copy).replayable([lambda: calls.append("launch")])
    replay()
    assert calls == ["launch", "launch", "replay"]


def test_what_is_passed_holds_for_these_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpu.machine.sources()
    monkeypatch.setattr(gpu.machine, "ROOT", Path("/nowhere"))
    assert gpu.machine.sources() != before


def test_a_device_that_no_longer_answers_ends_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> dict[str, Any]:
        monkeypatch.setattr(gpu.machine.Machine, "alive", lambda self: False)
        raise RuntimeError("an illegal memory access")

    names = {"first": dict, "breaks": breaks, "last": dict}
    monkeypatch.setitem(sys.modules, "gpu.conformance", SimpleNamespace(cases=lambda machine: names.items()))
    code, report = run(tmp_path, "conformance")
    assert (code, list(report["conformance"])) == (1, ["first", "breaks"])


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "invariance", "--only", "no such case")
    assert "no case has 'no such case' in its name" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu_check.main([])
        assert "PyTorch sees no GPU" in capsys.readouterr().err


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
