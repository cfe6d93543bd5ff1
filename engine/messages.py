"""What crosses between the floors: requests and their options coming in, plans and results, outputs going out.

Everything here is frozen, holds Python integers, floats and strings only, and imports neither torch nor NumPy. What is
made for every token is a named tuple, which takes a third of the time that a frozen dataclass takes.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsFloat

MAX_LOGPROBS = 20  # top-N logprobs that a request may ask for
GREEDY_BELOW = 1e-5  # a temperature: logits divided by much less would overflow, and who could be drawn would be chance
LARGEST_FLOAT = 3.4e38  # that float32 holds


def whole(value: object) -> int | None:
    """An integer of any library's, or None for what is none."""
    if type(value) is int:  # asked of every token of a prompt
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _token_ids(name: str, values: Iterable[object]) -> tuple[int, ...]:
    ids = []
    for value in values:
        i = whole(value)
        if i is None or i < 0:
            raise ValueError(f"{name} must hold token ids, integers of at least 0, got {value!r}")
        ids.append(i)
    return tuple(ids)


def _bias(token_id: int, value: object) -> float:
    bias = float(value) if isinstance(value, SupportsFloat) else math.nan
    if not bias <= LARGEST_FLOAT:
        raise ValueError(f"logit_bias of token {token_id} must be a number of at most {LARGEST_FLOAT}, got {value!r}")
    return bias if bias >= -LARGEST_FLOAT else -math.inf


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen. Names and defaults are vLLM's.

    Order of the options: logit bias and penalties, temperature, top-k, top-p (of the distribution renormalised after
    top-k), min-p, draw. Tokens tied with the k-th are kept. Logprobs are of the model's own distribution, before all
    of these.

    Args:
        n: samples for the prompt.
        presence_penalty: subtracted from the logits of tokens generated so far.
        frequency_penalty: subtracted once per time the token was generated.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or generated.
        temperature: divides the logits; 0 is greedy (the lowest id among equals), and what is below 1e-5 counts as 0.
        top_p: keep the smallest set of most probable tokens with at least this mass, in (0, 1].
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1].
        seed: any integer; the same seed gives the same tokens in any company. None draws one and reports it.
        stop: a string or strings that end the text, and are not part of it.
        stop_token_ids: ids that end the sequence as the end-of-text id does.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on past the end-of-text id.
        max_tokens: tokens to generate at most; None: up to the context length.
        min_tokens: the end-of-text and stop ids cannot be drawn before this many tokens.
        logprobs: report the chosen token's logprob and those of this many most probable tokens.
        skip_special_tokens: leave special tokens out of the text.
        logit_bias: added to the logits of these ids.
        allowed_token_ids: nothing else can be drawn.

    Raises:
        ValueError: an option out of its range, with its value and what is accepted.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        ending = () if self.stop_token_ids is None else self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", ending))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            named = (int(i) if isinstance(i, str) and i.isdecimal() else i for i in self.logit_bias)  # JSON has strings
            ids = _token_ids("logit_bias", named)
            biases = [_bias(i, bias) for i, bias in zip(ids, self.logit_bias.values(), strict=True)]
            object.__setattr__(self, "logit_bias", dict(zip(ids, biases, strict=True)))
        self._check_numbers()
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must hold non-empty strings, got {self.stop!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be drawn")

    def _check_numbers(self) -> None:
        def integer(name: str, low: int, optional: bool = False, high: int | None = None) -> None:
            value = getattr(self, name)
            if value is None and optional:
                return
            number = whole(value)
            if number is None or number < low or (high is not None and number > high):
                limit = f"of at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be an integer {limit}{' or None' if optional else ''}, got {value!r}")
            object.__setattr__(self, name, number)

        def number(name: str, low: float, high: float, open_low: bool = False) -> None:
            value = getattr(self, name)
            known = isinstance(value, SupportsFloat) and not isinstance(value, str | bytes)
            number = float(value) if known else math.nan
            if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
                raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value!r}")
            object.__setattr__(self, name, number)

        integer("n", 1)
        integer("top_k", -1)
        integer("min_tokens", 0)
        integer("max_tokens", 1, optional=True)
        integer("logprobs", 0, optional=True, high=MAX_LOGPROBS)
        if self.seed is not None:
            seed = whole(self.seed)
            if seed is None:
                raise ValueError(f"seed must be an integer or None, got {self.seed!r}")
            object.__setattr__(self, "seed", seed)
        number("presence_penalty", -2.0, 2.0)
        number("frequency_penalty", -2.0, 2.0)
        number("repetition_penalty", 0.0, math.inf, open_low=True)
        number("temperature", 0.0, math.inf)
        number("top_p", 0.0, 1.0, open_low=True)
        number("min_p", 0.0, 1.0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens of the sequence so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


class Draw(NamedTuple):
    """One token to draw after the last token that a ``SequencePlan`` runs.

    Args:
        params: the request's options.
        seed: 64-bit key of the request's random stream.
        position: position in its sequence of the token to be drawn.
        sample_index: which of the request's ``n`` samples this is.
        history: the sequence's tokens, prompt first, when penalties need them, else empty.
        num_prompt_tokens: how many of ``history`` are the prompt's.
        banned_token_ids: ids that cannot be drawn this time (``min_tokens``).
    """

    params: SamplingParams
    seed: int
    position: int
    sample_index: int
    history: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    banned_token_ids: tuple[int, ...] = ()


class SequencePlan(NamedTuple):
    """One sequence's share of a step: run ``token_ids`` at positions ``start``, ``start + 1``, ...

    Args:
        seq_id: the planner's number for the sequence.
        token_ids: the tokens to run.
        start: position of the first of them; the KV cache holds all positions before it.
        block_table: ids of the sequence's blocks, in order, enough for ``start + len(token_ids)`` positions.
        draw: the token to draw after the last of them, or None while a prompt is still incomplete.
        num_logits: how many rows of logits to return as they are, counted from the end.
        take_previous: the last step drew this sequence's newest token and it has not been collected: the last entry
            of ``token_ids`` is a placeholder, and the backend takes row ``previous_row`` of that step instead.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    draw: Draw | None = None
    num_logits: int = 0
    take_previous: bool = False
    previous_row: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: these tokens for each of these sequences. Prefill, a chunk of it and decode are one case.

    Args:
        sequences: one entry per sequence that runs in this step.
        block_copies: (source, destination) blocks of the KV cache to copy before the step (copy on write).
        num_steps: how many steps may follow each other before anybody has to see what was drawn. In each later one
            every sequence runs the token that it drew in the one before; a backend may run fewer.
        ending_ids: tokens that end a sequence. A backend that sees one drawn stops there; what it draws for that one
            in further steps counts for nothing.
    """

    sequences: Sequence[SequencePlan]
    block_copies: Sequence[tuple[int, int]] = ()
    num_steps: int = 1
    ending_ids: Sequence[int] = ()


class Drawn(NamedTuple):
    """A drawn token: its id, its logprob and rank (1 = most probable) in the model's own distribution.

    The rank may be 0, not counted, where no request of the step asks for logprobs.
    ``top`` holds the most probable (id, logprob) pairs that the request asked for, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave: for each sequence of the plan, in its order, the token drawn or None."""

    drawn: Sequence[Drawn | None]


class UndrawableRow(ValueError):
    """No token can be drawn from the logits of a row. What else the step drew is lost, and can be drawn again.

    Args:
        message: which row, and why.
        row: its number among the drawn rows of the step.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Event(NamedTuple):
    """A token of a sequence, as the planner hands it to the doors.

    ``finish_reason`` is None while the sequence goes on, then "stop" or "length"; ``stop_reason`` is the stop token's
    id, or None for the end-of-text id and for "length". Where a sequence cannot go on nothing is drawn,
    ``finish_reason`` is "error" and ``stop_reason`` says why.
    """

    seq_id: int
    drawn: Drawn | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's logprob, its rank among all tokens (1 = most probable) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request.

    Args:
        index: which of the request's ``n`` samples.
        text: the generated text, without the stop string and the end-of-text token.
        token_ids: the generated ids, the one that ended the sequence included.
        cumulative_logprob: sum of the tokens' logprobs; with ``screen_head`` an estimate unless logprobs are asked for.
        logprobs: per token, id -> ``Logprob`` of the chosen token and the most probable ones; None if not asked for.
        finish_reason: "stop" or "length"; "abort" after ``LLM.abort``; "error" where it could not go on.
        stop_reason: the stop string or stop token id that ended it; None for end-of-text and "length"; of an error what
            it was.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the sample is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's prompt and its samples. ``seed`` is the one given, or the one that was drawn for it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    seed: int = 0
    prompt_logprobs: None = field(default=None)
