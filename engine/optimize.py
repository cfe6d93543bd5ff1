"""``optimize``: one line that makes a live GPT module fast, without changing what it answers.

The object returned shares everything with the module; only its ``forward`` is another. It keeps the keys and values
and the logits of the context it saw last, so that a loop which feeds the whole context again for every token, as the
course page's does, pays for the new token only.
"""

import functools
import inspect
import threading
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine.backends.base import Backend
from engine.backends.registry import choose
from engine.checkpoints.live import canonical_weights, recognise
from engine.config import EngineConfig
from engine.execution.batch_builder import BatchBuilder
from engine.execution.runner import Runner
from engine.live.logits import LogitsBuffer, logits_tensor
from engine.live.self_check import check_logits, check_parts, long_probe_ids, plain_logits, probe_ids
from engine.live.structure import LiveStructure
from engine.live.weights import WeightWatch
from engine.logs import get_logger
from engine.messages import SequencePlan, StepPlan

ModuleT = TypeVar("ModuleT", bound=nn.Module)

BLOCK_SIZE = 16
STEP_TOKENS = 4096  # a longer prefill runs in several steps
STEP_SEQUENCES = 256

_requires_grad = attrgetter("requires_grad")


def optimize(module: ModuleT, *, backend: str = "auto", threads: int | None = None) -> ModuleT:
    """Return ``module`` with a fast ``forward``: an object of a class below the module's own that shares its state.

    Parameters, attributes and methods are the module's; methods that return ``self`` return the fast object. The
    logits have the module's dtype, and autocast is off inside. They carry no gradient: a backward through them raises.
    In training mode the call is refused if a dropout is above 0: an ``nn.Dropout``, or a number from 0 to 1 that a part
    has as an attribute with "drop" in its name.

    Changes are noticed at the next call. New weights are taken over. Of edits through ``.data`` or NumPy those are seen
    that touch one of some 32 elements of a tensor, equally far apart: of a whole tensor, or of a 30th of it in one
    piece, but rarely of one element, row or column; call ``refresh()`` after those. After any other change (a constant
    such as eps, an activation, a hook, a forward, another submodule or buffer) the module is read anew and checked as
    here, and may be refused; edits inside a buffer, a list or an object of another kind are not seen.

    Logits that a caller edited in place are not given out again, with one exception: edits through ``.data`` or NumPy
    of a few elements of a position that was not the last of the latest call, and on a GPU any through ``.data``.

    Args:
        module: a live module of the course's or the book's shape.
        backend: "auto", or a backend's name.
        threads: CPU threads of the native or torch backend; None: as many as this process may use.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: the module's structure is not one that is supported, a part of it computes something else than
            its structure says, its weights are not finite, or the backend does not have the module's dtype or device.
            Nothing is changed then.
    """
    cls = type(module)
    if not isinstance(module, nn.Module):
        got = f"the class {module.__qualname__}" if isinstance(module, type) else cls.__qualname__
        raise TypeError(f"engine.optimize takes a live GPT module, an instance of a torch.nn.Module, got {got}")
    if "forward" in vars(module):
        raise ValueError(f"{cls.__qualname__} has a forward set on the object, which hides its class's own; delete it")
    if hasattr(cls, "_accelerator"):
        raise ValueError(f"{cls.__qualname__} was made by engine.optimize already; pass the module it was made from")
    accelerator = Accelerator(module, backend, threads)
    get_logger().info("%s", accelerator.description)
    fast: ModuleT = object.__new__(_subclass(cls, accelerator))
    object.__setattr__(fast, "__dict__", module.__dict__)
    return fast


def _subclass(cls: type[ModuleT], accelerator: "Accelerator") -> type[ModuleT]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return accelerator.forward(*args, **kwargs)

    def refresh(self: nn.Module) -> None:
        """Read all weights again; needed only after edits of elements, rows or columns by ``.data`` or NumPy."""
        accelerator.refresh()

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        """Copies and pickles are of the plain module: this class and its cache live in this process only."""
        reduced = accelerator.module.__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return object.__new__, (cls,), *reduced[2:]

    body: dict[str, Any] = {
        "forward": forward,
        "refresh": refresh,
        "__reduce_ex__": reduce_ex,
        "_accelerator": accelerator,
    }
    body |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    made: type[ModuleT] = types.new_class(
        f"Optimized{cls.__name__}", (cls,), exec_body=lambda space: space.update(body)
    )
    return made


