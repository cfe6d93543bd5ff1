"""``python -m kernels.compile``: compile every specialisation a model asks for, with no GPU, and write a manifest.

    python -m kernels.compile --targets sm_80,sm_90,sm_100,sm_120,gfx942 --output kernels/manifest.json

Each target is compiled in a process of its own. The manifest holds, for each specialisation, what the machine code is
like (registers, spills, shared memory, occupancy, width of loads, tensor-core family) and what the launch moves by its
``cost()``; and a hash of the sources, by which a stale manifest is known.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def sources_hash() -> str:
    """A hash of every source in this folder."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_target(target: str, models: list[str], dtypes: list[str], kinds: list[str]) -> list[dict[str, Any]]:
    """A manifest row for every specialisation; one target a process."""
    import torch

    from kernels.launches import MODELS, all_launches
    from kernels.offline import compile_launches

    launches = [
        (model, dtype, kind, launch)
        for model in models
        for dtype in dtypes
        for kind in kinds
        for launch in all_launches(MODELS[model], getattr(torch, DTYPES[dtype]), kind)
    ]
    rows = []
    for index, report in compile_launches(target, [launch.run for *_, launch in launches]):
        model, dtype, kind, launch = launches[index]
        cost = launch.cost
        row = {"launch": launch.name, "model": model, "dtype": dtype, "weights": kind} | report.as_row()
        rows.append(row | {"bytes": cost.total_bytes, "flops": cost.flops})
    return rows


def table(target: str, manifest: dict[str, Any], model: str = "gpt2") -> str:
    """The manifest's rows of one model on one target, in Markdown."""
    lines = [
        "| launch | tile | registers | spills | shared | occupancy | 128-bit loads | tensor core |",
        "|" + "---|" * 8,
    ]
    for row in manifest["targets"][target]:
        if row["model"] != model:
            continue
        given = row["arguments"]
        parts = [
            f"{given[name]} {what}" for name, what in (("BLOCK_T", "rows"), ("BLOCK_Q", "queries")) if name in given
        ]
        if given.get("FUSED") and given.get("SPLITS", 2) > 1:
            parts.append("splits in one program")
        parts += [
            name.removeprefix("HAS_").lower() for name in ("HAS_EDITS", "HAS_ALLOWED", "OPTIONS") if given.get(name)
        ]
        lines.append(
            f"| {row['launch']} | {', '.join(parts)} | {row['registers']} | {row['spills']} | {row['shared']} "
            f"| {row['occupancy']:.0%} | {row['wide_share']:.0%} | {row['family']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    from kernels.launches import MODELS
    from kernels.offline import TARGETS

    def listed(accepted: Any, what: str) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            for name in chosen:
                if name not in accepted:
                    raise argparse.ArgumentTypeError(f"no {what} {name!r}; choose from {', '.join(accepted)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=listed(TARGETS, "target"), default=list(TARGETS), help="comma-separated")
    parser.add_argument("--models", type=listed(MODELS, "model"), default=list(MODELS), help="comma-separated")
    parser.add_argument(
        "--dtypes", type=listed(DTYPES, "dtype"), default=["bf16"], help="comma-separated: bf16, fp16, fp32"
    )
    parser.add_argument("--weights", type=listed(("float", "int8", "int4"), "kind"), default=["float"])
    parser.add_argument("--output", type=Path, help="where the manifest goes; default: standard output")
    parser.add_argument(
        "--table", choices=list(TARGETS), help="print the committed manifest's table for gpt2, and stop"
    )
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(table(args.table, json.loads(MANIFEST.read_text())))
        return 0
    if len(args.targets) == 1:
        os.environ.pop("TRITON_INTERPRET", None)
        targets = {args.targets[0]: compile_target(args.targets[0], args.models, args.dtypes, args.weights)}
    else:
        targets = {}
        for target in args.targets:
            command = [sys.executable, "-m", "kernels.compile", "--targets", target]
            for option in ("models", "dtypes", "weights"):
                command += [f"--{option}", ",".join(getattr(args, option))]
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            done = subprocess.run(
                command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            targets |= json.loads(done.stdout)["targets"]
            print(f"{target}: {len(targets[target])} specialisations", file=sys.stderr)
    import triton

    manifest = {"sources": sources_hash(), "triton": triton.__version__, "targets": targets}
    text = json.dumps(manifest, indent=None, separators=(",", ":")).replace('{"launch"', '\n{"launch"') + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
