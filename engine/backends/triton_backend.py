"""The Triton backends: ``triton`` on a GPU, and ``triton-interpret``, the same kernels on a CPU, to prove and to read.

A row's bits are the same in any batch and any chunking. The residual stream, statistics, softmax, accumulation and
logits are in float32 whatever the storage type.

"int8" (W8A16: 8-bit weights of linears and head with a scale per output) and "int4" (W4A16: 4 bits, a scale for every
64 weights of an output; "int4-g64" is another name) multiply in bfloat16, in which everything else is stored.
"""

import itertools
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Backend, Batch, Capacity, StepOutput
from engine.backends.checks import (
    check_batch,
    check_choice,
    check_no_screen_head,
    check_no_strict_jit,
    check_no_threads,
    free_memory,
)
from engine.backends.later_steps import later_steps
from engine.config import ModelConfig
from engine.messages import UndrawableRow

if TYPE_CHECKING:
    from engine.backends.triton_step import StepTensors

MAX_WIDTH, MAX_HEAD_DIM = 8192, 256
MOST_STEPS = 8  # that ``submit`` queues of a batch of several: what ends in the first goes on in vain to the last
_log = logging.getLogger("engine.triton")


@dataclass(frozen=True, slots=True)
class Handle:
    """Submitted steps, on their way to the host: one, or one and those that follow it."""

    steps: "list[StepTensors]"


