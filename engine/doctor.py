"""``python -m engine.doctor``: what this machine has, which backends run, and which one ``auto`` takes and why."""

import argparse
import importlib.metadata
import platform

import torch
from rich.table import Table

import engine
from engine.backends.registry import BACKENDS, available_devices, choose, missing
from engine.cli import console, run
from engine.machine import available_memory, instruction_sets, processor_name, usable_cpus

COMMAND = "python -m engine.doctor"
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "safetensors", "tokenizers", "huggingface_hub", "transformers")


def versions() -> dict[str, str]:
    """Version of every package that the engine uses, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def gpus() -> list[str]:
    """A line for each GPU that PyTorch sees."""
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    return [*lines, "Apple GPU (mps)"] if torch.backends.mps.is_available() else lines


def _remark(name: str) -> str:
    """What else there is to say of a backend here: why it cannot run, or how it does."""
    reason = missing(name)
    if reason is not None:
        return f"; not here: {reason}"
    if name != "native":
        return ""
    from engine.backends.native_backend import ISA_VARIABLE, chosen_isa

    return f"; instruction set {chosen_isa()} ({ISA_VARIABLE} chooses another)"


def main() -> None:
    """Print it."""
    made = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    made.parse_args()
    out = console()
    table = Table(show_header=False, box=None)
    table.add_row("engine", engine.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("processor", f"{processor_name()}, {usable_cpus()} usable CPUs")
    table.add_row("instruction sets", ", ".join(instruction_sets()) or "not known on this system")
    table.add_row("free memory", f"{available_memory() / 2**30:.1f} GiB")
    table.add_row("GPU", "; ".join(gpus()) or "none that PyTorch sees")
    table.add_row("devices", ", ".join(available_devices()))
    for name, version in versions().items():
        table.add_row(name, version)
    out.print(table)
    out.print()
    for name, load in BACKENDS.items():
        cls = load()
        out.print(f"backend [bold]{name}[/]: {', '.join(cls.dtypes)} on {', '.join(cls.devices)}{_remark(name)}")
    choice = choose()
    out.print(f"auto takes [bold]{choice.backend.name}[/], {choice.dtype} on {choice.device}: {choice.reason}")


if __name__ == "__main__":
    run(COMMAND, main)
