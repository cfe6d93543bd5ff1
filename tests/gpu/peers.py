"""Beside others on the same GPU: PyTorch eager, transformers, and transformers under torch.compile; greedy decoding."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from engine.backends.torch_backend import TorchBackend
from engine.config import ModelConfig
from gpu.bench import PROMPT, decode_seconds, model_driver
from gpu.machine import GPT2, SMALL, Case, Machine

BATCHES = (1, 32, 256)
FEW, MANY = 8, 40  # new tokens of two runs whose difference is timed, so that the prompt is not


def cases(machine: Machine) -> Iterator[Case]:
    """Every engine on GPT-2 small to XL, the compiled one last: it takes longest to start."""
    models = {"small": SMALL} if machine.tiny else GPT2
    batches = (1, 2) if machine.tiny else BATCHES
    for engine in ("ours", "PyTorch eager", "transformers", "transformers, torch.compile"):
        for name, model in models.items():
            for batch in batches:
                yield (
                    f"{engine}, {name} batch {batch}",
                    lambda e=engine, m=model, b=batch: _timed(machine, e, m, b),
                )


def _timed(machine: Machine, engine: str, model: ModelConfig, batch: int) -> dict[str, Any]:
    """Seconds of a decode step, and tokens a second."""
    dtype = machine.adapter.dtypes[0]
    if engine in ("ours", "PyTorch eager"):
        adapter = None if engine == "ours" else TorchBackend
        seconds = decode_seconds(machine, model_driver(machine, model, dtype, {}, adapter), model, batch)
        return {"us a step": seconds * 1e6, "tokens/s": batch / seconds}
    return transformers_seconds(machine, model, dtype, batch, engine.endswith("torch.compile"))


def transformers_seconds(
    machine: Machine, model: ModelConfig, dtype: str, batch: int, compiled: bool
) -> dict[str, Any]:
    """``generate``, with its growing cache, or with a static one and a compiled forward pass."""
    from transformers import GPT2Config, GPT2LMHeadModel, __version__

    def make() -> Any:
        torch.manual_seed(0)
        with torch.device(machine.device):
            made = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=model.vocab_size, n_positions=model.context_length, n_embd=model.embed_dim,
                    n_layer=model.n_layers, n_head=model.n_heads, n_inner=model.hidden_dim, bos_token_id=0,
                    eos_token_id=0,
                )
            )  # fmt: skip
        made = made.to(getattr(torch, dtype)).eval()
        if compiled and not machine.on_gpu:  # on a GPU, generate compiles the forward pass of a static cache itself
            made.forward = torch.compile(made.forward)
        return made

    made = machine.kept((model, dtype, compiled), make)
    few, many = (2, 4) if machine.tiny else (FEW, MANY)
    prompt = torch.randint(0, model.vocab_size, (batch, 5 if machine.tiny else PROMPT), device=machine.device)

    def generate(count: int) -> float:
        machine.wait()
        start = time.perf_counter()
        out = made.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation="static" if compiled else None,
        )  # fmt: skip
        assert out.shape[1] == prompt.shape[1] + count
        machine.wait()
        return time.perf_counter() - start

    with torch.inference_mode():
        for _ in range(2 if compiled else 1):  # compiles
            generate(many), generate(few)
        took = sorted(generate(many) - generate(few) for _ in range(1 if machine.tiny else 5))
    seconds = max(took[len(took) // 2], 1e-9) / (many - few)
    return {"us a step": seconds * 1e6, "tokens/s": batch / seconds, "transformers": __version__}
