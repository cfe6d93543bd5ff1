"""The native backend beside other engines and beside what the machine can do at most: ``python -m benchmarks.compare``.

One random GPT-2 is written to disk and given to every engine, each in a process of its own (``benchmarks/engines.py``)
and in its best setting for ``--threads`` threads. The engines take turns within each repetition, in an order that is
drawn anew, as a machine is not the same after every neighbour. Its limits (bytes read per second, multiply-accumulates
per second with operands in registers) are measured in every repetition too, so that a guest's load hits all alike;
medians are reported. Prompts are new in every repetition.
A decode step's time is that between the last sequence's first token and the end, over the tokens in between; a
prefill's is that until the first token. The float32 engines must agree on the greedy tokens, and the others give
tokens of the vocabulary, before anything is timed. Peers are looked for in this environment and in those that
``python -m benchmarks.make_peers`` makes; what is absent or refuses is skipped and named. The last line of the output
is JSON, and ``--json FILE`` writes it, for ``python -m benchmarks.chart``.
"""

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import PRESETS, shared_checkpoint
from benchmarks.engines import (
    OWN,
    PEERS,
    PRECISIONS,
    ROOT,
    SCREENED,
    Engine,
    EngineError,
    Generated,
    find_pythons,
    start,
)
from engine.backends.native_backend import chosen_isa, load_extension
from engine.bench.measure import ITEM_BYTES
from engine.config import ModelConfig
from engine.machine import processor_name, usable_cpus

STORAGE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 2}  # int4 multiplies as int8 does
PAUSE = 0.25  # seconds before a turn, in which the threads of the engine before go to sleep


@dataclass(frozen=True, slots=True)
class Case:
    """``seqs`` sequences: a prompt of ``prompt`` tokens each, then ``tokens`` decoded; a prefill has tokens == 1."""

    name: str
    seqs: int
    prompt: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Runner:
    """An engine that is ready, in one precision."""

    peer: str
    precision: str
    engine: Engine
    versions: dict[str, str]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """As in "ours float32"."""
        return f"{self.peer} {self.precision}"


def start_engines(args: argparse.Namespace, stack: ExitStack) -> tuple[list[Runner], list[str]]:
    """The engines, loaded, and a line for each that is skipped and why; ``stack`` ends their processes."""
    checkpoint = shared_checkpoint(args.folder / "models", args.preset)
    pythons = find_pythons(args.folder / "env") if args.peers else {}
    skipped = [f"{peer}: not installed" for peer in args.peers if peer not in pythons]
    ready = []
    for peer in (*OWN, *(peer for peer in args.peers if peer in pythons)):
        python = pythons.get(peer, Path(sys.executable))
        for precision in args.dtypes:
            if precision not in (OWN[peer] if peer in OWN else PEERS[peer].precisions):
                continue
            log = args.folder / f"{peer}-{precision}.log"
            log.write_bytes(b"")
            try:
                engine, said = start(peer, python, checkpoint, precision, log, args.threads, max(args.seqs))
            except EngineError as error:
                if peer in OWN:
                    raise
                skipped.append(f"{peer} {precision}: {error}")
                continue
            stack.callback(engine.close)
            ready.append(Runner(peer, precision, engine, said["versions"], said["facts"]))
    return ready, skipped


def able_to_generate(runners: list[Runner], vocab_size: int, skipped: list[str]) -> list[Runner]:
    """Those that answer a first prompt; ``skipped`` gets a line for each peer that does not."""
    prompt, tokens = random_prompts(vocab_size, 1, 16, 1), 8
    able, answers = [], {}
    for runner in runners:
        try:
            answers[runner.name] = runner.engine.generate(prompt, tokens).token_ids[0]
        except EngineError as error:
            if runner.peer in OWN:
                raise
            skipped.append(f"{runner.name}: {error}")
            continue
        able.append(runner)
    check_agreement(answers, vocab_size, tokens)
    return able


