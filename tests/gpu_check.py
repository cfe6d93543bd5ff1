"""``python tests/gpu_check.py``: is the triton backend right, invariant and fast on this machine's GPU?

Parts run alone or together (``--part`` or the environment's PART): conformance, invariance, bench, peers; what they
hold is in ``tests/gpu/``. Every case is written to one JSON file as it ends. A case that is there already, passed by
the same versions on the same device, is not run again without ``--again``, and a part stops after ``--seconds``: run it
once more and it goes on. A long case, of compute-sanitizer, begins only where a part has hardly begun, so that a part
ends within eight minutes. ``--backend triton-interpret --tiny`` takes these paths on a CPU. It needs torch, triton,
numpy, pytest and this repository (peers: transformers), and no network.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

PARTS = ("conformance", "invariance", "bench", "peers")
NONE = "none"
LONG = "compute-sanitizer"  # how the names of long cases begin
LONG_SECONDS = 400  # that one may take; the others take up to a minute


class Report:
    """The JSON file: versions and device, and part -> case -> result.

    Args:
        path: the file.
        versions: what the results hold for; a file of others is begun anew.
    """

    def __init__(self, path: Path, versions: dict[str, str]) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.content: dict[str, Any] = found if found.get("versions") == versions else {"versions": versions}

    def part(self, name: str) -> dict[str, Any]:
        """The results of a part."""
        results: dict[str, Any] = self.content.setdefault(name, {})
        return results

    def forget(self, part: str, only: str) -> None:
        """Drop a part's results whose case has this text in its name."""
        self.content[part] = {name: result for name, result in self.part(part).items() if only not in name}

    def save(self) -> None:
        """Write the file."""
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        whole.replace(self.path)  # never half a file, whatever ends the process


def run_part(report: Report, part: str, machine: Any, seconds: float, only: str) -> str:
    """Run a part's cases that are not through, those that were never tried first, and say how it went: "ok", what
    failed, how many are left, or "none" where no name has ``only`` in it."""
    start, left = time.monotonic(), 0
    results = report.part(part)
    listed = [case for case in importlib.import_module(f"gpu.{part}").cases(machine) if only in case[0]]
    if not listed:
        return NONE
    for name, run in sorted(listed, key=lambda case: case[0] in results):
        if results.get(name, {}).get("ok"):
            continue
        last = max(1.0, seconds - LONG_SECONDS + 60) if name.startswith(LONG) and seconds > 0 else seconds
        if time.monotonic() - start > last:
            left += 1
            continue
        begun = time.monotonic()
        try:
            result = {"ok": True} | run()
        except Exception as error:  # the next case may still tell something
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()}
        results[name] = result | {"seconds": round(time.monotonic() - begun, 2)}
        report.save()
        print(f"{part}: {name}: {shown(results[name])}", flush=True)
        if "trace" in results[name] and not machine.alive():  # every later case would fail by this one's fault
            return f"failed: {name}, and the device is of no use to this process any more: run it again to go on"
    bad = [name for name, result in results.items() if not result["ok"]]
    if bad:
        return f"failed: {', '.join(bad)}"
    return f"{left} cases left: run it again to go on" if left else "ok"


def shown(result: dict[str, Any]) -> str:
    """A result on a line."""
    values = {name: value for name, value in result.items() if name not in ("trace", "end", "ok")}
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]
    return " ".join(["ok" if result["ok"] else "FAILED", *texts])


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 if all is well, 1 if a case failed, 2 if some are left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default=os.environ.get("PART") or "all", choices=("all", *PARTS))
    parser.add_argument("--backend", default="triton", choices=("triton", "triton-interpret"))
    parser.add_argument("--tiny", action="store_true", help="the smallest models, to take all paths quickly")
    parser.add_argument("--again", action="store_true", help="run cases that have passed already")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    parser.add_argument("--seconds", type=float, default=420, help="after which a part begins no other case")
    parser.add_argument("--workers", type=int, help="processes that compile before the first part; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args(arguments)
    if args.part not in ("all", *PARTS):  # argparse does not look at a default
        parser.error(f"PART={args.part!r} is no part; choose from {', '.join(PARTS)}")
    if args.backend == "triton-interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from gpu.machine import Machine
    from gpu.precompile import precompile

    from engine.backends.registry import missing
    from engine.backends.triton_compile import WORKERS_VARIABLE, workers_to_use

    if (reason := missing(args.backend)) is not None:
        parser.error(f"{reason}; --backend triton-interpret --tiny takes the same paths on a CPU")
    begun = time.monotonic()
    machine = Machine(args.backend, args.tiny)
    report = Report(args.output, machine.versions())
    parts = PARTS if args.part == "all" else (args.part,)
    workers = workers_to_use() if args.workers is None else args.workers
    if machine.target is not None and workers:
        well, text = precompile(machine.target, parts, workers)
        print(f"compiled {text}", flush=True)
        if well:
            os.environ[WORKERS_VARIABLE] = "0"  # no backend need do it again
    if args.again:
        for part in parts:
            report.forget(part, args.only)
    said, compiling = {}, time.monotonic() - begun
    for part in parts:
        said[part] = run_part(report, part, machine, args.seconds - compiling, args.only)
        compiling = 0.0  # is of the first part's time
    if set(said.values()) == {NONE}:
        parser.error(f"no case has {args.only!r} in its name")
    said = {part: text for part, text in said.items() if text != NONE}
    for part, text in said.items():
        print(f"{part}: {text}")
    failed = any(text.startswith("failed") for text in said.values())
    print(json.dumps({"ok": all(text == "ok" for text in said.values()), "report": str(args.output)}))
    return 1 if failed else 0 if all(text == "ok" for text in said.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
