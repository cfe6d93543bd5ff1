"""Real machine code, made without a GPU: the manifest covers what a step asks for, and the code keeps the rules."""

import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import manifest, tiles
from kernels.launches import MODELS, ModelShape, step_launches

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB
SIZES = {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "int4": 4}  # bits of a weight, or of a key
KNOWN_SPILLS = {  # bytes, by target, model, dtype, launch and BLOCK_T: of heads that no GPT-2 has
    ("sm_80", "heads", "fp32", "attention", None): 72,  # 256 wide
    ("sm_90", "heads", "fp32", "attention", None): 80,
    ("sm_90", "heads", "bf16", "attention", None): 8,  # 20 wide
    ("sm_90", "heads", "fp16", "attention", None): 8,
}
OTHER_SPILLS = {("sm_90", "gpt2", "bf16", "sampling", None): 40}  # with a mask of allowed ids, under Triton 3.6 and 3.9
LAYOUTS = {  # of warps over a product's outputs, rows or queries, and keys: what there is, so that another one shows
    "sm_80": {
        "linear": {"4x1", "2x2"}, "fp32 linear": {"4x1", "8x1"}, "attention": {"1x2", "1x8", "8x1"},
        "fp32 attention": {"1x4", "1x8"}, "head_sample": {"4x1", "2x2", "2x4"}, "fp32 head_sample": {"4x1", "8x1"},
    },
    "sm_90": {
        "linear": {"4x1"}, "fp32 linear": {"4x1", "4x2"}, "attention": {"1x2", "1x8", "8x1"},
        "fp32 attention": {"1x4", "1x8"}, "head_sample": {"4x1", "4x2"}, "fp32 head_sample": {"4x1", "4x2"},
    },
}  # fmt: skip
STREAMING = (
    "qkv",
    "proj",
    "fc",
    "fc2",
    "attention",
    "logits",
    "head_sample",
    "head_ranks",
)  # what reads weights, K or V


