"""Each operator's launches at the sizes of GPT-2 small in bfloat16: GB/s by its ``cost()``, and the share of a copy's.

    python -m pytest benchmarks                    on a GPU
    python -m pytest benchmarks --tiny             anywhere: the same code at a tiny shape, interpreted

``tests/test_kernel_lint.py`` wants a benchmark of every operator here, by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from kernel_timing import MOST_COPIES, RESULTS, ROTATION, Machine

from kernels import attention as attention_kernel
from kernels import embedding as embedding_kernel
from kernels import head_ranks as head_ranks_kernel
from kernels import head_sample as head_sample_kernel
from kernels import layer_norm as layer_norm_kernel
from kernels import linear as linear_kernel
from kernels import logits as logits_kernel
from kernels import sampling as sampling_kernel
from kernels import tiles
from kernels.cost import Cost
from kernels.launches import MODELS, ModelShape
from kernels.weights import Weights, pack

DTYPE = torch.bfloat16
EPS = 1e-5
BLOCK = 16
TINY = ModelShape(vocab_size=97, context_length=64, width=64, heads=2, layers=1, hidden=128)
rows_of_a_step = pytest.mark.parametrize("rows", [1, 32, 512])
rows_that_draw = pytest.mark.parametrize("rows", [1, 32, 256])


@dataclass
class Work:
    """One launch on operands of its own, what it is said to move, and what it writes."""

    launch: Callable[[], None]
    cost: Cost
    outputs: list[torch.Tensor]


class Bench:
    """Makes a launch's operands on this machine, and measures."""

    def __init__(self, machine: Machine, benchmark: Any, rows: int) -> None:
        self.machine, self.benchmark = machine, benchmark
        self.shape = TINY if machine.tiny else MODELS["gpt2"]
        self.rows = min(rows, 3) if machine.tiny else rows
        self.context = 40 if machine.tiny else 512

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self.machine.device).to(dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, dtype=torch.int32, device=self.machine.device)

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.machine.device)

    def weights(self, n: int, k: int, kind: str = "float") -> Weights:
        return pack(self.floats(n, k) / k**0.5, DTYPE, kind)

    def norm(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.floats(width, dtype=DTYPE), self.floats(width, dtype=DTYPE)

    def options(self) -> sampling_kernel.Options:
        fill = lambda v, dtype=torch.float32: torch.full((self.rows,), v, dtype=dtype, device=self.machine.device)  # noqa: E731
        none, stream = fill(0, torch.int32), torch.arange(self.rows, dtype=torch.int32, device=self.machine.device)
        return sampling_kernel.Options(
            fill(0.8), none, fill(1.0), fill(0.0), fill(7, torch.int64), stream, none, fill(0.0), fill(0.0), fill(1.0)
        )

    def drawn(self, top: int = 0) -> sampling_kernel.Drawn:
        i, f = (torch.empty(self.rows, dtype=d, device=self.machine.device) for d in (torch.int32, torch.float32))
        best = i.new_empty(self.rows, top), f.new_empty(self.rows, top)
        return sampling_kernel.Drawn(i, f, i.clone(), i.clone(), *best)

    def measure(self, make: Callable[[], Work]) -> None:
        """Time ``make``'s launch, on as many sets of operands as the L2 cache cannot hold."""
        works = [make()]
        cost, machine = works[0].cost, self.machine
        copies = tiles.cdiv(ROTATION * machine.cache, cost.total_bytes)
        works += [make() for _ in range(min(copies, MOST_COPIES) - 1)]
        for work in works:
            for output in work.outputs:
                output.fill_(torch.nan)
        run = machine.replayable([work.launch for work in works])
        self.benchmark.pedantic(run, rounds=1 if machine.tiny else 30, warmup_rounds=0 if machine.tiny else 3)
        assert not any(output.isnan().any() for work in works for output in work.outputs), "an output was not written"
        name = self.benchmark.name
        if machine.tiny or self.benchmark.stats is None:
            RESULTS.append(f"{name}: ran, {cost.total_bytes} bytes; nothing was measured")
            return
        seconds = self.benchmark.stats.stats.median / len(works)
        rate = cost.total_bytes / seconds
        self.benchmark.extra_info.update(
            {"bytes": cost.total_bytes, "us": seconds * 1e6, "GB/s": rate / 1e9, "share of copy": rate / machine.copy}
        )
        RESULTS.append(
            f"{name}: {seconds * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, {rate / machine.copy:.0%} of a copy's "
            f"{machine.copy / 1e9:.0f}, {cost.flops / seconds / 1e12:.1f} TFLOP/s"
        )


@pytest.fixture
def bench(machine: Machine, benchmark: Any, rows: int) -> Bench:
    torch.manual_seed(0)
    return Bench(machine, benchmark, rows)


@rows_of_a_step
def test_embedding(bench: Bench) -> None:
    shape, rows = bench.shape, bench.rows
    tok = bench.machine.shared("tok", lambda: bench.floats(shape.vocab_size, shape.width, dtype=DTYPE))
    pos = bench.machine.shared("pos", lambda: bench.floats(shape.context_length, shape.width, dtype=DTYPE))

    def make() -> Work:
        ids, positions = bench.integers(shape.vocab_size, rows), bench.integers(shape.context_length, rows)
        x, normed = bench.floats(rows, shape.width), bench.floats(rows, shape.width, dtype=DTYPE)
        norm = bench.norm(shape.width)
        cost = embedding_kernel.cost(rows, shape.width, DTYPE.itemsize, len(ids.unique()), len(positions.unique()))
        none = bench.zeros(rows) - 1
        return Work(
            lambda: embedding_kernel.embedding(ids, none, none, positions, tok, pos, x, *norm, normed, EPS),
            cost,
            [x, normed],
        )

    bench.measure(make)


@rows_of_a_step
def test_layer_norm(bench: Bench) -> None:
    rows, width = bench.rows, bench.shape.width

    def make() -> Work:
        x, y = bench.floats(rows, width, dtype=DTYPE), bench.floats(rows, width, dtype=DTYPE)
        weight, bias = bench.norm(width)
        cost = layer_norm_kernel.cost(rows, width, DTYPE.itemsize, False)
        return Work(lambda: layer_norm_kernel.layer_norm(x, weight, bias, y, EPS), cost, [y])

    bench.measure(make)


@rows_of_a_step
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize("layer", ["qkv", "proj", "fc", "fc2"])
def test_linear(bench: Bench, layer: str, kind: str) -> None:
    rows, d, hidden = bench.rows, bench.shape.width, bench.shape.hidden
    n, k = {"qkv": (3 * d, d), "proj": (d, d), "fc": (hidden, d), "fc2": (d, hidden)}[layer]
    epilogue = {"qkv": "qkv", "fc": "none"}.get(layer, "residual")

    def make() -> Work:
        device = bench.machine.device
        partials, tile_counters, row_counters = linear_kernel.Workspace.needed(
            rows, n, k, DTYPE.itemsize, epilogue == "residual"
        )
        space = linear_kernel.Workspace(
            torch.empty(partials, device=device), bench.zeros(tile_counters), bench.zeros(row_counters)
        )
        weights, bias = bench.weights(n, k, kind), bench.floats(n, dtype=DTYPE)
        x = bench.floats(rows, k, dtype=DTYPE)
        y = bench.floats(rows, d if layer == "qkv" else n, dtype=torch.float32 if epilogue == "residual" else DTYPE)
        options: dict[str, Any] = {}
        outputs = [y]
        if epilogue == "residual":
            normed = bench.floats(rows, n, dtype=DTYPE)
            options["residual"] = linear_kernel.Residual(bench.floats(rows, n), *bench.norm(n), normed, EPS)
            outputs.append(normed)
        elif epilogue == "qkv":
            cache = bench.floats(2, tiles.cdiv(rows, BLOCK), bench.shape.heads, BLOCK, d // bench.shape.heads).to(DTYPE)
            options["cache"] = linear_kernel.KVCache(cache[0], cache[1], torch.arange(rows, device=device))
        else:
            options["activation"] = "gelu_tanh"
        return Work(
            lambda: linear_kernel.linear(x, weights, bias, y, space, **options),
            linear_kernel.cost(rows, weights, DTYPE.itemsize, epilogue),
            outputs,
        )

    bench.measure(make)


@pytest.mark.parametrize("rows", [1, 32, 256])
@pytest.mark.parametrize("queries", [1, 512])
def test_attention(bench: Bench, queries: int) -> None:
    """``rows`` sequences of the same length, decoded or prefilled whole; few when they are prefilled."""
    shape, last = bench.shape, bench.context
    sequences = bench.rows if queries == 1 else min(bench.rows, 8)
    count, head_dim = min(queries, last), shape.width // shape.heads
    choice = tiles.attention_tiles(head_dim, DTYPE.itemsize, count)
    paging = attention_kernel.Paging(shape.heads, head_dim, BLOCK, tiles.split_kv(shape.heads, shape.context_length))
    starts = np.arange(0, sequences * count + 1, count, dtype=np.int32)
    positions = np.tile(np.arange(last - count, last, dtype=np.int32), sequences)
    listed = attention_kernel.query_tiles(starts, positions, choice.block_q)

    def make() -> Work:
        device, blocks = bench.machine.device, tiles.cdiv(last, BLOCK)
        k, v = (bench.floats(sequences * blocks, shape.heads, BLOCK, head_dim, dtype=DTYPE) for _ in range(2))
        tables = torch.randperm(sequences * blocks, device=device).int().view(sequences, blocks)
        q, out = (bench.floats(sequences * count, shape.width, dtype=DTYPE) for _ in range(2))
        partials, counters = attention_kernel.scratch_sizes(starts[-1], len(listed), paging, choice, last)
        scratch, counters = torch.empty(partials, device=device), bench.zeros(counters)
        query_tiles, scale = torch.from_numpy(listed).to(device), head_dim**-0.5
        return Work(
            lambda: attention_kernel.attention(
                q, k, v, tables, query_tiles, out, scratch, counters, paging, scale, choice, last
            ),
            attention_kernel.cost(listed.tolist(), paging, DTYPE.itemsize, choice),
            [out],
        )

    bench.measure(make)


@rows_that_draw
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_logits(bench: Bench, kind: str) -> None:
    shape, rows = bench.shape, bench.rows

    def make() -> Work:
        x, y = bench.floats(rows, shape.width, dtype=DTYPE), bench.floats(rows, shape.vocab_size)
        weights = bench.weights(shape.vocab_size, shape.width, kind)
        ids = torch.arange(rows, dtype=torch.int32, device=bench.machine.device)
        cost = logits_kernel.cost(rows, weights, DTYPE.itemsize)
        return Work(lambda: logits_kernel.logits(x, weights, ids, y), cost, [y])

    bench.measure(make)


@rows_that_draw
def test_sampling(bench: Bench) -> None:
    rows, vocab = bench.rows, bench.shape.vocab_size

    def make() -> Work:
        y, drawn, options = bench.floats(rows, vocab), bench.drawn(), bench.options()
        cost = sampling_kernel.cost(rows, vocab, 0, sampled_rows=rows)
        return Work(lambda: sampling_kernel.sampling(y, options, drawn, y), cost, [drawn.logprobs])

    bench.measure(make)


class Drawing:
    """Operands of ``head_sample``, and of the ``head_ranks`` that may follow it."""

    def __init__(self, bench: Bench, kind: str, top: int) -> None:
        shape, rows = bench.shape, bench.rows
        self.x, self.drawn = bench.floats(rows, shape.width, dtype=DTYPE), bench.drawn(top)
        self.options, self.weights = bench.options(), bench.weights(shape.vocab_size, shape.width, kind)
        self.ids = torch.arange(rows, dtype=torch.int32, device=bench.machine.device)
        floats, ids, counters = head_sample_kernel.HeadScratch.needed(rows, shape.vocab_size, top)
        self.scratch = head_sample_kernel.HeadScratch(bench.floats(floats), bench.zeros(ids), bench.zeros(counters))

    def sample(self, ranks_follow: bool = False) -> None:
        head_sample_kernel.head_sample(
            self.x, self.weights, self.ids, self.options, self.drawn, self.scratch, ranks_follow
        )

    def rank(self) -> None:
        head_ranks_kernel.head_ranks(self.x, self.weights, self.ids, self.drawn, self.scratch)

    def tiles_above(self) -> int:
        """Vocabulary tiles with a logit above a drawn one, after ``sample``."""
        rows, top = self.drawn.top_ids.shape
        planes, _, (chosen, _), _, _ = self.scratch.parts(rows, self.weights.shape[0], top)
        maxima = planes[0, : rows * tiles.cdiv(self.weights.shape[0], tiles.VOCAB_TILE)].view(rows, -1)
        return int((maxima > chosen[:rows, None]).any(0).sum())


@rows_that_draw
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_head_sample(bench: Bench, kind: str) -> None:
    def make() -> Work:
        drawing = Drawing(bench, kind, top=0)
        cost = head_sample_kernel.cost(bench.rows, drawing.weights, DTYPE.itemsize)
        return Work(drawing.sample, cost, [drawing.drawn.logprobs])

    bench.measure(make)


@rows_that_draw
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_head_ranks(bench: Bench, kind: str) -> None:
    """Random logits: most tiles have one above a drawn token's, which is the dearest case."""

    def make() -> Work:
        drawing = Drawing(bench, kind, top=5)
        drawing.sample(ranks_follow=True)
        cost = head_ranks_kernel.cost(bench.rows, drawing.weights, DTYPE.itemsize, 5, drawing.tiles_above())
        return Work(drawing.rank, cost, [drawing.drawn.top_logprobs])

    bench.measure(make)
