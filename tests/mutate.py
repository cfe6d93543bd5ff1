"""``python tests/mutate.py``: break the kernels on purpose, one line at a time; the suite must notice each time.

Each mutant is made in a copy of the repository and judged by the tests of its kernel. A table goes to standard output
and, with ``--output``, to a file; the exit status is 1 if a mutant survived. ``--only TEXT`` runs those whose file or
change contains the text.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change: the first (or ``nth``) place of ``old`` in ``kernels/<file>.py`` becomes ``new``."""

    file: str
    old: str
    new: str
    what: str
    nth: int = 1
    tests: str = ""

    @property
    def test_file(self) -> str:
        return self.tests or f"tests/test_kernel_{self.file}.py"


MUTANTS = [
    Mutant("common", "x = left + right", "x = left", "tree drops half", tests="tests/test_kernel_layer_norm.py"),
    Mutant(
        "common",
        "/ WIDTH\n    return",
        "/ CHUNK\n    return",
        "variance over the chunk",
        tests="tests/test_kernel_layer_norm.py",
    ),
    Mutant(
        "common",
        "centred = tl.where(mask, x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
        "padding enters the variance",
        tests="tests/test_kernel_layer_norm.py",
    ),
    Mutant(
        "common",
        "tl.sqrt_rn(variance + eps)",
        "tl.sqrt_rn(variance)",
        "eps is lost",
        tests="tests/test_kernel_layer_norm.py",
    ),
    Mutant(
        "common", "tl.store(counter_ptr, 0)", "pass", "the counter is not reset", tests="tests/test_kernel_linear.py"
    ),
    Mutant("common", "== expected - 1", "== expected", "nobody is last", tests="tests/test_kernel_linear.py"),
    Mutant("common", "== expected - 1", "== 0", "the first finishes", tests="tests/test_kernel_linear.py"),
    Mutant("common", "0.044715", "0.04", "another GELU", tests="tests/test_kernel_linear.py"),
    Mutant("common", "x * 0.7071067811865476", "x * 0.7", "another exact GELU", tests="tests/test_kernel_linear.py"),
    Mutant(
        "common", "rstd * weight + bias", "rstd * weight", "norm bias is lost", tests="tests/test_kernel_layer_norm.py"
    ),
    Mutant(
        "embedding", "previous >= 0, drawn, given", "previous > 0, drawn, given", "row 0 of the step before is ignored"
    ),
    Mutant(
        "embedding", "positions[:, None] * pos_stride", "rows[:, None] * pos_stride", "positions are taken for rows"
    ),
    Mutant("embedding", "row_mask = rows < num_rows", "row_mask = rows <= num_rows", "one row too many"),
    Mutant("layer_norm", "rows[:, None] * y_stride", "rows[:, None] * x_stride", "another tensor's stride"),
    Mutant("layer_norm", "column_mask = columns < WIDTH", "column_mask = columns <= WIDTH", "one column too many"),
    Mutant("layer_norm", "+ residual.to(tl.float32)", "", "the residual is lost"),
    Mutant(
        "linear",
        "mask=(part == 2)[:, None] & kept",
        "mask=(part == 2)[:, None] & row_mask[None, :]",
        "slot -1 is written",
    ),
    Mutant("linear", "slots % BLOCK_SIZE", "slots % 16", "block size is taken for 16"),
    Mutant("linear", "within % HEAD_DIM", "within % BLOCK_SIZE", "head width is mixed up"),
    Mutant(
        "linear",
        "first_k = (split * BLOCKS_PER_SPLIT + step) * BLOCK_K",
        "first_k = step * BLOCK_K",
        "all splits do the first",
    ),
    Mutant("linear", "old + y, mask=mask", "y, mask=mask", "the residual is lost"),
    Mutant("linear", "rows < num_rows", "rows <= num_rows", "one row too many"),
    Mutant("linear", "for split in range(SPLITS):", "for split in range(1, SPLITS):", "a partial sum is left out"),
    Mutant("linear", "out_mask = outs < N", "out_mask = outs <= N", "one output too many"),
    Mutant("linear", 'if WEIGHTS == "int8":', "if False:", "the int8 scale is lost"),
    Mutant(
        "linear", "range(0, BLOCK_T, STAT_ROWS)", "range(0, STAT_ROWS, STAT_ROWS)", "statistics of the first rows only"
    ),
    Mutant(
        "weights", "(packed >> 4)", "(packed >> 3)", "the high half is shifted", tests="tests/test_kernel_linear.py"
    ),
    Mutant(
        "weights", "tl.join(low, high)", "tl.join(high, low)", "halves are swapped", tests="tests/test_kernel_linear.py"
    ),
    Mutant(
        "weights",
        "ks[None, :] // GROUP",
        "ks[None, :] // 32",
        "another group size",
        tests="tests/test_kernel_linear.py",
    ),
    Mutant(
        "weights", "k_mask = ks < K", "k_mask = ks <= K", "one column too many", tests="tests/test_kernel_linear.py"
    ),
    Mutant(
        "attention",
        "keys[None, :] <= positions[:, None]",
        "keys[None, :] < positions[:, None]",
        "a query does not see itself",
    ),
    Mutant("attention", "keys[None, :] <= positions[:, None]", "keys[None, :] >= 0", "no causal mask"),
    Mutant("attention", "key_mask = keys < kv_end", "key_mask = keys <= kv_end", "one key too many"),
    Mutant("attention", "block * HEADS + head", "block + head", "heads are not strided"),
    Mutant("attention", "l = l * alpha +", "l = l +", "the running sum is not rescaled"),
    Mutant("attention", "acc * alpha[:, None]", "acc", "the running output is not rescaled"),
    Mutant("attention", "l * old + split_l * new", "l + split_l", "splits are added without their maxima"),
    Mutant(
        "attention", "num_splits = tl.cdiv(kv_end, SPLIT)", "num_splits = kv_end // SPLIT", "the last split is left out"
    ),
    Mutant("logits", "mean_ptr + x_rows", "mean_ptr + rows", "another row's mean"),
    Mutant("logits", "(outs < N)[:, None] & row_mask", "(outs <= N)[:, None] & row_mask", "one logit too many"),
    Mutant("sampling", "bits ^ 0xFFFFFFFF", "bits", "negative floats in the wrong order"),
    Mutant("sampling", "(n1 >= target)", "(n1 > target)", "the k-th is not kept"),
    Mutant(
        "sampling",
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        "words are swapped",
    ),
    Mutant("sampling", "frequency * values", "frequency", "a count is not counted"),
    Mutant("sampling", "tl.where(values > 0.0, presence, 0.0)", "presence", "ids of the prompt count as present"),
    Mutant("sampling", ">= min_p", "> min_p", "min_p leaves out the border"),
    Mutant(
        "sampling",
        "tl.where(ordered_bits(x) >= floor, _mass(x, maximum), 0)",
        "_mass(x, maximum)",
        "top-p forgets top-k",
    ),
    Mutant("sampling", "better = top > best", "better = top >= best", "the highest id among equals"),
    Mutant("sampling", "(ids % 32)", "(ids % 16)", "another bit of the mask"),
    Mutant("sampling", "above + 1", "above", "ranks from 0"),
    Mutant("head_sample", "better = step_best > best", "better = step_best >= best", "the last tile among equals"),
    Mutant(
        "head_sample",
        "add_masses(mass, top, part",
        "add_masses(0.0, top, part",
        "mass of the last step alone",
    ),
    Mutant("head_sample", 'tl.where(bad != 0, float("inf"), top)', "top", "NaN goes unseen"),
    Mutant("head_sample", "quads = first_id // 4 +", "quads = first_id +", "another part of the stream"),
]


