"""Hugging Face transformers: GPT-2 with its own cache and greedy loop."""

import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "torch")}


class Clock(StoppingCriteria):
    """Stops nothing, and notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Engine:
    """``model.generate``."""

    def __init__(self, checkpoint: Path, precision: str, threads: int) -> None:
        self.facts: dict[str, str] = {}
        torch.set_num_threads(threads)
        self.model = GPT2LMHeadModel.from_pretrained(checkpoint, dtype=getattr(torch, precision)).eval()

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        clock = Clock()
        start = time.perf_counter()
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        seconds = time.perf_counter() - start
        return out[:, ids.shape[1] :].tolist(), clock.times[0] - start, seconds


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(checkpoint, precision, threads)
