"""Drawing tokens from logits, one launch: options, kept tokens, Gumbel-max draw, logprob, rank and top-N.

One program draws for one row; it walks the vocabulary a few times, from the L2 cache after the first. In order:

1. Raw pass: maximum and softmax mass, per VOCAB_TILE entries an explicit tree, tiles added in vocabulary order.
2. Where a row has bias or penalties, the logits are copied to scratch and edited there; the allowed-token bits and the
   temperature apply wherever a logit is read: x = edited / temperature.
3. top-k: the k-th largest x, by radix passes over the ordered bits of the floats, two bits a pass, counting.
   top-p: likewise over the integer masses floor(exp(x - max) * 2**30), whose sums no order changes. min-p compares.
4. argmax(x + g) over the kept tokens, g the Gumbel noise of Philox4x32-10 (Salmon et al. 2011): an exact draw from
   the softmax. Without temperature, argmax(x). The lowest id among equals.
5. Of the raw logits: the chosen token's logprob and rank, and the N most probable tokens.

Bytes: the logits once from memory, 3 to 37 times more from the cache, depending on the options, and once more for each
of the top N.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.common import tree_sum
from kernels.cost import Cost
from kernels.tiles import VOCAB_TILE, launch_options, vocab_groups

OK, NOT_FINITE, NOTHING_ALLOWED = 0, 1, 2  # values of ``status``


@triton.jit
def ordered_bits(x):
    """float32 to uint32 of the same order; both zeros become the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def gumbel(words):
    """Gumbel noise of random words r: u = (r + 1/2) / 2**32, E = -log(1 - u), as a series below 1e-3, g = -log(E)."""
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u + u * u / 2.0 + u * u * u / 3.0
    return -tl.log(tl.where(u < 1e-3, series, -tl.log(tl.maximum(1.0 - u, 2.3283064365386963e-10))))


