"""The NEON kernels, compiled for arm64 and run by an emulator where this machine has both."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None, reason=f"{COMPILER} or {EMULATOR} is missing"
)
def test_neon_is_the_generic_code_up_to_rounding(tmp_path: Path) -> None:
    sources = [path for path in ROOT.glob("csrc/*.cpp") if path.name != "module.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-static", f"-I{ROOT / 'csrc'}"]
    command += [*map(str, sources), str(ROOT / "tests" / "native_isa_check.cpp"), "-o", str(tmp_path / "check")]
    subprocess.run(command, check=True)
    done = subprocess.run([EMULATOR, str(tmp_path / "check")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok neon") for line in lines) == 17
    assert lines[-1] == "0 failures"
