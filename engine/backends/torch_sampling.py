"""Sampling in PyTorch tensor operations: the readable definition of what ``base.py`` says, on any device."""

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import SamplingBatch, Sparse

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32 (Salmon et al. 2011, table 2)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASS_UNIT = 1 << 30


def draw(logits: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Draw a token for every row of ``logits`` ``[R, V]`` (float32 or wider); returns ids ``[R]`` int64."""
    x = logits.float()
    temperature = _column(sampling.temperature, x.device)  # [R, 1]
    x = _apply_bias_and_penalties(x, sampling)
    if sampling.allowed is not None:
        x = x.masked_fill(~_unpack(sampling.allowed, x.shape[1], x.device), -torch.inf)
    greedy = temperature[:, 0] == 0
    if bool(greedy.all()):
        return _lowest_argmax(x)
    scaled = x / torch.where(temperature == 0, 1.0, temperature)
    kept = keep(scaled, sampling)
    noise = gumbel_noise(sampling.seeds, sampling.positions, sampling.sample_index, x.shape[1], x.device)
    sampled = _lowest_argmax(torch.where(kept, scaled + noise, -torch.inf))
    return torch.where(greedy, _lowest_argmax(x), sampled)


def keep(x: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Which tokens of ``x`` ``[R, V]`` (after the temperature) top-k, top-p and min-p leave; bool ``[R, V]``."""
    kept = x > -torch.inf
    top = x.amax(dim=1, keepdim=True)  # [R, 1]
    vocab_size = x.shape[1]
    if bool((sampling.top_k > 0).any()):
        k = _column(np.where(sampling.top_k > 0, np.minimum(sampling.top_k, vocab_size), vocab_size), x.device)
        ordered = x.sort(dim=1, descending=True).values
        kept &= x >= ordered.gather(1, k.long() - 1)  # ties with the k-th stay
    if bool((sampling.top_p < 1).any()):
        kept &= _top_p(torch.where(kept, x, -torch.inf), top, sampling.top_p)
    if bool((sampling.min_p > 0).any()):
        kept &= torch.exp(x - top) >= _column(sampling.min_p, x.device)
    return kept


def _top_p(x: torch.Tensor, top: torch.Tensor, top_p: npt.NDArray[np.float32]) -> torch.Tensor:
    """{x >= t} for the largest t at which the integer mass reaches ``top_p`` of the whole."""
    ordered = x.sort(dim=1, descending=True).values
    mass = (torch.exp(ordered - top) * _MASS_UNIT).long()  # floor; [R, V]
    reached = mass.cumsum(dim=1)
    whole = reached[:, -1].cpu().numpy()  # the product is a float64, which not every device has
    wanted = _column(np.ceil(top_p.astype(np.float64) * whole).astype(np.int64), x.device)
    # A token is kept when those before it do not reach the mass; tokens equal to the last kept one are kept too.
    last = (reached - mass < wanted).sum(dim=1, keepdim=True) - 1
    threshold = ordered.gather(1, last.clamp_min(0))
    return (x >= threshold) | _column(top_p >= 1, x.device)


def gumbel_noise(
    seeds: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.uint32],
    sample_index: npt.NDArray[np.uint32],
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """The Gumbel noise of every vocabulary id for each of R draws, float32 ``[R, vocab_size]``."""
    groups = torch.arange(-(-vocab_size // 4), device=device).expand(len(seeds), -1)  # [R, G], id >> 2
    keys = [_column((seeds & np.uint64(_LOW)).astype(np.int64), device)]
    keys.append(_column((seeds >> np.uint64(32)).astype(np.int64), device))
    counter = (groups, _column(positions.astype(np.int64), device), _column(sample_index.astype(np.int64), device))
    words = torch.stack(philox(*counter, torch.zeros_like(groups), *keys), dim=-1)  # [R, G, 4]
    return _gumbel(words.flatten(1)[:, :vocab_size])


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, k0: torch.Tensor, k1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four 32-bit words for a counter and a key, all held in int64 tensors that broadcast."""
    for _ in range(_ROUNDS):
        # A product of two 32-bit words may wrap int64; its bits are right all the same.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    u = (words.float() + 0.5) * 2.0**-32
    series = u + u * u / 2 + u * u * u / 3  # -log(1 - u), where the subtraction would lose u
    return -torch.log(torch.where(u < 1e-3, series, -torch.log((1 - u).clamp_min(2.0**-32))))


def _apply_bias_and_penalties(x: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    if sampling.logit_bias is None and sampling.output_counts is None:
        return x
    x = x.clone()
    if sampling.logit_bias is not None:
        rows, ids, values = _coordinates(sampling.logit_bias, x.device)
        x[rows, ids] += values
    if sampling.output_counts is not None:
        rows, ids, counts = _coordinates(sampling.output_counts, x.device)
        old = x[rows, ids]
        repetition = _column(sampling.repetition_penalty, x.device)[rows, 0]
        old = torch.where(old > 0, old / repetition, old * repetition)
        old -= _column(sampling.frequency_penalty, x.device)[rows, 0] * counts
        x[rows, ids] = old - _column(sampling.presence_penalty, x.device)[rows, 0] * (counts > 0)
    return x


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the raw distribution: logprob and rank of ``token_ids`` ``[R]``, ids and logprobs of the ``count`` best.

    Returns ``([R] float32, [R] int64, [R, count] int64, [R, count] float32)``.
    """
    logprob = torch.log_softmax(logits.float(), dim=1)
    chosen = logprob.gather(1, token_ids[:, None])  # [R, 1]
    rank = (logprob > chosen).sum(dim=1) + 1
    best, best_ids = logprob.topk(min(count, logits.shape[1]), dim=1)
    return chosen[:, 0], rank, best_ids, best


def _lowest_argmax(x: torch.Tensor) -> torch.Tensor:
    """[R] the lowest id among those with the row's largest value (``argmax`` promises no order among equals)."""
    ids = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(dim=1, keepdim=True), ids, x.shape[1]).amin(dim=1)


def _column(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """[R] to [R, 1] on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)[:, None]


def _coordinates(sparse: Sparse, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, id and value of every entry."""
    rows = np.repeat(np.arange(len(sparse.starts) - 1), np.diff(sparse.starts))
    arrays = (rows.astype(np.int64), sparse.ids.astype(np.int64), sparse.values)
    rows_t, ids_t, values_t = (torch.from_numpy(array).to(device) for array in arrays)
    return rows_t, ids_t, values_t


def _unpack(bits: npt.NDArray[np.uint32], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[R, words] to bool [R, vocab_size]."""
    flags = np.unpackbits(np.ascontiguousarray(bits).astype("<u4").view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(flags[:, :vocab_size].astype(bool)).to(device)
