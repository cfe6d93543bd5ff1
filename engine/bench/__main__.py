"""The command line of the bench."""

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import engine
from engine.bench.check import check_against_reference
from engine.bench.measure import (
    BatchResult,
    LoopResult,
    measure_batch,
    measure_engine_loop,
    measure_loop,
    read_bandwidth,
)
from engine.bench.plan import BATCHES, CARDS, plan
from engine.bench.plot import chart_path, save_plot
from engine.bench.presets import PRESETS, preset_config, random_checkpoint
from engine.bench.report import print_batches, print_check, print_headline, print_loops
from engine.checkpoints.canonical import Checkpoint, to_reference
from engine.checkpoints.load import load_checkpoint
from engine.cli import add_model_options, console, model_options, run, writable
from engine.llm import DEMO_MODEL, LLM
from engine.machine import processor_name
from engine.messages import SamplingParams
from engine.optimize import optimize
from engine.options import dtype_name
from engine.reference import GPTModel

COMMAND = "python -m engine.bench"
EXAMPLES = """examples:
  python -m engine.bench                                             the demo model
  python -m engine.bench --model model.pth --config config.json      your own: your loop, the engine, the same tokens
  python -m engine.bench --preset gpt2 --prompt-len 448 --gen-len 64
  python -m engine.bench --preset gpt2 --batch 1,8,32 --json result.json --plot result.png
  python -m engine.bench --plan h100 --preset gpt2-xl --dtype int8   an estimate for a card that is not here
"""
SAMPLE_PROMPT = "It is a truth universally acknowledged, that"
PLANNED = {"plan", "preset", "batch", "prompt_len", "gen_len", "dtype", "json"}  # the options that --plan reads


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=COMMAND,
        description="First the check: the engine against GPTModel on this very model. Then its speed, beside the naive "
        "loop and beside the ceiling that the memory sets. The last line of standard output is JSON.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench = made.add_argument_group("bench")
    bench.add_argument("--preset", choices=PRESETS, help="a GPT-2 size with random weights, in place of --model")
    bench.add_argument("--batch", help="sequences at once, a list (default: 1,4,16; with --plan 1 to 256)")
    bench.add_argument("--plan", choices=CARDS, help="measure nothing: estimate GPT-2 on a card by its published rates")
    bench.add_argument("--prompt-len", type=int, default=128, help="tokens in a prompt (default: %(default)s)")
    bench.add_argument("--gen-len", type=int, default=64, help="tokens to generate (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=3, help="runs that count (default: %(default)s)")
    bench.add_argument("--quick", action="store_true", help="small sizes: --batch 1,4 --gen-len 16 --repeats 1")
    bench.add_argument("--no-naive", action="store_true", help="leave the naive loop out: it is slow on a large model")
    bench.add_argument("--json", type=writable, help="write the JSON document to a file, too")
    bench.add_argument("--plot", type=chart_path, help="write a chart (PNG)")
    add_model_options(made)
    return made


def main() -> None:
    """Check, measure, print."""
    args = parser().parse_args()
    if args.plan:
        _plan(args)
        return
    args.batch = args.batch or "1,4,16"
    if args.quick:
        args.batch, args.gen_len, args.repeats = "1,4", min(args.gen_len, 16), 1
    batches = _sizes(args.batch)
    if args.preset and args.model:
        raise ValueError("--preset and --model exclude each other")
    if args.gen_len < 3 or args.prompt_len < 8 or args.repeats < 1:
        raise ValueError("--gen-len must be at least 3, --prompt-len at least 8, --repeats at least 1")
    out = console()
    checkpoint = _checkpoint(args)
    llm = _llm(args, checkpoint, max(batches))
    if args.prompt_len + args.gen_len > llm.max_model_len:
        raise ValueError(
            f"--prompt-len {args.prompt_len} and --gen-len {args.gen_len} exceed the context of {llm.max_model_len}"
        )
    if args.preset is None and args.model is None:
        _show_sample(out, llm)
    reference = to_reference(checkpoint.config, checkpoint.weights)
    prompts = _prompts(llm.model_config.vocab_size, max(batches), args.prompt_len)
    progress = Console(file=sys.stderr)
    with progress.status("checking the engine against GPTModel"):
        check = check_against_reference(llm, reference, [p[: 16 + 7 * i] for i, p in enumerate(prompts[:2])], 24)
    if not check.passed:
        print_check(out, check)
        raise SystemExit("the engine disagrees with the reference on this model: no speed is printed")
    results: dict[str, Any] = {"check": dataclasses.asdict(check)}
    loops: dict[str, LoopResult] = {}
    if not args.no_naive:
        with progress.status("the naive loop, optimize, and the engine"):
            loops = _loops(args, checkpoint, llm, reference, prompts[0])
        print_headline(out, loops)
    print_check(out, check)
    if loops:
        print_loops(out, loops, args.prompt_len, args.gen_len)
    measured, bandwidth = _measure(progress, llm, prompts, batches, args)
    name = args.preset or args.model or "the demo model"
    title = f"{name}, {llm.backend.name} backend, {llm.dtype} on {llm.device}"
    print_batches(out, measured, bandwidth, f"{title}: prompts of {args.prompt_len}, {args.gen_len} tokens each")
    results |= {"machine": _machine(), "model": name, "backend": llm.backend.name, "dtype": llm.dtype}
    results |= {"device": llm.device, "prompt_len": args.prompt_len, "gen_len": args.gen_len}
    results |= {"loops": {key: dataclasses.asdict(loop) for key, loop in loops.items()}}
    results |= {"read_bandwidth": bandwidth, "batches": [_numbers(b, bandwidth) for b in measured]}
    _hand_out(results, args.json)
    if args.plot:
        save_plot(args.plot, title, loops, measured, bandwidth)
        progress.print(f"chart written to {args.plot}")


def _hand_out(results: dict[str, Any], path: Path | None) -> None:
    document = json.dumps(results)
    print(document, flush=True)  # first: whatever becomes of the file
    if path:
        path.write_text(document + "\n")


def _plan(args: argparse.Namespace) -> None:
    """Print the estimate for a card; the context of a decode step is that in the middle of generating."""
    if args.model:
        raise ValueError("--plan and --model exclude each other; --preset chooses a GPT-2 size")
    unset = vars(parser().parse_args([]))
    unused = sorted(name for name, value in vars(args).items() if name not in PLANNED and value != unset[name])
    if unused:
        given, read = (
            ", ".join("--" + name.replace("_", "-") for name in names) for names in (unused, sorted(PLANNED))
        )
        raise ValueError(f"--plan measures nothing and has no use for {given}; it reads {read}")
    name = args.preset or "gpt2"
    config, context = preset_config(name), args.prompt_len + args.gen_len // 2
    if not 1 <= context <= config.context_length:
        raise ValueError(f"--prompt-len {args.prompt_len} and --gen-len {args.gen_len} do not fit a context of 1024")
    batches = _sizes(args.batch) if args.batch else list(BATCHES)
    dtype = "bfloat16" if args.dtype == "auto" else dtype_name(args.dtype)
    _hand_out(plan(console(), name, config, args.plan, dtype, batches, context), args.json)


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise ValueError(f"--batch must be positive integers separated by commas, got {text!r}")
    return sizes


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    if args.preset:
        return random_checkpoint(args.preset)
    return load_checkpoint(args.model or DEMO_MODEL, config=model_options(args)["config"])


def _llm(args: argparse.Namespace, checkpoint: Checkpoint, most: int) -> LLM:
    options = model_options(args) | {"model": checkpoint, "config": None}
    options["max_num_seqs"] = max(options["max_num_seqs"], most)
    options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], most)
    return LLM(**options)


