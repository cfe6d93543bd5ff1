"""What the bench prints: tables for people, one JSON document for programs."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engine.bench.check import CheckResult
from engine.bench.measure import BatchResult, LoopResult


def print_check(console: Console, result: CheckResult) -> None:
    """One line on whether the engine is right."""
    verdict = "[bold green]agrees[/]" if result.passed else "[bold red]DISAGREES[/]"
    excused = f", {result.num_excused} within the error" if result.num_excused else ""
    console.print(
        f"The engine {verdict} with GPTModel: {result.num_equal}/{result.num_tokens} greedy tokens equal{excused}, "
        f"{result.measure} {result.error:.1e} (accepted {result.limit:.1e}; {result.rule})"
    )


def print_headline(console: Console, loops: dict[str, LoopResult]) -> None:
    """What a user came for: their loop, the engine, and whether the tokens are the same.

    ``loops`` has the naive loop, ``optimize`` and ``LLM`` in its precision, then perhaps ``LLM`` in a lower one.
    """
    naive, _, engine, *lower = loops.values()
    equal = sum(a == b for a, b in zip(engine.token_ids, naive.token_ids, strict=True))
    console.print(
        f"The naive loop: {naive.tokens_per_second:.1f} tokens/s. "
        f"The engine: [bold]{engine.tokens_per_second:.1f} tokens/s, "
        f"{engine.tokens_per_second / naive.tokens_per_second:.1f} times that[/], "
        f"with {equal} of {len(naive.token_ids)} tokens identical."
        + "".join(f" In lower precision: {loop.tokens_per_second:.1f} tokens/s." for loop in lower),
        highlight=False,
    )


def print_loops(console: Console, loops: dict[str, LoopResult], prompt_len: int, steps: int) -> None:
    """The naive loop beside the same tokens from ``optimize`` and from ``LLM``, as ``print_headline`` says."""
    table = Table(title=f"{steps} greedy tokens after a prompt of {prompt_len}, one sequence", title_justify="left")
    for heading in ("", "tokens/s", "times naive", "same tokens"):
        table.add_column(heading, justify="left" if not heading else "right")
    naive = next(iter(loops.values()))
    for name, loop in loops.items():
        equal = sum(a == b for a, b in zip(loop.token_ids, naive.token_ids, strict=True))
        ratio = loop.tokens_per_second / naive.tokens_per_second
        table.add_row(name, f"{loop.tokens_per_second:.1f}", f"{ratio:.1f}x", f"{equal}/{steps}")
    console.print(table)
    for name in list(loops)[3:]:
        console.print(
            f"{name}: where two tokens are closer than this precision's error it may take the other one, and goes on "
            "from there. Whether it does so nowhere else is what the check above says."
        )


def print_batches(console: Console, batches: Sequence[BatchResult], bandwidth: float, title: str) -> None:
    """The throughput table."""
    table = Table(title=title, title_justify="left")
    columns = ("batch", "prefill", "decode", "ceiling", "MBU", "TTFT", "TPOT", "TPOT p90")
    for heading in columns:
        table.add_column(heading, justify="right")
    for b in batches:
        table.add_row(
            str(b.batch),
            f"{b.prefill_tokens_per_second:,.0f}",
            f"[bold]{b.decode_tokens_per_second:,.0f}[/]",
            f"{b.ceiling(bandwidth):,.0f}",
            f"{b.mbu(bandwidth):.0%}",
            f"{b.ttft * 1e3:.1f}",
            f"{b.tpot * 1e3:.2f}",
            f"{b.tpot_p90 * 1e3:.2f}",
        )
    console.print(table)
    console.print(
        "prefill, decode and ceiling in tokens/s over all sequences, TTFT and TPOT in ms. Decode is measured as "
        "generate runs it, TPOT as a stream does, token by token. The ceiling is what the bytes of a decode step "
        f"(weights, K and V) allow at {bandwidth / 1e9:.1f} GB/s, the read bandwidth measured in this run; MBU is the "
        "share of it reached."
    )
    if any(b.mbu(bandwidth) > 1 for b in batches):
        console.print("MBU above 100%: this model fits in the CPU's cache, so main memory is not its limit")
