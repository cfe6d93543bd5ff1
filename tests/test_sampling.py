"""Sampling: the random stream against NumPy integers, the kept set against a brute-force oracle, the distribution."""

import numpy as np
import pytest
import torch
from chi_square import chi_square_p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_batches import neutral_sampling

from engine.backends.base import SamplingBatch, Sparse
from engine.backends.torch_sampling import draw, gumbel_noise, keep, logprobs, philox

U32 = np.uint64(0xFFFFFFFF)


def philox_oracle(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def batch(rows: int, **changes: object) -> SamplingBatch:
    return neutral_sampling(rows, **({"positions": np.arange(rows, dtype=np.uint32)} | changes))


def test_philox_known_answers() -> None:
    """The known answers that Random123 publishes for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox_oracle((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_oracle((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
@settings(max_examples=40, deadline=None)
def test_philox_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    words = philox(*(torch.tensor([word]) for word in (*counter, *key)))
    assert [int(word) for word in words] == philox_oracle(counter, key)


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 11, 2**64 - 1])
def test_noise_of_every_id(seed: int) -> None:
    """Word v & 3 of counter (v >> 2, position, sample, 0), mapped as the contract says."""
    vocab, position, sample = 103, 2**31 + 5, 3
    one = np.ones(1)
    arguments = (
        one.astype(np.uint64) * np.uint64(seed),
        one.astype(np.uint32) * position,
        one.astype(np.uint32) * sample,
    )
    got = gumbel_noise(*arguments, vocab, torch.device("cpu"))[0]
    for v in range(vocab):
        word = philox_oracle((v >> 2, position, sample, 0), (seed & 0xFFFFFFFF, seed >> 32))[v & 3]
        u = (word + 0.5) / 2**32
        wanted = -np.log(-np.log1p(-u))
        assert got[v].item() == pytest.approx(wanted, rel=1e-4, abs=2e-4)


def test_extreme_words_are_finite() -> None:
    from engine.backends.torch_sampling import _gumbel

    noise = _gumbel(torch.tensor([0, 1, 2**32 - 1, 2**32 - 2]))
    assert torch.isfinite(noise).all()
    assert noise[0] == pytest.approx(-np.log(0.5 * 2.0**-32), rel=1e-6)
    assert noise[2] < -3


def kept_oracle(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Brute force over sorted values, in float64 and Python integers."""
    order = sorted(range(len(x)), key=lambda i: -x[i])
    kept = [i for i in order if x[i] > -np.inf]
    if 0 < top_k < len(x):
        kth = x[order[top_k - 1]]
        kept = [i for i in kept if x[i] >= kth]
    mass = {i: int(np.floor(np.exp(np.float32(x[i]) - np.float32(x.max())) * np.float32(2**30))) for i in kept}
    if top_p < 1:
        wanted = int(np.ceil(float(np.float32(top_p)) * sum(mass.values())))
        best = None
        for t in sorted({x[i] for i in kept}, reverse=True):
            best = t
            if sum(m for i, m in mass.items() if x[i] >= t) >= wanted:
                break
        kept = [i for i in kept if x[i] >= best]
    return {i for i in kept if np.exp(np.float32(x[i]) - np.float32(x.max())) >= np.float32(min_p)}


@given(
    values=st.lists(st.integers(-12, 6), min_size=2, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    hole=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_kept_tokens(values: list[int], top_k: int, top_p: float, min_p: float, hole: bool) -> None:
    x = np.array(values, np.float32) / 2  # small integers halved: ties are common
    if hole:
        x[0] = -np.inf if len(set(values[1:])) else x[0]
    options = batch(
        1,
        top_k=np.array([top_k], np.int32),
        top_p=np.array([top_p], np.float32),
        min_p=np.array([min_p], np.float32),
    )
    got = keep(torch.from_numpy(x)[None], options)[0]
    assert set(got.nonzero()[:, 0].tolist()) == kept_oracle(x, top_k, top_p, min_p)


def test_kept_set_does_not_depend_on_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * 3
    shuffle = torch.randperm(5000, generator=generator)
    options = batch(1, top_p=np.array([0.9], np.float32))
    assert torch.equal(keep(x[None], options)[0][shuffle], keep(x[shuffle][None], options)[0])


CHI_CASES = {
    "plain": ({}, None),
    "temperature": ({"temperature": 0.7}, None),
    "top_k": ({"top_k": 5}, None),
    "top_p": ({"top_p": 0.8}, None),
    "min_p": ({"min_p": 0.2}, None),
}


def draws_of(x: torch.Tensor, count: int, options: dict[str, float]) -> np.ndarray:
    arrays = {key: np.full(count, value, np.int32 if key == "top_k" else np.float32) for key, value in options.items()}
    ids = draw(x.expand(count, -1), batch(count, seeds=np.full(count, 12345, np.uint64), **arrays))
    return np.bincount(ids.numpy(), minlength=x.shape[-1])


def expected_of(x: torch.Tensor, options: dict[str, float]) -> np.ndarray:
    scaled = x / options.get("temperature", 1.0)
    kept = kept_oracle(
        scaled.numpy(), int(options.get("top_k", 0)), options.get("top_p", 1.0), options.get("min_p", 0.0)
    )
    p = torch.softmax(scaled.double(), 0).numpy()
    p[[i for i in range(len(p)) if i not in kept]] = 0
    return p / p.sum()


@pytest.mark.parametrize("case", CHI_CASES)
def test_distribution(case: str) -> None:
    options = CHI_CASES[case][0]
    x = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    counts, p = draws_of(x, 20000, options), expected_of(x, options)
    assert counts[p == 0].sum() == 0
    assert chi_square_p_value(counts[p > 0], p[p > 0]) > 0.001


def test_a_biased_sampler_is_caught() -> None:
    """The negative control: a temperature that is 4% off must fail the same test."""
    x = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    counts = draws_of(x, 20000, {"temperature": 0.96})
    assert chi_square_p_value(counts, expected_of(x, {})) < 0.001


def test_large_vocabulary_is_uniform_where_logits_are() -> None:
    """All-equal logits over 50257 ids: every 16th part of the vocabulary is drawn as often as another."""
    x, counts = torch.zeros(1, 50257), np.zeros(50257)
    for part in range(16):  # 25 rows at a time: the noise of a row is 50257 numbers
        options = batch(25, seeds=np.full(25, 7, np.uint64), sample_index=np.full(25, part, np.uint32))
        counts += np.bincount(draw(x.expand(25, -1), options).numpy(), minlength=50257)
    parts = np.array([part.sum() for part in np.array_split(counts, 16)])
    assert chi_square_p_value(parts, np.array([len(p) for p in np.array_split(counts, 16)]) / 50257) > 0.001


def test_neighbours_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 97, generator=generator) * 2
    options = batch(
        6,
        top_k=np.array([0, 3, 0, 0, 50, 0], np.int32),
        top_p=np.array([1, 1, 0.5, 1, 0.9, 1], np.float32),
        temperature=np.array([1, 1, 2, 0, 0.5, 1], np.float32),
        seeds=np.arange(6, dtype=np.uint64),
    )
    together = draw(x, options)
    for row in range(6):
        one = {
            key: getattr(options, key)[row : row + 1] for key in ("top_k", "top_p", "temperature", "seeds", "positions")
        }
        assert draw(x[row : row + 1], batch(1, **one)).item() == together[row].item()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    x = torch.zeros(1, 40)
    x[0, [7, 21]] = 3.0
    assert draw(x, batch(1, temperature=np.zeros(1, np.float32))).item() == 7


def sparse(rows: list[dict[int, float]]) -> Sparse:
    starts = np.cumsum([0, *(len(row) for row in rows)])
    ids, values = [i for row in rows for i in row], [v for row in rows for v in row.values()]
    return Sparse(starts.astype(np.int32), np.array(ids, np.int32), np.array(values, np.float32))


def test_bias_and_penalties() -> None:
    x = torch.tensor([[2.0, 1.9, -1.0, 0.0], [2.0, 1.9, -1.0, 0.0]])
    greedy = {"temperature": np.zeros(2, np.float32)}
    assert draw(x, batch(2, **greedy, logit_bias=sparse([{}, {3: 2.5}]))).tolist() == [0, 3]
    counts = sparse([{0: 0.0}, {0: 2.0}])  # in the prompt only; generated twice
    presence = {"presence_penalty": np.full(2, 0.5, np.float32)}
    assert draw(x, batch(2, **greedy, **presence, output_counts=counts)).tolist() == [0, 1]
    frequency = {"frequency_penalty": np.full(2, 0.06, np.float32)}
    assert draw(x, batch(2, **greedy, **frequency, output_counts=counts)).tolist() == [0, 1]
    repetition = {"repetition_penalty": np.full(2, 1.2, np.float32)}
    assert draw(x, batch(2, **greedy, **repetition, output_counts=counts)).tolist() == [1, 1]
    negative = torch.tensor([[-1.0, -1.1]])
    one = {"temperature": np.zeros(1, np.float32), "repetition_penalty": np.full(1, 1.2, np.float32)}
    assert draw(negative, batch(1, **one, output_counts=sparse([{0: 1.0}]))).item() == 1


def test_allowed_mask() -> None:
    x = torch.arange(70.0)[None]
    bits = np.zeros((1, 3), np.uint32)
    bits[0, 1] = 1 << 5  # id 37
    for temperature in (0.0, 1.0):
        options = batch(1, temperature=np.full(1, temperature, np.float32), allowed=bits)
        assert draw(x, options).item() == 37


def test_logprobs_are_of_the_raw_distribution() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, -5.0]])
    chosen, rank, ids, values = logprobs(x, torch.tensor([2]), 2)
    wanted = torch.log_softmax(x, 1)[0]
    assert chosen.item() == pytest.approx(wanted[2].item())
    assert rank.item() == 2
    assert ids.tolist() == [[1, 2]]
    assert values[0].tolist() == pytest.approx(wanted[[1, 2]].tolist())
