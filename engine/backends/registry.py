"""Which backends there are, and which one ``auto`` takes and why."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.backends.base import Backend
from engine.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend with the settings that "auto" became, and one line on why."""

    backend: type[Backend]
    dtype: str
    device: str
    reason: str


def _load_torch() -> type[Backend]:
    from engine.backends.torch_backend import TorchBackend

    return TorchBackend


def _load_native() -> type[Backend]:
    from engine.backends.native_backend import NativeBackend

    return NativeBackend


def _load_triton() -> type[Backend]:
    from engine.backends.triton_backend import TritonBackend

    return TritonBackend


def _load_triton_interpret() -> type[Backend]:
    from engine.backends.triton_backend import TritonInterpretBackend

    return TritonInterpretBackend


BACKENDS: dict[str, Callable[[], type[Backend]]] = {
    "native": _load_native,
    "torch": _load_torch,
    "triton": _load_triton,
    "triton-interpret": _load_triton_interpret,
}
"""Name -> a function that imports the adapter, so that naming a backend does not load the others."""


def missing(name: str) -> str | None:
    """Why backend ``name`` cannot run here at all, or None if it can."""
    if name == "native":
        from engine.backends.native_backend import load_extension

        try:
            load_extension()
        except ValueError as error:
            return str(error)
    if name.startswith("triton") and importlib.util.find_spec("triton") is None:
        return "triton is not installed (it has wheels for Linux only)"
    if name == "triton" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def default_device() -> tuple[str, str]:
    """The device that ``auto`` means for the torch backend here, and why."""
    if torch.cuda.is_available():
        return "cuda", "PyTorch sees a GPU"
    if torch.backends.mps.is_available():
        return "mps", "PyTorch sees an Apple GPU"
    return "cpu", "PyTorch sees no GPU"


def available_devices() -> list[str]:
    """The devices that PyTorch can use here, by the names that ``device`` takes."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _available(device: str) -> str:
    """``device``, which must be here; "cpu:0" and "mps:0", of which there is one only, as "cpu" and "mps"."""
    name = device.removesuffix(":0") if device in ("cpu:0", "mps:0") else device
    if name not in (available := available_devices()):
        raise ValueError(f"device {device!r} is not available here; choose from auto, {', '.join(available)}")
    return name


def choose(
    backend: str = "auto", dtype: str = "auto", device: str = "auto", model: ModelConfig | None = None
) -> Choice:
    """Settle every "auto", for a model where one is given.

    Raises:
        ValueError: the backend is not known, PyTorch does not have the device here, or the backend is left to "auto"
            with a dtype that none has; with those that are.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    where, device_reason = default_device()
    if device != "auto":
        where, device_reason = _available(device), "asked for"
    elif backend != "auto" and where not in BACKENDS[backend]().devices:
        where, device_reason = BACKENDS[backend]().devices[0], f"the one that {backend} runs on"
    name, reason = (backend, "asked for") if backend != "auto" else _fastest(dtype, where, model)
    reasons = [f"{name}: {reason}", f"{where}: {device_reason}"]
    if dtype == "auto":
        dtype, dtype_reason = _default_dtype(name)
        reasons.append(f"{dtype}: {dtype_reason}")
    adapter = BACKENDS[name]()
    if backend == "auto" and dtype not in adapter.dtypes:
        _check_some_backend_has(dtype)
    return Choice(adapter, dtype, where, "; ".join(reasons))


def _check_some_backend_has(dtype: str) -> None:
    found = {name: load().dtypes for name, load in BACKENDS.items()}
    if not any(dtype in dtypes for dtypes in found.values()):
        listed = "; ".join(f"{name} has {', '.join(dtypes)}" for name, dtypes in found.items())
        raise ValueError(f"no backend has dtype {dtype!r}: {listed}")


def _fastest(dtype: str, device: str, model: ModelConfig | None) -> tuple[str, str]:
    """The backend that ``auto`` means for a dtype, a device and a model, and why."""
    if device.partition(":")[0] == "cuda":
        reason = _no_triton(dtype, device, model)
        return ("triton", "the fastest on this GPU") if reason is None else ("torch", reason)
    if device != "cpu":
        return "torch", f"the one that runs on {device}"
    if missing("native") is not None:
        return "torch", "the C++ extension of native is not built"
    if dtype not in ("auto", *_load_native().dtypes):
        return "torch", f"the one that has {dtype} on a CPU"
    return "native", "the fastest on a CPU"


def _no_triton(dtype: str, device: str, model: ModelConfig | None) -> str | None:
    """Why ``auto`` leaves the triton backend out on a GPU, or None if it takes it."""
    if (absent := missing("triton")) is not None:
        return absent
    if torch.version.hip is not None:
        return "the triton backend was never run on an AMD GPU; it can be asked for"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return (
            f"the triton backend is for compute capability 8.0 and later, this GPU has {'.'.join(map(str, capability))}"
        )
    if not os.environ.get("CC") and not any(map(shutil.which, ("clang", "gcc"))):
        return "Triton needs a C compiler, and finds neither CC nor clang nor gcc"
    from engine.backends.triton_backend import TritonBackend

    if dtype not in ("auto", *TritonBackend.dtypes):
        return f"the one that has {dtype} on a GPU"
    return None if model is None else TritonBackend.refuses(model)


def _default_dtype(name: str) -> tuple[str, str]:
    """What dtype="auto" means for a backend here, and why."""
    if name == "native":
        from engine.backends.native_backend import best_dtype

        if best_dtype() == "bfloat16":
            return "bfloat16", "this CPU multiplies it in hardware"
    return "float32", "it gives the reference's own tokens"
