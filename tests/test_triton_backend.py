"""The Triton backend on tiny models, interpreted: against the reference, however a sequence is cut into steps."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import kernel_harness as harness
import numpy as np
import pytest
import torch
from backend_driver import BLOCK, Driver, Running, greedy, quantised, random_weights, tokens
from precision import BUDGET, TEXT, costs
from sampling_batches import neutral_sampling

from engine import LLM, optimize
from engine.backends import registry
from engine.backends.base import Batch, SamplingBatch
from engine.backends.torch_backend import TorchBackend
from engine.backends.triton_backend import MOST_STEPS, TritonBackend, TritonInterpretBackend
from engine.checkpoints.canonical import to_reference
from engine.checkpoints.load import load_checkpoint
from engine.config import ModelConfig
from engine.llm import DEMO_MODEL
from engine.reference import GPTModel, generate_greedy
from engine.text.load import load_tokenizer
from kernels import tiles

MODEL = ModelConfig(vocab_size=97, context_length=150, embed_dim=80, n_heads=4, n_layers=2, hidden_dim=130)


def reference(model: ModelConfig = MODEL) -> GPTModel:
    return to_reference(model, random_weights(model))


def backend(model: ModelConfig = MODEL, dtype: str = "float32", blocks: int = 60) -> TritonInterpretBackend:
    made = TritonInterpretBackend(model, random_weights(model), dtype=dtype, device="cpu", block_size=BLOCK)
    made.allocate(blocks)
    return made


def oracle(ids: Sequence[int], model: ModelConfig = MODEL) -> torch.Tensor:
    """Float64 logits of every position."""
    with torch.no_grad():
        return reference(model).double()(torch.tensor([list(ids)]))[0]


VARIANTS = {
    "gpt2": MODEL,
    "tied, exact gelu, one head": ModelConfig(61, 40, 37, 1, 1, 50, activation="gelu", tied_head=True),
    "relu, own scales": ModelConfig(130, 64, 64, 2, 2, 64, activation="relu", attn_scales=(0.3, 0.1)),
    "silu": ModelConfig(40, 30, 48, 3, 1, 100, activation="silu", norm_eps=1e-3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_is_the_reference(name: str) -> None:
    model = VARIANTS[name]
    ids = tokens(30, vocab_size=model.vocab_size)
    logits = Driver(backend(model)).in_chunks(ids, [])
    torch.testing.assert_close(logits.double(), oracle(ids, model), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_chunks_decode_and_mixtures_are_the_reference_and_the_same_bits() -> None:
    """A long sequence whole, in chunks, token by token at the end, and beside others: one set of bits."""
    ids = tokens(140)
    driver = Driver(backend())
    whole = driver.in_chunks(ids, [])
    torch.testing.assert_close(whole.double(), oracle(ids), rtol=0, atol=1e-4)
    for cuts in ([5, 21, 100], range(137, 140)):
        assert harness.same_bits(driver.in_chunks(ids, cuts), whole)
        driver.release()
    a, b, c = driver.sequence(140), driver.sequence(80), driver.sequence(1)
    driver.run([(a, ids[:100])])
    mixed = driver.logits([(b, tokens(70, 5)), (a, ids[100:120]), (c, [7])])
    assert harness.same_bits(mixed[70:90], whole[100:120])
    torch.testing.assert_close(mixed[:70].double(), oracle(tokens(70, 5)), rtol=0, atol=1e-4)
    mixed = driver.logits([(a, ids[120:121]), (b, [1])])
    assert harness.same_bits(mixed[:1], whole[120:121])


def test_splits_that_follow_the_batch_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above: the bits do depend on the order of sums."""
    ids = tokens(40)
    driver = Driver(backend())
    whole = driver.in_chunks(ids, [])
    monkeypatch.setattr(tiles, "split_k", lambda n, k: (1, tiles.cdiv(k, tiles.BLOCK_K)))
    assert not harness.same_bits(driver.in_chunks(ids, []), whole)


