"""Does the engine compute what ``GPTModel`` computes, on this very model? Asked before any speed is printed."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.llm import LLM
from engine.messages import SamplingParams
from engine.reference import GPTModel

FLOAT32_LIMIT = 1e-4
ERROR_FACTOR = 2.0  # of plain PyTorch's own error in the same precision
KL_LIMITS = {"int8": 5e-3, "int4": 5e-2, "int4-g64": 5e-2, "int4-g128": 5e-2}  # nats a token


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How far the engine is from the reference.

    Args:
        num_tokens: greedy tokens compared.
        num_equal: those that are the reference's.
        num_excused: those that differ where the reference's two best logits are closer than the error allows.
        measure: what ``error`` is, in words.
        error: how far the logits are from the reference's.
        limit: the largest error that is accepted.
        rule: what the limit is, in words.
    """

    num_tokens: int
    num_equal: int
    num_excused: int
    measure: str
    error: float
    limit: float
    rule: str

    @property
    def passed(self) -> bool:
        """Whether speed may be printed."""
        return self.error <= self.limit and self.num_equal + self.num_excused == self.num_tokens


@dataclass(frozen=True, slots=True)
class _Compared:
    """One text: the reference's logits ``[T, V]`` and the engine's, on the CPU in the reference's dtype."""

    ids: torch.Tensor  # [1, T]
    wanted: torch.Tensor
    got: torch.Tensor
    drawn: tuple[int, ...]  # the last of the tokens, one more than T

    @property
    def difference(self) -> float:
        return (self.got - self.wanted).abs().max().item()

    def same_and_excused(self) -> tuple[int, int]:
        """Drawn tokens that are the reference's, and others whose lead in the reference is within twice the error."""
        best = self.wanted[-len(self.drawn) :].topk(2, dim=-1)
        same = best.indices[:, 0] == torch.tensor(self.drawn)
        close = best.values[:, 0] - best.values[:, 1] <= 2 * self.difference
        return int(same.sum()), int((~same & close).sum())


@torch.no_grad()
def check_against_reference(llm: LLM, reference: GPTModel, prompts: Sequence[Sequence[int]], steps: int) -> CheckResult:
    """Generate greedily with the engine, then run the reference over the same tokens.

    float32: every logit within 1e-4 of the reference (1e-5 of the largest logit, where that is more than 10), and every
    token the reference's. bfloat16 and float16: the error against float64 at most twice that of plain PyTorch in the
    same precision. Quantised: the mean KL divergence from float64 within ``KL_LIMITS``. In all of the latter every
    token is the reference's wherever its lead over the second is more than twice the error.

    Args:
        llm: the engine.
        reference: the same weights, float32, on the CPU.
        prompts: token ids, each with room for ``steps`` more tokens in the context.
        steps: tokens to generate.
    """
    exact = llm.dtype in ("float32", "float64")
    judge = reference if exact else copy.deepcopy(reference).double()
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    texts = []
    for prompt, output in zip(prompts, outputs, strict=True):
        drawn = output.outputs[0].token_ids
        ids = torch.tensor([[*prompt, *drawn[:-1]]])
        wanted = judge(ids)[0]
        texts.append(_Compared(ids, wanted, llm.logits(ids[0].tolist()).cpu().to(wanted.dtype), drawn))
    counts = [text.same_and_excused() for text in texts]
    equal, excused = sum(same for same, _ in counts), 0 if exact else sum(other for _, other in counts)
    return CheckResult(steps * len(prompts), equal, excused, *_error_and_limit(llm.dtype, reference, texts))


def _error_and_limit(dtype: str, reference: GPTModel, texts: Sequence[_Compared]) -> tuple[str, float, float, str]:
    """(measure, error, limit, rule) of a precision."""
    if dtype in KL_LIMITS:
        divergence = sum(
            F.kl_div(text.got.log_softmax(-1), text.wanted.softmax(-1), reduction="batchmean").item() for text in texts
        )
        return "mean KL divergence", divergence / len(texts), KL_LIMITS[dtype], f"in nats, for {dtype}"
    error = max(text.difference for text in texts)
    if dtype in ("float32", "float64"):
        limit = max(FLOAT32_LIMIT, *(1e-5 * text.wanted.abs().max().item() for text in texts))
        return "largest logit difference", error, limit, "1e-4, or 1e-5 of the largest logit"
    plain = copy.deepcopy(reference).to(getattr(torch, dtype))
    own = max((plain(text.ids)[0].to(text.wanted.dtype) - text.wanted).abs().max().item() for text in texts)
    return "largest logit difference", error, ERROR_FACTOR * own, f"twice plain PyTorch's error in {dtype}"