def check_agreement(answers: dict[str, list[int]], vocab_size: int, tokens: int) -> None:
    """Refuse engines that compute different things.

    Args:
        answers: engine and precision, as in "ours float32", to its greedy tokens after the same prompt.
        vocab_size: of the model.
        tokens: how many were asked for.

    Raises:
        SystemExit: two float32 engines differ in a token, or any engine gave another number of tokens or no token of
            the vocabulary.
    """
    for name, answer in answers.items():
        if len(answer) != tokens or not all(0 <= token < vocab_size for token in answer):
            raise SystemExit(f"{name} was asked for {tokens} tokens below {vocab_size} and gave {answer}")
    exact = {name: answer for name, answer in answers.items() if name.endswith(" float32")}
    if len({tuple(answer) for answer in exact.values()}) > 1:
        raise SystemExit(f"the float32 engines disagree on the greedy tokens: {exact}")


def floor_seconds(
    config: ModelConfig, dtype: str, case: Case, read_rate: float, mac_rate: float, screen_rate: float | None = None
) -> float:
    """The least time of one step: every weight and cached value read once, or every product, whichever is more.

    A weight counts as what its type takes, whatever an engine makes of it: two bytes in bfloat16, of which the native
    backend reads one and a half. Of a prompt's rows but the last one, the last layer's products are those of K and V:
    nothing depends on others.
    Rates are bytes and products of ``dtype`` a second; with ``screen_rate``, of int8 products, the head is in int8.
    """
    width, hidden = config.embed_dim, config.hidden_dim
    block = 4 * width * width + 2 * width * hidden
    head = config.vocab_size * width
    rows = case.seqs if case.tokens > 1 else case.seqs * case.prompt
    cached = case.seqs * (case.prompt + case.tokens / 2) * 2 * width * config.n_layers * max(2, ITEM_BYTES[dtype])
    head_bytes = head * ITEM_BYTES["int8" if screen_rate else dtype]
    read = config.n_layers * block * ITEM_BYTES[dtype] + head_bytes + (cached if case.tokens > 1 else 0)
    keys_and_values = 2 * width * width
    layers = rows * ((config.n_layers - 1) * block + keys_and_values) + case.seqs * (block - keys_and_values)
    products = layers / mac_rate + case.seqs * head / (screen_rate or mac_rate)
    return max(read / read_rate, products)


def measure_limits(threads: int, dtypes: list[str], megabytes: int) -> dict[str, float]:
    """Bytes per second, and multiply-accumulates per second by dtype."""
    native = load_extension()
    size = megabytes << 20
    limits = {"read": size / statistics.median(native.time_reads("", threads, size, 3))}
    for dtype in dtypes:
        limits[dtype] = statistics.median(native.time_products("", threads, STORAGE_CODES[dtype], 2))
    return limits


def seconds_of(run: Generated, case: Case) -> float:
    """Seconds of one decode step, or of the prefill with its one token.

    Raises:
        SystemExit: a prompt got another number of tokens than was asked for, so its steps are not those of the others.
    """
    if found := {len(ids) for ids in run.token_ids} - {case.tokens}:
        raise SystemExit(
            f"{case.name}: {case.tokens} tokens were to follow a prompt of {case.prompt}, and {min(found)} did"
        )
    return run.first if case.tokens == 1 else (run.seconds - run.first) / (case.tokens - 1)