@pytest.mark.slow
def test_greedy_tokens_are_the_reference_s() -> None:
    """Two sequences of different lengths, decoded together; the next token is taken on the device."""
    prompts, steps = [tokens(9, 3), tokens(30, 4)], 8
    driver = Driver(backend())
    running = [driver.sequence(60), driver.sequence(60)]
    found: list[list[int]] = [[], []]
    output = driver.run([(s, p) for s, p in zip(running, prompts, strict=True)], greedy(2))
    for _ in range(steps):
        for ids, token in zip(found, output.token_ids.tolist(), strict=True):
            ids.append(token)
        batch = driver.batch([(running[1], [0]), (running[0], [0])], greedy(2))  # in the other order
        running.reverse(), found.reverse()
        batch = Batch(**{n: getattr(batch, n) for n in batch.__slots__} | {"previous_rows": np.array([1, 0], np.int32)})
        output = driver.backend.collect(driver.backend.submit(batch))
    model = reference()
    for prompt, ids in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = generate_greedy(model, torch.tensor([prompt]), steps)[0, len(prompt) :].tolist()
        assert ids == expected


def test_sampled_tokens_and_logprobs_are_those_of_the_torch_backend() -> None:
    options = greedy(
        3,
        temperature=np.array([1.0, 0.7, 1.5], np.float32),
        top_k=np.array([0, 20, 0], np.int32),
        top_p=np.array([1.0, 1.0, 0.9], np.float32),
        positions=np.array([5, 6, 7], np.uint32),
        num_logprobs=4,
    )
    outputs = []
    for adapter in (TorchBackend, TritonInterpretBackend):
        made = adapter(MODEL, random_weights(MODEL), dtype="float32", device="cpu", block_size=BLOCK)
        made.allocate(60)
        driver = Driver(made)
        outputs.append(driver.run([(driver.sequence(20), tokens(5 + i, i)) for i in range(3)], options))
    theirs, ours = outputs
    for name in ("token_ids", "ranks", "top_ids"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-4)


def test_a_neighbour_that_wants_top_k_changes_no_logprob() -> None:
    driver = Driver(backend())
    alone = driver.run([(driver.sequence(20), tokens(9))], greedy(1))  # no logits in memory
    options = greedy(2, num_logprobs=3, top_k=np.array([0, 5], np.int32), temperature=np.array([0, 1], np.float32))
    beside = driver.run([(driver.sequence(20), tokens(9)), (driver.sequence(20), tokens(12))], options)
    assert alone.token_ids[0] == beside.token_ids[0]
    assert alone.logprobs[0].tobytes() == beside.logprobs[0].tobytes()
    assert alone.ranks[0] == beside.ranks[0] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision_is_as_good_as_pytorch_s(dtype: str) -> None:
    ids = tokens(60)
    ours = Driver(backend(dtype=dtype)).in_chunks(ids, [40, 59])
    made = TorchBackend(MODEL, random_weights(MODEL), dtype=dtype, device="cpu", block_size=BLOCK)
    made.allocate(60)
    harness.assert_as_good_as_torch(ours, oracle(ids), Driver(made).in_chunks(ids, [40, 59]))


