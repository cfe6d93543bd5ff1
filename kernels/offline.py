"""Compile kernels for a GPU that is not there: a driver that answers for one target, launches that only compile.

One target a process, since Triton keys its caches by device. Used by ``python -m kernels.compile``.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from kernels.manifest import specialisation_name

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB a program may use
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "sm_120": 65536, "gfx942": 131072}  # of a multiprocessor
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}
BINARY = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a", "sm_120": "SM120a"}  # nvdisasm's names
INSTRUCTION = 16  # bytes, on every NVIDIA target
LOAD = re.compile(r"\b(LDGSTS|LDG)\.E(\S*)|\bglobal_load_(\w+)|\bbuffer_load_(\w+)")
WIDTHS = {"128": 16, "dwordx4": 16, "64": 8, "dwordx2": 8, "U16": 2, "ushort": 2, "U8": 1, "ubyte": 1}  # else 4 bytes
FAMILIES = {"wgmma": r"\b[HIQ]GMMA\.", "tcgen05": r"\bUTC[A-Z]*MMA", "mma.sync": r"\b[HIQ]MMA\.", "mfma": r"v_mfma_"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A specialisation that launches ask for: its name, its kernel and that one's module, its constexprs by name.

    ``index`` is the first launch that asks.
    """

    index: int
    name: str
    kernel: str
    module: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What one specialisation became. ``spills`` and ``shared`` are bytes.

    ``occupancy`` is the share of a multiprocessor's threads that fit at once, ``wide_share`` of the bytes that global
    loads fetch what comes 128 bits at a time, ``copied`` the bytes that the asynchronous copies in the code bring to
    shared memory when each runs once (NVIDIA), ``family`` the kind of tensor-core instruction, ``layout`` how warps are
    laid over a product's tile and, after "of", that instruction's shape.
    """

    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    wide_share: float
    copied: int
    family: str
    layout: str


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


@contextmanager
def compiling_only(target: str, hook: Any = None, seen: Callable[[Any], None] | None = None) -> Iterator[None]:
    """Inside, every launch only compiles, for ``target``. One target a process.

    Args:
        target: one of ``TARGETS``.
        hook: a ``jit_cache_hook``: called before a compilation, which is left out where it returns True.
        seen: called with every compiled kernel that a launch would run; None where its compilation was left out.

    Raises:
        ValueError: Triton is in interpreter mode in this process, or the target is not known.
    """
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; choose from {', '.join(TARGETS)}")
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kernels import interpreter

    if interpreter.interpreting():
        raise ValueError("Triton interprets in this process; unset TRITON_INTERPRET to compile")
    driver.set_active(OfflineDriver(target))
    run, previous = JITFunction.run, triton.knobs.runtime.jit_cache_hook

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if seen is not None:
            seen(compiled)
        return compiled

    JITFunction.run = compile_only
    triton.knobs.runtime.jit_cache_hook = hook or previous
    try:
        yield
    finally:
        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = previous


def asked_by(target: str, launches: Iterable[Callable[[], None]]) -> list[Asked]:
    """The specialisations that these launches ask for, each once; nothing is compiled. Tensors may be on "meta"."""
    found: dict[str, Asked] = {}
    index = 0

    def hook(*, key: str, fn: Any, compile: Any, **rest: Any) -> bool:
        name = specialisation_name(fn.name, key)
        names = fn.jit_function.arg_names
        values = {names[place[0]]: value for place, value in compile["constants"].items()}
        shown = {n: v if isinstance(v, int | float | str) else str(v) for n, v in values.items() if n.isupper()}
        found.setdefault(name, Asked(index, name, fn.name, fn.module.rpartition(".")[2], shown))
        return True

    with compiling_only(target, hook):
        for index, launch in enumerate(launches):  # noqa: B007
            launch()
    return list(found.values())


def compile_launches(target: str, launches: Iterable[Callable[[], None]], wanted: Container[str]) -> dict[str, Report]:
    """Compile those specialisations that these launches ask for whose names are ``wanted``: name -> report."""
    made: dict[str, Compiled] = {}
    name = ""

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        nonlocal name
        name = specialisation_name(fn.name, key)
        return name not in wanted

    def seen(compiled: Any) -> None:
        if compiled is not None and name not in made:
            made[name] = Compiled.of(target, compiled)

    with compiling_only(target, hook, seen):
        for launch in launches:
            launch()
    texts = disassemble(target, [one.code for one in made.values()])
    return {name: examine(target, one, text) for (name, one), text in zip(made.items(), texts, strict=True)}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is kept of a compiled kernel: its machine code (AMD: assembly), and what the compiler says of it."""

    code: bytes
    registers: int  # of a thread
    spills: int  # bytes of local memory
    num_warps: int
    num_stages: int
    shared: int
    layout: str

    @staticmethod
    def of(target: str, compiled: Any) -> "Compiled":
        """Take it from what a launch compiled."""
        if target.startswith("sm_"):
            code = _code_section(compiled.asm["cubin"])
            registers, spills = _resources(compiled.asm["cubin"])
        else:
            text = compiled.asm["amdgcn"]
            code = text.encode()
            registers, spills = (_number(rf"\.{what}:\s*", text) for what in ("vgpr_count", "vgpr_spill_count"))
        metadata = compiled.metadata
        stages, layout = getattr(metadata, "num_stages", 0), _layout(compiled.asm["ttgir"])
        return Compiled(code, registers, spills, metadata.num_warps, stages, metadata.shared, layout)


