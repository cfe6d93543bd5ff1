"""What ``mutate.py`` breaks, one place at a time, and which tests have to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change: the first (or ``nth``) place of ``old`` in a file becomes ``new``; ``file`` is without its ending."""

    file: str
    old: str
    new: str
    what: str
    nth: int = 1
    tests: str = ""  # the file of tests, where it is not that of the kernel's name
    folder: str = "kernels"

    @property
    def path(self) -> str:
        """The file that is changed, from the repository's root."""
        return f"{self.folder}/{self.file}.py"

    @property
    def test_file(self) -> str:
        """The tests that judge it, likewise."""
        return f"tests/test_kernel_{self.tests or self.file}.py"

    def apply(self, source: str) -> str:
        """The changed source.

        Raises:
            ValueError: the source has no such place: the list of mutants is out of date.
        """
        parts = source.split(self.old)
        if len(parts) <= self.nth:
            raise ValueError(f"{self.path} has no {self.old!r} to change: bring the list of mutants up to date")
        return self.old.join(parts[: self.nth]) + self.new + self.old.join(parts[self.nth :])


MUTANTS = [
    Mutant("common", "x = left + right", "x = left", "tree drops half", tests="layer_norm"),
    Mutant("common", "/ WIDTH\n    apply_norm", "/ CHUNK\n    apply_norm", "variance over the chunk",
           tests="layer_norm"),
    Mutant("common", "centred = tl.where(mask, x - mean[:, None], 0.0)", "centred = x - mean[:, None]",
           "padding enters the variance", tests="layer_norm"),
    Mutant("common", "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)", "eps is lost", tests="layer_norm"),
    Mutant("common", "tl.store(counter_ptr, 0)", "pass", "the counter is not reset", tests="linear"),
    Mutant("common", "== expected - 1", "== expected", "nobody is last", tests="linear"),
    Mutant("common", "== expected - 1", "== 0", "the first finishes", tests="linear"),
    Mutant("common", "0.044715", "0.04", "another GELU", tests="linear"),
    Mutant("common", "x * 0.7071067811865476", "x * 0.7", "another exact GELU", tests="linear"),
    Mutant("common", " + bias.to(tl.float32)[None, :]", "", "norm bias is lost", tests="layer_norm"),
    Mutant("common", "y_ptr += rows[:, None] * y_stride", "y_ptr += rows[:, None] * x_stride",
           "another tensor's stride", tests="layer_norm"),
    Mutant("common", "(start + columns < WIDTH)", "(start + columns <= WIDTH)", "one column too many", nth=3,
           tests="layer_norm"),
    Mutant("common", "following = start + CHUNK + columns", "following = start + columns", "a chunk is read twice",
           tests="layer_norm"),
    Mutant("embedding", "previous >= 0, drawn, given", "previous > 0, drawn, given",
           "row 0 of the step before is ignored"),
    Mutant("embedding", "positions[:, None] * pos_stride", "rows[:, None] * pos_stride",
           "positions are taken for rows"),
    Mutant("embedding", "row_mask = rows < num_rows", "row_mask = rows <= num_rows", "one row too many"),
    Mutant("embedding", "ids[:, None] * tok_stride", "ids[:, None] * pos_stride", "the other table's stride"),
    Mutant("embedding", "drawn, given).to(tl.int64)", "drawn, given)", "a token's offset in 32 bits"),
    Mutant("layer_norm", "+ residual.to(tl.float32)", "", "the residual is lost"),
    Mutant("layer_norm", "tl.arange(0, ROWS).to(tl.int64)", "tl.arange(0, ROWS)", "a row's offset in 32 bits"),
    Mutant("layer_norm", "x_stride = sum_stride", "x_stride = residual_stride", "the sum is read with another stride"),
    Mutant("linear", "mask=(part == 2)[:, None] & kept", "mask=(part == 2)[:, None] & row_mask[None, :]",
           "slot -1 is written"),
    Mutant("linear", "slots % BLOCK_SIZE", "slots % 16", "block size is taken for 16"),
    Mutant("linear", "within % HEAD_DIM", "within % BLOCK_SIZE", "head width is mixed up"),
    Mutant("linear", "first_k = (split * BLOCKS_PER_SPLIT + step) * BLOCK_K", "first_k = step * BLOCK_K",
           "all splits do the first"),
    Mutant("linear", "y += old", "y += 0.0", "the residual is lost"),
    Mutant("linear", "rows < num_rows", "rows <= num_rows", "one row too many"),
    Mutant("linear", "in tl.range(SPLITS, ", "in tl.range(1, SPLITS, ", "a partial sum is left out"),
    Mutant("linear", "out_mask = outs < N", "out_mask = outs <= N", "one output too many"),
    Mutant("linear", 'if WEIGHTS == "int8":', "if False:", "the int8 scale is lost"),
    Mutant("linear", "range(0, tl.minimum(BLOCK_T, num_rows - row_block * BLOCK_T), NORM_ROWS)",
           "range(0, NORM_ROWS, NORM_ROWS)", "the first rows of a block only are normalised"),
    Mutant("linear", "TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N", "TILES: tl.constexpr = N // BLOCK_N",
           "the last output block is not waited for"),
    Mutant("linear", "squares + counts * apart", "squares + apart", "tiles weigh alike"),
    Mutant("linear", "tl.minimum(N - tile * BLOCK_N, BLOCK_N)", "tl.minimum(N, BLOCK_N)",
           "a tile that is not full counts as one"),
    Mutant("linear", "rows[None, :] * residual_stride", "rows[None, :] * y_stride", "another tensor's stride"),
    Mutant("linear", "tl.arange(0, BLOCK_T).to(tl.int64)", "tl.arange(0, BLOCK_T)", "a row's offset in 32 bits"),
    Mutant("linear", "slots // BLOCK_SIZE * (BLOCK_SIZE * WIDTH)",
           "(slots // BLOCK_SIZE).to(tl.int32) * (BLOCK_SIZE * WIDTH)", "a slot in 32 bits"),
    Mutant("linear", "(SPLITS * BLOCK_N * BLOCK_T)", "(BLOCK_N * BLOCK_T)", "tiles share their partial sums"),
    Mutant("weights", "word >> 20", "word >> 19", "a nibble is shifted", tests="linear"),
    Mutant("weights", "(word << 8) >> 24", "(word << 8) >> 25", "a byte is shifted", tests="linear"),
    Mutant("weights", "tl.join(even, odd)", "tl.join(odd, even)", "columns are swapped", nth=2, tests="linear"),
    Mutant("weights", "first_k // GROUP", "first_k // 32", "another group size", tests="linear"),
    Mutant("weights", "(ks < K)", "(ks <= K)", "one column too many", tests="linear"),
    Mutant("weights", "(K + PER_WORD - 1) // PER_WORD", "K // PER_WORD", "the last columns are lost", tests="linear"),
    Mutant("attention", "keys[None, :] <= positions[:, None]", "keys[None, :] < positions[:, None]",
           "a query does not see itself"),
    Mutant("attention", "keys[None, :] <= positions[:, None]", "keys[None, :] >= 0", "no causal mask"),
    Mutant("attention", "key_mask = keys < kv_end", "key_mask = keys <= kv_end", "one key too many"),
    Mutant("attention", "block * HEADS + head", "block + head", "heads are not strided"),
    Mutant("attention", "l = l * alpha +", "l = l +", "the running sum is not rescaled"),
    Mutant("attention", "acc * alpha[:, None]", "acc", "the running output is not rescaled"),
    Mutant("attention", "l * old + split_l * new", "l + split_l", "splits are added without their maxima"),
    Mutant("attention", "num_splits = tl.cdiv(kv_end, SPLIT)", "num_splits = kv_end // SPLIT",
           "the last split is left out"),
    Mutant("attention", "other=0).to(tl.int64)", "other=0)", "a block's offset in 32 bits"),
    Mutant("attention", "rows[:, None] * out_stride", "rows[:, None] * q_stride", "another tensor's stride"),
    Mutant("attention", "keys % BLOCK_SIZE", "keys % 16", "block size is taken for 16"),
    Mutant("attention", "(rows * HEADS + head) * split_programs", "(rows * HEADS) * split_programs",
           "heads share their partial results"),
    Mutant("attention", "arrive(counter_ptr + pid, num_splits)", "arrive(counter_ptr, num_splits)",
           "one counter for all"),
    Mutant("logits", "scale_ptr, x_rows, row_mask", "scale_ptr, rows, row_mask", "row ids are ignored"),
    Mutant("logits", "(outs < N)[:, None] & row_mask", "(outs <= N)[:, None] & row_mask", "one logit too many"),
    Mutant("logits", "row_mask = rows < num_rows", "row_mask = rows <= num_rows", "one row too many"),
    Mutant("logits", "tl.arange(0, BLOCK_T).to(tl.int64)", "tl.arange(0, BLOCK_T)", "a row's offset in 32 bits"),
    Mutant("logits", 'if WEIGHTS == "int8":', "if False:", "the int8 scale is lost"),
    Mutant("sampling", "bits ^ 0xFFFFFFFF", "bits", "negative floats in the wrong order"),
    Mutant("sampling", "(tl.sum(n1) >= target)", "(tl.sum(n1) > target)", "the k-th is not kept"),
    Mutant("sampling", "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
           "words are swapped"),
    Mutant("sampling", "frequency * values", "frequency", "a count is not counted"),
    Mutant("sampling", "tl.where(values > 0.0, presence, 0.0)", "presence", "ids of the prompt count as present"),
    Mutant("sampling", "(k > 0) & (k < V)", "(k > 1) & (k < V)", "top-k of 1 is ignored"),
    Mutant("sampling", "tl.ceil(top_p", "tl.floor(top_p", "a mass of 0 is enough for top-p"),
    Mutant("sampling", ">= min_p", "> min_p", "min_p leaves out the border"),
    Mutant("sampling", "tl.where(ordered_bits(x) >= floor, _mass(x, maximum), 0)", "_mass(x, maximum)",
           "top-p forgets top-k"),
    Mutant("sampling", "tl.where(x > best,", "tl.where(x >= best,", "the highest id among equals"),
    Mutant("sampling", "(ids % 32)", "(ids % 16)", "another bit of the mask"),
    Mutant("sampling", "tl.sum(above) + 1", "tl.sum(above)", "ranks from 0"),
    Mutant("sampling", "logits_ptr + row.to(tl.int64) * logits_stride", "logits_ptr + row * logits_stride",
           "a row in 32 bits"),
    Mutant("sampling", "(ids > previous_id)", "(ids >= previous_id)", "the same token again among the best"),
    Mutant("sampling", "u < 1e-3, series", "u < 1e-30, series", "noise of small words is coarse"),
    Mutant("sampling", "zero + position", "zero", "every position draws alike"),
    Mutant("sampling", "mask = entries < end", "mask = entries <= end", "the next row's bias too"),
    Mutant("head_sample", "better = score > best", "better = score >= best", "the last tile among equals"),
    Mutant("head_sample", "add_masses(mass, top, part", "add_masses(0.0, top, part", "mass of the last step alone"),
    Mutant("head_sample", 'tl.where(bad != 0, float("inf"), top)', "top", "NaN goes unseen"),
    Mutant("head_sample", "quads = first_id // 4 +", "quads = first_id +", "another part of the stream"),
    Mutant("head_sample", "other=2147483647) < first_id", "other=2147483647) <= first_id",
           "a tile's first id is unedited"),
    Mutant("head_sample", "row_mask & (has_counts != 0)", "row_mask & (has_bias != 0)",
           "one list stands for the other"),
    Mutant("head_sample", "(ids > previous_id[:, None])", "(ids < 0)", "equal candidates are lost"),
    Mutant("head_sample", "tl.where(chosen == maximum, 1, other_rank)", "1", "every rank is 1"),
    Mutant("head_sample", "(words < WORDS) & (has_allowed != 0)", "(has_allowed != 0)", "mask words of the next row"),
    Mutant("head_ranks", "(y > chosen[None, :])", "(y >= chosen[None, :])", "equals count as above"),
    Mutant("head_ranks", "(top > chosen)", "(top >= chosen)", "the drawn token's own tile is computed in vain"),
    Mutant("head_ranks", " & (outs < N)[:, None]", "", "what is past the vocabulary counts"),
    Mutant("head_ranks", "tl.where(taken, plane, 0)", "plane", "all lists advance"),
    Mutant("head_ranks", "(n + 1 < num_logprobs)", "(n < num_logprobs)", "a list is read past its end"),
    Mutant("tiles", "KEY_BYTES // (next_power_of_2(head_dim) * element_size)",
           "KEY_BYTES // (next_power_of_2(head_dim) * element_size) // (1 + many)", "steps of keys follow the queries",
           tests="attention"),
    Mutant("dependent", "outs, N - 1)", "outs, N)", "a line past the weights is fetched"),
    Mutant("linear", "wait_for_previous(PDL)", "pass", "nothing is waited for", tests="dependent"),
    Mutant("attention", "    wait_for_previous(PDL)\n    split = 0\n    if not FUSED:\n",
           "    split = 0\n    if not FUSED:\n        wait_for_previous(PDL)\n",
           "with one split, nothing is waited for", tests="dependent"),
    Mutant("logits", "    wait_for_previous(PDL)\n", "", "nothing is waited for", tests="dependent"),
    Mutant("interpreter", "0x7FFF + ((bits >> 16) & 1)", "0x8000", "ties are rounded up"),
    Mutant("interpreter", "GROUP = 16", "GROUP = 4096", "the whole of k at once"),
    Mutant("kernel_harness", "if outside.any():", "if False:",
           "touches out of bounds pass", tests="harness", folder="tests"),
    Mutant("kernel_harness", "if foreign.any():", "if False:",
           "foreign writes pass", tests="harness", folder="tests"),
    Mutant("kernel_harness", "        poison(*outputs)", "        pass",
           "outputs are not poisoned", tests="harness", folder="tests"),
    Mutant("kernel_harness", "linear = total - 1 - linear", "pass",
           "reverse is forward", tests="harness", folder="tests"),
    Mutant("kernel_harness", "note(True, pointers, mask)\n        return store", "return store",
           "stores go unseen", tests="harness", folder="tests"),
    Mutant("kernel_harness", "note(True, pointers, mask)\n        return rmw", "return rmw",
           "atomics write unseen", tests="harness", folder="tests"),
    Mutant("kernel_harness", "- shared) * SECTOR", "- shared) * 16",
           "sectors are counted short", tests="harness", folder="tests"),
    Mutant("kernel_harness", "permutation(total)[linear]", "permutation(total)[0] * 0 + linear",
           "shuffled is forward", tests="harness", folder="tests"),
    Mutant("kernel_harness", "[:] = 0xFF", "[:] = 0",
           "guards are not poisoned", tests="harness", folder="tests"),
]  # fmt: skip