def as_good_as_torch_on(made: TritonInterpretBackend, stored: dict[str, torch.Tensor], model: ModelConfig) -> None:
    """Logits as near to float64's with these weights as those of the torch backend in bfloat16 are."""
    ids = tokens(60)
    theirs = TorchBackend(model, stored, dtype="bfloat16", device="cpu", block_size=BLOCK)
    theirs.allocate(60)
    with torch.no_grad():
        exact = to_reference(model, stored).double()(torch.tensor([ids]))[0]
    ours, theirs_logits = (Driver(one).in_chunks(ids, [40, 59]) for one in (made, theirs))
    harness.assert_as_good_as_torch(ours, exact, theirs_logits)


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "int8"), ("int4", "int4"), ("int4-g64", "int4")])
def test_quantised_weights_are_as_good_as_pytorch_s_in_bfloat16(dtype: str, kind: str) -> None:
    made, sixteen = backend(dtype=dtype).capacity(), backend(dtype="bfloat16").capacity()
    as_good_as_torch_on(backend(dtype=dtype), quantised(random_weights(MODEL), kind), MODEL)
    tables = 2 * (MODEL.vocab_size + MODEL.context_length) * MODEL.embed_dim
    share = (made.weight_bytes - tables) / (sixteen.weight_bytes - tables)
    assert share < {"int8": 0.65, "int4": 0.62}[kind]  # rows of 80 and 130 weights are padded to 128 and 256
    assert made.bytes_per_block == sixteen.bytes_per_block


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_quantised_weights_cost(kind: str) -> None:
    """On the demo model, by PyTorch in float32 with the weights that the kernels multiply with."""
    checkpoint = load_checkpoint(DEMO_MODEL)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size, checkpoint.eos_token_id, None)
    assert tokenizer is not None
    ids = list(tokenizer.encode(TEXT))[: checkpoint.config.context_length]
    untied = replace(checkpoint.config, tied_head=False)
    with torch.no_grad():
        exact, got = (
            torch.log_softmax(to_reference(untied, weights)(torch.tensor([ids]))[0].double(), dim=1)
            for weights in (checkpoint.weights, quantised(dict(checkpoint.weights), kind))
        )
    divergence, likelihood = costs(got, (exact, ids))
    assert 0 < divergence <= BUDGET[kind][0]
    assert likelihood <= BUDGET[kind][1]


def test_a_quantised_head_that_is_tied() -> None:
    """The embedding stays as it is; after new weights the head is quantised anew."""
    tied, untied = (ModelConfig(97, 150, 80, 4, 1, 130, tied_head=tied) for tied in (True, False))
    made = TritonInterpretBackend(tied, random_weights(tied, 1), dtype="int8", device="cpu", block_size=BLOCK)
    made.allocate(60)
    weights = random_weights(tied)
    made.update_weights(weights)
    as_good_as_torch_on(made, quantised({**weights, "head": weights["tok_emb"].clone()}, "int8"), untied)


