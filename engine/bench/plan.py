"""``python -m engine.bench --plan CARD``: what GPT-2's launches move and compute, over what a card is published to do.

An estimate, and nothing else: no launch reaches the published rates, and nothing here was measured. The bytes and
operations are those of ``cost()``, which the tests count on the launches themselves (``tests/test_kernel_bytes.py``).

Published rates, dense, accumulating in float32, by NVIDIA:

- H100 SXM5: 3.35 TB/s; 989 TFLOPS bf16 and fp16, 494 tf32 (halves of the 1,979 and 989 stated with sparsity).
  "NVIDIA H100 Tensor Core GPU" datasheet.
- A100 80GB SXM4: 2,039 GB/s; 312 TFLOPS bf16 and fp16, 156 tf32. "NVIDIA A100 Tensor Core GPU" datasheet.
- L4: 300 GB/s; 121 TFLOPS bf16 and fp16, 60 tf32 (halves of the 242 and 120 stated with sparsity). "NVIDIA L4 Tensor
  Core GPU" datasheet.
- GeForce RTX 4090: 1,008 GB/s; 165.2 TFLOPS bf16 and fp16, 82.6 tf32. "NVIDIA Ada GPU Architecture" whitepaper,
  appendix A.

A launch costs about 6 us from Python and 1.3 us inside a CUDA graph, both published figures.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.config import ModelConfig

SECONDS_FROM_PYTHON, SECONDS_IN_GRAPH = 6e-6, 1.3e-6
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = {  # --dtype -> storage type, kind of weights, whose rate multiplies
    "bfloat16": ("bfloat16", "float", "half"),
    "float16": ("float16", "float", "half"),
    "float32": ("float32", "float", "float32"),
    "int8": ("bfloat16", "int8", "half"),
    "int4": ("bfloat16", "int4", "half"),
}


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is published to do: bytes a second from memory, operations a second by operand type."""

    name: str
    bandwidth: float
    half: float
    tf32: float

    @property
    def float32(self) -> float:
        """Operations a second of float32 operands: the kernels make three products of tf32 of each."""
        return self.tf32 / 3


CARDS = {
    "h100": Card("H100 SXM5", 3.35e12, 989e12, 494e12),
    "a100": Card("A100 80GB SXM4", 2.039e12, 312e12, 156e12),
    "l4": Card("L4", 300e9, 121e12, 60e12),
    "rtx4090": Card("GeForce RTX 4090", 1.008e12, 165.2e12, 82.6e12),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """One step on a card. Seconds; ``tokens`` is what the step runs, ``sequences`` for how many."""

    sequences: int
    tokens: int
    bytes: int
    flops: int
    launches: int
    floor: float

    @property
    def in_graph(self) -> float:
        """Seconds with every launch in a CUDA graph, one after another."""
        return self.floor + self.launches * SECONDS_IN_GRAPH

    @property
    def from_python(self) -> float:
        """Seconds with every launch from Python, which queues them while the card works."""
        return max(self.in_graph, self.launches * SECONDS_FROM_PYTHON)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "seconds_in_graph": self.in_graph,
            "seconds_from_python": self.from_python,
            "launch_share_in_graph": 1 - self.floor / self.in_graph,
            "launch_share_from_python": 1 - self.floor / self.from_python,
            "tokens_per_second_in_graph": self.tokens / self.in_graph,
            "tokens_per_second_from_python": self.tokens / self.from_python,
        }


def estimate(model: ModelConfig, card: Card, spans: Sequence[tuple[int, int]], dtype: str = "bfloat16") -> Estimate:
    """A step that runs ``spans``, (first position, number of tokens) of each sequence, and draws for each by the fused
    head, as without top-k, top-p and min-p.

    The floor is, launch by launch, the longer of moving its unique bytes and computing its products. With int8 and
    int4 weights products are multiplied in bfloat16; a product of float32 is three of tf32.

    Raises:
        ValueError: a dtype that the kernels do not have, or Triton, which the kernels import, is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--plan has no dtype {dtype!r}; it accepts {', '.join(DTYPES)}")
    if "triton" not in sys.modules and find_spec("triton") is None:
        raise ValueError("--plan reads the kernels, which need the package triton (Linux only)")
    from kernels.launches import ModelShape, step_launches

    storage, kind, operands = DTYPES[dtype]
    shape = ModelShape(
        model.vocab_size, model.context_length, model.embed_dim, model.n_heads, model.n_layers, model.hidden_dim
    )
    launches = step_launches(shape, spans, getattr(torch, storage), kind, fused=True)
    rate = getattr(card, operands)
    return Estimate(
        sequences=len(spans),
        tokens=sum(count for _, count in spans),
        bytes=sum(one.times * one.cost.total_bytes for one in launches),
        flops=sum(one.times * one.cost.flops for one in launches),
        launches=sum(one.times for one in launches),
        floor=sum(one.times * max(one.cost.total_bytes / card.bandwidth, one.cost.flops / rate) for one in launches),
    )


def plan(
    console: Console, name: str, model: ModelConfig, card: str, dtype: str, batches: Sequence[int], context: int
) -> dict[str, Any]:
    """Print the estimate of decoding with ``context`` positions behind each sequence, and of prefill; for JSON."""
    rates = CARDS[card]
    decode = [estimate(model, rates, [(context - 1, 1)] * batch, dtype) for batch in batches]
    lengths = sorted({min(length, model.context_length) for length in (128, 512, 1024)})
    prefill = [estimate(model, rates, [(0, length)], dtype) for length in lengths]
    precision = DTYPES[dtype][0] if DTYPES[dtype][1] == "float" else f"{dtype} weights, {DTYPES[dtype][0]} activations"
    console.print(f"ESTIMATE, not a measurement: {name}, {precision}, {rates.name}", style="bold")
    count = decode[0].launches
    _print(console, f"estimated decode step, {context} positions each", "batch", [(e.sequences, e) for e in decode])
    _print(console, "estimated prefill of one sequence", "tokens", [(e.tokens, e) for e in prefill])
    console.print(
        "floor: each launch at the published bandwidth or matrix rate, whichever takes longer. graph and Python: the "
        f"share of the step that its {count} launches add, at 1.3 us in a CUDA graph and at 6 us from Python (both "
        "published), and the tokens/s with them. Real kernels stay below the published rates: an estimate says where "
        "the time goes, not what a run will show.",
        highlight=False,
    )
    rows = {"decode": [e.numbers() for e in decode], "prefill": [e.numbers() for e in prefill]}
    return {"estimate": True, "model": name, "card": asdict(rates), "dtype": dtype, "context": context} | rows


def _print(console: Console, title: str, first: str, rows: Sequence[tuple[int, Estimate]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in (first, "MB", "floor us", "graph", "tokens/s", "Python", "tokens/s"):
        table.add_column(heading, justify="right")
    for label, e in rows:
        n = e.numbers()
        cells = [f"{e.bytes / 1e6:,.1f}", f"{e.floor * 1e6:,.1f}"]
        for way in ("in_graph", "from_python"):
            cells += [f"{n[f'launch_share_{way}']:.0%}", f"{n[f'tokens_per_second_{way}']:,.0f}"]
        table.add_row(str(label), *cells)
    console.print(table)
