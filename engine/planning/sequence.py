"""One sequence as the scheduler sees it: its tokens, how far they are computed, when it ends."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from engine.messages import Draw, SamplingParams


@dataclass(slots=True)
class Sequence:
    """The state of one sample of a request. The scheduler is its only writer.

    Args:
        seq_id: its number.
        token_ids: prompt, then what was drawn.
        params: the request's options.
        seed: key of its random stream.
        sample_index: which of the request's ``n`` samples it is.
        context_length: positions that the model has.
        eos_token_id: the end-of-text id, or None.
        slide: past the context length, go on with the last ``context_length`` tokens as a new prompt.
    """

    seq_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    sample_index: int
    context_length: int
    eos_token_id: int | None = None
    slide: bool = False
    num_prompt_tokens: int = field(init=False)
    num_computed: int = field(init=False, default=0)  # positions of the window that the KV cache holds
    block_table: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def window_start(self) -> int:
        """Index of the token that is at position 0: above 0 only for a sliding sequence past its context."""
        return max(0, len(self.token_ids) - self.context_length)

    @property
    def num_pending(self) -> int:
        """Tokens to run before the next one can be drawn."""
        return min(len(self.token_ids), self.context_length) - self.num_computed

    @property
    def max_positions(self) -> int:
        """Positions of the KV cache that the sequence can come to need."""
        if self.params.max_tokens is None:
            return self.context_length
        return min(self.context_length, self.num_prompt_tokens + self.params.max_tokens)

    def pending_tokens(self, count: int) -> SequenceOf[int]:
        """The next ``count`` tokens to run."""
        first = self.window_start + self.num_computed
        return self.token_ids[first : first + count]

    def next_draw(self) -> Draw:
        """The draw after the last pending token."""
        early = self.num_output_tokens < self.params.min_tokens
        return Draw(
            params=self.params,
            seed=self.seed,
            position=len(self.token_ids),
            sample_index=self.sample_index,
            history=tuple(self.token_ids) if self.params.has_penalties else (),
            num_prompt_tokens=self.num_prompt_tokens,
            banned_token_ids=self._ending_ids() if early else (),
        )

    @property
    def num_draws_ahead(self) -> int:
        """Draws, from the next one on, that follow each other with the same options, unless one of them ends it."""
        params, drawn = self.params, self.num_output_tokens
        if params.has_penalties or params.stop:
            return 1  # options that change with every token; a text that may end with any
        ahead = self.context_length - len(self.token_ids) + 1  # then the context is full, or the window moves
        if params.max_tokens is not None:
            ahead = min(ahead, params.max_tokens - drawn)
        return max(1, min(ahead, params.min_tokens - drawn) if drawn < params.min_tokens else ahead)

    @property
    def final_ids(self) -> Iterator[int]:
        """The ids that end the sequence when they are drawn."""
        yield from self.params.stop_token_ids or ()
        if self.eos_token_id is not None and not self.params.ignore_eos:
            yield self.eos_token_id

    def _ending_ids(self) -> tuple[int, ...]:
        stops = tuple(self.params.stop_token_ids or ())
        return stops if self.eos_token_id is None else (*stops, self.eos_token_id)

    def append(self, token_id: int) -> tuple[str | None, int | None]:
        """Take a drawn token; return (finish_reason, stop_reason), (None, None) while the sequence goes on."""
        self.token_ids.append(token_id)
        if self.slide and self.window_start:
            self.num_computed = 0  # the window moved: every position holds another token now
        if not self.params.ignore_eos and token_id == self.eos_token_id:
            return "stop", None
        if token_id in (self.params.stop_token_ids or ()):
            return "stop", token_id
        full = not self.slide and len(self.token_ids) > self.context_length  # the newest could not be run
        return ("length" if full or self.num_output_tokens == self.params.max_tokens else None), None
