"""The first start of a model on a GPU: its kernels compiled on many CPUs at once, before they are wanted.

Triton compiles a kernel when a launch asks for it, one after another, in the process that launches. Here other
processes make the launches of a backend's warm-up on torch's "meta" device, where a launch only compiles, each its
share; what they compile goes into Triton's cache, where the warm-up finds it. A note in the cache says that this was
done, so that a later start does nothing. Whatever goes wrong in it, the warm-up compiles itself.
"""

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.machine import usable_cpus

WORKERS_VARIABLE = "ENGINE_COMPILE_WORKERS"  # how many processes; 0 for none
MOST_WORKERS = 16  # each takes half a gigabyte
BLOCKS = 64  # of the cache on "meta"
_log = logging.getLogger("engine.triton")


def launch_warm_up(model: ModelConfig, dtype: str, block_size: int, dependent: bool) -> None:
    """Make every launch of a warm-up on tensors without memory."""
    from engine.backends import triton_jit, triton_step, triton_weights
    from engine.checkpoints.canonical import canonical_shapes

    model = replace(model, n_layers=1, attn_scales=model.attn_scales[:1])  # the others ask for the same kernels
    weights = {name: torch.empty(shape, device="meta") for name, shape in canonical_shapes(model).items()}
    if model.tied_head:
        weights["head"] = weights["tok_emb"]
    packed = triton_weights.pack_model(model, weights, dtype, torch.device("meta"))
    storage = triton_weights.STORAGE[dtype][0]
    step = triton_step.TritonStep(model, packed, storage, block_size, graphs=False, dependent=dependent)
    step.allocate(BLOCKS)
    with torch.inference_mode():
        triton_jit.warm_up(step.run, model)


class Share:
    """A worker's share of the specialisations, as a ``jit_cache_hook`` that leaves the others' out.

    Args:
        share: this worker's number.
        of: how many workers there are.
    """

    def __init__(self, share: int, of: int) -> None:
        self.compiled: set[str] = set()
        self._share, self._of = share, of

    def __call__(self, *, key: str, fn: Any, **rest: Any) -> bool:
        from kernels.manifest import specialisation_name

        name = specialisation_name(fn.name, key)
        if zlib.crc32(name.encode()) % self._of != self._share:
            return True
        self.compiled.add(name)
        return False


def run_workers(command: list[str], workers: int) -> tuple[int, list[str]]:
    """Run the command with ``--of`` and ``--share`` for each worker: the sum of what they print, and their errors."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = [
        subprocess.Popen(
            [*command, "--of", str(workers), "--share", str(share)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for share in range(workers)
    ]  # fmt: skip
    ended = [process.communicate() for process in running]
    failed = [error for process, (_, error) in zip(running, ended, strict=True) if process.returncode]
    return sum(int(out) for out, _ in ended if out.strip().isdigit()), failed


def target_of(device: torch.device) -> str | None:
    """What ``kernels/offline.py`` calls this GPU; None where it does not know it."""
    from kernels.offline import TARGETS

    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" if f"sm_{major}{minor}" in TARGETS else None


def workers_to_use() -> int:
    """``ENGINE_COMPILE_WORKERS``, or one for each CPU that may be used."""
    given = os.environ.get(WORKERS_VARIABLE, "")
    if given and not given.isdigit():
        raise ValueError(f"{WORKERS_VARIABLE}={given!r} is not a number of processes; it accepts 0 for none, 1, 2 ...")
    return int(given) if given else min(usable_cpus(), MOST_WORKERS)


def compile_ahead(model: ModelConfig, dtype: str, block_size: int, dependent: bool, device: torch.device) -> int:
    """Compile what a backend's warm-up will ask for, unless that was done before; how many were compiled.

    Raises:
        ValueError: ``ENGINE_COMPILE_WORKERS`` is not a number.
    """
    target, workers = target_of(device), workers_to_use()
    if target is None or workers < 2:
        return 0
    asked = {"model": asdict(model), "dtype": dtype, "block_size": block_size, "dependent": dependent, "target": target}
    note = _note(asked)
    if note.exists():
        return 0
    started = time.monotonic()
    count, failed = run_workers([sys.executable, "-m", __spec__.name, json.dumps(asked)], workers)
    if failed:
        _log.warning("%d of %d processes that compile kernels failed: %s", len(failed), workers, failed[0][-500:])
        return count
    _log.info("compiled %d kernels in %.0f s with %d processes", count, time.monotonic() - started, workers)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()
    return count


def _note(asked: dict[str, Any]) -> Path:
    """The file that says these were compiled, by this Triton from these sources."""
    import triton

    from kernels.manifest import sources_hash

    model = {name: value for name, value in asked["model"].items() if name not in ("n_layers", "attn_scales")}
    said = json.dumps([asked | {"model": model}, triton.__version__, sources_hash()], sort_keys=True)
    return Path(triton.knobs.cache.dir) / f"engine-{hashlib.sha256(said.encode()).hexdigest()[:24]}"


def main() -> None:
    """A worker: compile a share, and print how many those were."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("asked", type=json.loads)
    parser.add_argument("--share", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    args = parser.parse_args()
    from kernels.offline import compiling_only

    share, asked = Share(args.share, args.of), args.asked
    fields = asked["model"] | {"attn_scales": tuple(asked["model"]["attn_scales"])}
    with compiling_only(asked["target"], share):
        launch_warm_up(ModelConfig(**fields), asked["dtype"], asked["block_size"], asked["dependent"])
    print(len(share.compiled))


if __name__ == "__main__":
    main()
