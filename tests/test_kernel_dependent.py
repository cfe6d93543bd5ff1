"""Dependent launch: every program waits, and until then fetches weights and does nothing else; read in machine code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import kernel_harness as harness
import numpy as np
import pytest
import torch
import triton.language as tl
from test_kernel_compile import compiled_mode
from test_kernel_head_sample import scratch
from test_kernel_sampling import Row, options, outputs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import attention, embedding, head_sample, linear, logits, tiles
from kernels.launches import MOST_ROWS_DEPENDENT
from kernels.weights import Weights, pack, unpack

STEPS = ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "prefetch.global.L2")


@contextmanager
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], harness.Trace]]:
    """Run inline assembly as events: (program, step, touches so far, addresses)."""
    events: list[Any] = []
    with harness.recording() as trace:

        def inline(self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
            step = next(name for name in STEPS if name in asm)
            events.append((trace.program, step, len(trace.touches), [v.data for v in values]))
            return SimpleNamespace(get_result=lambda i: TensorHandle(np.zeros(1, np.int32), tl.int32))

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline, raising=False)
        yield events, trace


def check(events: list[Any], trace: harness.Trace, weights: Weights | None, programs: int) -> int:
    """Every program lets the next one start and waits, once each, and touches nothing before; lines prefetched."""
    lines = 0
    assert trace.program + 1 == programs
    for program in range(programs):
        mine = [(step, touches, values) for p, step, touches, values in events if p == program]
        names = [step for step, *_ in mine]
        assert names in ([STEPS[0], STEPS[1]], [STEPS[0], STEPS[2], STEPS[1]])
        before = [touch for touch in trace.touches[: mine[-1][1]] if touch[0] == program]
        assert before == [], "something is read or written before the wait"
        if len(mine) == 3:
            assert weights is not None
            addresses = np.unique(mine[1][2][0])
            inside = (addresses >= weights.data.data_ptr()) & (
                addresses < weights.data.data_ptr() + weights.data.nbytes
            )
            assert inside.all(), "a prefetch leaves the weights"
            first_use = [a for p, write, a, _ in trace.touches if p == program and not write]
            used = np.unique(np.concatenate(first_use)) // 128
            assert np.isin(addresses // 128, used).all(), "a line is fetched that the program does not read"
            own = used[
                (used >= weights.data.data_ptr() // 128) & (used * 128 < weights.data.data_ptr() + weights.data.nbytes)
            ]
            assert addresses.min() // 128 == own.min(), "the first line is not fetched"
            lines += len(addresses)
    return lines


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize(("rows", "n", "k"), [(3, 130, 200), (3, 64, 1024), (70, 64, 320)])
def test_linear(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, n: int, k: int) -> None:
    """Few rows, with K splits; many, whose programs walk all splits; the last output block is not full."""
    monkeypatch.setattr(tiles, "TARGET_PROGRAMS", 6)
    dtype = torch.bfloat16
    weights, x = pack(torch.randn(n, k), dtype, kind), torch.randn(rows, k).to(dtype)
    chosen = tiles.linear_tiles(rows, n, k, 2)
    results = []
    for dependent in (False, True):
        y, bias = torch.empty(rows, n), torch.zeros(n, dtype=dtype)
        sizes = linear.Workspace.needed(rows, n, k, 2)
        workspace = linear.Workspace(
            torch.empty(sizes[0]), *(torch.zeros(size, dtype=torch.int32) for size in sizes[1:])
        )
        with traced(monkeypatch) as (events, trace):
            linear.linear(x, weights, bias, y, workspace, dependent=dependent)
        results.append(y)
    programs = tiles.cdiv(n, 64) * tiles.cdiv(rows, chosen.block_t) * (1 if chosen.fused else chosen.splits)
    assert check(events, trace, weights, programs) >= programs
    assert harness.same_bits(*results)
    torch.testing.assert_close(results[0], x.float() @ unpack(weights).T, rtol=0.05, atol=0.5)


def test_attention_embedding_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that have nothing to do wait too: a tile without queries, splits beyond a sequence's end."""
    i = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    paging, choice = attention.Paging(1, 16, 16, 64), tiles.attention_tiles(16, 4, 1)
    k, q = torch.randn(8, 1, 16, 16), torch.randn(2, 16)
    listed = torch.tensor([[0, 0, 70, 1], [0, 0, 0, 0], [1, 1, 3, 1]], dtype=torch.int32)
    tables = torch.arange(16, dtype=torch.int32).view(2, 8) % 8
    partials, counters = attention.scratch_sizes(2, 3, paging, choice, 128)
    parts = torch.empty(partials), torch.zeros(counters, dtype=torch.int32)
    out = torch.empty(2, 16)
    for chosen, programs in ((choice, 6), (tiles.attention_tiles(16, 4, 17), 3)):  # the second walks all splits
        with traced(monkeypatch) as (events, trace):
            attention.attention(q, k, k, tables, listed, out, *parts, paging, 0.25, chosen, 128, dependent=True)
        check(events, trace, None, programs)
    x, normed = torch.randn(9, 32), torch.empty(9, 32)
    ids = torch.zeros(9, dtype=torch.int32)
    with traced(monkeypatch) as (events, trace):
        embedding.embedding(ids, ids - 1, ids, ids, x, x, x.clone(), x[0], x[1], normed, 1e-5, dependent=True)
    check(events, trace, None, 2)
    weights = pack(torch.randn(97, 32), torch.float32)
    with traced(monkeypatch) as (events, trace):
        logits.logits(x, weights, i(0, 8), torch.empty(2, 97), dependent=True)
    assert check(events, trace, weights, 2) > 0
    drawn, space, greedy = outputs(2, 0), scratch(2, 97), options([Row(temperature=0)] * 2, 97)
    with traced(monkeypatch) as (events, trace):
        head_sample.head_sample(x, weights, i(0, 8), greedy, drawn, space, dependent=True)
    assert check(events, trace, weights, 2) > 0


