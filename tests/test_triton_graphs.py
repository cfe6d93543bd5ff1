"""Captured decode steps, interpreted: the bits of the launches one by one, and nothing read but what was uploaded."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from backend_driver import BLOCK, Driver, Running, greedy, random_weights, tokens
from step_lives import a_life, decode, first_difference, heat

from engine.backends import triton_graphs, triton_step
from engine.backends.base import Batch, StepOutput
from engine.backends.triton_backend import TritonInterpretBackend
from engine.backends.triton_buffers import DrawnLayout, Layout, Slot
from engine.config import ModelConfig

MODEL = ModelConfig(vocab_size=97, context_length=150, embed_dim=32, n_heads=1, n_layers=1, hidden_dim=32)


def driver(graphs: bool, dtype: str = "float32") -> Driver:
    made = TritonInterpretBackend(
        MODEL, random_weights(MODEL), dtype=dtype, device="cpu", block_size=BLOCK, graphs=graphs
    )
    made.allocate(40)
    made._step.cache.zero_()
    return Driver(made, num_blocks=40)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    replayed = []
    replay = triton_graphs.RecordedGraph.replay
    monkeypatch.setattr(
        triton_graphs.RecordedGraph, "replay", lambda self: replayed.append(len(self._launches)) or replay(self)
    )
    yield replayed


@pytest.fixture(scope="module")
def eager() -> list[Any]:
    return list(a_life(driver(graphs=False)))


def test_a_step_that_draws_nothing_is_not_waited_for_until_its_slot_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[Slot] = []
    monkeypatch.setattr(Slot, "wait", lambda slot: waits.append(slot))
    d = driver(graphs=True)
    sequence = d.sequence(40)
    for i, waited in enumerate((0, 1, 2)):
        d.run([(sequence, tokens(3, i))])
        assert len(waits) == waited
    assert len(d.backend._step.slots._free) == 1


@pytest.mark.slow
def test_a_replayed_step_is_the_eager_one_bit_for_bit(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as replayed:
        assert first_difference(a_life(driver(graphs=True)), eager) is None
    assert len(replayed) == 8
    assert set(replayed) <= {1 + 5 * MODEL.n_layers + last for last in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flaw", "seen"),
    [
        ("padding writes a key", "step 1: cache"),
        ("tokens of the step before ignored", "step 2: output"),
        ("launched for 64 keys", "step 5: output"),
    ],
)
def test_what_is_wrong_would_show(eager: Any, monkeypatch: pytest.MonkeyPatch, flaw: str, seen: str) -> None:
    """Negative controls: the first step that each mistake spoils."""
    if flaw == "padding writes a key":
        monkeypatch.setitem(triton_graphs.FILL, "slots", 0)
    elif flaw == "launched for 64 keys":
        layout = triton_graphs.padded_layout
        monkeypatch.setattr(triton_step, "padded_length", lambda longest, split, context_length: 64)
        monkeypatch.setattr(triton_step, "padded_layout", lambda arrays, rows, width: layout(arrays, rows, 10))
    else:
        write, nobody = triton_graphs.write_padded, {"previous_rows": np.full(3, -1, np.int32)}
        monkeypatch.setattr(triton_step, "write_padded", lambda arrays, padded: write({**arrays, **nobody}, padded))
    assert first_difference(a_life(driver(graphs=True)), eager) == seen


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_two_steps_in_flight(graphs: bool) -> None:
    """A step is submitted before the one whose tokens it takes is collected; what was collected stays as it is."""
    results = []
    for in_flight in (1, 2):
        d = driver(graphs)
        running = [d.sequence(40), d.sequence(40)]
        d.run([(s, tokens(9, i)) for i, s in enumerate(running)], greedy(2))
        handles: list[Any] = []
        outputs: list[StepOutput] = []
        for _ in range(3):
            handles.append(decode(d, running, greedy, [0, 1]))
            if len(handles) == in_flight:
                outputs.append(d.backend.collect(handles.pop(0)))
        outputs += [d.backend.collect(handle) for handle in handles]
        assert len(d.backend._step.slots._free) == in_flight
        results.append([o.token_ids.tolist() for o in outputs])
    assert results[0] == results[1]
    assert len({tuple(step) for step in results[0]}) > 1


@pytest.mark.slow
def test_new_weights_or_a_new_cache_forget_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    d = driver(graphs=True)
    graphs = d.backend._step.graphs
    for change in (lambda: d.backend.update_weights(random_weights(MODEL, seed=1)), lambda: d.backend.allocate(40)):
        d.release()
        d.backend.collect(decode(d, [d.sequence(20)]))
        assert len(graphs) == 1
        change()
        assert len(graphs) == 0


def test_tokens_that_no_graph_can_find_are_read_by_an_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is drawn than fits at the address that graphs know; the step after takes its tokens all the same."""
    found = []
    for words in (1 << 16, 64):
        monkeypatch.setattr(triton_step, "DRAWN_WORDS", words)
        d = driver(graphs=True)
        s = d.sequence(40)
        batch = d.batch([(s, tokens(9))], heat(1))
        many = {name: np.repeat(getattr(heat(1), name), 20) for name in ("temperature", "top_k", "seeds")}
        batch = replace(batch, draw_rows=np.full(20, 8, np.int32), sampling=replace(heat(20), **many))
        d.backend.collect(d.backend.submit(batch))
        found.append(d.backend.collect(decode(d, [s], greedy, [13])).token_ids.tolist())
        assert len(d.backend._step.graphs) == (words > 64)
    assert found[0] == found[1]


