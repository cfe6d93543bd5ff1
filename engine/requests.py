"""From the tokens of a request to what its caller sees: text piece by piece, stop strings, logprobs, the output."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.messages import CompletionOutput, Drawn, Event, Logprob, RequestOutput, SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.stops import StopFinder
from engine.text.tokenizer import TextCodec


class Sample:
    """One sample of a request while it grows.

    Args:
        index: which of the request's ``n`` samples.
        params: the request's options.
        codec: turns ids into text; None for a model without a tokenizer, whose text stays empty.
    """

    def __init__(self, index: int, params: SamplingParams, codec: TextCodec | None) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.token_ids: list[int] = []
        self._codec = codec
        self._detokenizer = None if codec is None else Detokenizer(codec, params.skip_special_tokens)
        self._stops = StopFinder(tuple(params.stop or ()), params.include_stop_str_in_output)
        self.pieces: list[str] = []
        self._cumulative_logprob = 0.0
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._min_tokens = params.min_tokens  # their text is not looked at for stop strings

    def take(self, event: Event) -> None:
        """Add a token and the text that it completes. Sets ``finish_reason`` when the sample ends."""
        drawn = event.drawn
        assert drawn is not None, "an error has no token"
        self.token_ids.append(drawn.token_id)
        self._cumulative_logprob += drawn.logprob
        if self._logprobs is not None:
            self._logprobs.append(self._describe(drawn))
        piece = ""
        if self._detokenizer is not None and event.finish_reason != "stop":  # what ends a sequence is not text
            piece = self._detokenizer.push(drawn.token_id)
            if len(self.token_ids) > self._min_tokens:
                piece = self._stops.push(piece)
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        if self._stops.matched is None and event.finish_reason is not None and self._detokenizer is not None:
            piece += self._stops.push(self._detokenizer.flush())
            piece += self._stops.flush()
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        self.pieces.append(piece)

    def end(self, finish_reason: str, stop_reason: str | None = None) -> None:
        """End the sample where it stands, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = finish_reason, stop_reason

    def _describe(self, drawn: Drawn) -> dict[int, Logprob]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(drawn.top, start=1)]
        if drawn.token_id not in {token_id for token_id, _, _ in ranked}:
            ranked.insert(0, (drawn.token_id, drawn.logprob, drawn.rank))
        text = None if self._codec is None else self._codec.decode
        return {i: Logprob(logprob, rank, None if text is None else text([i])) for i, logprob, rank in ranked}

    def output(self) -> CompletionOutput:
        """The sample as it stands."""
        return CompletionOutput(
            index=self.index,
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(slots=True, eq=False)
class Request:
    """A request while it runs: its prompt and its samples, by the number of their sequence."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    seed: int
    samples: dict[int, Sample] = field(default_factory=dict)
    _taken: int = 0  # pieces of the first sample that ``take_text`` has given

    @property
    def finished(self) -> bool:
        """Whether every sample is complete."""
        for sample in self.samples.values():  # noqa: SIM110 - half the time of all(), and asked of every request a step
            if sample.finish_reason is None:
                return False
        return True

    @property
    def error(self) -> str | None:
        """Why no sample could go on, or None."""
        samples = list(self.samples.values())
        return str(samples[0].stop_reason) if all(s.finish_reason == "error" for s in samples) else None

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far, over all samples."""
        return sum(len(sample.token_ids) for sample in self.samples.values())

    def take_text(self) -> str:
        """The text of the first sample that came since the last call."""
        pieces = next(iter(self.samples.values())).pieces
        text = "".join(pieces[self._taken :])
        self._taken = len(pieces)
        return text

    def output(self) -> RequestOutput:
        """The request as it stands."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_token_ids),
            outputs=tuple(sample.output() for sample in self.samples.values()),
            finished=self.finished,
            seed=self.seed,
        )