def random_prompts(vocab_size: int, seqs: int, length: int, seed: int) -> list[list[int]]:
    """Token ids, the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(seqs)]


def run_case(args: argparse.Namespace, runners: list[Runner], case: Case) -> list[dict[str, Any]]:
    """Time every engine on a case, in turns, and return a row for each."""
    config = PRESETS[args.preset]
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    shares: dict[str, list[float]] = {runner.name: [] for runner in runners}
    measured: list[dict[str, float]] = []
    screen = {"int8"} if any(runner.peer == SCREENED for runner in runners) else set()
    for repeat in range(-1, args.repeats):  # the first is a warm-up
        limits = measure_limits(args.threads, sorted({*args.dtypes, *screen}), args.megabytes)
        prompts = random_prompts(config.vocab_size, case.seqs, case.prompt, 1000 * case.seqs + repeat)
        for runner in random.Random(repeat).sample(runners, len(runners)):
            time.sleep(PAUSE)
            seconds = seconds_of(runner.engine.generate(prompts, case.tokens), case)
            if repeat >= 0:
                rates = limits["read"], limits[runner.precision], limits["int8"] if runner.peer == SCREENED else None
                floor = floor_seconds(config, runner.precision, case, *rates)
                times[runner.name].append(seconds)
                shares[runner.name].append(floor / seconds)
        measured.append(limits)
    rows = []
    for runner in runners:
        seconds = statistics.median(times[runner.name])
        tokens = case.seqs if case.tokens > 1 else case.prompt
        row = {
            "case": case.name,
            "engine": runner.peer,
            "precision": runner.precision,
            "ms": round(seconds * 1e3, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "share_of_limit": round(statistics.median(shares[runner.name]), 3),
            "read_GB_s": round(statistics.median(limits["read"] for limits in measured[1:]) / 1e9, 1),
            "GMAC_s": round(statistics.median(limits[runner.precision] for limits in measured[1:]) / 1e9, 1),
        }
        rows.append(row)
    return add_ratios(rows)


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """To ours of one case, add the best peer of the same precision, the best of all, and our speed over theirs."""
    peers = [row for row in rows if row["engine"] not in OWN]
    for row in rows:
        if row["engine"] in OWN:
            same = [peer for peer in peers if peer["precision"] == row["precision"]]
            for key, among in (("same", same), ("any", peers)):
                if among:
                    best = max(among, key=lambda peer: float(peer["tokens_per_s"]))
                    row[f"best_{key}"] = f"{best['engine']} {best['precision']}"
                    row[f"times_best_{key}"] = round(row["tokens_per_s"] / best["tokens_per_s"], 2)
    return rows


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the machine, the versions, what was skipped, and a row for every case and engine."""
    config = PRESETS[args.preset]
    longest = min(512, config.context_length - 1)
    cases = [Case(f"decode {n}", n, min(64, longest // 2), args.tokens) for n in args.seqs]
    cases.append(Case(f"prefill {longest}", 1, longest, 1))
    with ExitStack() as stack:
        runners, skipped = start_engines(args, stack)
        runners = able_to_generate(runners, config.vocab_size, skipped)
        for line in skipped:
            print("skipped", line)
        rows = []
        for case in cases:
            for row in run_case(args, runners, case):
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                rows.append(row)
        versions = {runner.peer: runner.versions for runner in runners}
        facts = {runner.name: runner.facts for runner in runners if runner.facts}
    return {
        "machine": processor_name(),
        "isa": chosen_isa(),
        "threads": args.threads,
        "preset": args.preset,
        "repeats": args.repeats,
        "versions": versions,
        "facts": facts,
        "skipped": skipped,
        "rows": rows,
    }


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that this script and ``footprint.py`` share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=PRESETS, default="gpt2")
    made.add_argument("--threads", type=int, default=usable_cpus())
    made.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--folder", type=Path, default=ROOT / ".peers", help="environments, converted models and logs")
    made.add_argument("--megabytes", type=int, default=512, help="memory that the read rate is measured on")
    made.add_argument("--json", type=Path, help="a file for the result")
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, compare, print."""
    made = option_parser(__doc__)
    made.add_argument("--seqs", nargs="+", type=int, default=[1, 8, 32], help="sequences decoded together, 32 at most")
    made.add_argument("--tokens", type=int, default=24, help="tokens of a decode")
    made.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none after it: ours alone")
    args = made.parse_args(arguments)
    if args.tokens < 2 or args.repeats < 1 or not all(1 <= n <= 32 for n in args.seqs):
        made.error("--tokens must be at least 2, --repeats at least 1, --seqs from 1 to 32")
    print(f"{processor_name()}, instruction set {chosen_isa()}, {args.threads} threads, preset {args.preset}")
    result = compare(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
