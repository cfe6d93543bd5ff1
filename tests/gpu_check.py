"""``python tests/gpu_check.py``: is the triton backend right, invariant and fast on this machine's GPU?

Parts run alone or together (``--part`` or the environment's PART): conformance, invariance, bench. Each writes its
results into one JSON file as it ends, and a part that is there already, made by the same versions on the same device,
is not run again without ``--again``. ``--backend triton-interpret --tiny`` takes every path on a CPU, in a minute or
so. It needs torch, triton, numpy and this repository, nothing else, and no network.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from backend_driver import BLOCK, Driver, greedy, random_weights, tokens

from engine.backends import registry
from engine.backends.base import Backend
from engine.backends.torch_backend import TorchBackend
from engine.checkpoints.canonical import to_reference
from engine.config import ModelConfig

PARTS = ("conformance", "invariance", "bench")
SMALL = ModelConfig(vocab_size=97, context_length=150, embed_dim=80, n_heads=4, n_layers=2, hidden_dim=130)
HALF = ModelConfig(vocab_size=50257, context_length=1024, embed_dim=768, n_heads=12, n_layers=2, hidden_dim=3072)
GPT2 = {
    "gpt2": ModelConfig(50257, 1024, 768, 12, 12, 3072, tied_head=True),
    "gpt2-medium": ModelConfig(50257, 1024, 1024, 16, 24, 4096, tied_head=True),
    "gpt2-large": ModelConfig(50257, 1024, 1280, 20, 36, 5120, tied_head=True),
    "gpt2-xl": ModelConfig(50257, 1024, 1600, 25, 48, 6400, tied_head=True),
}


class Check:
    """The machine, and how to make backends on it."""

    def __init__(self, backend: str, tiny: bool) -> None:
        self.adapter = registry.BACKENDS[backend]()
        self.device = self.adapter.devices[0]
        self.tiny = tiny
        self.models = {"small": SMALL} if tiny else {"small": SMALL, "gpt2 with 2 layers": HALF}

    def make(self, model: ModelConfig, dtype: str, blocks: int, adapter: type[Backend] | None = None) -> Driver:
        made = (adapter or self.adapter)(
            model, random_weights(model), dtype=dtype, device=self.device, block_size=BLOCK
        )
        made.allocate(blocks)
        return Driver(made, num_blocks=blocks)

    def versions(self) -> dict[str, str]:
        import triton

        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        return {"torch": torch.__version__, "triton": triton.__version__, "device": name, "tiny": str(self.tiny)}

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def conformance(check: Check) -> dict[str, Any]:
    """Logits against float64, and drawn tokens against the torch backend, in every dtype."""
    results: dict[str, Any] = {}
    for name, model in check.models.items():
        ids = tokens(100 if check.tiny else 140, vocab_size=model.vocab_size)
        with torch.no_grad():
            oracle = to_reference(model, random_weights(model)).double()(torch.tensor([ids]))[0]
        for dtype in check.adapter.dtypes:
            driver, theirs = check.make(model, dtype, 60), check.make(model, dtype, 60, TorchBackend)
            error = (driver.in_chunks(ids, [40, 41]).cpu().double() - oracle).abs().max().item()
            torch_error = (theirs.in_chunks(ids, [40, 41]).cpu().double() - oracle).abs().max().item()
            limit = 1e-4 if dtype == "float32" else 2 * torch_error
            results[f"{name} {dtype}"] = {"error": error, "torch": torch_error, "ok": error <= limit}
            if dtype == "float32":
                results[f"{name} draws"] = {"ok": _same_draws(driver, theirs, model)}
    return results


def _same_draws(ours: Driver, theirs: Driver, model: ModelConfig) -> bool:
    heat = np.array([0, 1, 0.7, 1.3], np.float32)
    options = greedy(
        4, temperature=heat, top_k=np.array([0, 0, 20, 5], np.int32), positions=np.arange(4, dtype=np.uint32),
        num_logprobs=3,
    )  # fmt: skip
    found = []
    for driver in (ours, theirs):
        driver.release()
        parts = [(driver.sequence(20), tokens(9 + i, i, model.vocab_size)) for i in range(4)]
        found.append(driver.run(parts, options).token_ids.tolist())
    return found[0] == found[1]


def invariance(check: Check) -> dict[str, Any]:
    """The bits of a row: whole, in chunks, one by one, beside others; and the logprob beside a neighbour's top-k."""
    results: dict[str, Any] = {}
    company = 3 if check.tiny else 63
    for name, model in check.models.items():
        ids = tokens(100 if check.tiny else 140, vocab_size=model.vocab_size)
        for dtype in check.adapter.dtypes:
            driver = check.make(model, dtype, 60 + 2 * company)
            whole = driver.in_chunks(ids, [])
            same = all(
                torch.equal(driver.in_chunks(ids, cuts), whole)
                for cuts in ([70], [5, 21, 64], list(range(len(ids) - 3, len(ids))))
            )
            driver.release()
            first = driver.sequence(len(ids))
            others = [driver.sequence(20) for _ in range(company)]
            driver.run([(first, ids[:-1])])
            beside = driver.logits([*((s, [7]) for s in others), (first, ids[-1:])])[-1]
            results[f"{name} {dtype}"] = {"chunks": same, "beside": torch.equal(beside, whole[-1])}
            results[f"{name} {dtype}"]["ok"] = all(results[f"{name} {dtype}"].values())
    return results