def _prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random prompts, the same at every run."""
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return prompts


def _show_sample(console: Console, llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=60, seed=1813)
    console.print(SAMPLE_PROMPT, style="bold", end="")
    for piece in llm.stream(SAMPLE_PROMPT, params):
        console.print(piece, end="", markup=False, highlight=False)
    console.print("\n")


def _loops(
    args: argparse.Namespace, checkpoint: Checkpoint, llm: LLM, reference: GPTModel, prompt: list[int]
) -> dict[str, LoopResult]:
    """The naive loop and what replaces it, in float32 as the loop, and then as asked for where that is less."""
    device, steps = torch.device(llm.device), args.gen_len
    reference = reference.to(device)
    naive = measure_loop(reference, prompt, steps, device)
    fast = optimize(reference, backend=llm.backend.name, threads=llm.engine_config.threads)
    loops = {"naive loop": naive, "engine.optimize, same loop": measure_loop(fast, prompt, steps, device)}
    if llm.dtype in ("float32", "float64"):
        return loops | {"LLM.generate": measure_engine_loop(llm, prompt, steps)}
    del fast  # before another engine takes its memory
    options = model_options(args) | {"model": checkpoint, "config": None, "dtype": "float32"}
    options |= {"max_num_seqs": 1, "kv_cache_memory_bytes": None}  # room for one sequence, whatever llm's was given
    return loops | {
        "LLM.generate, float32": measure_engine_loop(LLM(**options), prompt, steps),
        f"LLM.generate, {llm.dtype}": measure_engine_loop(llm, prompt, steps),
    }


def _measure(
    console: Console, llm: LLM, prompts: list[list[int]], sizes: list[int], args: argparse.Namespace
) -> tuple[list[BatchResult], float]:
    """The batch sizes one by one under a progress bar, and the read bandwidth measured before and after them."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(sizes) + 2)
        bandwidth = read_bandwidth(llm.device)
        progress.advance(task)
        results = []
        for size in sizes:
            progress.update(task, description=f"batch {size}")
            results.append(measure_batch(llm, prompts[:size], args.gen_len, args.repeats))
            progress.advance(task)
        bandwidth = max(bandwidth, read_bandwidth(llm.device))
    return results, bandwidth


def _numbers(result: BatchResult, bandwidth: float) -> dict[str, Any]:
    limit = {"ceiling_tokens_per_second": result.ceiling(bandwidth), "mbu": result.mbu(bandwidth)}
    return {**dataclasses.asdict(result), **limit}


def _machine() -> dict[str, Any]:
    return {
        "engine": engine.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    run(COMMAND, main)