class TritonBackend(Backend):
    """See ``Backend``. On NVIDIA and AMD GPUs; a step is queued by ``submit``, and waited for by ``collect``
    if it draws.

    Args:
        graphs: whether decode steps are captured and replayed (``triton_graphs``).
        dependent_launch: whether, in steps of at most 4 tokens, a kernel fetches weights while the one before it ends
            (``kernels/dependent.py``); for NVIDIA GPUs of compute capability 9.0 and later.
    """

    name: ClassVar[str] = "triton"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32", "int8", "int4", "int4-g64")
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
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
        graphs: bool = True,
        strict_jit: bool = False,
        screen_head: bool = False,
        dependent_launch: bool = False,
    ) -> None:
        check_choice("dtype", dtype, self.dtypes, self.name)
        if (reason := self.refuses(model)) is not None:
            raise ValueError(reason)
        check_no_screen_head(screen_head, self.name)
        check_no_threads(threads, self.name)
        self._prepare(strict_jit)
        check_choice("device", device.partition(":")[0], self.devices, self.name)
        if dependent_launch and not self._has_dependent_launch(torch.device(device)):
            raise ValueError(
                f"dependent_launch needs an NVIDIA GPU of compute capability 9.0 or later, which {device} is not"
            )
        from engine.backends import triton_jit, triton_step, triton_weights

        self._model = model
        self._device = torch.device(device)
        self._dtype, self._storage = dtype, triton_weights.STORAGE[dtype][0]
        self._block_size = block_size
        self._memory_fraction = memory_fraction
        self._dependent_launch = dependent_launch
        packed = triton_weights.pack_model(model, weights, dtype, self._device)
        self._step = triton_step.TritonStep(model, packed, self._storage, block_size, graphs, dependent_launch)
        self.jit = triton_jit.JitWatch(strict_jit)

    @classmethod
    def refuses(cls, model: ModelConfig) -> str | None:
        """Why the backend does not run this model, or None if it does."""
        if model.embed_dim <= MAX_WIDTH and model.head_dim <= MAX_HEAD_DIM:
            return None
        return (
            f"the {cls.name} backend accepts embed_dim up to {MAX_WIDTH} and head_dim up to {MAX_HEAD_DIM}, "
            f"got {model.embed_dim} and {model.head_dim}"
        )

    def _prepare(self, strict_jit: bool) -> None:
        """Settle this process's Triton mode, or say why it cannot be."""
        if not torch.cuda.is_available():
            raise ValueError(
                "the triton backend needs a GPU and PyTorch sees none; use backend 'torch' on this machine, or "
                "'triton-interpret' to run the same kernels, slowly, on the CPU"
            )
        _require_triton(self.name)
        from kernels import interpreter

        if interpreter.interpreting():
            raise ValueError(
                "TRITON_INTERPRET was set when triton was imported in this process, so kernels would be interpreted; "
                "unset it and start again, or ask for 'triton-interpret'"
            )

    @staticmethod
    def _has_dependent_launch(device: torch.device) -> bool:
        cuda = device.type == "cuda" and torch.version.hip is None
        return cuda and torch.cuda.get_device_capability(device) >= (9, 0)

    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        from engine.backends import triton_weights

        self._step.set_weights(triton_weights.pack_model(self._model, weights, self._dtype, self._device))

    def capacity(self) -> Capacity:
        from engine.backends import triton_weights

        item = self._storage.itemsize
        per_block = 2 * self._model.n_layers * self._block_size * self._model.embed_dim * item
        free = free_memory(self._device, self._memory_fraction)
        return Capacity(triton_weights.packed_bytes(self._step.packed), per_block, free)

    def allocate(self, num_blocks: int) -> None:
        self._step.allocate(num_blocks)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile what steps will ask for; what is compiled after that, ``jit`` counts, logs or refuses."""
        from engine.backends import triton_compile, triton_jit

        if self.jit.warm:
            return
        _log.info("warming up: the first start of a model on a machine compiles its kernels; Triton keeps them")
        started = time.monotonic()
        model, device = self._model, self._device
        triton_compile.compile_ahead(model, self._dtype, self._block_size, self._dependent_launch, device)
        triton_jit.warm_up(self.submit, self._model)
        self.jit.warm = True
        _log.info("warm after %.1f s", time.monotonic() - started)

    def submit(self, batch: Batch) -> Handle:
        num_blocks = self._step.cache.shape[2] if self._step.cache.dim() == 6 else 0
        check_batch(batch, self._model, num_blocks, self._block_size, self._step.num_drawn)
        on_gpu = self._device.type == "cuda"
        with torch.inference_mode(), self.jit, torch.cuda.device(self._device) if on_gpu else nullcontext():
            steps = [self._queue(batch)]
            count = min(batch.num_steps, MOST_STEPS) - 1
            steps += [self._queue(later) for later in later_steps(batch, self._block_size, count)]
        return Handle(steps)

    def _queue(self, batch: Batch) -> "StepTensors":
        """One step and the copy of what it draws to the host."""
        tensors = self._step.run(batch)
        if tensors.packed is not None:
            tensors.slot.download(tensors.packed)
        tensors.slot.record()
        return tensors

    def collect(self, handle: Handle) -> StepOutput:
        drawn = [self._downloaded(tensors) for tensors in handle.steps]
        logits = handle.steps[0].logits
        if not drawn[0]:
            integers, floats = np.empty((0,), np.int32), np.empty((0,), np.float32)
            return StepOutput(integers, floats, integers, integers[:, None], floats[:, None], logits)
        _check_status(drawn[0]["status"])
        # A later step that cannot be drawn from counts as not run: it comes again, as a first one.
        good = list(itertools.takewhile(lambda step: not step["status"].any(), drawn))

        def rows(name: str) -> Any:
            return np.concatenate([step[name] for step in good])

        return StepOutput(
            rows("tokens"), rows("logprobs"), rows("ranks"), rows("top_ids"), rows("top_logprobs"), logits
        )

    def _downloaded(self, tensors: "StepTensors") -> dict[str, npt.NDArray[Any]]:
        """What a step drew, once it is over; nothing where it drew nothing."""
        host = {}
        if tensors.drawn is not None:
            tensors.slot.wait()
            host = tensors.slot.downloaded(tensors.drawn, tensors.num_drawn)
        self._step.slots.give(tensors.slot)  # without draws there is nothing to wait for: logits stay on the device
        return host


class TritonInterpretBackend(TritonBackend):
    """The same kernels through Triton's corrected interpreter (``kernels/interpreter.py``): on a CPU, slowly."""

    name: ClassVar[str] = "triton-interpret"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16", "int8", "int4", "int4-g64")
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def _prepare(self, strict_jit: bool) -> None:
        check_no_strict_jit(strict_jit, self.name)
        _require_triton(self.name)
        from kernels import interpreter

        interpreter.install()

    def _warm_up(self) -> None:
        """Nothing is compiled."""


def _require_triton(name: str) -> None:
    from importlib.util import find_spec

    if "triton" not in sys.modules and find_spec("triton") is None:
        raise ValueError(f"the {name} backend needs the package triton (Linux only); use backend 'torch' instead")


def _check_status(status: npt.NDArray[np.int32]) -> None:
    """Refuse a step with a row from which no token could be drawn."""
    for row in np.flatnonzero(status):
        why = "hold NaN or +inf" if status[row] == 1 else "exclude every token"
        raise UndrawableRow(f"the logits of drawn row {row} {why}: no token can be drawn from them", int(row))
