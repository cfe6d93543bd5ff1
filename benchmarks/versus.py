"""Two states of this engine in turns: ``python -m benchmarks.versus FOLDER``.

FOLDER holds another state, with its extension built: for the one before a change,

    git worktree add ../before HEAD~1
    (cd ../before && python setup.py build_ext --inplace)
    python -m benchmarks.versus ../before --dtypes int8 --seqs 1 32 --prefill 512

Each state is a process of its own on the native backend with the same checkpoint; in every turn both run the same new
prompts, now the one first and now the other, after one turn that does not count. Tokens are greedy, or drawn as an
option like ``--sampling '{"temperature": 0.8, "top_k": 50, "seed": 1}'`` asks. Printed are the least and the median
milliseconds of a decode step, or of a prefill, before and now, their ratios (above 1: faster now), how many of all
prompts got the same tokens from both, and how fast memory was read meanwhile.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import PRESETS, shared_checkpoint
from benchmarks.compare import PAUSE, Case, measure_limits, option_parser, random_prompts, seconds_of
from benchmarks.engines import OURS, SCREENED, Engine, start
from engine.messages import SamplingParams


def sampling_params(text: str) -> dict[str, Any]:
    """Keyword arguments of ``SamplingParams`` from JSON, but for those that every prompt has here.

    Raises:
        ArgumentTypeError: it is JSON of something else, or a value is not accepted.
    """
    try:
        found = dict(json.loads(text))
        SamplingParams(**found)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not the JSON of SamplingParams: {error}") from error
    if fixed := found.keys() & {"n", "max_tokens", "ignore_eos"}:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(fixed))} cannot be given: --tokens of one sample are timed"
        )
    return found


def run_case(args: argparse.Namespace, states: list[Engine], case: Case, dtype: str) -> dict[str, Any]:
    """Milliseconds of both states, the one before first, in turns."""
    vocab_size = PRESETS[args.preset].vocab_size
    times: list[list[float]] = [[], []]
    reads, same = [], 0
    for repeat in range(-1, args.repeats):  # the first is a warm-up
        prompts = random_prompts(vocab_size, case.seqs, case.prompt, 1000 * case.seqs + repeat)
        reads.append(measure_limits(args.threads, [], args.megabytes)["read"] / 1e9)
        answers: list[list[list[int]]] = [[], []]
        for index in (0, 1) if repeat % 2 else (1, 0):
            time.sleep(PAUSE)
            run = states[index].generate(prompts, case.tokens, **args.sampling)
            answers[index] = run.token_ids
            if repeat >= 0:
                times[index].append(seconds_of(run, case) * 1e3)
        same += sum(before == now for before, now in zip(*answers, strict=True))
    before, now = times
    return {
        "case": case.name,
        "precision": dtype,
        "least_before": min(before),
        "least_now": min(now),
        "median_before": statistics.median(before),
        "median_now": statistics.median(now),
        "ratio_of_least": min(before) / min(now),
        "ratio_of_medians": statistics.median(before) / statistics.median(now),
        "same_tokens": same / (case.seqs * (args.repeats + 1)),
        "read_GB_s": statistics.median(reads),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse the command line, run every case in every dtype, print."""
    made = option_parser(__doc__)
    made.add_argument("before", type=Path, help="the folder of the other state")
    made.add_argument("--seqs", nargs="*", type=int, default=[1, 8, 32], help="sequences decoded together")
    made.add_argument("--prefill", nargs="*", type=int, default=[512], help="lengths of a prompt alone")
    made.add_argument("--prompt", type=int, default=64, help="tokens before a decode")
    made.add_argument("--tokens", type=int, default=12, help="tokens of a decode")
    made.add_argument("--screened", action="store_true", help="both states with screen_head=True")
    help_sampling = "SamplingParams of every prompt, in JSON; the same tokens need a seed"
    made.add_argument("--sampling", type=sampling_params, default={}, help=help_sampling)
    args = made.parse_args(arguments)
    adapter = SCREENED if args.screened else OURS
    if args.repeats < 1 or args.tokens < 2 or min([args.prompt, *args.seqs, *args.prefill]) < 1:
        made.error("--repeats, --prompt, --seqs and --prefill must be at least 1, --tokens at least 2")
    if not list((args.before / "engine" / "backends").glob("_native*")):
        made.error(f"{args.before} has no engine with a built extension: run python setup.py build_ext --inplace there")
    if not args.seqs and not args.prefill:
        made.error("there is nothing to run: neither --seqs nor --prefill has a number")
    cases = [Case(f"decode {n}", n, args.prompt, args.tokens) for n in args.seqs]
    cases += [Case(f"prefill {n}", 1, n, 1) for n in args.prefill]
    checkpoint = shared_checkpoint(args.folder / "models", args.preset)
    rows = []
    for dtype in args.dtypes:
        with ExitStack() as stack:
            states = []
            for name, home in (("before", args.before.resolve()), ("now", None)):
                log = args.folder / f"{name}-{dtype}.log"
                python = Path(sys.executable)
                engine, _ = start(adapter, python, checkpoint, dtype, log, args.threads, max([1, *args.seqs]), home)
                stack.callback(engine.close)
                states.append(engine)
            for case in cases:
                rows.append(run_case(args, states, case, dtype))
                print(
                    "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in rows[-1].items()), flush=True
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
