"""Head and draw in one launch, for rows that need no top-k, top-p or min-p: no logits in memory.

A program computes one [VOCAB_TILE, BLOCK_T] tile of logits as ``logits`` does, and keeps of each row:

1. Of the raw logits: the tile's maximum and softmax mass, and the N best with their ids where top-N is asked for.
2. Bias, penalties, mask and temperature are applied in registers; a row's sparse ids ascend, so that a binary search
   finds those of the tile. Kept is the best score: x + Gumbel noise, or x where greedy, the lowest id among equals.

The last program to finish a row block combines the tiles in vocabulary order, as ``sampling`` does with the same
arithmetic: a token and its logprob have the same bits on both paths. A rank is 1 where the token is the most probable;
any other needs logits that are gone, and top-N a merge of the tiles' candidates: ``head_ranks``, a second launch, does
both where they are wanted. The threshold of min-p is known only once all of the row is: as top-k and top-p, it needs
``logits`` and ``sampling``.

Bytes: W once (again for every BLOCK_T rows, from L2), the rows and their options once per vocabulary tile (from L2),
20 + 8 N bytes for each row and vocabulary tile, written once and 20 read (L2).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.common import arrive
from kernels.cost import Cost
from kernels.dependent import let_next_start, prefetch_weights, wait_for_previous
from kernels.linear import TRITON_TYPES
from kernels.logits import logits_of_tile
from kernels.sampling import Drawn, Options, SparseRows, add_masses, gumbel_noise, penalised, tile_mass
from kernels.tiles import VOCAB_TILE, cdiv, launch_options, logits_tiles, vocab_groups
from kernels.weights import Weights


@triton.jit
def _first_entry(ids_ptr, low, high, first_id, STEPS: tl.constexpr):
    """Of the ascending ids [low, high) of each row, the place of the first that is at least ``first_id``: [BLOCK_T].

    STEPS halvings are enough for a list of fewer than 2**STEPS ids.
    """
    for _ in range(STEPS):
        middle = (low + high) // 2
        unsure = low < high
        before = tl.load(ids_ptr + middle, mask=unsure, other=2147483647) < first_id
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    return low


@triton.jit
def _edit_tile(
    x,  # [BLOCK_T, TILE] float32
    first_id,
    rows,
    row_mask,
    starts_ptr, ids_ptr, values_ptr,
    presence_ptr, frequency_ptr, repetition_ptr,
    IS_BIAS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x with the bias, or the penalties, of the listed ids that lie in the tile, one entry of every row at a time."""
    ids = first_id + tl.arange(0, TILE)[None, :]
    if not IS_BIAS:
        presence = tl.load(presence_ptr + rows, mask=row_mask, other=0.0)[:, None]
        frequency = tl.load(frequency_ptr + rows, mask=row_mask, other=0.0)[:, None]
        repetition = tl.load(repetition_ptr + rows, mask=row_mask, other=1.0)[:, None]
    end = tl.load(starts_ptr + rows + 1, mask=row_mask, other=0)
    entry = _first_entry(ids_ptr, tl.load(starts_ptr + rows, mask=row_mask, other=0), end, first_id, STEPS)
    listed = tl.load(ids_ptr + entry, mask=entry < end, other=2147483647)
    while tl.min(listed) < first_id + TILE:
        inside = listed < first_id + TILE
        values = tl.load(values_ptr + entry, mask=inside, other=0.0)[:, None]
        if IS_BIAS:
            changed = x + values
        else:
            changed = penalised(x, values, presence, frequency, repetition)
        x = tl.where(listed[:, None] == ids, changed, x)
        entry += inside.to(tl.int32)
        listed = tl.load(ids_ptr + entry, mask=entry < end, other=2147483647)
    return x


