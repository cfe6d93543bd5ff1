"""Sampling against NumPy: the random stream word for word, the kept tokens, the draw's distribution, logprobs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_harness as harness
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import Drawn, Options, SparseRows, _threshold, cost, gumbel, gumbel_noise, ordered_bits, sampling


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters [N, 4]: [N, 4] words, from Salmon et al. 2011."""
    c, (k0, k1), low = [counter[:, i].astype(object) for i in range(4)], key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return np.stack(c, axis=1).astype(np.uint32)


def expected_gumbel(words: np.ndarray) -> np.ndarray:
    """Gumbel noise of random words, in float64 from the float32 u."""
    u = ((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    return -np.log(-np.log1p(-np.minimum(u, 1 - 2.0**-32)))


def noise(seed: int, position: int, sample: int, vocab_size: int) -> np.ndarray:
    quads = np.arange(-(-vocab_size // 4))
    counter = np.stack([quads, np.full_like(quads, position), np.full_like(quads, sample), 0 * quads], axis=1)
    return expected_gumbel(philox(counter, (seed & 0xFFFFFFFF, seed >> 32))).ravel()[:vocab_size]


@dataclass(frozen=True)
class Row:
    """The options of one row, as a person would write them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    sample: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    counts: tuple[tuple[int, int], ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None


def options(rows: list[Row], vocab_size: int) -> Options:
    def floats(name: str) -> torch.Tensor:
        return harness.guarded_like(torch.tensor([getattr(r, name) for r in rows], dtype=torch.float32))

    def bits(name: str, unsigned: type, signed: type) -> torch.Tensor:
        return harness.guarded_like(torch.from_numpy(np.array([getattr(r, name) for r in rows], unsigned).view(signed)))

    def sparse(name: str) -> SparseRows | None:
        entries = [getattr(r, name) for r in rows]
        if not any(entries):
            return None
        starts = torch.tensor(np.cumsum([0] + [len(e) for e in entries]), dtype=torch.int32)
        flat = [pair for e in entries for pair in e]
        ids, values = (torch.tensor([pair[i] for pair in flat]) for i in (0, 1))
        return SparseRows(
            harness.guarded_like(starts), harness.guarded_like(ids.int()), harness.guarded_like(values.float())
        )

    allowed = None
    if any(r.allowed is not None for r in rows):
        words = np.zeros((len(rows), -(-vocab_size // 32)), np.uint32)
        for i, r in enumerate(rows):
            for token in range(vocab_size) if r.allowed is None else r.allowed:
                words[i, token >> 5] |= np.uint32(1 << (token & 31))
        allowed = harness.guarded_like(torch.from_numpy(words.view(np.int32)), gap=0)
    return Options(
        floats("temperature"), bits("top_k", np.int32, np.int32), floats("top_p"), floats("min_p"),
        bits("seed", np.uint64, np.int64), bits("position", np.uint32, np.int32), bits("sample", np.uint32, np.int32),
        floats("presence"), floats("frequency"), floats("repetition"), sparse("counts"), sparse("bias"), allowed,
    )  # fmt: skip


def edited(logits: np.ndarray, row: Row) -> np.ndarray:
    """The logits after bias, penalties, mask and temperature, in float32."""
    x = logits.astype(np.float32).copy()
    for token, value in row.bias:
        x[token] += np.float32(value)
    for token, count in row.counts:
        r = np.float32(row.repetition)
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= np.float32(row.frequency) * np.float32(count)
        x[token] -= np.float32(row.presence) if count > 0 else np.float32(0)
    if row.allowed is not None:
        mask = np.ones(len(x), bool)
        mask[list(row.allowed)] = False
        x[mask] = -np.inf
    return x if row.temperature == 0 else x / np.float32(row.temperature)


def kept(x: np.ndarray, row: Row) -> np.ndarray:
    """Which tokens may be drawn, by sorting."""
    keep = x > -np.inf
    if 0 < row.top_k < len(x):
        keep &= x >= np.sort(x)[::-1][row.top_k - 1]
    if row.top_p < 1:
        mass = np.where(keep, np.floor(np.exp(x - x.max(), dtype=np.float32) * np.float32(2**30)), 0).astype(np.int64)
        wanted = np.ceil(np.float64(np.float32(row.top_p)) * np.float64(mass.sum()))
        keep &= x >= max(t for t in np.unique(x[keep]) if mass[x >= t].sum() >= wanted)
    if row.min_p > 0:
        keep &= np.exp(x - x.max(), dtype=np.float32) >= np.float32(row.min_p)
    return keep


def expected_token(logits: np.ndarray, row: Row) -> int:
    x = edited(logits, row)
    if row.temperature == 0:
        return int(np.argmax(x))
    score = x.astype(np.float64) + noise(row.seed, row.position, row.sample, len(x))
    return int(np.argmax(np.where(kept(x, row), score, -np.inf)))


def outputs(rows: int, top: int) -> Drawn:
    def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return harness.guarded([rows, *shape], dtype, gap=0 if shape else 64)

    i, f = torch.int32, torch.float32
    return Drawn(make(i), make(f), make(i), make(i), make(i, top), make(f, top))


def draw(logits: torch.Tensor, rows: list[Row], top: int = 0) -> Drawn:
    drawn = outputs(len(rows), top)
    sampling(logits, options(rows, logits.shape[1]), drawn, torch.full(logits.shape, torch.nan))
    return drawn


EVERYTHING = [
    Row(temperature=0),
    Row(seed=2**64 - 1, position=2**31 + 5),
    Row(temperature=0.7, top_k=20, seed=3, sample=1),
    Row(top_p=0.8, seed=4, position=9),
    Row(temperature=1.7, top_k=40, top_p=0.6, seed=5),
    Row(min_p=0.1, seed=2**63),
    Row(top_k=10**6, top_p=0.001, seed=6),
    Row(presence=1.0, frequency=0.5, repetition=1.3, counts=((3, 0), (90, 2), (7, 1)), seed=8),
    Row(temperature=0, bias=((5, 100.0), (6, -3.0))),
    Row(temperature=0, allowed=(11, 77)),
    Row(top_p=0.5, repetition=0.5, counts=((1, 3),), bias=((1, -2.0),), allowed=tuple(range(3, 90)), seed=9),
]


@pytest.mark.versions
def test_every_option_in_one_batch() -> None:
    torch.manual_seed(0)
    logits, top = harness.guarded_like(torch.randn(len(EVERYTHING), 97) * 3), 5
    opts, drawn, scratch = options(EVERYTHING, 97), outputs(len(EVERYTHING), top), torch.empty(logits.shape)
    inputs = [v for v in (getattr(opts, n) for n in opts.__slots__) if isinstance(v, torch.Tensor)]
    inputs += [t for s in (opts.output_counts, opts.logit_bias) for t in (s.starts, s.ids, s.values)]
    harness.run_in_every_order(
        lambda: sampling(logits, opts, drawn, scratch),
        [getattr(drawn, name) for name in drawn.__slots__],
        [logits, scratch, *inputs],
    )
    wide = logits.double()
    logprobs = wide.log_softmax(dim=1)
    for i, row in enumerate(EVERYTHING):
        token = int(drawn.tokens[i])
        assert token == expected_token(logits[i].numpy(), row)
        assert drawn.logprobs[i] == pytest.approx(logprobs[i, token].item(), abs=2e-6)
        assert drawn.ranks[i] == 1 + (logits[i] > logits[i, token]).sum()
    assert not drawn.status.any()
    best = wide.topk(top, dim=1)
    assert torch.equal(drawn.top_ids.long(), best.indices)
    torch.testing.assert_close(drawn.top_logprobs.double(), logprobs.gather(1, best.indices), rtol=0, atol=2e-6)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 130), st.integers(0, 2**64 - 1), st.floats(0.1, 3), st.integers(0, 140), st.floats(0.01, 1),
    st.floats(0, 1), st.booleans(),
)  # fmt: skip
def test_any_options(vocab: int, seed: int, heat: float, k: int, p: float, min_p: float, coarse: bool) -> None:
    values = np.random.default_rng(seed).normal(size=vocab) * 3
    logits = np.round(values).astype(np.float32) if coarse else values.astype(np.float32)  # coarse: many ties
    row = Row(temperature=heat, top_k=k, top_p=p, min_p=min_p, seed=seed)
    assert draw(torch.from_numpy(logits)[None], [row]).tokens.item() == expected_token(logits, row)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}])
def test_the_narrowest_filters_leave_the_best(narrow: dict[str, Any]) -> None:
    """So hot that without a filter eight seeds would hardly agree."""
    torch.manual_seed(0)
    logits = torch.randn(8, 97)
    narrowed, free = ([Row(temperature=50.0, seed=seed, **given) for seed in range(8)] for given in (narrow, {}))
    best = logits.argmax(dim=1).tolist()
    assert draw(logits, narrowed).tokens.tolist() == best
    assert draw(logits, free).tokens.tolist() != best


@triton.jit
def _philox_kernel(seed_ptr, out_ptr, position, sample):
    quads = tl.arange(0, 16)
    zero = quads.to(tl.uint32) * 0
    words = tl.philox(tl.load(seed_ptr), quads.to(tl.uint32), zero + position, zero + sample, zero)
    for i in tl.static_range(4):
        tl.store(out_ptr + quads * 4 + i, words[i].to(tl.int64))


@pytest.mark.versions
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize(("position", "sample"), [(0, 0), (1023, 7)])
def test_the_streams_integers_are_numpys(seed: int, position: int, sample: int) -> None:
    out = torch.empty(64, dtype=torch.int64)
    _philox_kernel[(1,)](torch.from_numpy(np.array([seed], np.uint64).view(np.int64)), out, position, sample)
    counter = np.stack([np.arange(16), np.full(16, position), np.full(16, sample), np.zeros(16, int)], axis=1)
    assert out.tolist() == philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).ravel().tolist()


@triton.jit
def _noise_kernel(seed_ptr, out_ptr, first, position, sample):
    span = tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :]
    quads = first // 4 + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    position = tl.full([], position, tl.uint32)
    sample = tl.full([], sample, tl.uint32)
    tl.store(out_ptr + span, gumbel_noise(tl.load(seed_ptr), quads, position, sample, 4, 64))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize(("position", "sample"), [(0, 0), (1023, 7)])
def test_noise_is_the_streams(seed: int, position: int, sample: int) -> None:
    """Equal to a part in a million where the words are; another word would differ by about 1."""
    out = torch.empty(256)
    _noise_kernel[(1,)](torch.from_numpy(np.array([seed], np.uint64).view(np.int64)), out, 512, position, sample)
    np.testing.assert_allclose(out.numpy(), noise(seed, position, sample, 768)[512:], rtol=2e-5, atol=2e-5)


@triton.jit
def _words_to_noise_kernel(words_ptr, out_ptr):
    at = tl.arange(0, 8)
    tl.store(out_ptr + at, gumbel(tl.load(words_ptr + at).to(tl.uint32, bitcast=True)))


@pytest.mark.versions
def test_extreme_words_give_finite_noise() -> None:
    words = np.array([0, 1, 2, 4294967, 4294968, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    out = torch.empty(8)
    _words_to_noise_kernel[(1,)](torch.from_numpy(words.view(np.int32)), out)
    assert out.isfinite().all()
    np.testing.assert_allclose(out.numpy(), expected_gumbel(words), rtol=1e-4, atol=1e-4)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(len(EVERYTHING), 97)
    together = draw(logits, EVERYTHING, top=3)
    for i, row in enumerate(EVERYTHING):
        alone = draw(logits[i : i + 1], [row], top=3)
        assert all(harness.same_bits(getattr(alone, n), getattr(together, n)[i : i + 1]) for n in alone.__slots__)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.slow
def test_the_draw_has_the_softmax_distribution() -> None:
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -3.0]), 600
    rows = [Row(seed=77, position=i) for i in range(draws)]
    counts = np.bincount(draw(logits.expand(draws, -1).contiguous(), rows).tokens.numpy(), minlength=6)
    probabilities = logits.softmax(0).numpy()
    assert chi_square(counts, probabilities) < 20.5  # 99.9% of 5 degrees of freedom
    biased = probabilities + np.array([0.05, -0.05, 0, 0, 0, 0])
    assert chi_square(counts, biased / biased.sum()) > 20.5, "the test would not see a wrong distribution"


def test_status_of_rows_without_a_token() -> None:
    logits = torch.zeros(4, 40)
    logits[0, 7], logits[1, 39], logits[2] = torch.nan, torch.inf, -torch.inf
    assert draw(logits, [Row(), Row(), Row(), Row(allowed=())]).status.tolist() == [1, 1, 2, 2]


@pytest.mark.slow
def test_equal_logits_keep_all_ties_and_greedy_takes_the_lowest_id() -> None:
    logits = torch.zeros(64, 33)
    rows = [Row(top_k=1, seed=i) for i in range(63)]
    drawn = draw(logits, [*rows, Row(temperature=0)])
    assert len(drawn.tokens[:-1].unique()) > 15
    assert drawn.tokens[-1] == 0
    assert (drawn.ranks == 1).all()


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((20, 50), -torch.inf)
    logits[:, 13] = -1e30
    assert (draw(logits, [Row(seed=i, top_p=0.5) for i in range(20)]).tokens == 13).all()


def test_gpt2_vocabulary() -> None:
    logits = (torch.randn(1, 50257) * 4).numpy()
    row = Row(top_k=50, top_p=0.9, temperature=0.8, seed=11)
    drawn = draw(torch.from_numpy(logits), [row], top=2)
    assert drawn.tokens.item() == expected_token(logits[0], row)
    exact = torch.from_numpy(logits).double().log_softmax(1)
    assert drawn.top_logprobs[0, 0].item() == pytest.approx(exact.max().item(), abs=3e-6)


@triton.jit
def _ordered_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 8)
    tl.store(out_ptr + at, ordered_bits(tl.load(x_ptr + at)).to(tl.int64))


def test_ordered_bits_keep_the_order() -> None:
    x = torch.tensor([-torch.inf, -3.0, -1e-40, -0.0, 0.0, 1e-40, 2.0, torch.inf])
    out = torch.empty(8, dtype=torch.int64)
    _ordered_kernel[(1,)](x, out)
    assert out.diff().sign().tolist() == [1, 1, 1, 0, 1, 1, 1]


@triton.jit
def _threshold_kernel(x_ptr, target_ptr, out_ptr, maximum, MASS: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr):
    pid = tl.program_id(0)
    target = tl.load(target_ptr + pid)
    t = _threshold(x_ptr, x_ptr, 1.0, maximum, target, MASS, V, False, GROUPS, 64)
    tl.store(out_ptr + pid, t.to(tl.int64))


@pytest.mark.parametrize("mass", [False, True])
def test_the_threshold_is_the_bits_of_a_logit(mass: bool) -> None:
    """By count or by mass, the radix passes end at the very bits of the last logit that is needed."""
    x = np.sort(np.random.default_rng(0).normal(size=70).astype(np.float32))[::-1].copy()
    bits = x.view(np.uint32).astype(np.int64)
    ordered = np.where(bits >> 31, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    weights = np.floor(np.exp(x - x[0], dtype=np.float32) * np.float32(2**30)).astype(np.int64) if mass else np.ones(70)
    targets = np.cumsum(weights).astype(np.int64)[[0, 1, 2, 9, 30, 68, 69]]
    out = torch.empty(len(targets), dtype=torch.int64)
    arguments = (torch.from_numpy(x), torch.from_numpy(targets), out, float(x[0]))
    _threshold_kernel[(len(targets),)](*arguments, mass, 70, 2)
    assert out.tolist() == ordered[[0, 1, 2, 9, 30, 68, 69]].tolist()


@pytest.mark.parametrize(
    ("logits", "row", "token"),
    [
        ([2.0, 1.9], Row(temperature=0), 0),
        ([2.0, 1.9], Row(temperature=0, frequency=0.06, counts=((0, 2),)), 1),
        ([2.0, 1.9], Row(temperature=0, frequency=0.04, counts=((0, 2),)), 0),
        ([2.0, 1.9], Row(temperature=0, presence=0.2, counts=((0, 1),)), 1),
        ([2.0, 1.9], Row(temperature=0, presence=0.2, counts=((0, 0),)), 0),
        ([2.0, 1.9], Row(temperature=0, repetition=1.1, counts=((0, 0),)), 1),
        ([-1.0, -1.05], Row(temperature=0, repetition=1.1, counts=((0, 3),)), 1),
        ([-1.0, -1.05], Row(temperature=0, bias=((1, 0.1),)), 1),
        ([-1.0, 2.0], Row(temperature=0, bias=((0, 3.5),), repetition=2.0, counts=((0, 1),)), 1),  # bias comes first
    ],
)
def test_each_edit(logits: list[float], row: Row, token: int) -> None:
    assert draw(torch.tensor([logits]), [row]).tokens.tolist() == [token]


def test_min_p_keeps_the_border() -> None:
    """min_p = 1 keeps what is as probable as the most probable token, and nothing else."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.9]]).expand(20, -1).contiguous()
    assert set(draw(logits, [Row(min_p=1.0, seed=i) for i in range(20)]).tokens.tolist()) == {1, 2}


@pytest.mark.slow
def test_top_p_is_of_what_top_k_left() -> None:
    """Of two equal halves after top-k, top_p = 0.5 needs one; of the whole distribution it would need both."""
    logits = torch.tensor([[2.0, 1.999, 1.0, 1.0, 1.0, 1.0]]).expand(20, -1).contiguous()
    rows = [Row(top_k=2, top_p=0.5, seed=i) for i in range(20)]
    assert set(draw(logits, rows).tokens.tolist()) == {0}


def test_the_lowest_id_among_equals_over_a_large_vocabulary() -> None:
    """More than one step of the walk over the vocabulary, all logits the same."""
    drawn = draw(torch.zeros(1, 4200), [Row(temperature=0)])
    assert drawn.tokens.item() == 0
    assert drawn.logprobs.item() == pytest.approx(-np.log(4200), abs=2e-6)


def test_rows_past_2_to_the_31(tmp_path: Path) -> None:
    logits = harness.far_rows(torch.randn(3, 97), tmp_path)
    rows = [Row(seed=i, top_k=5) for i in range(3)]
    expected = [expected_token(x, row) for x, row in zip(logits.numpy(), rows, strict=True)]
    assert draw(logits, rows).tokens.tolist() == expected


@pytest.mark.parametrize("name", ["counts", "bias"])
def test_one_kind_of_edit_without_the_other(name: str) -> None:
    """The lists that are not given are neither read nor applied."""
    logits = torch.randn(len(EVERYTHING), 97)
    rows = [replace(row, **{name: ()}) for row in EVERYTHING]
    expected = [expected_token(logits[i].numpy(), row) for i, row in enumerate(rows)]
    assert draw(logits, rows).tokens.tolist() == expected


def test_cost_is_what_is_touched() -> None:
    """A greedy row, a sampled one and one with both filters: unique bytes, and how often the logits are walked."""
    rows, top = [Row(temperature=0), Row(seed=1), Row(top_k=30, top_p=0.9, seed=2)], 2
    logits, opts, drawn = harness.guarded_like(torch.randn(3, 400)), options(rows, 400), outputs(3, top)
    with harness.recording() as trace:
        sampling(logits, opts, drawn, logits)
    expected = cost(3, 400, top, 2, 1)
    assert trace.bytes(False) == pytest.approx(expected.reads, rel=0.02)
    assert trace.bytes(True) == expected.writes
    low, high = logits[0, 0].data_ptr(), logits[-1, -1].data_ptr() + 4
    read = sum(((a >= low) & (a < high)).sum() * size for _, wrote, a, size in trace.touches if not wrote)
    assert read == pytest.approx(logits.numel() * 4 + expected.rereads["logits"], rel=0.02)


@pytest.mark.slow
def test_a_filter_draws_from_what_it_kept() -> None:
    """Ties with the k-th stay, what is minus infinity is never kept, and k and p may leave a single token."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, -torch.inf, 0.0]]).expand(40, -1).contiguous()
    drawn = draw(logits, [Row(top_k=2, temperature=5.0, seed=i) for i in range(40)]).tokens
    assert set(drawn.tolist()) == {0, 2, 3}
    drawn = draw(logits, [Row(temperature=100.0, seed=i) for i in range(40)]).tokens
    assert set(drawn.tolist()) == {0, 1, 2, 3, 5}
    assert not draw(logits, [Row(top_p=1e-6, seed=i) for i in range(40)]).tokens.any()
