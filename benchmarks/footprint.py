"""Start, memory and long contexts of the native backend: ``python -m benchmarks.footprint``.

For each dtype, in processes of their own, on the same random GPT-2 as ``benchmarks.compare``:

- seconds from the end of the imports to the first token after a 64-token prompt, the file's pages already cached;
- the peak of the anonymous memory (RssAnon, looked at every millisecond from before the load to the end of a decode of
  ``--seqs`` sequences) above that of a process that has only imported torch, beside the packed weights and KV cache;
- seconds of a decode step after a long prompt and after 64 tokens, in turns, beside the time that the further K and V
  take at the read bandwidth measured in the same turn.

Medians of ``--repeats``. The last line of the output is JSON, and ``--json FILE`` writes it. Linux only (/proc).
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import PRESETS, shared_checkpoint
from benchmarks.compare import PAUSE, measure_limits, option_parser, random_prompts
from benchmarks.engines import OURS, Engine, running
from engine.bench.measure import ITEM_BYTES
from engine.machine import processor_name

PROMPT, TOKENS = 64, 24


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process: its resident memory that no file backs."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def torch_baseline() -> int:
    """RssAnon after ``import torch`` and nothing else."""
    code = "import sys, torch; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = anonymous_bytes(process.pid)
        process.communicate()
    return found


class Peak(threading.Thread):
    """Watches a process's anonymous memory every millisecond until ``stop``."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.bytes, self.over = process, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes(self.process))

    def stop(self) -> int:
        """End watching; the most that was seen, in bytes."""
        self.over.set()
        self.join()
        return self.bytes


def load(args: argparse.Namespace, engine: Engine, dtype: str) -> dict[str, Any]:
    """Load the checkpoint in a worker whose imports are through; its answer."""
    checkpoint = str(shared_checkpoint(args.folder / "models", args.preset))
    paths = {"checkpoint": checkpoint, "folder": checkpoint}
    return engine.ask("load", **paths, precision=dtype, threads=args.threads, max_seqs=args.seqs)


def start_and_memory(args: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Seconds to the first token, and megabytes above ``import torch`` beside those of weights and KV cache."""
    prompts = random_prompts(PRESETS[args.preset].vocab_size, args.seqs, PROMPT, 1)
    seconds, peaks, bound = [], [], 0
    for _ in range(args.repeats):
        with running(OURS, Path(sys.executable), args.folder / "footprint.log") as engine:
            engine.ask("about", precision=dtype)  # answered once the imports are through
            peak = Peak(engine.process.pid)
            peak.start()
            answer = load(args, engine, dtype)
            seconds.append(answer["seconds"] + engine.generate(prompts[:1], 1).first)
            engine.generate(prompts, TOKENS)
            peaks.append(peak.stop())
            bound = answer["facts"]["weight_bytes"] + answer["facts"]["kv_bytes"]
    return {
        "load_to_first_token_s": round(statistics.median(seconds), 3),
        "anonymous_MB": round((statistics.median(peaks) - torch_baseline()) / 1e6, 1),
        "weights_and_kv_MB": round(bound / 1e6, 1),
    }


def long_context(args: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Milliseconds of one sequence's decode step at a short and a long context, and what the difference should be.

    What is compared is of one turn, the read bandwidth included: a shared machine is not the same in the next.
    """
    config = PRESETS[args.preset]
    longest = min(1000, config.context_length - TOKENS)
    values = (longest - PROMPT) * 2 * config.embed_dim * config.n_layers
    turns = []
    with running(OURS, Path(sys.executable), args.folder / "footprint.log") as engine:
        load(args, engine, dtype)
        for repeat in range(-1, args.repeats):  # the first is a warm-up
            times = []
            for length in (PROMPT, longest):
                time.sleep(PAUSE)
                run = engine.generate(random_prompts(config.vocab_size, 1, length, repeat + 2), TOKENS)
                times.append((run.seconds - run.first) / (TOKENS - 1))
            rate = measure_limits(args.threads, [], args.megabytes)["read"]
            turns.append((*times, values * max(2, ITEM_BYTES[dtype]) / rate))
    short, long, extra = zip(*turns[1:], strict=True)
    ratios = [b / (a + more) for a, b, more in turns[1:]]
    return {
        "context": longest,
        "short_ms": round(statistics.median(short) * 1e3, 3),
        "long_ms": round(statistics.median(long) * 1e3, 3),
        "extra_kv_ms": round(statistics.median(extra) * 1e3, 3),
        "long_over_short_plus_kv": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
        "largest_ratio": round(max(ratios), 3),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print."""
    made = option_parser(__doc__)
    made.add_argument("--seqs", type=int, default=32, help="sequences that the KV cache has room for")
    args = made.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for dtype in args.dtypes:
        rows.append({"precision": dtype, **start_and_memory(args, dtype), **long_context(args, dtype)})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = {"machine": processor_name(), "threads": args.threads, "preset": args.preset, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