def compiled_mode(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied_by_stages(row: dict[str, Any]) -> int:
    """Bytes of operands that a kernel has to have on their way at once, if its stages are worth their name."""
    bits, given = SIZES[row["dtype"]], row["arguments"]
    if row["launch"] == "attention":
        per_head = given.get("HEAD_DIM", 64)
        keys = tiles.attention_tiles(per_head, bits // 8, 1).block_kv
        step = 2 * keys * tiles.next_power_of_2(per_head) * bits // 8  # K and V
    else:
        depth = tiles.BLOCK_K_FLOAT32 if bits == 32 else tiles.BLOCK_K
        step = depth * (tiles.BLOCK_N * bits + given.get("BLOCK_T", tiles.MIN_ROWS) * max(bits, 16)) // 8
    return int(row["num_stages"] * step)


def broken_rules(target: str, rows: list[dict[str, Any]], known: Mapping[Any, int] = KNOWN_SPILLS) -> list[str]:
    """What the machine code of one target has against the rules.

    Warps split a product's outputs, never its sum, so that no bit depends on how they are laid: with ``mma.sync``, and
    where float32 takes more warps, that may differ for many rows. int8 weights come 64 bits at a time on sm_90, where
    that was measured to be faster, and keys of heads whose rows do not start at multiples of 16 bytes.
    """
    found = []
    families, layouts = defaultdict(set), defaultdict(set)
    for row in rows:
        name = f"{row['model']} {row['dtype']} {row['launch']} {row['arguments']}"
        place = row["model"], row["dtype"], re.sub("head_(sample|ranks)", "logits", row["launch"])
        if row["spills"] > known.get((target, *place[:2], row["launch"], row["arguments"].get("BLOCK_T")), 0):
            found.append(f"{name} spills {row['spills']} bytes")
        if row["shared"] > SHARED_LIMIT[target] * 1024:
            found.append(f"{name} takes {row['shared']} bytes of shared memory")
        if row["launch"] not in STREAMING:
            continue
        families[place].add(row["family"])
        of = row["launch"] if row["launch"] in ("attention", "head_sample") else "linear"
        layout = row["layout"].partition(" of ")[0]
        if layout not in LAYOUTS[target]["fp32 " * (row["dtype"] == "fp32") + of]:
            found.append(f"{name} has its warps laid {layout}")
        if row["family"] == "wgmma" and row["dtype"] != "fp32" and row["launch"] != "head_sample":
            layouts[place].add(layout)
        apart = row["arguments"].get("HEAD_DIM", 64) * SIZES[row["dtype"]] % 128 != 0
        if (target, row["dtype"]) != ("sm_90", "int8") and not apart and row["wide_share"] < 0.8:
            found.append(f"{name} loads {row['wide_share']:.0%} of its bytes 128 bits at a time")
        if row["copied"] < copied_by_stages(row):
            found.append(f"{name} copies {row['copied']} bytes asynchronously, of {copied_by_stages(row)}")
    found += [f"{place} has layouts {sorted(used)}" for place, used in layouts.items() if len(used) > 1]
    for place, used in families.items():
        if len(used) > 1 or used == {"none"}:
            found.append(f"{place} uses {sorted(used)}")
    return found


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return manifest.load()


def test_the_manifest_is_of_these_sources(committed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(committed["targets"]) == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    for rows in committed["targets"].values():
        assert {row["model"] for row in rows} == {*MODELS, kernel_compile.HEADS}
        assert {row["dtype"] for row in rows} == set(kernel_compile.DTYPES)
    monkeypatch.setattr(manifest, "sources_hash", lambda: "another")
    with pytest.raises(ValueError, match="run `make manifest`"):
        manifest.load()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_manifest_keeps_the_rules(target: str, committed: dict[str, Any]) -> None:
    assert broken_rules(target, committed["targets"][target]) == []


def test_every_target_has_the_shared_memory(committed: dict[str, Any]) -> None:
    for target, rows in committed["targets"].items():
        too_much = [row["name"] for row in rows if row["shared"] > SHARED_LIMIT[target] * 1024]
        assert too_much == [], target


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.versions)])
def test_gpt2_compiles_to_what_the_manifest_says(target: str, committed: dict[str, Any]) -> None:
    """Compiled anew, whatever the manifest has; under another Triton than the manifest's, the rules alone hold."""
    text = compiled_mode(
        "-m", "kernels.compile", "--targets", target, "--models", "gpt2", "--dtypes", "bf16", "--fresh"
    )
    made = json.loads(text)
    rows = made["targets"][target]
    assert {row["launch"] for row in rows} >= {*STREAMING, "embedding", "sampling", "layer_norm"}
    known = KNOWN_SPILLS if made["triton"] == committed["triton"] else OTHER_SPILLS
    assert broken_rules(target, rows, known) == []
    if made["triton"] == committed["triton"]:
        assert rows == [r for r in committed["targets"][target] if (r["model"], r["dtype"]) == ("gpt2", "bf16")]