@triton.jit
def _tile_best(
    raw,  # [BLOCK_T, TILE] float32, -inf past the vocabulary
    x,  # raw, edited
    first_id,
    rows,
    row_mask,
    temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, allowed_ptr,
    has_allowed,
    V: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_T: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Best score of each row, its id, and its raw logit: [BLOCK_T] each."""
    ids = first_id + tl.arange(0, TILE)
    wanted = tl.load(temperature_ptr + rows, mask=row_mask, other=0.0)
    x = x / tl.where(wanted == 0.0, 1.0, wanted)[:, None]
    if OPTIONS:
        WORDS: tl.constexpr = (V + 31) // 32
        words = first_id // 32 + tl.arange(0, TILE // 32)[None, :]
        mask = row_mask[:, None] & (words < WORDS) & (has_allowed != 0)
        word = tl.load(allowed_ptr + rows[:, None] * WORDS + words, mask=mask, other=-1)  # [BLOCK_T, TILE / 32]
        word = tl.reshape(tl.broadcast_to(word[:, :, None], [BLOCK_T, TILE // 32, 32]), [BLOCK_T, TILE])
        x = tl.where(((word >> (ids % 32)[None, :]) & 1) != 0, x, float("-inf"))
    seed = tl.load(seed_ptr + rows, mask=row_mask, other=0)[:, None]
    position = tl.load(position_ptr + rows, mask=row_mask, other=0).to(tl.uint32, bitcast=True)[:, None]
    sample_index = tl.load(sample_index_ptr + rows, mask=row_mask, other=0).to(tl.uint32, bitcast=True)[:, None]
    quads = first_id // 4 + tl.arange(0, TILE // 4)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    noise = gumbel_noise(seed, quads, position, sample_index, BLOCK_T, TILE)
    score = tl.where((wanted == 0.0)[:, None], x, x + noise)
    best = tl.max(score, axis=1)
    best_id = tl.min(tl.where(score == best[:, None], ids[None, :], 2147483647), axis=1)
    best_raw = tl.max(tl.where(ids[None, :] == best_id[:, None], raw, float("-inf")), axis=1)
    return best, best_id, best_raw


@triton.jit
def _store_candidates(
    raw, first_id, place, row_mask, values_ptr, ids_ptr, num_logprobs, plane,
    V: tl.constexpr, BLOCK_T: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The ``num_logprobs`` best raw logits of each row and their ids, best first, lowest id first among equals."""
    ids = first_id + tl.arange(0, TILE)[None, :]
    previous = tl.full([BLOCK_T], float("inf"), tl.float32)
    previous_id = tl.full([BLOCK_T], -1, tl.int32)
    for _ in range(num_logprobs):
        later = (raw < previous[:, None]) | ((raw == previous[:, None]) & (ids > previous_id[:, None]))
        previous = tl.max(tl.where(later, raw, float("-inf")), axis=1)
        found = later & (raw == previous[:, None]) & (ids < V)
        previous_id = tl.min(tl.where(found, ids, 2147483647), axis=1)
        tl.store(values_ptr + place, previous, mask=row_mask)
        tl.store(ids_ptr + place, previous_id, mask=row_mask)
        place += plane


@triton.jit
def _finish(
    rows,  # [BLOCK_T] int64
    row_mask,
    tops_ptr, masses_ptr, scores_ptr, raws_ptr, best_ids_ptr, chosen_ptr, log_mass_ptr,
    token_ptr, logprob_ptr, rank_ptr, status_ptr,
    other_rank,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Combine the vocabulary tiles of a row block in order, and write what was drawn."""
    largest = tl.full([BLOCK_T, GROUPS], float("-inf"), tl.float32)
    for first in range(0, TILES, GROUPS):
        tiles = first + tl.arange(0, GROUPS)[None, :]
        mask = row_mask[:, None] & (tiles < TILES)
        top = tl.load(tops_ptr + rows[:, None] * TILES + tiles, mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, top)
    maximum = tl.where(row_mask, tl.max(largest, axis=1), 0.0)
    mass = tl.where(row_mask, 0.0, 1.0)
    best = tl.full([BLOCK_T, GROUPS], float("-inf"), tl.float32)
    best_ids = tl.full([BLOCK_T, GROUPS], 2147483647, tl.int32)
    chosen = best
    for first in range(0, TILES, GROUPS):
        tiles = first + tl.arange(0, GROUPS)[None, :]
        mask = row_mask[:, None] & (tiles < TILES)
        place = rows[:, None] * TILES + tiles
        top = tl.load(tops_ptr + place, mask=mask, other=float("-inf"))
        part = tl.load(masses_ptr + place, mask=mask, other=0.0)
        mass = add_masses(mass, top, part, maximum[:, None], BLOCK_T, GROUPS)
        score = tl.load(scores_ptr + place, mask=mask, other=float("-inf"))
        raw = tl.load(raws_ptr + place, mask=mask, other=float("-inf"))
        ids = tl.load(best_ids_ptr + place, mask=mask, other=2147483647)
        better = score > best  # the first tile of the largest score, whose ids are the lowest
        chosen = tl.where(better, raw, chosen)
        best_ids = tl.where(better, ids, best_ids)
        best = tl.maximum(best, score)
    best_score = tl.max(best, axis=1)
    best_id = tl.min(tl.where(best == best_score[:, None], best_ids, 2147483647), axis=1)
    chosen = tl.max(tl.where(best_ids == best_id[:, None], chosen, float("-inf")), axis=1)
    log_mass = maximum + tl.log(mass)
    status = tl.where(maximum == float("inf"), 1, tl.where(best_score == float("-inf"), 2, 0))
    tl.store(token_ptr + rows, tl.where(status == 0, best_id, 0), mask=row_mask)
    tl.store(logprob_ptr + rows, chosen - log_mass, mask=row_mask)
    tl.store(rank_ptr + rows, tl.where(chosen == maximum, 1, other_rank), mask=row_mask)
    tl.store(status_ptr + rows, status, mask=row_mask)
    tl.store(chosen_ptr + rows, chosen, mask=row_mask)
    tl.store(log_mass_ptr + rows, log_mass, mask=row_mask)


@triton.jit
def _head_sample_tile(
    pid, x_ptr, w_ptr, scale_ptr, row_ids_ptr,
    temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, presence_ptr, frequency_ptr, repetition_ptr,
    count_starts_ptr, count_ids_ptr, counts_ptr, bias_starts_ptr, bias_ids_ptr, biases_ptr,
    allowed_ptr,  # [R, ceil(V / 32)] int32
    tops_ptr, masses_ptr, scores_ptr, raws_ptr,  # [R, TILES] float32
    values_ptr,  # [N, plane] float32, of which [N, R, TILES] is written
    chosen_ptr, log_mass_ptr,  # [R] float32
    best_ids_ptr,  # [R, TILES] int32
    value_ids_ptr,  # [N, plane] int32
    counter_ptr,  # [row blocks] int32, zero before and after
    token_ptr, logprob_ptr, rank_ptr, status_ptr,  # [R]
    num_rows, num_logprobs, plane, has_counts, has_bias, has_allowed, other_rank, x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    OPTIONS: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    tile = pid // row_blocks
    row_block = pid % row_blocks
    first_id = tile * BLOCK_N
    outs = first_id + tl.arange(0, BLOCK_N).to(tl.int64)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    row_mask = rows < num_rows
    prefetch_weights(w_ptr, outs, 0, w_stride, N, K, WEIGHTS, BLOCK_K, (K + BLOCK_K - 1) // BLOCK_K, PDL)
    wait_for_previous(PDL)
    y = logits_of_tile(
        x_ptr, w_ptr, scale_ptr, row_ids_ptr, rows, row_mask,
        outs, x_stride, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    raw = tl.where((outs < N)[None, :], tl.trans(y), float("-inf"))  # [BLOCK_T, BLOCK_N]
    top, mass = tile_mass(raw, BLOCK_T, BLOCK_N)
    bad = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), axis=1)
    place = rows * TILES + tile
    tl.store(tops_ptr + place, tl.where(bad != 0, float("inf"), top), mask=row_mask)
    tl.store(masses_ptr + place, mass, mask=row_mask)
    x = raw
    if OPTIONS:
        _store_candidates(
            raw, first_id, place, row_mask, values_ptr, value_ids_ptr, num_logprobs, plane, N, BLOCK_T, BLOCK_N
        )  # fmt: skip
        x = _edit_tile(
            x, first_id, rows, row_mask & (has_bias != 0), bias_starts_ptr, bias_ids_ptr, biases_ptr, presence_ptr,
            frequency_ptr, repetition_ptr, True, STEPS, BLOCK_N,
        )  # fmt: skip
        x = _edit_tile(
            x, first_id, rows, row_mask & (has_counts != 0), count_starts_ptr, count_ids_ptr, counts_ptr,
            presence_ptr, frequency_ptr, repetition_ptr, False, STEPS, BLOCK_N,
        )  # fmt: skip
    best, best_id, best_raw = _tile_best(
        raw, x, first_id, rows, row_mask, temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, allowed_ptr,
        has_allowed, N, OPTIONS, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    tl.store(scores_ptr + place, best, mask=row_mask)
    tl.store(raws_ptr + place, best_raw, mask=row_mask)
    tl.store(best_ids_ptr + place, best_id, mask=row_mask)
    if arrive(counter_ptr + row_block, TILES):
        _finish(
            rows, row_mask, tops_ptr, masses_ptr, scores_ptr, raws_ptr, best_ids_ptr, chosen_ptr, log_mass_ptr,
            token_ptr, logprob_ptr, rank_ptr, status_ptr, other_rank, TILES, BLOCK_T, GROUPS,
        )  # fmt: skip


_VARYING = ["num_rows", "num_logprobs", "plane", "has_counts", "has_bias", "has_allowed", "other_rank"]


@triton.jit(do_not_specialize=_VARYING)
def _head_sample_kernel(
    x_ptr, w_ptr, scale_ptr, row_ids_ptr, temperature_ptr,
    seed_ptr, position_ptr, sample_index_ptr, presence_ptr, frequency_ptr, repetition_ptr, count_starts_ptr,
    count_ids_ptr, counts_ptr, bias_starts_ptr, bias_ids_ptr, biases_ptr, allowed_ptr, tops_ptr, masses_ptr,
    scores_ptr, raws_ptr, values_ptr, chosen_ptr, log_mass_ptr, best_ids_ptr, value_ids_ptr, counter_ptr, token_ptr,
    logprob_ptr, rank_ptr, status_ptr, num_rows, num_logprobs, plane, has_counts, has_bias, has_allowed, other_rank,
    x_stride, w_stride, scale_stride,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    OPTIONS: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _head_sample_tile(
        tl.program_id(0), x_ptr, w_ptr, scale_ptr, row_ids_ptr,
        temperature_ptr, seed_ptr, position_ptr, sample_index_ptr, presence_ptr, frequency_ptr, repetition_ptr,
        count_starts_ptr, count_ids_ptr, counts_ptr, bias_starts_ptr, bias_ids_ptr, biases_ptr, allowed_ptr, tops_ptr,
        masses_ptr, scores_ptr, raws_ptr, values_ptr, chosen_ptr, log_mass_ptr, best_ids_ptr, value_ids_ptr,
        counter_ptr, token_ptr, logprob_ptr, rank_ptr, status_ptr, num_rows, num_logprobs, plane, has_counts, has_bias,
        has_allowed, other_rank, x_stride, w_stride, scale_stride, N, K, WEIGHTS, GROUP, DTYPE, OPTIONS, STEPS,
        GROUPS, BLOCK_N, BLOCK_T, BLOCK_K, PDL,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeadScratch:
    """What programs, and ``head_ranks`` after them, find of each other; ``needed`` gives the sizes.

    With a plane of R * vocabulary tiles, rounded up to a multiple of 16, ``floats`` holds planes of maxima, masses,
    scores and chosen logits, N of candidates, then the rows' chosen logits and log masses; ``ids`` holds a plane of
    the best ids, and N of candidates.
    """

    floats: torch.Tensor  # float32
    ids: torch.Tensor  # int32
    counters: torch.Tensor  # int32, zero before and after

    @staticmethod
    def needed(num_rows: int, vocab_size: int, num_logprobs: int) -> tuple[int, int, int]:
        """Elements of (floats, ids, counters) at least."""
        plane = _plane(num_rows, vocab_size)
        rows = 2 * cdiv(num_rows, 16) * 16
        return (4 + num_logprobs) * plane + rows, (1 + num_logprobs) * plane, num_rows

    def parts(
        self, num_rows: int, vocab_size: int, num_logprobs: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(planes [4, P], candidates [N * P], chosen and log mass [2, R'], best ids [P], candidate ids [N * P])."""
        plane = _plane(num_rows, vocab_size)
        rows, end = cdiv(num_rows, 16) * 16, (4 + num_logprobs) * plane
        return (
            self.floats[: 4 * plane].view(4, plane),
            self.floats[4 * plane :],
            self.floats[end : end + 2 * rows].view(2, rows),
            self.ids[:plane],
            self.ids[plane:],
        )


def _plane(num_rows: int, vocab_size: int) -> int:
    """Elements of a value for each row and vocabulary tile; each plane starts where the compiler likes it."""
    return cdiv(num_rows * cdiv(vocab_size, VOCAB_TILE), 16) * 16


def head_sample(
    x: torch.Tensor,
    weights: Weights,
    row_ids: torch.Tensor,
    options: Options,
    drawn: Drawn,
    scratch: HeadScratch,
    ranks_follow: bool = False,
    dependent: bool = False,
) -> None:
    """Draw a token after each of the rows ``row_ids`` [R] int32 of x [T, D].

    Args:
        x: normalised rows in the storage type, in which the product's operands are; columns contiguous.
        weights: the head, [V, D].
        options: top-k, top-p and min-p are not looked at; the ids of a sparse row have to ascend.
        drawn: tokens, logprobs and status are written. A rank is 1 where the token is the most probable, else 0: not
            counted; top-N is left to ``head_ranks``.
        scratch: sizes by ``HeadScratch.needed``.
        ranks_follow: ``head_ranks`` comes next: leave what it needs, candidates for the N of ``drawn`` among it.
        dependent: launched as ``kernels/dependent.py`` says.
    """
    num_rows, (n, k), num_logprobs = row_ids.shape[0], weights.shape, drawn.top_ids.shape[1]
    tiles, count = logits_tiles(num_rows, k, x.element_size(), weights.kind), cdiv(n, VOCAB_TILE)
    planes, candidates, rows, best_ids, candidate_ids = scratch.parts(num_rows, n, num_logprobs)
    scales = x if weights.scales is None else weights.scales
    counts, bias, allowed = options.output_counts, options.logit_bias, options.allowed
    none = SparseRows(options.positions, options.positions, options.temperature)
    lists = [getattr(given or none, name) for given in (counts, bias) for name in SparseRows.__slots__]
    num_warps = 8 if tiles.block_t == 64 else tiles.num_warps  # with 4, sm_80 spills
    _head_sample_kernel[(count * cdiv(num_rows, tiles.block_t),)](
        x, weights.data, scales, row_ids, options.temperature,
        options.seeds, options.positions, options.sample_index, options.presence_penalty, options.frequency_penalty,
        options.repetition_penalty, *lists, options.positions if allowed is None else allowed, *planes, candidates,
        *rows, best_ids, candidate_ids, scratch.counters, drawn.tokens, drawn.logprobs, drawn.ranks, drawn.status,
        num_rows, num_logprobs, planes.shape[1], int(counts is not None), int(bias is not None),
        int(allowed is not None), int(ranks_follow), x.stride(0), weights.data.stride(0),
        0 if weights.scales is None else scales.stride(0),
        N=n, K=k, WEIGHTS=weights.kind, GROUP=weights.group, DTYPE=TRITON_TYPES[x.dtype],
        OPTIONS=num_logprobs > 0 or counts is not None or bias is not None or allowed is not None,
        STEPS=n.bit_length(), GROUPS=vocab_groups(n), BLOCK_N=VOCAB_TILE, BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k,
        PDL=dependent, **launch_options(num_warps, tiles.num_stages, dependent),
    )  # fmt: skip


def cost(num_rows: int, weights: Weights, element_size: int) -> Cost:
    """Bytes of one launch on ``num_rows`` different rows without edits, mask or top-N; tiles' results stay in L2."""
    n, k = weights.shape
    x_bytes = num_rows * (k * element_size + 4)
    count, row_blocks = cdiv(n, VOCAB_TILE), cdiv(num_rows, logits_tiles(num_rows, k, element_size).block_t)
    return Cost(
        weights=weights.nbytes,
        reads=x_bytes + num_rows * 20,
        writes=num_rows * 16,
        flops=2 * num_rows * n * k,
        rereads={
            "weights": weights.nbytes * (row_blocks - 1),
            "x": x_bytes * (count - 1),
            "options": num_rows * 20 * (count - 1),
            "tile results, written and read": 2 * 20 * num_rows * count,
        },
    )
