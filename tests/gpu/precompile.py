"""Compile beforehand, on every CPU at once, what the check's models ask for (``engine/backends/triton_compile.py``)."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from engine.backends import triton_compile
from engine.config import ModelConfig
from kernels.compile import DEPENDENT

BLOCK_SIZE = 16
DTYPES = ("bfloat16", "float16", "float32", "int8", "int4")


def asked(target: str, parts: Sequence[str]) -> Iterator[tuple[ModelConfig, str, bool]]:
    """(model, dtype, with dependent launch) of the backends that these parts of the check make on this target."""
    from gpu.bench import QUANTISED
    from gpu.conformance import HEAD_DTYPES, HEADS
    from gpu.invariance import LIVED
    from gpu.machine import GPT2, HALF, SMALL

    ways = (False, True) if target in DEPENDENT else (False,)
    if "conformance" in parts or "invariance" in parts:
        yield from ((model, dtype, False) for model in (SMALL, HALF) for dtype in DTYPES)
    if "conformance" in parts:
        yield from ((model, dtype, False) for model in HEADS.values() for dtype in HEAD_DTYPES)
    if "invariance" in parts:
        yield from ((LIVED, dtype, dependent) for dependent in ways for dtype in DTYPES)
    if "bench" in parts or "peers" in parts:
        yield from ((model, "bfloat16", False) for model in GPT2.values())
    if "bench" in parts:
        yield from ((model, "bfloat16", dependent) for model in GPT2.values() for dependent in ways[1:])
        yield from ((list(GPT2.values())[-1], dtype, False) for dtype in QUANTISED)


def precompile(target: str, parts: Sequence[str], workers: int) -> tuple[bool, str]:
    """Compile for the target with so many processes: whether all of them ended well, and how it went, in words."""
    start = time.monotonic()
    count, failed = triton_compile.run_workers(
        [sys.executable, "-m", "gpu.precompile", target, ",".join(parts)], workers
    )
    said = f"{count} specialisations in {time.monotonic() - start:.0f} s with {workers} processes"
    said += "".join(f"\n{len(failed)} processes failed, one so: {error[-1500:]}" for error in failed[:1])
    return not failed, said


def main() -> None:
    """A worker."""
    from kernels.offline import compiling_only

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("parts", type=lambda text: text.split(","))
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    args = parser.parse_args()
    share = triton_compile.Share(args.share, args.of)
    with compiling_only(args.target, share):
        for model, dtype, dependent in asked(args.target, args.parts):
            triton_compile.launch_warm_up(model, dtype, BLOCK_SIZE, dependent)
    print(len(share.compiled))


if __name__ == "__main__":
    main()