@pytest.mark.slow
def test_blocks_are_copied_before_anything_is_written() -> None:
    """A copy of a sequence's blocks continues as the sequence does, and leaves it alone."""
    ids = tokens(40)
    driver = Driver(backend())
    original = driver.sequence(40)
    driver.run([(original, ids[:20])])
    copy = driver.sequence(40)
    copy.done = 20
    batch = driver.batch([(copy, tokens(20, 9))])
    copies = np.array([original.blocks[:2], copy.blocks[:2]], np.int32).T
    batch = Batch(**{n: getattr(batch, n) for n in batch.__slots__} | {"block_copies": copies})
    forked = driver.backend.collect(driver.backend.submit(batch)).logits
    assert harness.same_bits(driver.logits([(original, ids[20:])]), driver.in_chunks(ids, [20])[20:])
    assert forked is not None
    torch.testing.assert_close(forked.double(), oracle(ids[:20] + tokens(20, 9))[20:], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_decode_is_five_launches_a_layer_and_three_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    driver = Driver(backend())
    parts = [(driver.sequence(20), tokens(4)) for _ in range(2)]
    driver.run(parts, greedy(2))
    launched = []
    run = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        launched.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    layer = ["_linear_kernel", "_attention_kernel", "_linear_kernel", "_linear_kernel", "_linear_kernel"]
    sampled, apart = {"temperature": np.ones(2, np.float32)}, ["_logits_kernel", "_sampling_kernel"]
    for options, end in (
        (greedy(2), ["_head_sample_kernel"]),
        (greedy(2, **sampled, ranks=False), ["_head_sample_kernel"]),
        (greedy(2, **sampled), ["_head_sample_kernel", "_head_ranks_kernel"]),
        (greedy(2, **sampled, top_k=np.array([0, 5], np.int32)), apart),
    ):
        launched.clear()
        driver.run([(s, [1]) for s, _ in parts], options)
        assert launched == ["_embedding_kernel", *layer * MODEL.n_layers, *end]


def decode(
    driver: Driver, parts: Sequence[tuple[Running, Sequence[int]]], draw: SamplingBatch, num_steps: int
) -> Batch:
    """A step of several: with all the blocks that the later ones need."""
    step = driver.batch(parts, draw)
    tables = np.zeros((len(parts), max(len(s.blocks) for s, _ in parts)), np.int32)
    for row, (s, _) in enumerate(parts):
        tables[row, : len(s.blocks)] = s.blocks
    return replace(step, block_tables=tables, num_steps=num_steps)


@pytest.mark.slow
def test_several_steps_are_queued_and_collected_together() -> None:
    """The draws are those of steps one by one; one that cannot be drawn from comes again, as a first step."""
    weights = random_weights(MODEL)
    weights["pos_emb"][60 + 5] = float("nan")  # the longer sequence's position in the sixth step, past 64 keys
    made = TritonInterpretBackend(MODEL, weights, dtype="float32", device="cpu", block_size=BLOCK)
    made.allocate(60)
    driver = Driver(made)

    def options(step: int) -> SamplingBatch:
        return neutral_sampling(
            2, seeds=np.array([5, 6], np.uint64), positions=np.array([9, 30], np.uint32) + step, num_logprobs=2
        )

    def prompts() -> tuple[Running, Running]:
        driver.release()
        s, t = driver.sequence(20), driver.sequence(80)
        driver.run([(s, tokens(7)), (t, tokens(60))], greedy(2))
        return s, t

    s, t = prompts()
    outputs, last = [], [3, 4]
    for step in range(5):
        one = driver.batch([(s, last[:1]), (t, last[1:])], options(step))
        if step == 0:  # a copy that came again would undo what this step writes
            one = replace(one, block_copies=np.array([[t.blocks[0], s.blocks[0]]], np.int32))
        outputs.append(made.collect(made.submit(one)))
        last = outputs[-1].token_ids.tolist()
    s, t = prompts()
    several = decode(driver, [(s, [3]), (t, [4])], options(0), 9)
    several = replace(several, block_copies=np.array([[t.blocks[0], s.blocks[0]]], np.int32))
    together = made.collect(made.submit(several))
    assert together.top_ids.shape == (10, 2)
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(o, name) for o in outputs])), name
    s.done, t.done = s.done + 4, t.done + 4
    for _ in range(2):
        with pytest.raises(ValueError, match="logits of drawn row 1 hold NaN"):
            made.collect(made.submit(decode(driver, [(s, last[:1]), (t, last[1:])], options(5), 3)))
        s.done, t.done = s.done - 1, t.done - 1
    first = made.collect(made.submit(decode(driver, [(s, [3])], greedy(1), 9)))
    assert len(first.token_ids) == MOST_STEPS
    assert len(made._step.slots._free) == MOST_STEPS  # all of them came back, after errors too


def test_new_weights_and_capacity() -> None:
    made = backend()
    made.update_weights(random_weights(MODEL, seed=1))
    ids = tokens(10)
    with torch.no_grad():
        expected = to_reference(MODEL, random_weights(MODEL, seed=1)).double()(torch.tensor([ids]))[0]
    torch.testing.assert_close(Driver(made).in_chunks(ids, []).double(), expected, rtol=0, atol=1e-4)
    capacity = made.capacity()
    assert capacity.bytes_per_block == 2 * 2 * BLOCK * 80 * 4
    assert capacity.weight_bytes >= MODEL.num_parameters * 4
    assert capacity.free_bytes > 0


def test_refuses_what_it_does_not_have() -> None:
    weights = random_weights(MODEL)
    make = TritonInterpretBackend
    with pytest.raises(ValueError, match="float64"):
        make(MODEL, weights, dtype="float64", device="cpu", block_size=BLOCK)
    with pytest.raises(ValueError, match="'cuda'"):
        make(MODEL, weights, dtype="float32", device="cuda", block_size=BLOCK)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        make(ModelConfig(9, 9, 300, 1, 1, 9), weights, dtype="float32", device="cpu", block_size=BLOCK)
    driver = Driver(backend(blocks=3))
    driver.free = [2, 1, 0]
    for what, change in (
        ("token id 97", {"token_ids": np.array([97], np.int32)}),
        ("position 150", {"positions": np.array([150], np.int32)}),
        ("slot 48", {"slots": np.array([48], np.int64)}),
        ("block 3", {"block_tables": np.array([[3]], np.int32)}),
        ("logits row 1", {"logits_rows": np.array([1], np.int32)}),
        ("row of the step before 5", {"previous_rows": np.array([5], np.int32)}),
    ):
        batch = driver.batch([(Running([0]), [1])])
        with pytest.raises(ValueError, match=what):
            driver.backend.submit(Batch(**{n: getattr(batch, n) for n in batch.__slots__} | change))


