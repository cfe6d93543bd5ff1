"""``csrc/pool.hpp`` and ``csrc/shares.hpp``: who works on what, in a program without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_work_is_shared_out(tmp_path: Path) -> None:
    program = tmp_path / "check.exe"
    sources = [str(ROOT / "csrc" / "pool.cpp"), str(ROOT / "tests" / "native_pool_check.cpp")]
    options = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([str(COMPILER), *options, *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "0 failures"
