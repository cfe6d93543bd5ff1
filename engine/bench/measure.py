"""The measurements: the naive loop, the engine at several batch sizes, the machine's read bandwidth."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from engine.llm import LLM, STEPS_AT_A_TIME
from engine.messages import SamplingParams
from engine.reference import generate_greedy


@dataclass(frozen=True, slots=True)
class LoopResult:
    """Greedy generation after one prompt. ``token_ids`` are the generated ones."""

    tokens_per_second: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The engine on ``batch`` prompts at once. Times in seconds; medians over the repeats.

    Args:
        prefill_tokens_per_second: prompt tokens, all sequences together.
        decode_tokens_per_second: generated tokens, all sequences together, as ``LLM.generate`` takes them.
        ttft: time to the first token of a request, all submitted at once.
        tpot: time between two tokens of a request, as ``LLM.stream`` takes them, median.
        tpot_p90: the same, 90th percentile.
        bytes_per_step: what a decode step cannot help reading; over the read bandwidth, the least time it can take.
    """

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft: float
    tpot: float
    tpot_p90: float
    bytes_per_step: int

    def ceiling(self, bandwidth: float) -> float:
        """Tokens a second that the bytes of a step allow at ``bandwidth`` bytes a second."""
        return self.batch * bandwidth / self.bytes_per_step

    def mbu(self, bandwidth: float) -> float:
        """Share of the ceiling that was reached: model bandwidth utilisation."""
        return self.decode_tokens_per_second / self.ceiling(bandwidth)


def measure_loop(
    model: Callable[[torch.Tensor], torch.Tensor], prompt: Sequence[int], steps: int, device: torch.device
) -> LoopResult:
    """The course page's loop, greedy, on any module or function from ids ``[1, T]`` to logits ``[1, T, V]``."""
    context = torch.tensor([list(prompt)], device=device)
    with torch.no_grad():
        model(context[:, -8:])  # what a first call sets up is not the loop's; of the prompt itself it shows nothing
        started = time.perf_counter()
        tokens = generate_greedy(model, context, steps)[0, len(prompt) :].tolist()  # which waits for a GPU
        seconds = time.perf_counter() - started
    return LoopResult(steps / seconds, tuple(tokens))


def measure_engine_loop(llm: LLM, prompt: Sequence[int], steps: int) -> LoopResult:
    """The same generation by ``LLM.generate``."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    llm.generate([list(prompt[:8])], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    started = time.perf_counter()
    output = llm.generate([list(prompt)], params, use_tqdm=False)[0]
    return LoopResult(steps / (time.perf_counter() - started), output.outputs[0].token_ids)


def measure_batch(llm: LLM, prompts: Sequence[Sequence[int]], steps: int, repeats: int) -> BatchResult:
    """Run all prompts together, ``repeats`` times after a warm-up.

    Args:
        llm: an idle engine.
        prompts: token ids, all of one length.
        steps: tokens to generate for each, at least 3: the first half one by one, for the times between them, the
            others as ``LLM.generate`` does, for the throughput.
        repeats: the runs that count.
    """
    _timed_run(llm, prompts, 3)
    runs = [_timed_run(llm, prompts, steps) for _ in range(repeats)]
    gaps = sorted(gap for run in runs for gap in run.gaps)
    mean_context = len(prompts[0]) + 3 * steps // 4  # where the throughput is measured
    return BatchResult(
        batch=len(prompts),
        prefill_tokens_per_second=len(prompts) * len(prompts[0]) / statistics.median(max(run.first) for run in runs),
        decode_tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        ttft=statistics.median(first for run in runs for first in run.first),
        tpot=statistics.median(gaps),
        tpot_p90=gaps[int(0.9 * (len(gaps) - 1))],
        bytes_per_step=step_bytes(
            llm.model_config,
            llm.dtype,
            len(prompts),
            mean_context,
            screen_head=llm.engine_config.screen_head,
            coded=getattr(llm.backend, "coded", False),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds to the first token of each prompt and between two of its tokens; tokens a second if none is awaited."""

    first: list[float]
    gaps: list[float]
    tokens_per_second: float


def _timed_run(llm: LLM, prompts: Sequence[Sequence[int]], steps: int) -> _Run:
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    requests = [llm.submit(list(prompt), params) for prompt in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    started = time.perf_counter()
    while any(request.num_output_tokens < steps // 2 + 1 for request in requests):
        llm.step()
        now = time.perf_counter() - started
        for request, seen in zip(requests, times, strict=True):
            if request.num_output_tokens > len(seen):
                seen.append(now)
    before = sum(request.num_output_tokens for request in requests)
    half = time.perf_counter()
    over = all if any(request.finished for request in requests) else any  # while all of them run, if they do
    while not over(request.finished for request in requests):
        llm.step(STEPS_AT_A_TIME)
    seconds = time.perf_counter() - half
    count = sum(request.num_output_tokens for request in requests) - before
    while not all(request.finished for request in requests):
        llm.step()
    return _Run(
        first=[seen[0] for seen in times],
        gaps=[b - a for seen in times for a, b in itertools.pairwise(seen)],
        tokens_per_second=count / seconds,
    )


ITEM_BYTES = {
    "float64": 8.0,
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "int4": 0.5 + 1 / 32,
    "int4-g64": 0.5 + 1 / 64,
    "int4-g128": 0.5 + 1 / 128,
}
"""Bytes a weight; int4 has a multiplier of 8 bits for every 32, 64 or 128."""


CODED_BYTES = 1.5
"""Of a bfloat16 weight in a matrix that the native backend has coded."""


def step_bytes(
    model: ModelConfig, dtype: str, batch: int, context: int, *, screen_head: bool = False, coded: bool = False
) -> int:
    """Bytes that a decode step cannot help reading: every weight but the embeddings' other rows, and K and V.

    With ``screen_head`` the head is read in int8, and of itself only a few outputs; ``coded`` weights take 12 bits.
    """
    item = CODED_BYTES if coded else ITEM_BYTES[dtype]
    saved = (item - ITEM_BYTES["int8"]) * model.vocab_size * model.embed_dim if screen_head else 0
    embeddings = (0 if model.tied_head else model.vocab_size) + model.context_length
    weights = model.num_parameters - embeddings * model.embed_dim
    cached = batch * context * 2 * model.n_layers * model.embed_dim
    kv_item = max(ITEM_BYTES[dtype], 2.0)  # K and V of quantised models are bfloat16
    return int(item * weights - saved + kv_item * cached)


def read_bandwidth(device: str, seconds: float = 1.0) -> float:
    """Bytes a second that PyTorch's threads stream from memory: the best of several readers.

    The buffer, 256 MiB, is larger than any cache that this is likely to meet; on a GPU, where starting and waiting
    take longer than reading that much, it is 2 GiB.
    """
    data = torch.ones(1 << (29 if device.startswith("cuda") else 26), device=device)
    matrix, vector = data.view(-1, 1024), torch.ones(1024, device=device)
    readers: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: data.sum(),
        lambda: torch.dot(data, data),
        lambda: torch.mv(matrix, vector),
    )
    best = 0.0
    for reader in readers:
        reader()
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            started = time.perf_counter()
            reader().reshape(-1)[0].item()  # waits for a GPU
            best = max(best, data.numel() * data.element_size() / (time.perf_counter() - started))
    return best