class Accelerator:
    """What stands behind an optimized module: a backend with the module's weights, and the context it saw last."""

    def __init__(self, module: nn.Module, backend: str, threads: int | None) -> None:
        EngineConfig(backend=backend, threads=threads)  # its checks
        self.module = module
        self.description = ""
        self._backend_name, self._threads = backend, threads
        self._lock = threading.RLock()
        parameters = list(inspect.signature(type(module).forward).parameters.values())
        self._input_name = parameters[1].name
        self._bind()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids ``[B, T]`` to logits ``[B, T, V]``, as the module's own ``forward``."""
        in_idx = self._argument(args, kwargs)
        with self._lock:
            self._check_mode()
            self._follow_signs()
            self._check_shape(in_idx)
            ids, differs = self._watch.compare(in_idx)
            if differs:
                self._update()
            return self._logits_of(ids.numpy())

    def refresh(self) -> None:
        """Take all weights anew, whatever the signs say."""
        with self._lock:
            self._follow_signs(all_anew=True)

    def _bind(self) -> None:
        """Recognise the module as it is now, make a backend for it, and check the two against each other."""
        self._passed = False  # until the self-check is through, so that a module it refuses is refused again
        recognised = recognise(self.module)
        self._model = recognised.config
        weights = canonical_weights(recognised)
        head = weights["head"]
        self._dtype, self._device = head.dtype, head.device
        dtype, device = str(self._dtype).removeprefix("torch."), str(self._device)
        choice = choose(self._backend_name, dtype, device, self._model)
        self._backend: Backend = choice.backend(
            self._model,
            weights,
            dtype=choice.dtype,
            device=choice.device,
            block_size=BLOCK_SIZE,
            threads=self._threads,
        )
        self._blocks_each = -(-self._model.context_length // BLOCK_SIZE)
        builder = BatchBuilder(STEP_TOKENS, STEP_SEQUENCES, self._blocks_each, BLOCK_SIZE, self._model.vocab_size)
        self._runner = Runner(self._backend, builder)
        self._num_rows = 0  # sequences that the KV cache has room for
        self._buffer: LogitsBuffer | None = None
        self._structure = LiveStructure(self.module, recognised.sources)
        self._watch_weights()
        difference = self._self_check(choice.dtype, recognised.description)
        self._structure.settle()
        self._passed = True
        self.description = (
            f"{recognised.description}; {choice.backend.name} backend, {choice.dtype} on {choice.device}; "
            f"self-check passed, largest logit difference {difference:.1e}"
        )

    def _argument(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        unknown = sorted(set(kwargs) - {self._input_name})
        if unknown:
            raise TypeError(f"an optimized forward takes {self._input_name!r} only, got {', '.join(unknown)}")
        values = (*args, *kwargs.values())
        if len(values) != 1:
            raise TypeError(f"an optimized forward takes one argument, {self._input_name!r}, got {len(values)}")
        if not isinstance(values[0], torch.Tensor):
            raise TypeError(f"{self._input_name} must be a tensor of token ids, got {type(values[0]).__name__}")
        return values[0]

    def _check_mode(self) -> None:
        if (active := self._structure.active_dropout()) is not None:
            path, rate = active
            raise ValueError(
                f"the module is in training mode and {path} has dropout {rate}, which this forward does not do: "
                "call eval() first"
            )

    def _follow_signs(self, all_anew: bool = False) -> None:
        parameters = self._structure.parameters() if self._passed else None
        if parameters is None:
            self._bind()
            return
        self._parameters = parameters
        if all_anew or self._watch.touched(parameters):
            self._update()

    def _check_shape(self, in_idx: torch.Tensor) -> None:
        name, length = self._input_name, self._model.context_length
        if in_idx.dim() != 2 or in_idx.numel() == 0 or in_idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be integer ids [B, T], not empty, got {in_idx.dtype} {list(in_idx.shape)}")
        if in_idx.device != self._device:
            raise ValueError(f"{name} is on {in_idx.device} and the weights are on {self._device}")
        if in_idx.shape[1] > length:
            raise ValueError(f"{name} has {in_idx.shape[1]} tokens and the model's context is {length}")

    def _check_range(self, tokens: list[int]) -> None:
        """Refuse ids that the model does not have; those of positions that are known were asked already."""
        most = self._model.vocab_size - 1
        if tokens and not 0 <= min(tokens) <= max(tokens) <= most:
            bad = next(token for token in tokens if not 0 <= token <= most)
            raise ValueError(f"{self._input_name} has token id {bad}; this model's ids are 0 to {most}")

    def _update(self) -> None:
        recognised = recognise(self.module)
        weights = canonical_weights(recognised)
        head = weights["head"]
        if recognised.config != self._model or head.dtype != self._dtype or head.device != self._device:
            self._bind()
            return
        self._buffer = None
        self._backend.update_weights(weights)
        self._watch_weights()

    def _watch_weights(self) -> None:
        """Remember the weights as they are now."""
        parameters = self._structure.parameters()
        assert parameters is not None, "it was read just now"
        self._parameters = parameters
        self._watch = WeightWatch(parameters)

    def _self_check(self, dtype: str, description: str) -> float:
        """Compare with the module on two probes, one token by token; returns the largest logit difference."""
        check_parts(self.module, self._model)
        differences = []
        for ids, steps in ((probe_ids(self._model), True), (long_probe_ids(self._model), False)):
            wanted = plain_logits(self.module, ids, self._model)
            length = ids.shape[1]
            for end in range(length // 2 + 1 if steps else length, length + 1):
                got = self._logits_of(ids[:, :end].numpy())
            self._buffer = None
            differences.append(check_logits(got.detach(), wanted, dtype, description))
        return max(differences)

    def _logits_of(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """``[B, T]`` to ``[B, T, V]``: what the buffer has, and the rest computed."""
        with torch.inference_mode(False), torch.no_grad(), self._without_autocast():
            rows, length = ids.shape
            if rows > self._num_rows:
                self._allocate(rows)
            buffer = LogitsBuffer.after(self._buffer, ids, self._gradient_source() is not None, self._new_tensor)
            known = buffer.length
            plans = self._plans(ids, known)
            self._buffer = None  # until the new positions are in, nothing is known
            for plan in plans:
                logits = self._runner.logits(plan)
                for part in plan.sequences:
                    count = len(part.token_ids)
                    buffer.write(part.seq_id, part.start, logits[:count])
                    logits = logits[count:]
            buffer.extend_to(ids)
            self._buffer = buffer if buffer.is_bounded else None
        return buffer.view(length)

    def _without_autocast(self) -> AbstractContextManager[object]:
        enabled = torch.is_autocast_enabled(self._device.type)
        return torch.autocast(self._device.type, enabled=False) if enabled else nullcontext()

    def _new_tensor(self, rows: int, length: int) -> torch.Tensor:
        """Room for the logits of ``length`` positions or more; a part of the graph where the module's would be."""
        return logits_tensor(rows, length, self._model, self._dtype, self._device, self._gradient_source())

    def _gradient_source(self) -> torch.Tensor | None:
        return next(filter(_requires_grad, self._parameters), None)

    def _plans(self, ids: npt.NDArray[np.int64], known: int) -> list[StepPlan]:
        """Steps that run positions ``known`` to the end of every row, each within the limits of a step."""
        plans: list[StepPlan] = []
        parts: list[SequencePlan] = []
        budget = STEP_TOKENS
        for row, tokens in enumerate(ids[:, known:].tolist()):
            self._check_range(tokens)
            first = 0
            while first < len(tokens):
                chunk = tokens[first : first + budget]
                first_block = row * self._blocks_each
                table = range(first_block, first_block - (-(known + first + len(chunk)) // BLOCK_SIZE))
                parts.append(SequencePlan(row, chunk, known + first, table, num_logits=len(chunk)))
                first, budget = first + len(chunk), budget - len(chunk)
                if budget == 0 or len(parts) == STEP_SEQUENCES:
                    plans.append(StepPlan(parts))
                    parts, budget = [], STEP_TOKENS
        return [*plans, StepPlan(parts)] if parts else plans

    def _allocate(self, rows: int) -> None:
        """Make room for ``rows`` sequences of the model's context; what the KV cache held is gone."""
        self._buffer, self._num_rows = None, 0
        capacity = self._backend.capacity()
        needed = rows * self._blocks_each * capacity.bytes_per_block
        if needed > capacity.free_bytes:
            raise ValueError(
                f"a KV cache for {rows} rows takes {needed} bytes, and {capacity.free_bytes} are free: take fewer rows"
            )
        self._backend.allocate(rows * self._blocks_each)
        self._num_rows = rows