@pytest.mark.slow
def test_what_did_not_change_is_not_compiled(committed: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "kernels.compile", "--targets", "sm_90", "--models", "gpt2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    if made["triton"] == committed["triton"]:
        assert " 0 to compile" in done.stderr
        assert made["targets"]["sm_90"] == [r for r in committed["targets"]["sm_90"] if r["model"] == "gpt2"]


def test_only_code_counts_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hash by which a row is kept: a kernel's body and what it calls count, texts and launchers do not."""
    for path in manifest.FOLDER.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(manifest, "FOLDER", tmp_path)
    before, before_all = manifest.code_hash("logits"), manifest.sources_hash()

    def edited(name: str, old: str, new: str) -> str:
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
        found = manifest.code_hash("logits")
        assert manifest.sources_hash() != before_all
        (tmp_path / name).write_text(text)
        return found

    assert edited("logits.py", "The logits of one tile", "The tile's logits") == before
    assert edited("logits.py", "    num_rows, (n, k) = row_ids", "    num_rows, (n, k) = (0, 0)[0], row_ids") == before
    assert edited("attention.py", "* scale", "+ scale") == before
    assert edited("logits.py", "rows = (pid %", "rows = 0 * (pid %") != before
    assert edited("linear.py", "acc = product(w, x, acc)", "acc = product(w, x, acc) * 2") != before
    assert edited("common.py", "tl.debug_barrier()", "tl.debug_barrier(), tl.debug_barrier()") != before


def test_the_readmes_have_the_tables_of_the_manifest(committed: dict[str, Any]) -> None:
    for file, parts in manifest.sections(committed).items():
        text = file.read_text(encoding="utf-8")
        assert manifest.with_sections(text, parts) == text, "run `python -m kernels.manifest`"
    others = {"sm_90": manifest.machine_table(committed, "sm_80"), "kernels": manifest.short_table(committed, "sm_80")}
    for file, name in ((manifest.README, "sm_90"), (manifest.PROJECT_README, "kernels")):
        text = file.read_text(encoding="utf-8")
        assert manifest.with_sections(text, {name: others[name]}) != text


def test_the_rules_see() -> None:
    row = {
        "model": "m",
        "dtype": "bf16",
        "launch": "qkv",
        "arguments": {},
        "spills": 0,
        "shared": 0,
        "num_stages": 4,
        "wide_share": 1.0,
        "copied": 40960,
        "family": "wgmma",
        "layout": "4x1 of 16x64x16",
    }
    assert broken_rules("sm_90", [row, row | {"layout": "4x1 of 16x16x16"}]) == []
    assert broken_rules("sm_90", [row | {"dtype": "int8", "wide_share": 0.5}]) == []
    for change in ({"spills": 8}, {"shared": 10**6}, {"wide_share": 0.5}, {"copied": 40959}, {"family": "none"}):
        assert broken_rules("sm_90", [row | change])
    for change in ({"family": "mma.sync"}, {"layout": "2x2 of 16x64x16"}):
        assert broken_rules("sm_90", [row, row | change])


def test_command_line_refuses() -> None:
    for arguments in (["--targets", "sm_70"], ["--models", "gpt5"], ["--dtypes", "fp8"]):
        with pytest.raises(SystemExit):
            kernel_compile.main(arguments)


STEP = """
import sys, json
import numpy as np, torch
from engine.backends.base import Batch, SamplingBatch, Sparse
from engine.backends.triton_step import TritonStep
from engine.backends.triton_weights import STORAGE, pack_model
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig
from kernels.compile import DEPENDENT
from kernels.launches import MODELS
from kernels.offline import asked_by

target, seed = sys.argv[1], int(sys.argv[2])
random = np.random.default_rng(seed)

def coin():
    return bool(random.integers(0, 2))

def options(rows, vocab_size):
    f, u = lambda v: np.full(rows, v, np.float32), np.zeros(rows, np.uint32)
    sparse = Sparse(np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.int32), f(1))
    mask = np.zeros((rows, -(-vocab_size // 32)), np.uint32)
    return SamplingBatch(f(coin()), np.full(rows, 5 * coin(), np.int32), f(0.9), f(0), u.astype(np.uint64), u, u,
                         int(random.integers(0, 3)) * coin(), f(0), f(0), f(1), sparse if coin() else None,
                         sparse if coin() else None, mask if coin() else None)

def batch(vocab_size, few):
    kind = random.integers(0, 3)  # decode, one prompt, a mixture
    most = 4 if few and coin() else 256
    counts = [1] * int(random.integers(1, most + 1)) if kind != 1 else [int(random.integers(1, 4 * most + 1))]
    if kind == 2:
        counts += [int(n) for n in random.integers(1, 300, random.integers(1, 6))]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    first = random.integers(0, 1025 - max(counts), len(counts))
    ends = (first + counts).astype(np.int32)
    draws = int(random.integers(0, len(counts) + 1)) if coin() else len(counts)
    asked = int(random.integers(0, starts[-1] + 1)) if coin() else 0
    total = starts[-1]
    return Batch(np.zeros(total, np.int32),
                 np.concatenate([np.arange(a, a + c) for a, c in zip(first, counts)]).astype(np.int32),
                 np.zeros(total, np.int64), starts, ends,
                 np.zeros((len(counts), max(ends) // 16 + 1 + random.integers(0, 3)), np.int32),
                 starts[1:][:draws] - 1, np.arange(asked, dtype=np.int32),
                 options(draws, vocab_size) if draws else None)

found = {}
for name, shape in MODELS.items():
    model = ModelConfig(shape.vocab_size, shape.context_length, shape.width, shape.heads, 1, shape.hidden)
    weights = {n: torch.empty(s, device="meta") for n, s in canonical_shapes(model).items()}
    for dtype, (storage, _) in STORAGE.items():
        packed = pack_model(model, weights, dtype, torch.device("meta"))
        for dependent in (False, True) if target in DEPENDENT else (False,):
            step = TritonStep(model, packed, storage, 16, dependent=dependent)
            step.allocate(int(random.choice([4096, 200_000])))
            for asked in asked_by(target, [lambda: step.run(batch(shape.vocab_size, dependent))] * 25):
                found[asked.name] = f"{name} {dtype} {asked.kernel} {asked.arguments}"
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_step_asks_for_nothing_that_is_not_in_the_manifest(target: str, committed: dict[str, Any]) -> None:
    """What ``TritonStep`` really launches for random batches, on tensors without memory."""
    seed = random.randrange(10**6)
    asked = json.loads(compiled_mode("-c", STEP, target, str(seed)))
    assert len(asked) > 150
    listed = {row["name"] for row in committed["targets"][target]}
    missing = [what for name, what in asked.items() if name not in listed]
    assert missing == [], f"seed {seed}: all_launches() does not list what a step asks for"
    assert [name for name in asked if name not in listed - {next(iter(asked))}], "the comparison sees one that lacks"


def test_a_layer_is_five_launches() -> None:
    tiny = ModelShape(97, 64, 64, 2, 3, 128)
    launches = step_launches(tiny, [(5, 1)] * 4, torch.float32)
    assert [launch.name for launch in launches if launch.times == 3] == ["qkv", "attention", "proj", "fc", "fc2"]
    assert sum(launch.times == 1 for launch in launches) == 3


DOTS = """
import sys
import torch
from kernels import linear, tiles
from kernels.offline import compiling_only
from kernels.launches import empty, meta_weights

def loops_around_the_product(text):
    around, found = [], []  # of each region that is open: how far it is indented, and whether it is a loop
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while around and indent <= around[-1][0]:
            around.pop()
        if "tt.dot" in line:
            found.append(sum(loop for _, loop in around))
        if line.rstrip().endswith("{") or "({" in line:
            around.append((indent, "scf.for" in line))
    return found

def launch(rows, n, k):
    space = linear.Workspace(empty(1 << 20), *(torch.zeros(4096, dtype=torch.int32) for _ in range(2)))
    half = torch.bfloat16
    linear.linear(empty(rows, k, dtype=half), meta_weights(n, k, half), empty(n, dtype=half), empty(rows, n), space)

with torch.device("meta"):
    for tiles.MIN_BLOCKS_PER_SPLIT in (2, 1):
        texts = []
        with compiling_only("sm_90", seen=lambda compiled: texts.append(compiled.asm["ttir"])):
            launch(80, 96, 256)
        print(tiles.linear_tiles(80, 96, 256, 2).blocks_per_split, *loops_around_the_product(texts[0]))
"""


@pytest.mark.slow
@pytest.mark.versions
def test_the_sum_of_the_splits_stays_out_of_the_product() -> None:
    """Where one program walks all K splits, the product accumulates within a split, in an inner loop.

    With one block a split, Triton takes ``total += dot(a, b, 0)`` for ``dot(a, b, total)``, which rounds otherwise than
    the partial sums of few rows do: a GPU showed it, the interpreter cannot. Hence ``MIN_BLOCKS_PER_SPLIT``, which may
    go the day that this test finds two loops in the second line too.
    """
    assert compiled_mode("-c", DOTS).splitlines() == ["2 2", "1 1"]
