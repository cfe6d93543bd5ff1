"""One engine in a process of its own: ``python worker.py ADAPTER`` answers a line of JSON for every line of JSON.

It runs by the Python of whatever environment has the engine, so it imports nothing but the standard library and one
adapter, the module ``ADAPTER_peer.py`` beside it. An adapter has::

    versions() -> {package: version}
    refusal(precision) -> why this machine cannot run it in that precision, or None; optional
    convert(checkpoint, folder, precision): a Hugging Face GPT-2 folder to the engine's own files in ``folder``;
        optional, an engine without it reads the checkpoint itself
    load(checkpoint, folder, precision, threads, max_seqs) -> engine
    engine.facts                                    {name: value} that a reader of the result should know
    engine.generate(prompts, tokens) -> (greedy token ids of each prompt, seconds to the first, seconds in all)
        and by keyword what a request's "sampling" asks for, of this project's own engine

A precision is "float32", "bfloat16", "int8" or "int4". "Seconds to the first" end when every prompt has its first
token. No prompt is answered from a cache. Requests and their answers::

    {"do": "about", "precision"}                                 {"versions", "refusal", "converts"}
    {"do": "convert", "checkpoint", "folder", "precision"}       {"seconds"}
    {"do": "load", and "threads", "max_seqs" besides}            {"seconds", "facts"}
    {"do": "generate", "prompts", "tokens"}                      {"token_ids", "first", "seconds"}

A request that fails is answered {"error"}, and the process lives on. Whatever the engine prints goes to stderr.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO


class Worker:
    """The adapter, and the engine that it loaded."""

    def __init__(self, adapter: ModuleType) -> None:
        self.adapter = adapter
        self.engine: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What one request gives; raises whatever the adapter raises."""
        do = request["do"]
        if do == "about":
            refusal = getattr(self.adapter, "refusal", lambda precision: None)(request["precision"])
            converts = hasattr(self.adapter, "convert")
            return {"versions": self.adapter.versions(), "refusal": refusal, "converts": converts}
        if do == "generate":
            sampling = request.get("sampling", {})
            token_ids, first, seconds = self.engine.generate(request["prompts"], request["tokens"], **sampling)
            return {"token_ids": token_ids, "first": first, "seconds": seconds}
        start = time.perf_counter()
        paths = Path(request["checkpoint"]), Path(request["folder"])
        if do == "convert":
            self.adapter.convert(*paths, request["precision"])
            return {"seconds": time.perf_counter() - start}
        if do == "load":
            self.engine = self.adapter.load(*paths, request["precision"], request["threads"], request["max_seqs"])
            return {"seconds": time.perf_counter() - start, "facts": self.engine.facts}
        raise ValueError(f"unknown request {do!r}")


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    for line in requests:
        try:
            answer = worker.answer(json.loads(line))
        except (Exception, SystemExit) as error:  # told to the one who asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Keep the answers' stream for the answers, then serve."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Worker(importlib.import_module(f"{sys.argv[1]}_peer")), sys.stdin, answers)


if __name__ == "__main__":
    main()
