"""``csrc/`` compiled for this machine and for others, and run: by an emulator where a program is another machine's.

The compiler for others is Zig's clang, which the ziglang package brings along with every system's headers; ``make
check-platforms`` installs it. qemu-aarch64, wine and GCC for arm64 are this system's; without them less is run.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", f"-I{ROOT / 'csrc'}"]
ZIG = [sys.executable, "-m", "ziglang", "c++"]
GCC_FOR_ARM64 = "aarch64-linux-gnu-g++"
HOST = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.slow
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


def compiled(compiler: list[str], sources: list[Path], folder: Path, *options: str) -> list[str]:
    """Object files, two at a time."""

    def one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        subprocess.run([*compiler, *FLAGS, *options, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def kernels_and_model() -> list[Path]:
    return [path for path in sorted(ROOT.glob("csrc/*.cpp")) if path.name != "module.cpp"]


def checking_program(compiler: list[str], folder: Path, *link: str) -> Path:
    """A program without Python: every instruction set of its CPU against generic code."""
    objects = compiled(compiler, [*kernels_and_model(), ROOT / "tests" / "native_isa_check.cpp"], folder)
    subprocess.run([*compiler, *objects, *link, "-o", str(folder / "check.exe")], check=True)
    return folder / "check.exe"


def instruction_sets_that_agree(command: list[str], **environment: str) -> set[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert lines[-1] == "0 failures"
    found = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert all(found.count(name) == 25 for name in found)
    return set(found)


@pytest.mark.skipif(HOST is None, reason="no C++ compiler")
def test_this_machine(tmp_path: Path) -> None:
    extension = pytest.importorskip("engine.backends._native")
    program = checking_program([str(HOST)], tmp_path, "-pthread")
    sets = {name for name, available in extension.isas() if available}
    assert instruction_sets_that_agree([str(program)]) == sets - {"generic"}


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param([*ZIG, "-target", "aarch64-linux-musl"], marks=needs_zig, id="clang"),
        pytest.param(
            [GCC_FOR_ARM64], marks=pytest.mark.skipif(shutil.which(GCC_FOR_ARM64) is None, reason="no GCC"), id="gcc"
        ),
    ],
)
def test_linux_on_arm64(compiler: list[str], tmp_path: Path) -> None:
    program = checking_program(compiler, tmp_path, "-static")
    if (emulator := shutil.which("qemu-aarch64")) is None:
        pytest.skip("compiled; qemu-aarch64 is missing to run it")
    assert instruction_sets_that_agree([emulator, str(program)]) == {"neon"}


@needs_zig
def test_windows(tmp_path: Path) -> None:
    """By clang and its libraries, not by Visual C++."""
    program = checking_program([*ZIG, "-target", "x86_64-windows-gnu"], tmp_path)
    wine = shutil.which("wine") or shutil.which("wine64", path="/usr/lib/wine")
    if wine is None:
        pytest.skip("compiled; wine is missing to run it")
    settings = {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    assert "avx2" in instruction_sets_that_agree([wine, str(program)], **settings)


@needs_zig
def test_macos_on_arm64(tmp_path: Path) -> None:
    """The extension itself, compiled and linked; nothing here could run it."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = [*ZIG, "-target", "aarch64-macos"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = compiled(compiler, [*kernels_and_model(), ROOT / "csrc" / "module.cpp"], tmp_path, *includes)
    target = tmp_path / "_native.so"
    subprocess.run([*compiler, "-shared", "-undefined", "dynamic_lookup", *objects, "-o", str(target)], check=True)
    assert target.stat().st_size > 500_000
