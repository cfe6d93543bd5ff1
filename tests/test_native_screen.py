"""``screen_head``: the token is the whole head's, its logprob close to it, whatever the weights and the neighbours."""

import numpy as np
import pytest
import torch
from models import random_weights, tiny_config
from native_steps import BLOCK, ISAS, batch, ids_of, neutral

from engine import LLM, SamplingParams
from engine.backends.base import StepOutput
from engine.backends.native_backend import NativeBackend
from engine.backends.torch_backend import TorchBackend
from engine.config import ModelConfig

CONFIG = tiny_config(vocab_size=4099, embed_dim=72, n_heads=2)  # odd, two pieces of panels, whole vectors and a rest
ROWS = 6


def hard_weights(kind: str, config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Weights whose heads are not easy: each "kind" is a way in which int8 says too little, or nothing at all."""
    weights = random_weights(config, scale=0.15)
    generator = torch.Generator().manual_seed(1)
    head = weights["head"] = torch.randn(config.vocab_size, config.embed_dim, generator=generator) * 0.15
    half = config.vocab_size // 2
    if kind == "close":  # every output has a neighbour that beats it, or not, by far less than an int8 step
        head[half : 2 * half] = head[:half] + 2e-4 * torch.randn(half, config.embed_dim, generator=generator)
    elif kind == "equal":
        head[half : 2 * half] = head[:half]
    elif kind == "outlier":  # one dimension takes the scale of weights and rows
        head[:, 3] *= 40
        weights["final_norm.weight"][5] = 60.0
    elif kind == "uneven":  # the outputs that win are not those with the largest weights
        order = torch.randperm(config.vocab_size, generator=generator)
        head *= torch.logspace(-3, 0, config.vocab_size)[order][:, None]
    elif kind == "whole":  # int8 holds the weights as they are: all that is left out is of the rows, and not small
        head.copy_(torch.randint(-126, 127, head.shape, generator=generator) / 512)
        head[:, 0] = 127 / 512
        weights["final_norm.weight"][5] = 60.0
    elif kind == "rounded":  # the same row always, whose int8 form leaves the largest output below the next
        weights["final_norm.weight"].zero_()
        weights["final_norm.bias"].copy_(torch.tensor([127.0, 5.0] + [30.45] * 35 + [30.0] * 35))
        head *= 0.01
        head[[0, half]] = 0
        head[0, 2:37] = head[half, 37:] = head[half, 1] = 127 / 512
    elif kind == "zero":
        head.zero_()
    elif kind == "faint":  # rows near the least numbers that there are
        weights["final_norm.weight"].fill_(1e-39)
        weights["final_norm.bias"].zero_()
    elif kind == "faintest":  # logits are numbers that the product of two scales is not
        weights["final_norm.weight"].fill_(1e-20)
        weights["final_norm.bias"].zero_()
        head *= 1e-20
    elif kind == "tiny":
        head *= 1e-36
    elif kind == "huge":
        head *= 1e30
    elif kind == "rare":  # a panel's exponents are few but for some weights, which decide what wins (csrc/coding.inc)
        for first in range(0, config.vocab_size - 48, 48):
            lanes, columns = torch.randperm(48, generator=generator)[:7], torch.randperm(72, generator=generator)[:7]
            head[first + lanes, columns] = torch.tensor([4.0, -4.5, 9.0, -8.5, 20.0, -17.0, 33.0])
    return weights


KINDS = (
    "random",
    "close",
    "equal",
    "outlier",
    "uneven",
    "whole",
    "rounded",
    "zero",
    "faint",
    "faintest",
    "tiny",
    "huge",
    "rare",
)


def make(weights: dict[str, torch.Tensor], dtype: str, threads: int = 2) -> NativeBackend:
    backend = NativeBackend(
        CONFIG, weights, dtype=dtype, device="cpu", block_size=BLOCK, threads=threads, screen_head=True
    )
    backend.allocate(96)
    return backend


def run(backend: NativeBackend, only: list[bool], temperature: float = 0.0, parts: slice = slice(None)) -> StepOutput:
    """Draws after ROWS prompts of different lengths, or some of them, and the logits of their last rows."""
    prompts = [(row, 0, ids_of(row, 3 + row, CONFIG)) for row in range(ROWS)][parts]
    ends = np.cumsum([len(ids) for _, _, ids in prompts]) - 1
    sampling = neutral(
        len(prompts), temperature=np.full(len(prompts), temperature, np.float32), token_only=np.array(only, np.bool_)
    )
    return backend.collect(backend.submit(batch(prompts, "last", sampling, ends.tolist())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_token_is_that_of_the_whole_head(isa: str, dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_ISA", isa)
    found = run(make(hard_weights(kind), dtype), [True] * ROWS)
    assert found.logits is not None
    whole = found.logits.double()
    assert found.token_ids.tolist() == [int(np.argmax(row)) for row in whole.numpy()]
    assert found.ranks.tolist() == [1] * ROWS
    exact = torch.log_softmax(whole, 1)[range(ROWS), found.token_ids]
    assert np.abs(found.logprobs - exact.numpy()).max() < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_by_chance_is_that_of_the_whole_head(
    isa: str, dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seeds give the same tokens: many draws after each prompt, cold to hot."""
    monkeypatch.setenv("ENGINE_ISA", isa)
    backend = make(hard_weights(kind), dtype)
    prompts = [(row, 0, ids_of(row, 3 + row, CONFIG)) for row in range(ROWS)]
    ends = np.cumsum([len(ids) for _, _, ids in prompts]) - 1
    rows = np.repeat(ends, 16).tolist()
    temperatures = np.tile(np.array([1e-3, 0.3, 1.0, 4.0], np.float32), len(rows) // 4)
    found, whole = (
        backend.collect(
            backend.submit(
                batch(
                    prompts,
                    "none",
                    neutral(len(rows), temperature=temperatures, token_only=np.full(len(rows), by)),
                    rows,
                )
            )
        )
        for by in (True, False)
    )
    assert found.token_ids.tolist() == whole.token_ids.tolist()
    assert np.abs(found.logprobs - whole.logprobs).max() < 0.02 * max(1.0, float(np.abs(whole.logprobs).max()) / 100)
    if kind == "random":
        assert len(set(found.token_ids.tolist())) > ROWS


@pytest.mark.parametrize("temperature", [1e-38, 1.2e-38, 1e-30])
def test_a_temperature_that_overflows_gives_the_same_bits_with_any_threads(temperature: float) -> None:
    weights = hard_weights("random")
    alone, together = (run(make(weights, "float32", threads), [True] * ROWS, temperature) for threads in (1, 3))
    assert (alone.token_ids == together.token_ids).all()
    assert (alone.logprobs == together.logprobs).all()


def test_what_is_no_temperature_gives_the_token_of_the_whole_head() -> None:
    """SamplingParams refuses it."""
    backend = make(hard_weights("random"), "float32")
    by_screen, whole = run(backend, [True] * ROWS, -1.0), run(backend, [False] * ROWS, -1.0)
    assert (by_screen.token_ids == whole.token_ids).all()
    assert (by_screen.logprobs == whole.logprobs).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimates_are_what_it_works_with(dtype: str) -> None:
    """Else the test above would compare the whole head with itself."""
    backend = make(hard_weights("random"), dtype)
    by_screen, whole = run(backend, [True] * ROWS), run(backend, [False] * ROWS)
    assert (by_screen.token_ids == whole.token_ids).all()
    assert (by_screen.logprobs != whole.logprobs).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_neighbours(dtype: str) -> None:
    weights = hard_weights("close")
    backend = make(weights, dtype, threads=3)
    together = run(backend, [True] * ROWS)
    mixed = run(backend, [row % 2 == 0 for row in range(ROWS)])
    whole = run(make(weights, dtype, threads=1), [False] * ROWS)
    for row in range(ROWS):
        alone = run(backend, [True], parts=slice(row, row + 1))
        assert alone.token_ids[0] == together.token_ids[row]
        assert alone.logprobs[0] == together.logprobs[row]
        beside = together if row % 2 == 0 else whole
        assert (mixed.token_ids[row], mixed.logprobs[row]) == (beside.token_ids[row], beside.logprobs[row])


def test_other_rows_see_the_whole_head() -> None:
    weights = hard_weights("random")
    backend = make(weights, "float32")
    plain = NativeBackend(CONFIG, weights, dtype="float32", device="cpu", block_size=BLOCK, threads=2)
    plain.allocate(96)
    found, wanted = run(backend, [False] * ROWS, 1.0), run(plain, [False] * ROWS, 1.0)
    assert (found.token_ids == wanted.token_ids).all()
    assert (found.logprobs == wanted.logprobs).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(value: float) -> None:
    weights = hard_weights("random")
    weights["head"][CONFIG.vocab_size - 2, 7] = value
    with pytest.raises(ValueError, match="no token can be drawn from the logits of drawn row 0"):
        run(make(weights, "float32"), [True] * ROWS)


def test_new_weights_are_screened_anew() -> None:
    backend = make(hard_weights("random"), "bfloat16")
    backend.update_weights(hard_weights("outlier"))
    found, wanted = run(backend, [True] * ROWS), run(make(hard_weights("outlier"), "bfloat16"), [True] * ROWS)
    assert (found.token_ids == wanted.token_ids).all()
    assert (found.logprobs == wanted.logprobs).all()


def test_generation_is_the_same_and_requests_with_logprobs_are_exact() -> None:
    plain, by_screen = LLM(dtype="float32", backend="native"), LLM(dtype="float32", backend="native", screen_head=True)
    assert by_screen.backend.capacity().weight_bytes > plain.backend.capacity().weight_bytes
    prompts = ["It is a truth", "She", "In the morning Mr. Darcy"]
    for params in (
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=20, logprobs=3),
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, logit_bias={11: 2.0}),
        SamplingParams(temperature=0, max_tokens=20, allowed_token_ids=list(range(5, 400))),
        SamplingParams(temperature=0.8, top_k=50, seed=3, max_tokens=20),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=20),
        SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=3),
    ):
        for a, b in zip(*(llm.generate(prompts, params, use_tqdm=False) for llm in (plain, by_screen)), strict=True):
            for one, other in zip(a.outputs, b.outputs, strict=True):
                assert one.token_ids == other.token_ids
                assert one.logprobs == other.logprobs
                off = abs(one.cumulative_logprob - other.cumulative_logprob) / len(one.token_ids)
                optioned = params.logprobs or params.repetition_penalty != 1 or params.top_k > 0 or params.top_p < 1
                assert off == 0 if optioned or params.allowed_token_ids else 0 < off < 2e-3


def test_who_has_it_not_says_so() -> None:
    with pytest.raises(ValueError, match="screen_head=True needs dtype float32 or bfloat16: with int8"):
        NativeBackend(CONFIG, {}, dtype="int8", device="cpu", block_size=BLOCK, screen_head=True)
    with pytest.raises(ValueError, match="the torch backend has no screen_head=True, the native one has"):
        TorchBackend(CONFIG, {}, dtype="float32", device="cpu", block_size=BLOCK, screen_head=True)