def _median_seconds(check: Check, run: Callable[[], None], times: int) -> float:
    run(), check.wait()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run(), check.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def bench(check: Check) -> dict[str, Any]:
    """Decode steps of GPT-2's sizes, and the bandwidth that a copy reaches here."""
    size = 1 << (20 if check.tiny else 30)
    a = torch.zeros(size, dtype=torch.uint8, device=check.device)
    b = torch.empty_like(a)
    copy = 2 * size / _median_seconds(check, lambda: b.copy_(a), 5)
    results: dict[str, Any] = {"copy GB/s": copy / 1e9, "ok": True}
    models = {"small": SMALL} if check.tiny else GPT2
    dtype = check.adapter.dtypes[0]
    for name, model in models.items():
        weight_bytes = model.num_parameters * getattr(torch, dtype).itemsize
        for batch in (1, 2) if check.tiny else (1, 8, 32, 64, 256):
            driver = check.make(model, dtype, batch * (4 if check.tiny else 16))
            parts = [
                (driver.sequence(60 if check.tiny else 250), tokens(30, i, model.vocab_size)) for i in range(batch)
            ]
            driver.run(parts, greedy(batch))
            step = _median_seconds(check, lambda: _decode(driver, parts, batch), 3 if check.tiny else 50)  # noqa: B023
            results[f"{name} batch {batch}"] = {
                "seconds a step": step, "tokens/s": batch / step, "weights GB/s": weight_bytes / step / 1e9,
                "share of copy": weight_bytes / step / copy,
            }  # fmt: skip
            print(f"{name} batch {batch}: {batch / step:.0f} tokens/s", flush=True)
    return results


def _decode(driver: Driver, parts: list[Any], batch: int) -> None:
    driver.run([(s, [1]) for s, _ in parts], greedy(batch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default=os.environ.get("PART", "all"), choices=("all", *PARTS))
    parser.add_argument("--backend", default="triton", choices=("triton", "triton-interpret"))
    parser.add_argument("--tiny", action="store_true", help="the smallest models, to take every path quickly")
    parser.add_argument("--again", action="store_true", help="run parts that are done already")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    if args.backend == "triton-interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    check = Check(args.backend, args.tiny)
    versions = check.versions()
    report: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    failed = False
    for part in PARTS if args.part == "all" else (args.part,):
        done = report.get(part)
        if done is None or args.again or done["versions"] != versions:
            start = time.perf_counter()
            results = {"conformance": conformance, "invariance": invariance, "bench": bench}[part](check)
            done = report[part] = {"versions": versions, "seconds": time.perf_counter() - start, "results": results}
            args.output.write_text(json.dumps(report, indent=1) + "\n")
        bad = [
            name for name, result in done["results"].items() if isinstance(result, dict) and result.get("ok") is False
        ]
        failed |= bool(bad)
        print(f"{part}: {'failed: ' + ', '.join(bad) if bad else 'ok'} ({done['seconds']:.0f} s)", flush=True)
    print(json.dumps({"ok": not failed, "report": str(args.output)}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
