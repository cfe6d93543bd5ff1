"""The command lines as a person runs them: output, help, errors that say what to type, the bench's JSON."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ODD_CONFIGS, tiny_module

from engine import generate
from engine.bench.__main__ import parser as bench_parser
from engine.bench.check import check_against_reference
from engine.bench.measure import step_bytes
from engine.bench.presets import PRESETS, preset_config
from engine.checkpoints.canonical import to_reference
from engine.checkpoints.live import canonical_weights, recognise
from engine.cli import add_fields, chosen, documented
from engine.config import EngineConfig
from engine.llm import LLM
from engine.messages import SamplingParams


def command(*arguments: str) -> list[str]:
    """``python -m engine.X ...`` with this checkout on the path, wherever it runs."""
    root = str(Path(__file__).parent.parent)
    code = f"import runpy, sys; sys.path.insert(0, {root!r}); sys.argv[0] = sys.argv[1]; del sys.argv[1]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, *arguments]


def run(*arguments: str, stdin: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a command line did."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, input=stdin, cwd=cwd, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state_dict of a tiny model, and its config beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save(tiny_module().state_dict(), folder / "model.pth")
    (folder / "gpt.json").write_text(json.dumps(ODD_CONFIGS["plain"]))
    return folder


@pytest.mark.slow
def test_generate_streams_the_demo_model(tmp_path: Path) -> None:
    done = run("engine.generate", "It is a truth", "--max-tokens", "12", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("It is a truth")
    assert "+ 12 tokens" in done.stderr
    assert "seed 3" in done.stderr
    again = run("engine.generate", "-", "--max-tokens", "12", "--seed", "3", stdin="It is a truth")
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_generate_prints_several_samples() -> None:
    options = ["--max-tokens", "none", "--max-model-len", "24", "--min-tokens", "5", "--seed", "3", "--n", "3"]
    done = run("engine.generate", "It is a truth", *options, "--presence-penalty", "0.5", "--frequency-penalty", "-0.5")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.split("--- ")[1:]
    assert first.startswith("1 of 3\nIt is a truth")
    assert [other.splitlines()[0] for other in others] == ["2 of 3", "3 of 3"]
    assert len({text.partition("\n")[2] for text in (first, *others)}) == 3
    assert "finished by length, length, length, seed 3]" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["engine.generate", "It is a truth", "--max-tokens", "400", "--seed", "3"], ["engine.doctor"]]
)
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    if arguments[0] == "engine.doctor":
        os.close(reader)  # before a first byte: it has all to say at once
    with subprocess.Popen(command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        if arguments[0] != "engine.doctor":
            os.read(reader, 5)
            os.close(reader)
        assert process.stderr is not None
        said = [line for line in process.stderr.read().splitlines() if not line.startswith("engine: ")]
    assert (process.returncode, said) == (141, [])


def test_options_given_several_times_all_count() -> None:
    args = generate.parser().parse_args(["x", "--stop", "the", "--stop", "and"])
    assert chosen(args, SamplingParams, generate.SAMPLING)["stop"] == ["the", "and"]
    assert chosen(generate.parser().parse_args(["x"]), SamplingParams, generate.SAMPLING)["stop"] is None


def test_numbers_can_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    args = generate.parser().parse_args(["x", "--max-tokens", "none", "--threads", "None", "--stop", "none"])
    assert (args.max_tokens, args.threads, args.stop) == (None, None, ["none"])
    assert generate.parser().parse_args(["x"]).max_tokens == 100
    with pytest.raises(SystemExit):
        generate.parser().parse_args(["x", "--max-tokens", "many"])
    assert "argument --max-tokens: invalid int or none value: 'many'" in capsys.readouterr().err


def test_sequences_of_numbers_are_options_too() -> None:
    parser = argparse.ArgumentParser()
    add_fields(parser, SamplingParams, ["stop_token_ids"])
    assert parser.parse_args(["--stop-token-ids", "3", "--stop-token-ids", "5"]).stop_token_ids == [3, 5]


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_places_are_tried_before_anything_is_measured(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    new, old, link = tmp_path / "new.png", tmp_path / "old.png", tmp_path / "link.png"
    old.write_text("what was there")
    link.symlink_to(tmp_path / "nowhere.png")
    for path in (new, old, link):
        assert getattr(bench_parser().parse_args([option, str(path)]), option[2:]) == path
    assert {path.name for path in tmp_path.iterdir()} == {"old.png", "link.png"}
    assert old.read_text() == "what was there"
    assert link.is_symlink()
    (tmp_path / "folder.png").mkdir()
    for path, why in (("no/x.png", "No such file or directory"), ("folder.png", "Is a directory")):
        with pytest.raises(SystemExit):
            bench_parser().parse_args([option, str(tmp_path / path)])
        assert f"argument {option}: {tmp_path / path} cannot be written: {why}" in capsys.readouterr().err


def test_a_chart_in_no_known_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        bench_parser().parse_args(["--plot", str(tmp_path / "chart")])
    said = capsys.readouterr().err
    assert f"argument --plot: {tmp_path / 'chart'} must end in one of ." in said
    assert ".png" in said


@pytest.mark.slow
def test_errors_name_the_line_to_type(checkpoint: Path) -> None:
    model = str(checkpoint / "model.pth")
    for arguments, message, line in (
        (["engine.generate", "x", "--model", model], "n_heads", "--config"),
        (["engine.generate", "x", "--model", model, "--config", '{"n_heads": 2}'], "tokenizer", "--tokenizer gpt2"),
        (["engine.generate", "word " * 600], "and the context 512", "--context-overflow slide"),
        (["engine.generate", "x", "--backend", "tpu"], "unknown backend 'tpu'", "engine.doctor"),
        (["engine.generate", "x", "--tokenizer", "gpt2"], "has 50257 tokens", "--tokenizer path/to/folder"),
        (["engine.generate", "x", "--device", "cuda:99"], "device 'cuda:99' is not available here", "engine.doctor"),
        (["engine.generate", "x", "--top-p", "7"], "top_p must be in", "--help"),
        (["engine.bench", "--batch", "two"], "--batch must be positive integers", "--help"),
        (["engine.bench", "--prompt-len", "500"], "exceed the context of 512", "--help"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert message in done.stderr
        assert line in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_help_teaches() -> None:
    for module in ("engine.generate", "engine.bench", "engine.doctor"):
        done = run(module, "--help")
        assert done.returncode == 0
        assert f"usage: python -m {module}" in done.stdout
    assert "examples:" in run("engine.bench", "--help").stdout


def test_doctor() -> None:
    done = run("engine.doctor")
    assert done.returncode == 0, done.stderr
    for word in ("processor", "torch", "backend torch", "backend native", "auto takes"):
        assert word in done.stdout


@pytest.mark.slow
def test_bench_on_a_users_model(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoint / "model.pth"), "--config", str(checkpoint / "gpt.json")]
    sizes = ["--dtype", "float32", "--prompt-len", "16", "--gen-len", "8", "--batch", "1,2", "--repeats", "1"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    done = run("engine.bench", *arguments, *sizes, *files)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert document["check"]["num_equal"] == document["check"]["num_tokens"] == 48
    assert [batch["batch"] for batch in document["batches"]] == [1, 2]
    assert all(batch["mbu"] > 0 for batch in document["batches"])
    naive, fast, engine = document["loops"].values()
    assert naive["token_ids"] == fast["token_ids"] == engine["token_ids"]
    assert "8/8" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_loops_are_compared_in_their_own_precision(checkpoint: Path, tmp_path: Path) -> None:
    """Less than float32, asked for or "auto" on some CPUs, is a row of its own: the loop's tokens are float32's."""
    arguments = ["--model", str(checkpoint / "model.pth"), "--config", str(checkpoint / "gpt.json")]
    sizes = ["--dtype", "bfloat16", "--prompt-len", "16", "--gen-len", "8", "--batch", "1", "--repeats", "1"]
    done = run("engine.bench", *arguments, *sizes, "--plot", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    loops = json.loads(done.stdout.splitlines()[-1])["loops"]
    assert list(loops)[2:] == ["LLM.generate, float32", "LLM.generate, bfloat16"]
    assert loops["naive loop"]["token_ids"] == loops["LLM.generate, float32"]["token_ids"]
    assert "In lower precision: " in done.stdout
    assert "LLM.generate, bfloat16: where two tokens are closer" in done.stdout


def test_the_check_catches_a_wrong_engine() -> None:
    """The bench refuses to print speed when a weight of the reference is another."""
    module = tiny_module()
    llm = LLM(module, dtype="float32")
    found = recognise(module)
    weights = canonical_weights(found)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert check_against_reference(llm, to_reference(found.config, weights), prompts, 10).passed
    weights["blocks.1.fc.bias"] = weights["blocks.1.fc.bias"] + 0.01
    wrong = check_against_reference(llm, to_reference(found.config, weights), prompts, 10)
    assert not wrong.passed
    assert wrong.error > wrong.limit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_check_in_low_precision(dtype: str) -> None:
    module = tiny_module()
    found = recognise(module)
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in canonical_weights(found).items()}
    llm = LLM(tiny_module(), dtype=dtype)
    result = check_against_reference(llm, to_reference(found.config, weights), [[1, 2, 3], [4, 5, 6, 7]], 10)
    assert result.passed
    assert result.num_equal + result.num_excused == 20


def test_bytes_of_a_step() -> None:
    """GPT-2 small in float32: 124.4M parameters less the position table, and 73.7 kB of K and V a position."""
    config = preset_config("gpt2")
    assert config.num_parameters == 124_439_808
    weights = 4 * (124_439_808 - 1024 * 768)
    assert step_bytes(config, "float32", 1, 0) == weights
    assert step_bytes(config, "float32", 2, 100) == weights + 2 * 100 * 12 * 2 * 768 * 4
    assert step_bytes(config, "float32", 1, 0, screen_head=True) == weights - 3 * 50257 * 768
    cached = 2 * 100 * 12 * 2 * 768 * 2
    assert step_bytes(config, "bfloat16", 2, 100, coded=True) == weights * 3 // 8 + cached
    screened = step_bytes(config, "bfloat16", 2, 100, screen_head=True, coded=True)
    assert screened == weights * 3 // 8 + cached - 50257 * 768 // 2
    assert [preset_config(name).num_parameters // 10**6 for name in PRESETS] == [124, 354, 774, 1557]


def test_every_option_has_a_help_text() -> None:
    for cls in (EngineConfig, SamplingParams):
        texts = documented(cls)
        assert set(texts) == {field.name for field in dataclasses.fields(cls)}
        assert all(len(text) > 10 for text in texts.values())
