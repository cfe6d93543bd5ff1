"""Packaging: what the engine needs, and what its extras add."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3", "hypothesis>=6", "transformers>=4.50", "matplotlib>=3.8"]

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
    extras_require={
        "hub": ["huggingface_hub>=0.25", "tokenizers>=0.20"],
        "plot": ["matplotlib>=3.8"],
        "train": ["tokenizers>=0.20", "rdata>=0.11"],
        "test": [*TEST, "huggingface_hub>=0.25", "tokenizers>=0.20"],
        "lint": ["ruff>=0.12", "mypy>=1.15"],
    },
)
