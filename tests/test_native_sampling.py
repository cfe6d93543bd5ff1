"""Draws of the native backend held to an oracle in NumPy and Python integers that is written here from the contract."""

import math

import numpy as np
import pytest
from models import tiny_config
from native_steps import ISAS, batch, ids_of, make, neutral

from engine.backends.base import SamplingBatch, Sparse, StepOutput
from engine.backends.native_backend import NativeBackend
from engine.config import ModelConfig
from engine.messages import UndrawableRow

MASK = 0xFFFFFFFF
CONFIG = tiny_config(vocab_size=131)
LARGE = tiny_config(vocab_size=9001)  # three pieces, and more than four times as many ids as groups for top_k 512
ROWS = 12


def philox(counter: tuple[np.ndarray, int, int, int], seed: int) -> list[np.ndarray]:
    c, k = list(counter), [seed & MASK, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def gumbel(vocab: int, seed: int, position: int, sample: int) -> np.ndarray:
    words = np.stack(philox((np.arange(-(-vocab // 4), dtype=np.uint64), position, sample, 0), seed), 1).ravel()[:vocab]
    u = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    e = np.where(u < np.float32(1e-3), u + u * u / 2 + u * u * u / 3, -np.log(np.maximum(1 - u, np.float32(2.0**-32))))
    return -np.log(e.astype(np.float64))


def row_of(sparse: Sparse | None, r: int) -> list[tuple[int, float]]:
    if sparse is None:
        return []
    part = slice(sparse.starts[r], sparse.starts[r + 1])
    return list(zip(sparse.ids[part].tolist(), sparse.values[part].tolist(), strict=True))


def options_applied(logits: np.ndarray, s: SamplingBatch, r: int) -> np.ndarray:
    x = logits.astype(np.float64)
    for i, bias in row_of(s.logit_bias, r):
        x[i] += bias
    for i, count in row_of(s.output_counts, r):
        x[i] = x[i] / s.repetition_penalty[r] if x[i] > 0 else x[i] * s.repetition_penalty[r]
        x[i] -= s.frequency_penalty[r] * count + (s.presence_penalty[r] if count > 0 else 0)
    if s.allowed is not None:
        for i in range(len(x)):
            if not (int(s.allowed[r, i >> 5]) >> (i & 31)) & 1:
                x[i] = -np.inf
    return x


def kept(x: np.ndarray, s: SamplingBatch, r: int) -> np.ndarray:
    """Which of x, after the temperature, may be drawn: by sorting, where the backend makes radix passes."""
    keep = x > -np.inf
    if s.top_k[r] > 0:
        keep &= x >= np.sort(x)[::-1][min(int(s.top_k[r]), len(x)) - 1]
    if s.top_p[r] < 1:
        mass = np.where(keep, np.floor(np.exp(x - x.max()) * 2**30), 0).astype(np.int64)
        wanted = math.ceil(float(s.top_p[r]) * int(mass.sum()))
        order = np.argsort(-x, kind="stable")
        reached = np.cumsum(mass[order])
        keep &= x >= x[order[int(np.argmax(reached >= wanted))]]
    return keep & (np.exp(x - x.max()) >= s.min_p[r])


def drawn(logits: np.ndarray, s: SamplingBatch, r: int) -> tuple[int, float]:
    """The token, and by how much it beats the next: rounding decides below about 1e-5."""
    x = options_applied(logits, s, r)
    if s.temperature[r] > 0:
        x = x / s.temperature[r]
        noise = gumbel(len(x), int(s.seeds[r]), int(s.positions[r]), int(s.sample_index[r]))
        x = np.where(kept(x, s, r), x + noise, -np.inf)
    order = np.argsort(-x, kind="stable")
    return int(order[0]), float(x[order[0]] - x[order[1]])


def step(
    sampling: SamplingBatch, rows: int = ROWS, config: ModelConfig = CONFIG, backend: NativeBackend | None = None
) -> tuple[np.ndarray, StepOutput]:
    """Logits and draws of the same rows of one step."""
    backend = backend or make(config)
    output = backend.collect(
        backend.submit(batch([(0, 0, ids_of(1, rows, config))], "all", sampling, list(range(rows))))
    )
    assert output.logits is not None
    return output.logits.numpy(), output


def check(sampling: SamplingBatch, config: ModelConfig = CONFIG, backend: NativeBackend | None = None) -> None:
    logits, output = step(sampling, config=config, backend=backend)
    clear = 0
    for r in range(ROWS):
        token, margin = drawn(logits[r], sampling, r)
        if margin > 1e-4:
            assert output.token_ids[r] == token, r
            clear += 1
    assert clear > ROWS // 2


def full(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.full(ROWS, value, dtype)


def sparse(rows: list[dict[int, float]]) -> Sparse:
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    ids = np.array([i for row in rows for i in row], np.int32)
    return Sparse(starts, ids, np.array([v for row in rows for v in row.values()], np.float32))


def lowered(vocab_size: int) -> dict[str, Sparse]:
    """The option that makes all logits less than the zeros that fill rows up."""
    return {"logit_bias": sparse([dict.fromkeys(range(vocab_size), -90.0)] * ROWS)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": full(0.3)},
        {"temperature": full(5)},
        {"temperature": full(5), "seeds": np.arange(ROWS, dtype=np.uint64) + np.uint64(2**64 - 20)},
        {"temperature": full(3), "positions": full(2**32 - 1, np.uint32), "sample_index": full(7, np.uint32)},
        {"temperature": full(5), "top_k": np.arange(ROWS, dtype=np.int32)},
        {"temperature": full(5), "top_k": full(1000, np.int32)},
        {"temperature": full(5), "top_p": np.linspace(0.01, 1, ROWS, dtype=np.float32)},
        {"temperature": full(5), "top_k": full(9, np.int32), "top_p": full(0.5)},
        {"temperature": full(5), "min_p": np.linspace(0, 1, ROWS, dtype=np.float32)},
        {"temperature": full(9), "top_k": full(50, np.int32), "top_p": full(0.9), "min_p": full(0.2)},
    ],
)
def test_draws(changes: dict[str, np.ndarray]) -> None:
    check(neutral(ROWS, **changes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab_size", [9, 131, 1031, 2063])
def test_no_id_past_the_vocabulary_counts(isa: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits below zero, in rows of a size that is no multiple of a vector, one batch after another."""
    monkeypatch.setenv("ENGINE_ISA", isa)
    config = tiny_config(vocab_size=vocab_size)
    backend = make(config)
    few = np.zeros((ROWS, -(-vocab_size // 32)), np.uint32)
    few[:, 0] = 0b1000101
    for changes in (
        {"top_k": full(5, np.int32)},
        {"top_p": full(0.7), "temperature": full(3)},
        {"top_k": full(5, np.int32), "allowed": few},
        {"top_p": full(0.999), "allowed": few},
    ):
        check(neutral(ROWS, **lowered(vocab_size), **changes), config, backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": np.geomspace(0.01, 100, ROWS, dtype=np.float32)},
        {
            "temperature": full(2),
            "top_k": np.array([1, 2, 50, 64, 65, 300, 512, 513, 3000, 9000, 9001, 9002], np.int32),
        },
        {"temperature": np.geomspace(0.02, 20, ROWS, dtype=np.float32), "top_p": full(0.9)},
        {"temperature": full(0.1), "top_p": np.linspace(0.1, 0.999999, ROWS, dtype=np.float32)},
        {"temperature": full(1), "top_k": full(70, np.int32), "top_p": full(0.8), "min_p": full(0.01)},
        {"top_k": np.array([1, 2, 3, 40, 300, 512, 513, 3000, 8999, 9000, 9001, 9002], np.int32), **lowered(9001)},
        {"top_p": full(0.7), **lowered(9001)},
    ],
)
def test_draws_of_a_large_vocabulary(isa: str, changes: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what could not be drawn is passed over: most noise, and most ids in the search for a threshold."""
    monkeypatch.setenv("ENGINE_ISA", isa)
    for seed in range(4):
        check(neutral(ROWS, seeds=np.arange(ROWS, dtype=np.uint64) + np.uint64(100 * seed), **changes), LARGE)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_bias_penalties_and_mask(temperature: float) -> None:
    generator = np.random.default_rng(3)
    counts = [{int(i): float(i % 4) for i in generator.choice(131, 60, replace=False)} for _ in range(ROWS)]
    biases = [
        {int(i): float(generator.normal()) * 5 for i in generator.choice(131, r, replace=False)} for r in range(ROWS)
    ]
    penalties = {
        "presence_penalty": full(0.7),
        "frequency_penalty": full(0.4),
        "repetition_penalty": np.linspace(0.5, 2, ROWS, dtype=np.float32),
    }
    allowed = generator.integers(0, 2**32, (ROWS, 5), dtype=np.uint32)
    heat = {"temperature": full(temperature)}
    check(neutral(ROWS, **heat, **penalties, output_counts=sparse(counts), logit_bias=sparse(biases)))
    check(neutral(ROWS, **heat, allowed=allowed))
    check(neutral(ROWS, **heat, **penalties, output_counts=sparse(counts), allowed=allowed, top_k=full(5, np.int32)))


def test_ties_at_the_top_k_boundary_stay_and_greedy_takes_the_lowest_id() -> None:
    """A bias makes ids 7, 20 and 99 equal and larger than all others."""
    logits, _ = step(neutral(ROWS))
    level = dict.fromkeys((99, 7, 20), np.float32(30))
    biases = [{i: float(level[i] - row[i]) for i in level} for row in logits]
    exact = [all(r[i] + np.float32(b[i]) == level[i] for i in level) for r, b in zip(logits, biases, strict=True)]
    _, output = step(neutral(ROWS, temperature=full(0), logit_bias=sparse(biases)))
    assert [token for token, same in zip(output.token_ids, exact, strict=True) if same] == [7] * sum(exact)
    assert sum(exact) > 3
    drawn_ids = set()
    for seed in range(8):
        seeds = np.arange(ROWS, dtype=np.uint64) + np.uint64(100 * seed)
        _, output = step(neutral(ROWS, seeds=seeds, top_k=full(2, np.int32), logit_bias=sparse(biases)))
        drawn_ids |= {int(token) for token, same in zip(output.token_ids, exact, strict=True) if same}
    assert drawn_ids == {7, 20, 99}


def test_logprobs_and_ranks() -> None:
    """Of the raw logits, whatever the options are."""
    biases = [{3: 50.0} for _ in range(ROWS)]
    logits, output = step(neutral(ROWS, num_logprobs=5, logit_bias=sparse(biases), temperature=full(0)))
    x = logits.astype(np.float64)
    logprobs = x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
    assert (output.token_ids == 3).all()
    assert np.allclose(output.logprobs, logprobs[:, 3], atol=1e-5)
    assert np.array_equal(output.ranks, (logits > logits[:, 3:4]).sum(1) + 1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert np.array_equal(output.top_ids, order)
    assert np.allclose(output.top_logprobs, np.take_along_axis(logprobs, order, 1), atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_the_most_probable_of_a_large_vocabulary(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_ISA", isa)
    logits, output = step(neutral(ROWS, num_logprobs=20), config=LARGE)
    assert np.array_equal(output.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :20])


def test_the_distribution() -> None:
    """100,000 draws of one row against its softmax (chi-square); a temperature 10% off fails the same test."""
    count = 100000
    ids = ids_of(1, 3, CONFIG)
    backend = make(CONFIG)
    tokens = []
    for temperature in (2.0, 1.8):
        sampling = neutral(
            count,
            temperature=np.full(count, temperature, np.float32),
            seeds=np.full(count, 12345, np.uint64),
            positions=np.arange(count, dtype=np.uint32),
        )
        output = backend.collect(backend.submit(batch([(0, 0, ids)], "last", sampling, [2] * count)))
        tokens.append(np.bincount(output.token_ids, minlength=131))
    assert output.logits is not None
    p = np.exp(output.logits[0].numpy().astype(np.float64) / 2)
    p /= p.sum()
    # The statistic has mean f and variance 2f for f = 130 degrees of freedom: 4 deviations are far out.
    f = 130
    limit = f + 4 * math.sqrt(2 * f)
    statistics = [(((counts - count * p) ** 2) / (count * p)).sum() for counts in tokens]
    assert statistics[0] < limit < statistics[1]


def test_a_row_that_excludes_everything_is_an_error() -> None:
    allowed = np.full((ROWS, 5), 2**32 - 1, np.uint32)
    allowed[4] = 0
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="no token can be drawn from the logits of drawn row 4"):
            step(neutral(ROWS, allowed=allowed, temperature=full(temperature)))


@pytest.mark.parametrize("changes", [{"min_p": full(1.5)}, {"min_p": full(1.5), "top_k": full(3, np.int32)}])
def test_filters_that_exclude_everything_are_an_error(changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(UndrawableRow, match="no token can be drawn from the logits of drawn row 0"):
        step(neutral(ROWS, **changes))


def test_an_infinite_temperature_takes_what_is_allowed_or_nothing() -> None:
    """SamplingParams cannot give one; -inf over infinity is NaN."""
    allowed = np.zeros((ROWS, 5), np.uint32)
    allowed[:, 0] = 0xF0
    try:
        tokens = step(neutral(ROWS, allowed=allowed, temperature=full(np.inf)))[1].token_ids
    except UndrawableRow:
        return
    assert set(tokens.tolist()) <= {4, 5, 6, 7}


@pytest.mark.parametrize("temperature", [np.nan, -1.0])
def test_what_is_no_temperature_is_no_crash(temperature: float) -> None:
    """SamplingParams refuses them."""
    _, drawn = step(neutral(ROWS, temperature=full(temperature), top_k=full(3, np.int32), top_p=full(0.5)))
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 131)).all()


def test_a_vanishing_top_p_leaves_the_most_probable() -> None:
    logits, drawn = step(neutral(ROWS, top_p=full(0)))
    assert np.array_equal(drawn.token_ids, logits.argmax(1))


def test_a_vanishing_temperature_is_greedy() -> None:
    _, cold = step(neutral(ROWS, temperature=full(1e-42)))
    _, greedy = step(neutral(ROWS, temperature=full(0)))
    assert np.array_equal(cold.token_ids, greedy.token_ids)
