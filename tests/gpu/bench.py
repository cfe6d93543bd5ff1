"""How fast is it: operators beside the bandwidth of a copy; decode steps eager, as graphs, dependent launches, int8."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from backend_driver import Driver, greedy, tokens

from engine.backends.triton_weights import STORAGE
from engine.config import ModelConfig
from gpu.machine import GPT2, SMALL, Case, Machine

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
PROMPT = 64  # tokens before the first step that is timed
WARM, TIMED = 8, 40  # steps
BATCHES = (1, 8, 32, 64, 256)
MODES = {"eager": {"graphs": False}, "graphs": {"graphs": True}}
DEPENDENT = {"graphs, dependent launch": {"graphs": True, "dependent_launch": True}}  # for the fewest rows alone
QUANTISED = ("int8", "int4")  # timed at the first and the last batch


def cases(machine: Machine) -> Iterator[Case]:
    """The copy, every operator of ``benchmarks/test_kernels.py``, then GPT-2 small to XL at batch 1 to 256.

    The largest model last with int8 and int4 weights.
    """
    import kernel_timing
    import test_kernels

    if machine.on_gpu:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        place = kernel_timing.Machine("cuda", False, kernel_timing.copy_bandwidth(), cache)
    else:
        place = kernel_timing.Machine("cpu", True, 1e9, 0)
    yield "copy", lambda: {"GB/s": place.copy / 1e9}
    for name, function in vars(test_kernels).items():
        if name.startswith("test_"):
            for given in parameters(function):
                label = ", ".join([name.removeprefix("test_"), *(f"{key} {value}" for key, value in given.items())])
                yield f"operator {label}", lambda f=function, g=given: _operator(test_kernels, place, f, g)
    models, batches = ({"small": SMALL}, (1, 2)) if machine.tiny else (GPT2, BATCHES)
    dtype = machine.dtypes[0]
    for name, model in models.items():
        listed = [(mode, options, batch) for mode, options in MODES.items() for batch in batches]
        if machine.has_dependent_launch:
            listed += [(mode, options, 1) for mode, options in DEPENDENT.items()]
        for mode, options, batch in listed:
            yield (
                f"{name} batch {batch} {mode}",
                lambda m=model, b=batch, o=options: steps(machine, m, b, o, dtype, place.copy),
            )
    for quantised, batch in product(QUANTISED, (batches[0], batches[-1])):
        yield (
            f"{name} batch {batch} graphs, {quantised}",
            lambda b=batch, d=quantised: steps(machine, model, b, MODES["graphs"], d, place.copy),
        )


def parameters(function: Any) -> list[dict[str, Any]]:
    """The arguments of a test that ``pytest.mark.parametrize`` gives, name -> value."""
    marks = [mark.args for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return [dict(zip([name for name, _ in marks], chosen, strict=True)) for chosen in product(*(v for _, v in marks))]


class Stopwatch:
    """What ``benchmarks/test_kernels.py`` asks of pytest-benchmark's fixture: rounds of a call, and their median."""

    def __init__(self) -> None:
        self.name = ""
        self.stats: Any = None
        self.extra_info: dict[str, float] = {}

    def pedantic(self, run: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        """Run and time."""
        taken = []
        for _ in range(warmup_rounds + rounds):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=statistics.median(taken[warmup_rounds:])))


def _operator(module: Any, place: Any, function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """One operator's launch, by its benchmark."""
    watch = Stopwatch()
    rest = {name: value for name, value in given.items() if name != "rows"}
    torch.manual_seed(0)
    function(module.Bench(place, watch, given["rows"]), **rest)
    return watch.extra_info


def steps(
    machine: Machine, model: ModelConfig, batch: int, options: dict[str, Any], dtype: str, copy: float
) -> dict[str, Any]:
    """A decode step of ``batch`` sequences: seconds, and counted bytes over them beside what a copy reaches."""
    from kernels.launches import ModelShape, step_bytes, step_launches

    driver = model_driver(machine, model, dtype, options)
    seconds = decode_seconds(machine, driver, model, batch)
    shape = ModelShape(
        model.vocab_size, model.context_length, model.embed_dim, model.n_heads, model.n_layers, model.hidden_dim
    )
    context = PROMPT + WARM + TIMED // 2
    moved = step_bytes(step_launches(shape, [(context - 1, 1)] * batch, *STORAGE[dtype], fused=True))
    rate = moved / seconds
    return {
        "us a step": seconds * 1e6, "tokens/s": batch / seconds, "GB/s": rate / 1e9, "share of copy": rate / copy,
    }  # fmt: skip


def model_driver(machine: Machine, model: ModelConfig, dtype: str, options: dict[str, Any], adapter: Any = None) -> Any:
    """A backend with room for the largest batch, kept for the cases of the same model and options."""
    key = model, dtype, tuple(options.items()), adapter
    batch, blocks = (2, 8) if machine.tiny else (max(BATCHES), -(-(PROMPT + WARM + TIMED + 1) // 16))

    def make() -> Driver:
        return machine.with_weights(machine.weights(model), model, dtype, batch * blocks, adapter, **options)

    return machine.kept(key, make)


def decode_seconds(machine: Machine, driver: Driver, model: ModelConfig, batch: int) -> float:
    """Seconds of a decode step whose tokens stay on the device, two steps in flight: the median step of ``TIMED``.

    Batches are built beforehand: what is timed is the backend, not the scheduler.
    """
    warm, timed = (1, 2) if machine.tiny else (WARM, TIMED)
    driver.release()
    sequences = [driver.sequence(PROMPT + warm + timed + 1) for _ in range(batch)]
    prompt = 5 if machine.tiny else PROMPT
    for first in range(0, batch, 32):
        part = sequences[first : first + 32]
        driver.run([(s, tokens(prompt, i, model.vocab_size)) for i, s in enumerate(part)], greedy(len(part)))
    driver.run([(s, [1]) for s in sequences], greedy(batch))
    rows = np.arange(batch, dtype=np.int32)
    batches = [
        replace(driver.batch([(s, [1]) for s in sequences], greedy(batch)), previous_rows=rows)
        for _ in range(warm + timed)
    ]
    ends = list(_pipelined(driver, batches))
    machine.wait()
    return statistics.median(after - before for before, after in pairwise(ends[warm - 1 :]))


def _pipelined(driver: Driver, batches: Sequence[Any]) -> Iterator[float]:
    """When each step was collected; the next is submitted before."""
    handle = driver.backend.submit(batches[0])
    for batch in batches[1:]:
        following = driver.backend.submit(batch)
        driver.backend.collect(handle)
        yield time.perf_counter()
        handle = following
    driver.backend.collect(handle)
    yield time.perf_counter()