@triton.jit
def gumbel_noise(seed, quads, position, sample_index, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Gumbel noise of 4 consecutive vocabulary ids for each of ``quads`` [ROWS, TILE / 4], id >> 2: [ROWS, TILE].

    The other arguments are scalars or [ROWS, 1].
    """
    counter = quads.to(tl.uint32)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + position, zero + sample_index, zero)
    return gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, TILE]))


@triton.jit
def tile_mass(x, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Maximum of each row of x [ROWS, TILE], and sum of exp(x - maximum): ([ROWS], [ROWS])."""
    top = tl.max(x, axis=1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top, tree_sum(tl.exp(x - safe[:, None]), ROWS, TILE)


@triton.jit
def add_masses(total, top, mass, maximum, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """``total`` [ROWS] plus the masses [ROWS, GROUPS] of consecutive tiles, taken from their own maxima to ``maximum``.

    ``maximum`` is a scalar or [ROWS, 1]. A row's bits depend on GROUPS, not on ROWS.
    """
    return total + tree_sum(mass * tl.exp(top - maximum), ROWS, GROUPS)


@triton.jit
def penalised(x, values, presence, frequency, repetition):
    """Logits after the penalties; ``values`` is how often an id was generated, 0 for one of the prompt alone."""
    x = tl.where(x > 0.0, x / repetition, x * repetition)
    x -= frequency * values
    return x - tl.where(values > 0.0, presence, 0.0)


@triton.jit
def _edit(
    scratch_ptr, starts_ptr, ids_ptr, values_ptr, given, row, presence, frequency, repetition, IS_BIAS: tl.constexpr
):
    """Apply the bias, or the penalties, of a row's listed ids to its scratch logits, where lists are given."""
    end = tl.load(starts_ptr + row + 1, mask=given != 0, other=0)
    for start in range(tl.load(starts_ptr + row, mask=given != 0, other=0), end, 256):
        entries = start + tl.arange(0, 256)
        mask = entries < end
        ids = tl.load(ids_ptr + entries, mask=mask, other=0).to(tl.int64)
        values = tl.load(values_ptr + entries, mask=mask, other=0.0)
        x = tl.load(scratch_ptr + ids, mask=mask, other=0.0)
        if IS_BIAS:
            x += values
        else:
            x = penalised(x, values, presence, frequency, repetition)
        tl.store(scratch_ptr + ids, x, mask=mask)
    tl.debug_barrier()


@triton.jit
def _options_applied(
    source_ptr, allowed_ptr, temperature, first_id, V: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x of GROUPS * TILE ids: edited logits, minus infinity where not allowed, over the temperature."""
    ids = first_id + tl.arange(0, GROUPS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = ids < V
    x = tl.load(source_ptr + ids, mask=inside, other=float("-inf"))
    if HAS_ALLOWED:
        word = tl.load(allowed_ptr + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, float("-inf"))
    return x / temperature


@triton.jit
def _threshold(
    source_ptr, allowed_ptr, temperature, maximum, target, MASS: tl.constexpr, V: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest ordered value t at which the ids with x >= t count, or weigh, at least ``target``."""
    t = tl.full([], 0, tl.uint32)
    one = tl.full([], 1073741824, tl.uint32)  # what the pass's two bits count in: 2**30, then 2**28 ...
    for _ in range(16):
        n1 = tl.zeros([GROUPS, TILE], tl.int64)
        n2 = tl.zeros([GROUPS, TILE], tl.int64)
        n3 = tl.zeros([GROUPS, TILE], tl.int64)
        for first_id in range(0, V, GROUPS * TILE):
            x = _options_applied(source_ptr, allowed_ptr, temperature, first_id, V, HAS_ALLOWED, GROUPS, TILE)
            bits = ordered_bits(x)
            if MASS:
                weight = _mass(x, maximum)
            else:
                weight = (x > float("-inf")).to(tl.int64)
            n1 += tl.where(bits >= t + one, weight, 0)
            n2 += tl.where(bits >= t + one * 2, weight, 0)
            n3 += tl.where(bits >= t + one * 3, weight, 0)
        digit = (tl.sum(n1) >= target).to(tl.uint32) + (tl.sum(n2) >= target).to(tl.uint32)
        t += (digit + (tl.sum(n3) >= target).to(tl.uint32)) * one
        one = one >> 2
    return t


@triton.jit
def _mass(x, maximum):
    """floor(exp(x - maximum) * 2**30) as int64."""
    return (tl.exp(x - maximum) * 1073741824.0).to(tl.int64)


@triton.jit
def best_of(values, ids):
    """The largest of ``values``, and the lowest id that has it."""
    top = tl.max(values)
    return top, tl.min(tl.where(values == top, ids, 2147483647))


@triton.jit
def _sampling_tile(
    row,
    logits_ptr,  # [R, V] float32
    scratch_ptr,  # [R, V] float32
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [R]
    seed_ptr,  # [R] int64, the bits of the seed
    position_ptr, sample_index_ptr,  # [R] int32, the bits of both
    presence_ptr, frequency_ptr, repetition_ptr,  # [R]
    count_starts_ptr, count_ids_ptr, counts_ptr,
    bias_starts_ptr, bias_ids_ptr, biases_ptr,
    allowed_ptr,  # [R, ceil(V / 32)] int32, the bits of the mask
    token_ptr,  # [R] int32
    logprob_ptr,  # [R] float32
    rank_ptr,  # [R] int32
    status_ptr,  # [R] int32
    top_ids_ptr,  # [R, N] int32
    top_logprobs_ptr,  # [R, N] float32
    num_logprobs,
    has_counts,
    has_bias,
    logits_stride,
    V: tl.constexpr,
    HAS_EDITS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = (V + 31) // 32
    raw_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    scratch_ptr += row.to(tl.int64) * V
    allowed_ptr += row.to(tl.int64) * WORDS
    span = tl.arange(0, GROUPS)[:, None] * TILE + tl.arange(0, TILE)[None, :]

    largest = tl.full([GROUPS, TILE], float("-inf"), tl.float32)
    not_finite = tl.zeros([GROUPS, TILE], tl.int32)
    for first_id in range(0, V, GROUPS * TILE):
        ids = first_id + span
        raw = tl.load(raw_ptr + ids, mask=ids < V, other=float("-inf"))
        not_finite |= ((raw != raw) | (raw == float("inf"))).to(tl.int32)
        largest = tl.maximum(largest, raw)
        if HAS_EDITS:
            tl.store(scratch_ptr + ids, raw, mask=ids < V)
    raw_max = tl.max(largest)
    masses = tl.zeros([1], tl.float32)
    for first_id in range(0, V, GROUPS * TILE):
        ids = first_id + span
        raw = tl.load(raw_ptr + ids, mask=ids < V, other=float("-inf"))
        top, mass = tile_mass(raw, GROUPS, TILE)
        groups = (tl.reshape(top, [1, GROUPS]), tl.reshape(mass, [1, GROUPS]))
        masses = add_masses(masses, groups[0], groups[1], raw_max, 1, GROUPS)
    raw_mass = tl.max(masses)

    source_ptr = raw_ptr
    if HAS_EDITS:
        tl.debug_barrier()
        source_ptr = scratch_ptr
        presence = tl.load(presence_ptr + row)
        frequency = tl.load(frequency_ptr + row)
        repetition = tl.load(repetition_ptr + row)
        _edit(scratch_ptr, bias_starts_ptr, bias_ids_ptr, biases_ptr, has_bias, row, 0.0, 0.0, 1.0, True)
        _edit(
            scratch_ptr, count_starts_ptr, count_ids_ptr, counts_ptr, has_counts, row, presence, frequency,
            repetition, False,
        )  # fmt: skip
    wanted_temperature = tl.load(temperature_ptr + row)
    greedy = wanted_temperature == 0.0
    temperature = tl.where(greedy, 1.0, wanted_temperature)

    best = tl.full([GROUPS, TILE], float("-inf"), tl.float32)
    best_ids = tl.full([GROUPS, TILE], 2147483647, tl.int32)
    for first_id in range(0, V, GROUPS * TILE):
        x = _options_applied(source_ptr, allowed_ptr, temperature, first_id, V, HAS_ALLOWED, GROUPS, TILE)
        best_ids = tl.where(x > best, first_id + span, best_ids)
        best = tl.maximum(best, x)
    maximum, best_id = best_of(best, best_ids)
    status = tl.where(tl.max(not_finite) > 0, 1, tl.where(maximum == float("-inf"), 2, 0))

    if (status == 0) & (wanted_temperature != 0.0):
        k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        floor = tl.full([], 0, tl.uint32)
        if (k > 0) & (k < V):
            floor = _threshold(source_ptr, allowed_ptr, temperature, maximum, k, False, V, HAS_ALLOWED, GROUPS, TILE)
        if top_p < 1.0:
            whole = tl.zeros([GROUPS, TILE], tl.int64)
            for first_id in range(0, V, GROUPS * TILE):
                x = _options_applied(source_ptr, allowed_ptr, temperature, first_id, V, HAS_ALLOWED, GROUPS, TILE)
                whole += tl.where(ordered_bits(x) >= floor, _mass(x, maximum), 0)
            target = tl.ceil(top_p.to(tl.float64) * tl.sum(whole).to(tl.float64)).to(tl.int64)
            nucleus = _threshold(
                source_ptr, allowed_ptr, temperature, maximum, target, True, V, HAS_ALLOWED, GROUPS, TILE
            )
            floor = tl.maximum(floor, nucleus)
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row).to(tl.uint32, bitcast=True)
        sample_index = tl.load(sample_index_ptr + row).to(tl.uint32, bitcast=True)
        quads = tl.arange(0, GROUPS)[:, None] * (TILE // 4) + tl.arange(0, TILE // 4)[None, :]
        best = tl.full([GROUPS, TILE], float("-inf"), tl.float32)
        for first_id in range(0, V, GROUPS * TILE):
            x = _options_applied(source_ptr, allowed_ptr, temperature, first_id, V, HAS_ALLOWED, GROUPS, TILE)
            kept = (ordered_bits(x) >= floor) & (tl.exp(x - maximum) >= min_p)
            score = x + gumbel_noise(seed, first_id // 4 + quads, position, sample_index, GROUPS, TILE)
            score = tl.where(kept, score, float("-inf"))
            best_ids = tl.where(score > best, first_id + span, best_ids)
            best = tl.maximum(best, score)
        best_id = best_of(best, best_ids)[1]
    token = tl.where(status == 0, best_id, 0)

    log_mass = raw_max + tl.log(raw_mass)
    chosen = tl.load(raw_ptr + token)
    above = tl.zeros([GROUPS, TILE], tl.int32)
    for first_id in range(0, V, GROUPS * TILE):
        ids = first_id + span
        raw = tl.load(raw_ptr + ids, mask=ids < V, other=float("-inf"))
        above += (raw > chosen).to(tl.int32)
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, chosen - log_mass)
    tl.store(rank_ptr + row, tl.sum(above) + 1)
    tl.store(status_ptr + row, status)

    previous = float("inf")
    previous_id = -1
    for n in range(num_logprobs):
        best = tl.full([GROUPS, TILE], float("-inf"), tl.float32)
        best_ids = tl.full([GROUPS, TILE], 2147483647, tl.int32)
        for first_id in range(0, V, GROUPS * TILE):
            ids = first_id + span
            raw = tl.load(raw_ptr + ids, mask=ids < V, other=float("-inf"))
            later = ((raw < previous) | ((raw == previous) & (ids > previous_id))) & (ids < V)
            better = later & ((raw > best) | (best_ids == 2147483647))  # of minus infinity too, the first
            best_ids = tl.where(better, ids, best_ids)
            best = tl.where(better, raw, best)
        previous, previous_id = best_of(best, best_ids)
        tl.store(top_ids_ptr + row * num_logprobs + n, previous_id)
        tl.store(top_logprobs_ptr + row * num_logprobs + n, previous - log_mass)


@triton.jit(do_not_specialize=["num_logprobs", "has_counts", "has_bias"])
def _sampling_kernel(
    logits_ptr, scratch_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    sample_index_ptr, presence_ptr, frequency_ptr, repetition_ptr, count_starts_ptr, count_ids_ptr, counts_ptr,
    bias_starts_ptr, bias_ids_ptr, biases_ptr, allowed_ptr, token_ptr, logprob_ptr, rank_ptr, status_ptr,
    top_ids_ptr, top_logprobs_ptr, num_logprobs, has_counts, has_bias, logits_stride,
    V: tl.constexpr, HAS_EDITS: tl.constexpr, HAS_ALLOWED: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    _sampling_tile(
        tl.program_id(0), logits_ptr, scratch_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr,
        position_ptr, sample_index_ptr, presence_ptr, frequency_ptr, repetition_ptr, count_starts_ptr,
        count_ids_ptr, counts_ptr, bias_starts_ptr, bias_ids_ptr, biases_ptr, allowed_ptr, token_ptr, logprob_ptr,
        rank_ptr, status_ptr, top_ids_ptr, top_logprobs_ptr, num_logprobs, has_counts, has_bias, logits_stride, V,
        HAS_EDITS, HAS_ALLOWED, GROUPS, TILE,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Values on some ids of each row, in compressed rows: starts [R + 1] and ids [N] int32, values [N] float32."""

    starts: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """One entry a row, [R]; neutral values switch an option off. Ids in a sparse row are different ones, and ascend."""

    temperature: torch.Tensor  # float32, 0 = greedy
    top_k: torch.Tensor  # int32, 0 = all
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    seeds: torch.Tensor  # int64, the bits of the 64-bit seed
    positions: torch.Tensor  # int32, the bits of the position of the token to draw
    sample_index: torch.Tensor  # int32
    presence_penalty: torch.Tensor  # float32
    frequency_penalty: torch.Tensor  # float32
    repetition_penalty: torch.Tensor  # float32
    output_counts: SparseRows | None = None
    logit_bias: SparseRows | None = None
    allowed: torch.Tensor | None = None  # [R, ceil(V / 32)] int32, bit (id & 31) of word (id >> 5)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a launch writes. Logprobs and ranks are of the raw logits."""

    tokens: torch.Tensor  # [R] int32
    logprobs: torch.Tensor  # [R] float32
    ranks: torch.Tensor  # [R] int32
    status: torch.Tensor  # [R] int32: OK, NOT_FINITE or NOTHING_ALLOWED, where the others mean nothing
    top_ids: torch.Tensor  # [R, N] int32
    top_logprobs: torch.Tensor  # [R, N] float32


def sampling(logits: torch.Tensor, options: Options, drawn: Drawn, scratch: torch.Tensor) -> None:
    """Draw a token for every row of ``logits`` [R, V] float32.

    Args:
        drawn: written; its N is how many of the most probable tokens to report, at most V.
        scratch: [R, V] float32 contiguous, used where there are penalties or a bias; any tensor otherwise.
    """
    num_rows, vocab_size = logits.shape
    counts, bias = options.output_counts, options.logit_bias
    none = SparseRows(options.top_k, options.top_k, options.top_p)
    counts_or_none, bias_or_none = counts or none, bias or none
    _sampling_kernel[(num_rows,)](
        logits, scratch, options.temperature, options.top_k, options.top_p, options.min_p, options.seeds,
        options.positions, options.sample_index, options.presence_penalty, options.frequency_penalty,
        options.repetition_penalty, counts_or_none.starts, counts_or_none.ids, counts_or_none.values,
        bias_or_none.starts, bias_or_none.ids, bias_or_none.values,
        options.top_k if options.allowed is None else options.allowed, drawn.tokens, drawn.logprobs, drawn.ranks,
        drawn.status, drawn.top_ids, drawn.top_logprobs, drawn.top_ids.shape[1], int(counts is not None),
        int(bias is not None), logits.stride(0),
        V=vocab_size, HAS_EDITS=counts is not None or bias is not None, HAS_ALLOWED=options.allowed is not None,
        GROUPS=vocab_groups(vocab_size), TILE=VOCAB_TILE,
        **launch_options(num_warps=16),
    )  # fmt: skip


def cost(num_rows: int, vocab_size: int, num_logprobs: int, sampled_rows: int, filtered_rows: int = 0) -> Cost:
    """Bytes of one launch without penalties, bias or mask.

    ``sampled_rows`` are not greedy; ``filtered_rows`` of them have both top-k and top-p.
    """
    row = vocab_size * 4
    walks = num_rows * (3 + num_logprobs) + sampled_rows + filtered_rows * 33  # after the first
    return Cost(
        weights=0,
        reads=num_rows * (row + 4) + sampled_rows * 28,
        writes=num_rows * (16 + 8 * num_logprobs),
        flops=0,
        rereads={"logits": row * walks},
    )
