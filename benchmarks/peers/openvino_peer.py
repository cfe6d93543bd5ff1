"""OpenVINO GenAI on a model that optimum-intel exported, its weights in float32 or as the exporter quantises them."""

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

_FORMATS = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8", "int4": "int4"}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("openvino-genai", "optimum-intel")}


def has_bf16() -> bool:
    """Whether OpenVINO runs bfloat16 on this CPU."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def refusal(precision: str) -> str | None:
    return "OpenVINO has no bfloat16 on this CPU" if precision == "bfloat16" and not has_bf16() else None


def convert(checkpoint: Path, folder: Path, precision: str) -> None:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "text-generation-with-past", "--weight-format", _FORMATS[precision], str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)


class Engine:
    """``ContinuousBatchingPipeline``, step by step, to see when the first token is there; all are read at the end."""

    def __init__(self, folder: Path, precision: str, threads: int, max_seqs: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = max_seqs
        scheduler.enable_prefix_caching = False
        hint = "bf16" if has_bf16() and precision != "float32" else "f32"
        properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self.facts = {"INFERENCE_PRECISION_HINT": hint}
        self.count = 0

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self.pipeline.add_request(self.count, ids, config))
            self.count += 1
        answers: list[list[int]] = [[] for _ in prompts]
        first = 0.0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if not first and all(handle.can_read() for handle in handles):
                first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        for handle, answer in zip(handles, answers, strict=True):
            while handle.can_read():
                answer += next(iter(handle.read().values())).generated_ids
        return answers, first, seconds


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(folder, precision, threads, max_seqs)
