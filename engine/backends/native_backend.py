"""The ``native`` backend: a whole step is one call into C++ (``csrc/``), with the interpreter lock released.

Weights are packed for streaming when they are loaded. Dtypes: "float32"; "bfloat16" (weights and KV cache; activations
are float32 on CPUs without bf16 dot products and bf16 on those with them); "int8" (W8A8: a scale per output of a weight
and per row of activations, exact int32 sums); "int4" (W4A8: the same, but a weight is a nibble times its group's
multiplier, of -15..16, for every 32 weights of an output), "int4-g64" and "int4-g128" (groups of 64 and 128: 4% and 6%
fewer bytes, more error). With int8 and int4 the KV cache and the embedding tables are bf16. On CPUs with bf16 dot
products or tiles attention rounds queries and the softmax's weights to bf16 if the cache is bf16. Statistics, softmax,
accumulation and the residual stream are float32. A row's bits do not depend on the batch, the chunking or the number of
threads; they do depend on the instruction set, which ``ENGINE_ISA`` chooses in place of the best one.

With ``screen_head`` rows of which the token alone is wanted are drawn by an int8 copy of the head and those outputs of
the head itself that could be drawn (``csrc/screen.hpp``): for few sequences fewer bytes, for many more products.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from engine.backends.base import Backend, Batch, Capacity, SamplingBatch, Sparse, StepOutput
from engine.backends.checks import check_choice, check_no_strict_jit, free_memory
from engine.checkpoints.canonical import check_canonical
from engine.config import ModelConfig
from engine.machine import usable_cpus
from engine.messages import UndrawableRow

ISA_VARIABLE = "ENGINE_ISA"
OMP_PAUSE_SOFT = 1  # of OpenMP's omp_pause_resource_t
_STORAGE = {  # the codes of Storage in csrc/kernels.hpp
    "float32": 0,
    "bfloat16": 1,
    "int8": 2,
    "int4": 3,
    "int4-g64": 4,
    "int4-g128": 5,
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # of Dtype in csrc/packing.hpp


def load_extension() -> ModuleType:
    """The C++ module.

    Raises:
        ValueError: it was not built, with how to build it.
    """
    try:
        from engine.backends import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"the native backend's C++ extension cannot be loaded ({error}); with a C++17 compiler and pybind11 "
            "installed, build it by `python setup.py build_ext --inplace` or `pip install .`"
        ) from error
    module: ModuleType = _native
    return module


def best_dtype() -> str:
    """What dtype="auto" means: bfloat16 where this CPU multiplies it in hardware, else float32."""
    return "bfloat16" if dict(load_extension().isas()).get("avx512_bf16", False) else "float32"


def chosen_isa() -> str:
    """The instruction set that runs here: ``ENGINE_ISA``, or the best one.

    Raises:
        ValueError: ``ENGINE_ISA`` names one that this build or this CPU does not have.
    """
    name: str = load_extension().choose_isa(os.environ.get(ISA_VARIABLE, ""))
    return name


def _openmp_pause() -> Callable[[int], int] | None:
    """OpenMP's ``omp_pause_resource_all`` as this process has it, or None."""
    try:
        pause: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # no OpenMP, one before 5.0, or a system without global symbols
        return None
    return pause


@dataclass(frozen=True, slots=True)
class _Finished:
    """A step that ran."""

    output: StepOutput
    error: UndrawableRow | None


