"""Does the engine compute what ``GPTModel`` computes, on this very model? Asked before any speed is printed."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.llm import LLM
from engine.messages import SamplingParams
from engine.reference import GPTModel

FLOAT32_LIMIT = 1e-4
ERROR_FACTOR = 2.0  # of plain PyTorch's own error in the same precision


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How far the engine is from the reference.

    Args:
        num_tokens: greedy tokens compared.
        num_equal: those that are the reference's.
        num_excused: those that differ where the reference's two best logits are closer than the error allows.
        error: largest logit difference from the reference.
        limit: the largest that is accepted.
        rule: what the limit is, in words.
    """

    num_tokens: int
    num_equal: int
    num_excused: int
    error: float
    limit: float
    rule: str

    @property
    def passed(self) -> bool:
        """Whether speed may be printed."""
        return self.error <= self.limit and self.num_equal + self.num_excused == self.num_tokens


@torch.no_grad()
def check_against_reference(llm: LLM, reference: GPTModel, prompts: Sequence[Sequence[int]], steps: int) -> CheckResult:
    """Generate greedily with the engine, then run the reference over the same tokens.

    float32: every logit within 1e-4 of the reference (1e-5 of the largest logit, where that is more than 10), and every
    token the reference's. Lower precision: the error against float64 at most twice that of plain PyTorch in the same
    precision, and every token the reference's wherever its lead over the second is more than twice the error.

    Args:
        llm: the engine.
        reference: the same weights, float32, on the CPU.
        prompts: token ids, each with room for ``steps`` more tokens in the context.
        steps: tokens to generate.
    """
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    exact = llm.dtype in ("float32", "float64")
    judge = reference if exact else copy.deepcopy(reference).double()
    plain = None if exact else copy.deepcopy(reference).to(getattr(torch, llm.dtype))
    error, limit, equal, excused = 0.0, FLOAT32_LIMIT, 0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        drawn = output.outputs[0].token_ids
        ids = torch.tensor([[*prompt, *drawn[:-1]]])
        wanted = judge(ids)[0]  # [T, V]
        this_error = (llm.logits(ids[0].tolist()).cpu().to(wanted.dtype) - wanted).abs().max().item()
        if plain is not None:
            limit = max(limit, ERROR_FACTOR * (plain(ids)[0].to(wanted.dtype) - wanted).abs().max().item())
        else:
            limit = max(limit, 1e-5 * wanted.abs().max().item())
        error = max(error, this_error)
        best = wanted[len(prompt) - 1 :].topk(2, dim=-1)
        lead = best.values[:, 0] - best.values[:, 1]
        same = best.indices[:, 0] == torch.tensor(drawn)
        equal += int(same.sum())
        excused += 0 if exact else int((~same & (lead <= 2 * this_error)).sum())
    rule = (
        "1e-4, or 1e-5 of the largest logit; all tokens equal" if exact else f"{llm.dtype}: twice plain PyTorch's error"
    )
    return CheckResult(steps * len(prompts), equal, excused, error, limit, rule)
