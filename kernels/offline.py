"""Compile kernels for a GPU that is not there: a driver that answers for one target, launches that only compile.

One target a process, since Triton keys its caches by device. Used by ``python -m kernels.compile``.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB a program may use
REGISTERS = 65536  # of a multiprocessor
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}
LOAD = re.compile(r"\b(LDGSTS|LDG)\.E(\S*)|\bglobal_load_(\w+)|\bbuffer_load_(\w+)")
WIDTHS = {"128": 16, "dwordx4": 16, "64": 8, "dwordx2": 8, "U16": 2, "ushort": 2, "U8": 1, "ubyte": 1}  # else 4 bytes
FAMILIES = {"wgmma": r"\b[HIQ]GMMA\.", "tcgen05": r"\bUTC[A-Z]*MMA", "mma.sync": r"\b[HIQ]MMA\.", "mfma": r"v_mfma_"}


@dataclass(frozen=True, slots=True)
class Report:
    """What one specialisation became. ``spills`` and ``shared`` are bytes.

    ``occupancy`` is the share of a multiprocessor's threads that fit at once, ``wide_share`` of the bytes that global
    loads fetch what comes 128 bits at a time, ``family`` the kind of tensor-core instruction.
    """

    name: str
    kernel: str
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    wide_share: float
    family: str
    layout: str

    def as_row(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


class OfflineDriver:
    """Answers what the compiler asks of a driver, for one target, without a device."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self) -> Any:
        """The target."""
        return self.target

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Stream 0."""
        return 0


def _capture(
    target: str, launches: Iterable[Callable[[], None]], seen: Callable[[int, Any, Any], None], hook: Any
) -> None:
    """Run each launch with ``JITFunction.run`` compiling only; ``seen(index of the launch, compiled, arguments)``."""
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; choose from {', '.join(TARGETS)}")
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kernels import interpreter

    if interpreter.interpreting():
        raise ValueError("Triton interprets in this process; unset TRITON_INTERPRET to compile")
    driver.set_active(OfflineDriver(target))
    run = JITFunction.run
    index = 0

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen(index, compiled, {k: v for k, v in kwargs.items() if k.isupper()})
        return compiled

    JITFunction.run = compile_only
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        for index, launch in enumerate(launches):  # noqa: B007
            launch()
    finally:
        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = None


def specialisations(target: str, launches: Iterable[Callable[[], None]]) -> set[str]:
    """Names of the specialisations that these launches ask for; nothing is compiled."""
    found: set[str] = set()

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        found.add(specialisation_name(fn.name, key))
        return True

    _capture(target, launches, lambda *_: None, hook)
    return found


def specialisation_name(kernel: str, key: str) -> str:
    """A short name of what Triton's cache is keyed by: argument types, what they are specialised on, options."""
    return f"{kernel.rpartition('.')[2]}:{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def compile_launches(target: str, launches: Iterable[Callable[[], None]]) -> list[tuple[int, Report]]:
    """Compile what these launches ask for, once each: (index of the first launch that asks, report).

    Tensors may be on torch's "meta" device.

    Raises:
        ValueError: Triton is in interpreter mode in this process, or the target is not known.
    """
    reports: list[tuple[int, Report]] = []
    names: list[str] = []

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        names.append(specialisation_name(fn.name, key))
        return False

    def seen(index: int, compiled: Any, arguments: dict[str, Any]) -> None:
        if len(names) > len(reports):
            reports.append((index, examine(target, names[-1], compiled, arguments)))

    _capture(target, launches, seen, hook)
    return reports


def _nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia_machine_code(cubin: bytes) -> tuple[str, int, int]:
    """(SASS, registers, bytes of local memory: spills) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_nvidia_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_nvidia_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return sass, registers, stack


def machine_code(target: str, compiled: Any) -> tuple[str, int, int]:
    """(assembly, registers of a thread, spills) of a compiled kernel."""
    if target.startswith("sm_"):
        return _nvidia_machine_code(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    count = {what: int(re.search(rf"\.{what}:\s*(\d+)", text)[1]) for what in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
    return text, count["vgpr_count"], count["vgpr_spill_count"]


def _wide_share(text: str) -> float:
    """Of the bytes that the loads in the code fetch for a thread, the share that comes 128 bits at a time.

    Where there are asynchronous copies to shared memory, those alone count: weights and K and V come by them.
    """
    loads = LOAD.findall(text)
    copies = [found for found in loads if found[0] == "LDGSTS"]
    sizes = [next((n for mark, n in WIDTHS.items() if mark in "".join(found[1:])), 4) for found in copies or loads]
    return sum(size for size in sizes if size == 16) / max(1, sum(sizes))


def examine(target: str, name: str, compiled: Any, arguments: dict[str, Any]) -> Report:
    """Read a compiled kernel's machine code."""
    text, registers, spills = machine_code(target, compiled)
    metadata = compiled.metadata
    threads = metadata.num_warps * TARGETS[target][2]
    by_registers = REGISTERS // max(1, registers * threads)
    by_shared = SHARED_LIMIT[target] * 1024 // max(1, metadata.shared)
    found = [family for family, pattern in FAMILIES.items() if re.search(pattern, text)]
    layouts = re.findall(r"#mma\d* = #ttg\.\w+<\{(.*)\}>", compiled.asm["ttgir"])
    return Report(
        name=name,
        kernel=metadata.name,
        arguments={k: v if isinstance(v, int | float | str) else str(v) for k, v in arguments.items()},
        num_warps=metadata.num_warps,
        num_stages=getattr(metadata, "num_stages", 0),
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        occupancy=round(min(1.0, min(by_registers, by_shared) * threads / THREADS[target]), 3),
        wide_share=round(_wide_share(text), 3),
        family="+".join(found) or "none",
        layout=" ".join(sorted(set(layouts))),
    )
