"""What a caller may pass as a prompt, read and checked."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from engine.messages import SamplingParams
from engine.text.tokenizer import TextCodec

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": str}`` or ``{"prompt_token_ids": ids}``."""


def list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, Sequence) and prompts and all(isinstance(i, int) for i in prompts):
        return [cast("Sequence[int]", prompts)]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    return list(cast("Sequence[Prompt]", prompts))


def one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """The options of each of ``count`` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one for all, or one each")
    return params


def no_tokenizer(vocab_size: int) -> str:
    """What to say when text is given to, or wanted from, a model without a tokenizer."""
    return (
        f"the model has {vocab_size} tokens and came without a tokenizer, so it takes and gives token ids only: pass "
        "prompt_token_ids, or LLM(tokenizer=...) with an object that has encode and decode"
    )


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns prompts into token ids that the model can take.

    Args:
        codec: the tokenizer, or None.
        vocab_size: ids are below it.
        eos_token_id: the end-of-text id, or None.
        longest: tokens that a prompt may have; None: any number, the last ones are used.
    """

    codec: TextCodec | None
    vocab_size: int
    eos_token_id: int | None
    longest: int | None

    def read(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt.

        Raises:
            ValueError: it is no prompt, it is too long, or it or the options name ids that the model does not have.
        """
        text, ids = self._encode(prompt)
        if not ids:
            start = "" if self.eos_token_id is None else f"; [{self.eos_token_id}], end of text, begins a new one"
            raise ValueError(f"the prompt has no tokens, and a model needs at least one{start}")
        named = {"the prompt": ids, "stop_token_ids": params.stop_token_ids or ()}
        named |= {"allowed_token_ids": params.allowed_token_ids or (), "logit_bias": tuple(params.logit_bias or ())}
        for name, values in named.items():
            bad = [i for i in values if not 0 <= i < self.vocab_size]
            if bad:
                raise ValueError(f"{name} has token id {bad[0]}; this model's ids are 0 to {self.vocab_size - 1}")
        if params.stop and self.codec is None:
            raise ValueError(f"stop strings need text: {no_tokenizer(self.vocab_size)}")
        if self.longest is not None and len(ids) > self.longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the context {self.longest}: shorten it, or take "
                'LLM(context_overflow="slide"), which uses the last tokens only'
            )
        return text, ids

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if set(prompt) - {"prompt", "prompt_token_ids"} or not prompt:
                raise ValueError(f"a prompt has 'prompt' or 'prompt_token_ids', got keys {sorted(prompt)}")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if ids is not None:
            try:
                return text, [operator.index(i) for i in ids]
            except TypeError:
                raise ValueError(f"a prompt is a string, token ids, or a dict of one of them, got {ids!r}") from None
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a string, token ids, or a dict of one of them, got {text!r}")
        if self.codec is None:
            raise ValueError(no_tokenizer(self.vocab_size))
        return text, self.codec.encode(text)
