"""``python -m kernels.compile``: compile every specialisation a model asks for, with no GPU, and write a manifest.

    python -m kernels.compile --targets sm_80,sm_90,sm_100,sm_120,gfx942 --output kernels/manifest.json

Each target is compiled in a process of its own, as many at once as there are CPUs. What ``kernels/manifest.py`` says a
row is; a row of the committed manifest is kept where the code that it is compiled from, Triton, and what reads the
machine code are the same, so that only what changed is compiled.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.manifest import FOLDER, MANIFEST, code_hash, machine_table, sources_hash, text_of

if TYPE_CHECKING:
    from kernels.launches import Launch
    from kernels.offline import Asked

DTYPES = {  # name -> storage type, kind of weights
    "bf16": ("bfloat16", "float"),
    "fp16": ("float16", "float"),
    "fp32": ("float32", "float"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
HEADS = "heads"  # in a model's place: attention with heads of other widths than GPT-2's
DEPENDENT = ("sm_90", "sm_100", "sm_120")  # have dependent launch (kernels/dependent.py)


def reader_hash() -> str:
    """A hash of what reads the machine code."""
    return hashlib.sha256((FOLDER / "offline.py").read_bytes()).hexdigest()[:16]


def kept_rows(target: str, code: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> what the committed manifest says of the machine code, where that holds for ``code``, kernel -> hash."""
    import triton

    from kernels.offline import Report

    if not MANIFEST.exists():
        return {}
    old = json.loads(MANIFEST.read_text(encoding="utf-8"))
    if old["triton"] != triton.__version__ or old["reader"] != reader_hash():
        return {}
    names = [field.name for field in fields(Report)]
    same = {kernel for kernel, digest in code.items() if old["code"].get(kernel) == digest}
    rows = old["targets"].get(target, [])
    return {row["name"]: {n: row[n] for n in names} for row in rows if row["name"].partition(":")[0] in same}


def varying(asked: Sequence["Asked"], launches: Sequence[tuple[str, str, "Launch"]]) -> dict[str, list[str]]:
    """Name of a specialisation -> its constexprs in which the specialisations of the same launch differ."""
    groups = defaultdict(list)
    for one in asked:
        model, dtype, launch = launches[one.index]
        groups[model, dtype, launch.name].append(one)
    found = {}
    for group in groups.values():
        names = [n for n in group[0].arguments if len({one.arguments[n] for one in group}) > 1]
        found |= {one.name: names for one in group}
    return found


def compile_target(target: str, models: list[str], dtypes: list[str], fresh: bool) -> tuple[list[Any], dict[str, str]]:
    """A manifest row for every specialisation, and kernel -> hash of its code; one target a process."""
    import torch

    from kernels.launches import MODELS, all_launches, head_launches
    from kernels.offline import asked_by, compile_launches

    def listed(model: str, storage: torch.dtype, kind: str) -> list["Launch"]:
        if model == HEADS:
            return head_launches(storage) if kind == "float" else []
        return all_launches(MODELS[model], storage, kind, dependent=target in DEPENDENT)

    launches = [
        (model, dtype, launch)
        for model in models
        for dtype in dtypes
        for launch in listed(model, getattr(torch, DTYPES[dtype][0]), DTYPES[dtype][1])
    ]
    asked = asked_by(target, [launch.run for *_, launch in launches])
    hashes = {module: code_hash(module) for module in {one.module for one in asked}}
    code = {one.kernel: hashes[one.module] for one in asked}
    machine = {} if fresh else kept_rows(target, code)
    missing = [one for one in asked if one.name not in machine]
    print(f"{target}: {len(asked)} specialisations, {len(missing)} to compile", file=sys.stderr)
    made = compile_launches(target, [launches[one.index][2].run for one in missing], {one.name for one in missing})
    machine |= {name: asdict(report) for name, report in made.items()}
    shown = varying(asked, launches)
    rows = []
    for one in asked:
        model, dtype, launch = launches[one.index]
        row = {"name": one.name, "launch": launch.name, "model": model, "dtype": dtype, "rows": launch.rows}
        row |= {"arguments": {name: one.arguments[name] for name in shown[one.name]}} | machine[one.name]
        rows.append(row | {"bytes": launch.cost.total_bytes, "flops": launch.cost.flops})
    return rows, code


def build(targets: list[str], models: list[str], dtypes: list[str], fresh: bool) -> dict[str, Any]:
    """The manifest. Compiles here for one target, in a process for each of several."""
    import triton

    manifest = {"sources": sources_hash(), "triton": triton.__version__, "reader": reader_hash(), "code": {}}
    manifest["targets"] = {}
    if len(targets) == 1:
        manifest["targets"][targets[0]], manifest["code"] = compile_target(targets[0], models, dtypes, fresh)
        return manifest
    options = ["--models", ",".join(models), "--dtypes", ",".join(dtypes), *(["--fresh"] if fresh else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(target: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "kernels.compile", "--targets", target, *options]
        done = subprocess.run(
            command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        part: dict[str, Any] = json.loads(done.stdout)
        return part

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(run, targets):
            manifest["targets"] |= part["targets"]
            manifest["code"] |= part["code"]
    return manifest


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
    for name, accepted in (("target", TARGETS), ("model", [*MODELS, HEADS]), ("dtype", DTYPES)):
        text = f"comma-separated: {', '.join(accepted)} (default: all)"
        parser.add_argument(f"--{name}s", type=listed(accepted, name), default=list(accepted), help=text)
    parser.add_argument("--output", type=Path, help="where the manifest goes; default: standard output")
    parser.add_argument("--fresh", action="store_true", help="keep no row of the committed manifest")
    parser.add_argument(
        "--table", choices=list(TARGETS), help="print the committed manifest's table for gpt2, and stop"
    )
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(machine_table(json.loads(MANIFEST.read_text(encoding="utf-8")), args.table))
        return 0
    text = text_of(build(args.targets, args.models, args.dtypes, args.fresh))
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
