"""This engine's native backend behind its public door."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.backends.native_backend import chosen_isa
from engine.llm import LLM, STEPS_AT_A_TIME
from engine.messages import SamplingParams


def versions() -> dict[str, str]:
    return {"torch": version("torch")}


class Engine:
    """``LLM`` on the checkpoint; every prompt is run whole in one step."""

    def __init__(
        self, checkpoint: Path, precision: str, threads: int, max_seqs: int, screen_head: bool = False
    ) -> None:
        self.llm = LLM(
            checkpoint,
            backend="native",
            dtype=precision,
            threads=threads,
            max_num_seqs=max_seqs,
            screen_head=screen_head,
        )
        capacity = self.llm.backend.capacity()
        blocks = max_seqs * -(-self.llm.max_model_len // self.llm.engine_config.block_size)
        self.facts = {
            "isa": chosen_isa(),
            "weight_bytes": capacity.weight_bytes,
            "kv_bytes": blocks * capacity.bytes_per_block,
        }

    def generate(
        self, prompts: list[list[int]], tokens: int, temperature: float = 0.0, **sampling: Any
    ) -> tuple[list[list[int]], float, float]:
        params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, **sampling)
        start = time.perf_counter()
        requests = [self.llm.submit(prompt, params) for prompt in prompts]
        while any(request.num_output_tokens == 0 for request in requests):
            self.llm.step()
        first = time.perf_counter() - start
        while not all(request.finished for request in requests):
            self.llm.step(STEPS_AT_A_TIME)  # as LLM.generate
        seconds = time.perf_counter() - start
        return [list(request.output().outputs[0].token_ids) for request in requests], first, seconds


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(checkpoint, precision, threads, max_seqs)