def test_steps_that_a_graph_does_not_serve() -> None:
    d = driver(graphs=True)
    a, b = Running([0, 1], 9), Running([2, 3], 4)
    plain = d.batch([(a, [1]), (b, [2])], greedy(2))
    step = d.backend._step
    assert step._graph_rows(plain) == 2
    assert step._graph_rows(d.batch([(a, [1])])) == 1
    changes: list[dict[str, Any]] = [
        {"draw_rows": np.array([1, 0], np.int32)},
        {"draw_rows": np.array([0, 1, 1], np.int32)},
        {"logits_rows": np.array([0], np.int32)},
        {"block_copies": np.array([[0, 5]], np.int32)},
    ]
    for change in changes:
        assert step._graph_rows(replace(plain, **change)) is None
    assert step._graph_rows(d.batch([(a, [1, 2]), (b, [2])], greedy(2))) is None
    assert step._graph_rows(d.batch([(Running([0]), [1]) for _ in range(257)], greedy(257))) is None


def test_capturing_refuses_what_a_graph_would_not_run() -> None:
    x = torch.zeros(4)
    for wrong in (lambda: x.add_(1), lambda: torch.zeros(2), x.clone):
        with pytest.raises(AssertionError, match="while launches are captured"):
            triton_graphs.RecordedGraph(wrong)
    triton_graphs.RecordedGraph(lambda: x[1:].view(3, 1))
    assert not x.any()


def test_a_cuda_graph_captures_once_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that PyTorch gets, with a stand-in for it: none of this machine's tests has a GPU."""
    calls: list[Any] = []

    class Fake:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def capturing(graph: Any, **options: Any) -> Any:
        calls.append(options)
        yield
        calls.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fake)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream")
    graph = triton_graphs.capture(torch.device("cuda"), lambda: calls.append("launch"))
    graph.replay()
    assert calls == [{"stream": "a stream", "capture_error_mode": "thread_local"}, "launch", "end", "replay"]


def test_sizes() -> None:
    assert [triton_graphs.padded_rows(n) for n in (1, 3, 9, 17, 65, 200, 256, 257)] == [
        1,
        4,
        16,
        24,
        80,
        224,
        256,
        None,
    ]
    lengths = [triton_graphs.padded_length(n, 64, 1000) for n in (1, 64, 65, 129, 513, 1000)]
    assert lengths == [64, 64, 128, 256, 1000, 1000]


def test_padding() -> None:
    arrays = {
        "token_ids": np.array([7], np.int32),
        "slots": np.array([33], np.int64),
        "block_tables": np.array([[2, 99, 99]], np.int32),
        "top_p": np.array([0.5], np.float32),
        "allowed": np.array([[1, 2]], np.uint32),
    }
    layout = triton_graphs.padded_layout(arrays, 2, 2)
    padded = layout.arrays(np.full(layout.size, 0xFF, np.uint8))
    triton_graphs.write_padded(arrays, padded)
    assert {name: array.tolist() for name, array in padded.items()} == {
        "row_ids": [0, 1],
        "token_ids": [7, 0],
        "slots": [33, -1],
        "block_tables": [[2, 99], [0, 0]],
        "top_p": [0.5, 1.0],
        "allowed": [[1, 2], [0xFFFFFFFF] * 2],
    }
    assert all(padded[name].dtype == arrays[name].dtype for name in arrays)
    wide = triton_graphs.padded_layout(arrays, 1, 5)
    padded = wide.arrays(np.full(wide.size, 0xFF, np.uint8))
    triton_graphs.write_padded(arrays, padded)
    assert padded["block_tables"].tolist() == [[2, 99, 99, 0, 0]]
    with pytest.raises(AssertionError, match="how to pad counts"):
        triton_graphs.padded_layout({"counts.ids": np.zeros(3, np.int32)}, 4, 1)


def test_graphs_keep_the_most_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_graphs, "MAX_GRAPHS", 2)
    graphs = triton_graphs.Graphs()
    made = [triton_graphs.Captured(None, None, torch.empty(0), None, ()) for _ in range(3)]  # type: ignore[arg-type]
    graphs.put("a", made[0])
    graphs.put("b", made[1])
    assert graphs.get("a") is made[0]
    graphs.put("c", made[2])
    assert [graphs.get(key) for key in "abc"] == [made[0], None, made[2]]


def test_layouts() -> None:
    arrays = {"a": np.arange(3, dtype=np.int32), "b": np.array([[2**63]], np.uint64), "c": np.zeros((0, 4), np.float32)}
    layout = Layout.of(arrays)
    assert layout == Layout.of({name: array + array.dtype.type(1) for name, array in arrays.items()})
    assert layout != Layout.of(arrays | {"a": np.arange(3, dtype=np.float32)})
    packed = np.full(layout.size, 0xFF, np.uint8)
    for name, place in layout.arrays(packed).items():
        place[...] = arrays[name]
    views = layout.views(torch.from_numpy(packed))
    assert views["a"].tolist() == [0, 1, 2]
    assert views["b"].tolist() == [[-(2**63)]]
    assert views["c"].shape == (0, 4)
    drawn = DrawnLayout(3, 2)
    parts = drawn.split(torch.arange(drawn.size, dtype=torch.int32))
    assert parts["tokens"].tolist() == [0, 1, 2]
    assert parts["top_ids"].tolist() == [[64, 65], [66, 67], [68, 69]]
    starts = sorted((part.data_ptr(), part.nbytes) for part in parts.values())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))


def test_a_batch_may_change_once_it_is_submitted() -> None:
    """The arrays are the caller's and used again: a step has read them when ``submit`` returns."""
    d = driver(graphs=True)
    found = []
    for spoil in (False, True):
        d.release()
        s = d.sequence(20)
        batch: Batch = d.batch([(s, [1])], greedy(1))
        handle = d.backend.submit(batch)
        if spoil:
            batch.token_ids[:] = 9
        found.append(d.backend.collect(handle).logprobs.tolist())
    assert found[0] == found[1]
