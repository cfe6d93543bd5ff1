"""A stream's steps while something else wants the CPUs: ``python -m benchmarks.beside``.

Milliseconds of single decode steps of the native backend, as a server or ``LLM.stream`` runs them (back in Python after
each): alone, and 5 ms apart; beside an endless loop at nice 10 and at nice 0; beside a second stream in another
process, and in turns with one in this process; in a pool with twice as many threads as CPUs. All threads of a pool wait
for its slowest one, so a step shows what the scheduler does to any of them. Printed are the median, the 90th percentile
and the maximum of each of ``--repeats`` runs.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from engine.llm import DEMO_MODEL, LLM
from engine.machine import usable_cpus
from engine.messages import SamplingParams

LOOP = "import os; os.nice({nice}); print('busy', flush=True)\nwhile True: pass"


def load(args: argparse.Namespace, threads: int) -> LLM:
    """The model, for one sequence."""
    return LLM(args.model, backend="native", dtype=args.dtype, threads=threads, max_num_seqs=1)


def milliseconds(args: argparse.Namespace, *llms: LLM, apart: float = 0.0) -> np.ndarray:
    """Wall time of each step after a prompt, of models that take turns, ``apart`` seconds after the step before."""
    params = SamplingParams(temperature=0.0, max_tokens=args.steps + 1, ignore_eos=True)
    requests = [llm.submit(list(range(1, args.prompt + 1)), params) for llm in llms]
    for llm in llms:
        llm.step()
    found = []
    while not requests[-1].finished:
        for llm in llms:
            if apart:
                time.sleep(apart)
            start = time.perf_counter()
            llm.step()
            found.append(time.perf_counter() - start)
    if len(found) != args.steps * len(llms):
        raise SystemExit(f"a prompt of {args.prompt} and {args.steps} steps are longer than the model's context")
    return np.array(found) * 1e3


@contextmanager
def process(*command: str) -> Iterator[None]:
    """Something else that runs meanwhile; it prints a line once it is busy."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        try:
            assert other.stdout is not None
            if not other.stdout.readline():
                raise RuntimeError(f"{' '.join(command)} ended")
            yield
        finally:
            other.kill()


def show(args: argparse.Namespace, case: str, *llms: LLM, apart: float = 0.0) -> None:
    """Print a line of each run."""
    for _ in range(args.repeats):
        found = milliseconds(args, *llms, apart=apart)
        p50, p90 = np.quantile(found, [0.5, 0.9])
        print(f"{case:24} median {p50:7.3f}  p90 {p90:7.3f}  max {found.max():7.3f} ms", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a checkpoint (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case")
    parser.add_argument("--endless", action="store_true", help=argparse.SUPPRESS)  # what the second stream does
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    for name in ("prompt", "steps", "repeats"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    llm = load(args, usable_cpus())
    milliseconds(args, llm)
    if args.endless:
        print("busy", flush=True)
        while True:
            milliseconds(args, llm)
    show(args, "alone", llm)
    show(args, "5 ms apart", llm, apart=0.005)
    for nice in (10, 0):
        with process(sys.executable, "-c", LOOP.format(nice=nice)):
            show(args, f"beside a loop, nice {nice}", llm)
    with process(sys.executable, "-m", "benchmarks.beside", "--endless", *arguments):
        show(args, "beside a second stream", llm)
    show(args, "two models in turns", llm, load(args, usable_cpus()))
    show(args, "twice as many threads", load(args, 2 * usable_cpus()))


if __name__ == "__main__":
    main()
