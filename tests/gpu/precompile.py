"""Compile beforehand, on every CPU at once, what the check's models ask for: Triton compiles one kernel after another.

Each worker runs the backend's warm-up on torch's "meta" device, where a launch only compiles, and takes its share of
the specialisations; what it compiles goes into Triton's cache, where the check finds it.
"""

import argparse
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import ModelConfig

DTYPES = ("bfloat16", "float16", "float32")


def asked(parts: Sequence[str]) -> Iterator[tuple["ModelConfig", str, bool]]:
    """(model, dtype, with dependent launch) of the backends that these parts of the check make."""
    from gpu.invariance import LIVED
    from gpu.machine import GPT2, HALF, SMALL

    if "conformance" in parts or "invariance" in parts:
        yield from ((model, dtype, False) for model in (SMALL, HALF) for dtype in DTYPES)
    if "invariance" in parts:
        yield from ((LIVED, dtype, dependent) for dependent in (False, True) for dtype in DTYPES)
    if "bench" in parts or "peers" in parts:
        yield from ((model, "bfloat16", False) for model in GPT2.values())
    if "bench" in parts:
        yield from ((model, "bfloat16", True) for model in GPT2.values())


def compile_share(target: str, parts: Sequence[str], share: int, of: int) -> int:
    """Compile this worker's share of the specialisations; how many those were."""
    from kernels.manifest import specialisation_name
    from kernels.offline import compiling_only

    compiled: set[str] = set()

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        name = specialisation_name(fn.name, key)
        if zlib.crc32(name.encode()) % of != share:
            return True
        compiled.add(name)
        return False

    with compiling_only(target, hook):
        for model, dtype, dependent in asked(parts):
            one_layer = replace(model, n_layers=1, attn_scales=model.attn_scales[:1])
            warm_up(one_layer, dtype, dependent)
    return len(compiled)


def warm_up(model: "ModelConfig", dtype: str, dependent: bool) -> None:
    """Make every launch of a backend's warm-up, on tensors without memory."""
    import torch

    from engine.backends import triton_buffers
    from engine.backends.triton_backend import TritonBackend
    from engine.checkpoints.canonical import canonical_shapes

    class OnMeta(TritonBackend):
        devices = ("meta",)

        def _prepare(self, strict_jit: bool) -> None:
            pass

        @staticmethod
        def _has_dependent_launch(device: torch.device) -> bool:
            return True

    triton_buffers.Slot.download = lambda slot, packed: None  # type: ignore[method-assign]  # there is nothing to bring
    weights = {name: torch.empty(shape, device="meta") for name, shape in canonical_shapes(model).items()}
    if model.tied_head:
        weights["head"] = weights["tok_emb"]
    made = OnMeta(model, weights, dtype=dtype, device="meta", block_size=16, graphs=False, dependent_launch=dependent)
    made.allocate(256)


def precompile(target: str, parts: Sequence[str], workers: int) -> str:
    """Compile for the target with so many processes, and say how it went; what fails here fails again in the check."""
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, target, ",".join(parts), "--of", str(workers), "--share"]
    running = [
        subprocess.Popen([*command, str(share)], env=environment, stdout=PIPE, stderr=PIPE, text=True)
        for share in range(workers)
    ]
    ended = [process.communicate() for process in running]
    count = sum(int(out) for out, _ in ended if out.strip())
    said = f"{count} specialisations in {time.monotonic() - start:.0f} s with {workers} processes"
    failed = [error[-1500:] for process, (_, error) in zip(running, ended, strict=True) if process.returncode]
    return said + "".join(f"\n{len(failed)} processes failed, one so: {error}" for error in failed[:1])


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("parts", type=lambda text: text.split(","))
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    args = parser.parse_args()
    print(compile_share(args.target, args.parts, args.share, args.of))