def _number(before: str, text: str) -> int:
    """The number after the pattern ``before``."""
    found = re.search(before + r"(\d+)", text)
    assert found is not None, before
    return int(found[1])


def _code_section(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin, an ELF file of 64 bits."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    found = [head for head in heads if cubin.startswith(b".text.", heads[names][4] + head[0])]
    assert len(found) == 1, "a cubin has one kernel"
    return cubin[found[0][4] : found[0][4] + found[0][5]]


def _nvidia_tool(*arguments: str, data: bytes) -> str:
    """What one of the tools that Triton ships says of a file with this content."""
    folder = Path(triton_folder()) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [str(folder / arguments[0]), *arguments[1:], file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def triton_folder() -> str:
    """Where Triton is installed."""
    import triton

    return str(Path(triton.__file__).parent)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of local memory, which is spills."""
    usage = _nvidia_tool("cuobjdump", "-res-usage", data=cubin)
    return _number("REG:", usage), _number("STACK:", usage)


def disassemble(target: str, codes: list[bytes]) -> list[str]:
    """Assembly of each kernel. NVIDIA's disassembler takes most of its time to start: it gets all of them at once."""
    if not target.startswith("sm_"):
        return [code.decode() for code in codes]
    if not codes:
        return []
    text = _nvidia_tool("nvdisasm", "-ndf", "-b", BINARY[target], data=b"".join(codes))
    lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*);", text, re.MULTILINE)
    ends = list(accumulate(len(code) // INSTRUCTION for code in codes))
    assert len(lines) == ends[-1], "an instruction a line"
    return ["\n".join(lines[first:last]) for first, last in pairwise([0, *ends])]


def _loads(text: str) -> tuple[float, int]:
    """Of the bytes that the loads in the code fetch for a thread: the share that comes 128 bits at a time, and how many
    are copied to shared memory asynchronously.

    Where there are such copies, those alone count for the share: weights and K and V come by them.
    """
    loads = [
        (found[0] == "LDGSTS", next((n for mark, n in WIDTHS.items() if mark in "".join(found[1:])), 4))
        for found in LOAD.findall(text)
    ]
    copies = [size for is_copy, size in loads if is_copy]
    counted = copies or [size for _, size in loads]
    wide = sum(size for size in counted if size == 16) / max(1, sum(counted))
    return wide, sum(copies)


def _layout(ttgir: str) -> str:
    """How the products of a kernel are laid over warps, and the instruction's shape: "4x1 of 16x64x16"."""
    found = set()
    for text in re.findall(r"#mma\d* = #ttg\.\w+<\{(.*)\}>", ttgir):
        parts = [re.search(rf"{what} = \[([\d, ]+)\]", text) for what in ("warpsPerCTA", "instrShape")]
        found.add(" of ".join(part[1].replace(", ", "x") for part in parts if part))
    return " + ".join(sorted(found))


def examine(target: str, compiled: Compiled, text: str) -> Report:
    """Read a kernel's assembly."""
    threads = compiled.num_warps * TARGETS[target][2]
    by_registers = REGISTERS[target] // max(1, compiled.registers * threads)
    by_shared = SHARED_LIMIT[target] * 1024 // max(1, compiled.shared)
    wide, copied = _loads(text)
    found = [family for family, pattern in FAMILIES.items() if re.search(pattern, text)]
    return Report(
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        registers=compiled.registers,
        spills=compiled.spills,
        shared=compiled.shared,
        occupancy=round(min(1.0, min(by_registers, by_shared) * threads / THREADS[target]), 3),
        wide_share=round(wide, 3),
        copied=copied * threads,
        family="+".join(found) or "none",
        layout=compiled.layout,
    )
