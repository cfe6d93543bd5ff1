"""The committed manifest: what the machine code of every specialisation is like, on every target. Read without Triton.

    {"sources": hash of this folder, "triton": version, "code": {kernel: hash}, "targets": {target: [row, ...]}}

A row is one specialisation, on a line of its own. ``bytes`` and ``flops`` are those of the first launch that asks for
it, which has ``rows`` rows; ``arguments`` are the constexprs in which it differs from the rows of the same launch.

``python -m kernels.manifest`` writes the tables of README.md anew: what a decode step moves, by ``cost()``, and what
the machine code for sm_90 is like, by the manifest; and a short one of both in the README of the project.
"""

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.launches import Launch

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"
README, PROJECT_README = FOLDER / "README.md", FOLDER.parent / "README.md"
REBUILD = "run `make manifest`"
SHOWN_CONTEXT = 512  # keys of the decode step that README.md shows


def sources_hash() -> str:
    """A hash of every source in this folder."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def code_hash(module: str) -> str:
    """A hash of what the kernels of a module here compile to: its jit functions, constants, and those it imports.

    Neither texts nor launchers count, so that editing them compiles nothing anew.
    """
    seen: dict[str, str] = {}

    def visit(name: str) -> None:
        path = FOLDER / f"{name}.py"
        if name in seen or not path.exists():
            return
        seen[name] = ""
        parts = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels."):
                visit(str(node.module).removeprefix("kernels."))
            is_jit = isinstance(node, ast.FunctionDef) and any(
                re.search("jit|constexpr_function", ast.unparse(d)) for d in node.decorator_list
            )
            if is_jit and ast.get_docstring(node) is not None:
                del node.body[0]  # type: ignore[attr-defined]
            if is_jit or isinstance(node, ast.Assign):
                parts.append(ast.unparse(node))
        seen[name] = "\n".join(parts)

    visit(module)
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()[:16]


def specialisation_name(kernel: str, key: str) -> str:
    """A short name of what Triton's cache is keyed by: argument types, what they are specialised on, our options.

    The options that Triton adds itself, another set in each version, are left out.
    """
    ours = key.partition(", 'debug':")[0]
    return f"{kernel.rpartition('.')[2]}:{hashlib.sha256(ours.encode()).hexdigest()[:12]}"


def load() -> dict[str, Any]:
    """The committed manifest.

    Raises:
        ValueError: it is not there, or was not made from these sources.
    """
    if not MANIFEST.exists():
        raise ValueError(f"there is no kernels/manifest.json: {REBUILD}")
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    if manifest["sources"] != sources_hash():
        raise ValueError(f"kernels/manifest.json was made from other sources than those in kernels/: {REBUILD}")
    return manifest


def text_of(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, a row a line."""
    head = {name: value for name, value in manifest.items() if name != "targets"}
    lines = [json.dumps(head)[:-1] + ', "targets": {']
    for i, (target, rows) in enumerate(manifest["targets"].items()):
        lines += [f'{"" if i == 0 else ","}"{target}": [']
        lines += [json.dumps(row, separators=(",", ":")) + ("," if row is not rows[-1] else "") for row in rows]
        lines.append("]")
    return "\n".join([*lines, "}}"]) + "\n"


def _markdown(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def machine_table(manifest: dict[str, Any], target: str, model: str = "gpt2", dtype: str = "bf16") -> str:
    """The manifest's rows of one model and dtype on one target, in Markdown, but those of dependent launch."""
    rows = []
    for row in manifest["targets"][target]:
        if row["model"] == model and row["dtype"] == dtype and not row["arguments"].get("PDL"):
            given = ", ".join(f"{name}={value}" for name, value in row["arguments"].items() if name != "PDL")
            rows.append(
                f"| {row['launch']} | {given} | {row['num_warps']} | {row['registers']} | {row['spills']} "
                f"| {row['shared']:,} | {row['occupancy']:.0%} | {row['wide_share']:.0%} | {row['family']} |"
            )
    head = "| launch | constexprs | warps | registers | spills | shared | occupancy | 128-bit loads | tensor core |"
    return _markdown(head, rows)


def _shown_launches() -> "tuple[list[Launch], list[Launch]]":
    """A decode step of GPT-2 small, one sequence, bfloat16; and what is in place of its last launch with top-k."""
    import torch

    from kernels.launches import MODELS, step_launches

    fused, apart = (
        step_launches(MODELS["gpt2"], [(SHOWN_CONTEXT - 1, 1)], torch.bfloat16, fused=fused) for fused in (True, False)
    )
    return fused, apart[-2:]


def short_table(manifest: dict[str, Any], target: str = "sm_90") -> str:
    """Of the same step: each launch's unique bytes, and its machine code on one target."""
    rows = []
    step, instead = _shown_launches()
    for launch in step + instead:
        code = next(
            row
            for row in manifest["targets"][target]
            if (row["launch"], row["model"], row["dtype"]) == (launch.name, "gpt2", "bf16") and row["rows"] == 1
        )
        rows.append(
            f"| {launch.name} | {'or ' * (launch in instead)}{launch.times} | {launch.cost.total_bytes:,} "
            f"| {code['registers']} | {code['spills']} "
            f"| {code['wide_share']:.0%} | {code['family']} |"
        )
    return _markdown("| launch | times | bytes | registers | spills | 128-bit loads | tensor core |", rows)


def bytes_table() -> str:
    """What each launch of that step moves, in Markdown."""
    step, instead = _shown_launches()
    rows, sums = [], [0, 0, 0]
    for launch in step + instead:
        cost = launch.cost
        moved, times = (cost.weights, cost.reads, cost.writes), f"{'or ' * (launch in instead)}{launch.times}"
        if launch in step:
            sums = [total + launch.times * part for total, part in zip(sums, moved, strict=True)]
        again = sum(cost.rereads.values())
        rows.append(f"| {launch.name} | {times} | " + " | ".join(f"{n:,}" for n in (*moved, again)) + " |")
    count = sum(launch.times for launch in step)
    rows.insert(len(step), f"| **step** | {count} | " + " | ".join(f"{n:,}" for n in sums) + " | |")
    return _markdown("| launch | times | weights | other reads | writes | again, from the cache |", rows)


def sections(manifest: dict[str, Any]) -> dict[Path, dict[str, str]]:
    """File -> name -> text of its generated parts."""
    return {
        README: {"bytes": bytes_table(), "sm_90": machine_table(manifest, "sm_90")},
        PROJECT_README: {"kernels": short_table(manifest)},
    }


def with_sections(readme: str, parts: dict[str, str]) -> str:
    """``readme`` with the text between ``<!-- name -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: a marker is not there.
    """
    for name, text in parts.items():
        before, found, rest = readme.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not found or not end:
            raise ValueError(f"the README has no part <!-- {name} --> ... <!-- end -->")
        readme = f"{before}{found}{text}\n{end}{after}"
    return readme


if __name__ == "__main__":
    for file, parts in sections(load()).items():
        file.write_text(with_sections(file.read_text(encoding="utf-8"), parts), encoding="utf-8")