def test_rows_without_a_token_are_refused_when_collected() -> None:
    weights = random_weights(MODEL)
    weights["tok_emb"][5] = torch.nan
    made = TritonInterpretBackend(MODEL, weights, dtype="float32", device="cpu", block_size=BLOCK)
    made.allocate(60)
    driver = Driver(made)
    handle = made.submit(driver.batch([(driver.sequence(9), [1]), (driver.sequence(9), [5])], greedy(2)))
    with pytest.raises(ValueError, match="drawn row 1 hold NaN"):
        made.collect(handle)
    allowed = np.zeros((1, 4), np.uint32)
    handle = made.submit(driver.batch([(driver.sequence(9), [1])], greedy(1, allowed=allowed)))
    with pytest.raises(ValueError, match="drawn row 0 exclude every token"):
        made.collect(handle)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_says_what_to_do() -> None:
    choice = registry.choose("triton")
    assert choice.backend is TritonBackend
    with pytest.raises(ValueError, match=r"needs a GPU.*'torch'.*'triton-interpret'"):
        TritonBackend(MODEL, random_weights(MODEL), dtype=choice.dtype, device=choice.device, block_size=BLOCK)
    assert registry.choose("triton-interpret").device == "cpu"
    for ask in (lambda: LLM(backend="triton", device="cpu"), lambda: optimize(reference(), backend="triton")):
        with pytest.raises(ValueError, match=r"needs a GPU.*'torch'.*'triton-interpret'"):
            ask()


@pytest.mark.parametrize("adapter", [TritonBackend, TritonInterpretBackend])
def test_a_number_of_threads_is_refused(adapter: Any) -> None:
    with pytest.raises(ValueError, match=rf"the {adapter.name} backend has no number of CPU threads, got threads=3"):
        adapter(MODEL, random_weights(MODEL), dtype="float32", device="cpu", block_size=BLOCK, threads=3)


def test_interpreting_after_triton_was_imported_compiled_is_refused() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import triton\n"
        "from engine.backends.triton_backend import TritonInterpretBackend as B\n"
        "from engine.config import ModelConfig\n"
        "try:\n    B(ModelConfig(9, 9, 8, 1, 1, 8), {}, dtype='float32', device='cpu', block_size=16)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "set TRITON_INTERPRET=1 before anything imports triton" in out


@pytest.mark.parametrize(
    ("capability", "dtype", "hip", "embed_dim", "taken", "why"),
    [
        ((9, 0), "auto", None, 64, "triton", "the fastest on this GPU"),
        ((8, 0), "bfloat16", None, 64, "triton", "the fastest on this GPU"),
        ((7, 5), "auto", None, 64, "torch", "8.0 and later, this GPU has 7.5"),
        ((9, 0), "float64", None, 64, "torch", "has float64 on a GPU"),
        ((9, 0), "auto", "6.4", 64, "torch", "AMD"),
        ((9, 0), "auto", None, 9000, "torch", "embed_dim up to 8192"),
        ((9, 0), "auto", "no compiler", 64, "torch", "needs a C compiler"),
    ],
)
def test_what_auto_takes_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: Any, dtype: str, hip: Any, embed_dim: int, taken: str, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("CC", "gcc")
    if hip == "no compiler":
        hip = None
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.version, "hip", hip)
    model = ModelConfig(vocab_size=97, context_length=50, embed_dim=embed_dim, n_heads=4, n_layers=1, hidden_dim=64)
    choice = registry.choose("auto", dtype, "auto", model)
    assert choice.backend.name == taken
    assert why in choice.reason
    assert choice.device == "cuda"
    assert registry.choose("auto", dtype, "cpu", model).backend.name != "triton"