def test_the_check_sees() -> None:
    """Negative controls: a program that does not wait, one that reads before it."""
    trace = harness.Trace([(0, False, np.array([64]), 4)], program=0)
    wait = [(0, STEPS[0], 0, []), (0, STEPS[1], 0, [])]
    check(wait, trace, None, 1)
    for wrong in (wait[:1], [wait[0], (0, STEPS[1], 1, [])]):
        with pytest.raises(AssertionError):
            check(wrong, trace, None, 1)


MACHINE_CODE = r"""
import json, re, sys
sys.path.insert(0, "tests")
import torch
from engine.backends.triton_step import TritonStep
from engine.backends.triton_weights import pack_model
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig
from backend_driver import Driver, Running, greedy
from kernels import offline

target, dependent = "TARGET", TARGET_HAS_IT
model = ModelConfig(50257, 1024, 768, 12, 1, 3072)
weights = {n: torch.empty(s, device="meta") for n, s in canonical_shapes(model).items()}
packed = pack_model(model, weights, "bfloat16", torch.device("meta"))
step = TritonStep(model, packed, torch.bfloat16, 16, graphs=False, dependent=dependent)
step.allocate(4096)
seen = {}
driver = Driver.__new__(Driver)
for count, k in ((1, 5), (4, 5), (5, 5), (70, 5), (1, 0)):
    options = greedy(1, temperature=torch.ones(1).numpy(), top_k=torch.full((1,), k).numpy(), ranks=False)
    batch = driver.batch([(Running(list(range(5))), [1] * count)], options)
    with offline.compiling_only(target, seen=lambda compiled: seen.setdefault(compiled.hash, (count, compiled))):
        step.run(batch)
kept = [offline.Compiled.of(target, compiled) for _, compiled in seen.values()]
texts = offline.disassemble(target, [one.code for one in kept])
marks = {"PREEXIT": "let", "ACQBULK": "wait", "CCTL.E.PF2": "prefetch", "LDG": "load", "LDGSTS": "load",
         "STG": "store", "ATOMG": "atomic", "EXIT": "exit"}
words = r"\b(PREEXIT|ACQBULK|CCTL\.E\.PF2|LDGSTS|LDG|STG|ATOMG|EXIT)\b"
print(json.dumps([
    [compiled.metadata.name, count, one.spills, compiled.metadata.launch_pdl,
     [marks[w] for w in re.findall(words, text)], "griddepcontrol" in compiled.asm["ptx"]]
    for (count, compiled), one, text in zip(seen.values(), kept, texts)
]))
"""


def machine_code(target: str, dependent: bool) -> list[Any]:
    script = MACHINE_CODE.replace("TARGET_HAS_IT", str(dependent)).replace("TARGET", target)
    return json.loads(compiled_mode("-c", script))


@pytest.mark.slow
@pytest.mark.versions
def test_the_machine_code_waits_first() -> None:
    """sm_90: the wait comes before every load, store and atomic; in linears and logits, after the prefetches.

    Steps of 5 and of 70 tokens have none of it.
    """
    found = machine_code("sm_90", True)
    assert {name for name, count, *_ in found if count <= MOST_ROWS_DEPENDENT} == {
        "_embedding_kernel", "_linear_kernel", "_attention_kernel", "_logits_kernel", "_sampling_kernel",
        "_head_sample_kernel",
    }  # fmt: skip
    assert {name for name, count, *_ in found if count == 5} == {
        "_embedding_kernel", "_linear_kernel", "_attention_kernel", "_logits_kernel"
    }  # fmt: skip
    for name, count, spills, launched, order, in_ptx in found:
        assert spills == 0, name
        assert launched == in_ptx == (name != "_sampling_kernel" and count <= MOST_ROWS_DEPENDENT)
        if launched:
            before = order[: order.index("wait")]
            weights = name in ("_linear_kernel", "_logits_kernel", "_head_sample_kernel")
            assert before == ["let", *["prefetch"] * before.count("prefetch")], name
            assert (before.count("prefetch") > 0) == weights


@pytest.mark.slow
def test_sm_80_has_none_of_it() -> None:
    for name, _, spills, launched, order, in_ptx in machine_code("sm_80", False):
        assert (launched, in_ptx, spills) == (False, False, 0), name
        assert not {"let", "wait", "prefetch"} & set(order)