class NativeBackend(Backend):
    """See ``Backend``. Threads spin for about 2 ms after a step before they sleep.

    PyTorch's threads do so for longer after one of its operations, on the cores that a step needs. A step therefore
    ends those of the thread that calls it, where there are too few cores for both; PyTorch starts them again.

    Raises:
        ValueError: besides what ``Backend`` says, the extension is not built, or ``ENGINE_ISA`` names an instruction
            set that this build or this CPU does not have.
    """

    name: ClassVar[str] = "native"
    dtypes: ClassVar[tuple[str, ...]] = tuple(_STORAGE)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    batch_invariant: ClassVar[bool] = True

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: str,
        device: str,
        block_size: int,
        threads: int | None = None,
        memory_fraction: float = 0.9,
        strict_jit: bool = False,
        screen_head: bool = False,
    ) -> None:
        check_choice("dtype", dtype, self.dtypes, self.name)
        check_no_strict_jit(strict_jit, self.name)
        check_choice("device", device, self.devices, self.name)
        if screen_head and dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"screen_head=True needs dtype float32 or bfloat16: with {dtype} the head itself is quantised"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._config = model
        self._memory_fraction = memory_fraction
        cpus = usable_cpus()
        self._model = load_extension().Model(
            asdict(model), _STORAGE[dtype], block_size, threads or cpus, os.environ.get(ISA_VARIABLE, ""), screen_head
        )
        self._pause = _openmp_pause()
        self._process = os.getpid()  # a child of it has none of PyTorch's threads, and would wait for them
        self._room = max(0, cpus - self.threads)  # threads of PyTorch's that can spin and be in nobody's way
        self.update_weights(weights)

    @property
    def coded(self) -> bool:
        """Whether all matrices are bfloat16 in twelve bits a weight: the same values, and a quarter less to read.

        One with weights of very many magnitudes takes sixteen bits, and from an ``update_weights`` that brings such on
        it does so for good: ``capacity`` grows then.
        """
        coded: bool = self._model.coded
        return coded

    @property
    def isa(self) -> str:
        """The instruction set that runs."""
        name: str = self._model.isa
        return name

    @property
    def threads(self) -> int:
        """How many threads a step runs on."""
        count: int = self._model.threads
        return count

    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        check_canonical(self._config, weights)
        tensors = [_readable(weights[name]) for name in self._model.tensor_names]
        self._model.update([_description(tensor) for tensor in tensors])

    def capacity(self) -> Capacity:
        free = free_memory(torch.device("cpu"), self._memory_fraction)
        return Capacity(self._model.weight_bytes, self._model.block_bytes, free)

    def allocate(self, num_blocks: int) -> None:
        self._model.allocate(num_blocks)

    def submit(self, batch: Batch) -> _Finished:
        arrays = (
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.query_starts,
            batch.context_lens,
            np.ascontiguousarray(batch.block_tables),
            batch.logits_rows,
            batch.previous_rows,
            batch.block_copies,
            batch.ending_ids,
        )
        options = None if batch.sampling is None else (batch.draw_rows, *_options(batch.sampling))
        if self._pause is not None and torch.get_num_threads() - 1 > self._room and os.getpid() == self._process:
            self._pause(OMP_PAUSE_SOFT)
        logits, token_ids, logprobs, ranks, top_ids, top_logprobs, bad = self._model.run(
            arrays, options, batch.num_steps
        )
        error = None
        if bad >= 0:
            why = f"no token can be drawn from the logits of drawn row {bad}: NaN, +inf, or every token excluded"
            error = UndrawableRow(why, bad)
        rows = None if logits is None else torch.from_numpy(logits)
        return _Finished(StepOutput(token_ids, logprobs, ranks, top_ids, top_logprobs, rows), error)

    def collect(self, handle: _Finished) -> StepOutput:
        if handle.error is not None:
            raise handle.error
        return handle.output


def _options(sampling: SamplingBatch) -> tuple[Any, ...]:
    return (
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        sampling.positions,
        sampling.sample_index,
        sampling.num_logprobs,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        _parts(sampling.output_counts),
        _parts(sampling.logit_bias),
        sampling.allowed,
        sampling.token_only,
    )


def _parts(sparse: Sparse | None) -> tuple[Any, Any, Any] | None:
    return None if sparse is None else (sparse.starts, sparse.ids, sparse.values)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in main memory in one of the dtypes that C++ reads; itself where it is so already."""
    tensor = tensor.detach()
    return tensor.to("cpu", tensor.dtype if tensor.dtype in _DTYPES else torch.float32)


def _description(tensor: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, dtype code, rows, columns, row stride, column stride; a vector is one row."""
    matrix = tensor if tensor.dim() == 2 else tensor[None]
    rows, columns = matrix.shape
    return tensor.data_ptr(), _DTYPES[tensor.dtype], rows, columns, matrix.stride(0), matrix.stride(1)
