"""Engines as processes: where each one's Python is, how it is started, converted to and asked (``peers/worker.py``)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
OURS, SCREENED = "ours", "screened"  # the second is ours with screen_head
OWN = {OURS: PRECISIONS, SCREENED: ("float32", "bfloat16")}


@dataclass(frozen=True, slots=True)
class Peer:
    """What must be importable for an engine to run, and the precisions that it is compared in."""

    modules: tuple[str, ...]
    precisions: tuple[str, ...]


PEERS = {  # the adapter is peers/NAME_peer.py
    "transformers": Peer(("torch", "transformers"), ("float32", "bfloat16")),
    "openvino": Peer(("openvino_genai", "optimum.intel"), PRECISIONS),
    "ctranslate2": Peer(("ctranslate2", "transformers"), ("float32", "int8")),
    "llama_cpp": Peer(("llama_cpp", "gguf", "safetensors"), PRECISIONS),
    "vllm": Peer(("vllm",), ("float32", "bfloat16")),
}
_ASK = """
import importlib.util as util, json, sys
def has(name):
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False
print(json.dumps([peer for peer, names in json.loads(sys.argv[1]).items() if all(map(has, names))]))
"""


class EngineError(Exception):
    """An engine's process answered an error, or died."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy token ids of each prompt; seconds until every prompt had its first, and in all."""

    token_ids: list[list[int]]
    first: float
    seconds: float


class Engine:
    """A running worker.

    Args:
        adapter: which ``peers/ADAPTER_peer.py`` it runs.
        python: the interpreter that has the engine.
        log: where its stderr goes.
        home: for one of ours, the folder whose engine it is; by default this one.
    """

    def __init__(self, adapter: str, python: Path, log: Path, home: Path | None = None) -> None:
        self.adapter, self.log = adapter, log
        environment = {**os.environ, "PYTHONPATH": str(home or ROOT)} if adapter in OWN else dict(os.environ)
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(python), str(ROOT / "benchmarks" / "peers" / "worker.py"), adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            EngineError: the answer is an error, or none comes because the process died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **fields}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.adapter} died; the end of its log: {self.log.read_text(errors='replace')[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def generate(self, prompts: list[list[int]], tokens: int, **sampling: Any) -> Generated:
        """Tokens after each prompt, and when they came: greedy ones, unless one of ours is given ``SamplingParams``."""
        fields = {"sampling": sampling} if sampling else {}
        return Generated(**self.ask("generate", prompts=prompts, tokens=tokens, **fields))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextmanager
def running(adapter: str, python: Path, log: Path) -> Iterator[Engine]:
    """A worker that is ended on leaving."""
    engine = Engine(adapter, python, log)
    try:
        yield engine
    finally:
        engine.close()


def find_pythons(environments: Path) -> dict[str, Path]:
    """Peer -> a Python that has it: this one, else the first of ``environments``/*/bin/python that does."""
    found: dict[str, Path] = {}
    modules = json.dumps({name: peer.modules for name, peer in PEERS.items()})
    for python in (Path(sys.executable), *sorted(environments.glob("*/bin/python"))):
        answer = subprocess.run([python, "-c", _ASK, modules], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found = dict.fromkeys(json.loads(answer.stdout), python) | found
    return found


def start(
    adapter: str,
    python: Path,
    checkpoint: Path,
    precision: str,
    log: Path,
    threads: int,
    max_seqs: int,
    home: Path | None = None,
) -> tuple[Engine, dict[str, Any]]:
    """An engine that has loaded the checkpoint, converted first if it must be, and what it says of itself.

    ``home`` is the folder of another state of this engine, where that is wanted.

    Returns:
        The engine, for the caller to close; its "versions", the "seconds" of the load and its "facts".

    Raises:
        EngineError: this machine cannot run the engine in this precision, or the conversion or the load failed.
    """
    engine = Engine(adapter, python, log, home)
    try:
        about = engine.ask("about", precision=precision)
        if about["refusal"]:
            raise EngineError(about["refusal"])
        folder = checkpoint.parent / f"{checkpoint.name}-{adapter}-{precision}" if about["converts"] else checkpoint
        if not folder.is_dir():
            convert(adapter, python, checkpoint, folder, precision, log)
        paths = {"checkpoint": str(checkpoint), "folder": str(folder)}
        return engine, about | engine.ask("load", **paths, precision=precision, threads=threads, max_seqs=max_seqs)
    except BaseException:
        engine.close()
        raise


def convert(adapter: str, python: Path, checkpoint: Path, folder: Path, precision: str, log: Path) -> None:
    """Make ``folder``, the checkpoint in an engine's own format, in a process that ends afterwards."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch, running(adapter, python, log) as engine:
        made = Path(scratch) / "converted"
        engine.ask("convert", checkpoint=str(checkpoint), folder=str(made), precision=precision)
        shutil.move(made, folder)