def judge(mutant: Mutant, copy: Path) -> tuple[str, float]:
    """("killed" or "SURVIVED", seconds): whether the tests of the mutant's kernel fail on it."""
    path = copy / "kernels" / f"{mutant.file}.py"
    source = path.read_text()
    parts = source.split(mutant.old)
    if len(parts) <= mutant.nth:
        raise SystemExit(f"{mutant.file}.py has no {mutant.old!r} to change: bring the list of mutants up to date")
    path.write_text(mutant.old.join(parts[: mutant.nth]) + mutant.new + mutant.old.join(parts[mutant.nth :]))
    start = time.perf_counter()
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            mutant.test_file,
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    finally:
        path.write_text(source)
    return "SURVIVED" if done.returncode == 0 else "killed", time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose file or change contains this text")
    parser.add_argument("--output", type=Path, help="where the table goes too")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in f"{m.file} {m.what} {m.old}"]
    lines = ["| file | mutant | verdict |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        verdicts = []
        for mutant in chosen:
            verdict, seconds = judge(mutant, copy)
            verdicts.append(verdict)
            lines.append(f"| {mutant.file} | {mutant.what} | {verdict} |")
            print(f"{lines[-1]} {seconds:.0f} s", flush=True)
    survived = verdicts.count("SURVIVED")
    lines.append(f"\n{len(verdicts) - survived} of {len(verdicts)} killed.")
    print(lines[-1])
    if args.output is not None:
        args.output.write_text("# Mutants\n\n`python tests/mutate.py` made this table.\n\n" + "\n".join(lines) + "\n")
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
