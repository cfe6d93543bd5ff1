"""What a caller may pass as a prompt, read and checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from engine.messages import SamplingParams, whole
from engine.text.tokenizer import TextCodec

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": str}`` or ``{"prompt_token_ids": ids}``."""


def list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    many = None if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable) else list(prompts)
    if many is None:
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    if many and all(whole(i) is not None for i in many):
        return [cast("Sequence[int]", many)]
    return cast("list[Prompt]", many)


def one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """The options of each of ``count`` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise ValueError(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}")
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one for all, or one each")
    for each in params:
        if not isinstance(each, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {each!r}")
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
        endings = {*(params.stop_token_ids or ()), self.eos_token_id}
        if params.min_tokens and params.allowed_token_ids is not None and endings.issuperset(params.allowed_token_ids):
            raise ValueError(
                f"min_tokens={params.min_tokens} leaves nothing to draw: all of allowed_token_ids end the sequence"
            )
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
        if not isinstance(text, str | None):
            raise ValueError(f"a prompt is a string, token ids, or a dict of one of them, got {text!r}")
        if ids is not None:
            known = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | bytearray | Mapping)
            read = [whole(i) for i in ids] if known else [None]
            if None in read:
                raise ValueError(f"a prompt is a string, token ids, or a dict of one of them, got {ids!r}")
            return text, [i for i in read if i is not None]
        if text is None:
            raise ValueError(f"a prompt is a string, token ids, or a dict of one of them, got {prompt!r}")
        if self.codec is None:
            raise ValueError(no_tokenizer(self.vocab_size))
        return text, self.codec.encode(text)
