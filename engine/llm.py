"""``LLM``: text in, text out. It builds the parts, wires them together, and runs requests to their ends."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from engine.assembly import choose_backend, make_backend, make_core
from engine.checkpoints.canonical import Checkpoint
from engine.checkpoints.load import load_checkpoint
from engine.config import ModelConfig
from engine.live.self_check import check_logits, check_parts, plain_logits, probe_ids
from engine.logs import get_logger
from engine.messages import Event, RequestOutput, SamplingParams, SequencePlan, StepPlan
from engine.options import engine_config, max_model_len
from engine.planning.sequence import Sequence as PlannedSequence
from engine.prompts import Prompt, PromptReader, list_of_prompts, no_tokenizer, one_each
from engine.requests import Request, Sample
from engine.text.load import load_tokenizer
from engine.turns import Turns

STEPS_AT_A_TIME = 32  # of ``generate``, whose caller sees no token before the last; between two Python takes 0.3 ms
DEMO_MODEL = Path(__file__).parent / "data" / "demo"


class LLM:
    """A model ready to generate. Its methods may be called from any thread: each waits for the step that runs.

    Args:
        model: a live module, whose weights are taken as they are now (``update_weights`` takes them again), a
            checkpoint file or folder, a hub name, or a loaded ``Checkpoint``; None is the demo model that the package
            ships, a small GPT trained on Jane Austen's novels.
        tokenizer: any object with ``encode`` and ``decode``, a folder or a ``.tiktoken`` file; None: the model's own.
        config: what the checkpoint does not say (``n_heads`` of a bare state_dict): a mapping or a JSON file.
        revision: of a hub name.
        seed: makes the seeds drawn for requests without one reproducible.
        gpu_memory_utilization: share of a GPU's memory that weights and KV cache may take; nothing on a CPU.
        options: the fields of ``EngineConfig``, and vLLM's arguments that change nothing here; the log names those that
            are not vLLM's defaults.

    Raises:
        ValueError: an option's value is not accepted, the checkpoint does not fit, the backend lacks something.
        TypeError: an argument is not known.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module | Checkpoint | None = None,
        *,
        tokenizer: object | None = None,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        seed: int | None = None,
        gpu_memory_utilization: float = 0.9,
        **options: Any,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization!r}")
        self.engine_config = engine_config(options)
        if isinstance(model, Checkpoint):
            checkpoint = model
        else:
            checkpoint = load_checkpoint(DEMO_MODEL if model is None else model, config=config, revision=revision)
        self.model_config: ModelConfig = checkpoint.config
        self.tokenizer = load_tokenizer(
            checkpoint.folder, checkpoint.config.vocab_size, checkpoint.eos_token_id, tokenizer
        )
        self._eos = checkpoint.eos_token_id if self.tokenizer is None else self.tokenizer.eos_token_id
        self._log = get_logger()
        choice = choose_backend(checkpoint, self.engine_config)
        self.dtype, self.device = choice.dtype, choice.device
        self.backend = make_backend(choice, checkpoint, self.engine_config, gpu_memory_utilization)
        self.max_model_len = max_model_len(self.engine_config, self.model_config)
        slides = self.engine_config.context_overflow == "slide"
        self._reader = PromptReader(
            self.tokenizer, self.model_config.vocab_size, self._eos, None if slides else self.max_model_len
        )
        self._core, self._runner = make_core(self.backend, self.model_config, self.engine_config, self.max_model_len)
        self._random = random.Random(seed)  # seeded by the system when seed is None
        self._next_id = 0
        self._owners: dict[int, Request] = {}  # of the unfinished sequences, by their number
        self._turns = Turns()  # of the threads that call
        self._said_sliding = False
        if isinstance(model, torch.nn.Module):
            self._check_module(model, checkpoint.source)

    def _check_module(self, module: torch.nn.Module, description: str) -> None:
        """Refuse a live module that computes something else than its structure says."""
        check_parts(module, self.model_config)
        ids = probe_ids(self.model_config)[:, : self.max_model_len]
        wanted = plain_logits(module, ids, self.model_config).to(self.device)
        got = torch.stack([self.logits(row) for row in ids.tolist()])
        difference = check_logits(got, wanted, self.dtype, description)
        self._log.info("self-check passed, largest logit difference %.1e", difference)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; outputs are in the order of the prompts.

        Args:
            prompts: a string, token ids, ``{"prompt": str}``, ``{"prompt_token_ids": ids}``, or a list of these.
            sampling_params: one for all prompts, or one each; None is ``SamplingParams()``.
            use_tqdm: show a progress bar.

        A request that cannot go on, because the model gave NaN for it or its options exclude every token, ends alone:
        its ``finish_reason`` is "error", and ``stop_reason`` says why.

        Raises:
            ValueError: a prompt or an option that this model cannot take; nothing is generated then. Or none of the
                requests could go on.
        """
        listed = list_of_prompts(prompts)
        params = one_each(sampling_params, len(listed))
        read = [(*self._read(prompt, p), p) for prompt, p in zip(listed, params, strict=True)]
        requests = [self._submit(text, ids, p) for text, ids, p in read]
        try:
            with tqdm(total=len(requests), desc="Processed prompts", unit="prompt", disable=not use_tqdm) as bar:
                while (done := sum(request.finished for request in requests)) < len(requests):
                    bar.update(done - bar.n)
                    self.step(STEPS_AT_A_TIME)
                bar.update(len(requests) - bar.n)
        finally:
            for request in requests:
                self.abort(request)  # of what finished nothing is left to abort
        if requests and all(request.error for request in requests):
            raise ValueError(requests[0].error)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one sample as it comes, never half a character, never part of a stop string.

        The request is queued when the first piece is asked for; closing the iterator ends it.

        Raises:
            ValueError: as ``generate``; also when ``n`` is above 1 or the model has no tokenizer.
        """
        params = one_each(sampling_params, 1)[0]
        if params.n != 1:
            raise ValueError(f"stream gives one sample, got n={params.n}; use generate")
        if self.tokenizer is None:
            raise ValueError(no_tokenizer(self.model_config.vocab_size))
        return self._pieces(*self._read(prompt, params), params)

    def _pieces(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> Iterator[str]:
        request = self._submit(text, ids, params)
        try:
            while not request.finished:
                self.step()
                if piece := request.take_text():
                    yield piece
        finally:
            self.abort(request)
        if request.error:
            raise ValueError(request.error)

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Request:
        """Queue a request for ``step`` to run. Raises as ``generate``."""
        params = one_each(sampling_params, 1)[0]
        return self._submit(*self._read(prompt, params), params)

    def step(self, most: int = 1) -> None:
        """Run one step of everything that is queued; each request takes the tokens drawn for it.

        Args:
            most: take up to so many steps together where the backend can go on by itself: while every sequence only
                decodes, none ends, and none has penalties or stop strings. Nothing is seen of a token before all are
                there, and nothing else is different.

        A request that cannot go on ends with the ``finish_reason`` "error"; the others lose nothing.

        Raises:
            ValueError: ``most`` is below 1.
        """
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        with self._turns:
            for event in self._core.step(most):
                if (request := self._owners.get(event.seq_id)) is not None:  # else a stop string ended it in this run
                    self._take(event, request, request.samples[event.seq_id])

    def _take(self, event: Event, request: Request, sample: Sample) -> None:
        """Hand a token to its sample. What goes wrong with it, in a tokenizer perhaps, is no matter of the others."""
        if event.drawn is None:
            sample.end("error", str(event.stop_reason))
        else:
            try:
                sample.take(event)
            except Exception as error:
                self._log.exception("request %s", request.request_id)
                sample.end("error", f"{type(error).__name__}: {error}")
        if sample.finish_reason == "error":
            self._log.error("request %s ended: %s", request.request_id, sample.stop_reason)
        if sample.finish_reason is not None:
            self._core.abort(event.seq_id)  # after a stop string, which the planner does not know of
            del self._owners[event.seq_id]

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """The logits at every position of a prompt, ``[T, V]``, in float32 or wider, on the backend's device.

        Raises:
            ValueError: as ``generate``; also while requests are queued, whose place in the KV cache it would take.
        """
        _, ids = self._read(prompt, SamplingParams(max_tokens=1))
        with self._turns:
            return self._logits(ids)

    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        if self._core.has_work:
            raise ValueError("logits needs an idle engine, and requests are queued")
        if len(ids) > self.max_model_len:
            raise ValueError(f"the prompt has {len(ids)} tokens and the context {self.max_model_len}")
        table = range(-(-len(ids) // self.engine_config.block_size))  # nobody holds a block
        step = self.engine_config.max_num_batched_tokens
        chunks = [(start, ids[start : start + step]) for start in range(0, len(ids), step)]
        plans = [StepPlan([SequencePlan(0, part, start, table, num_logits=len(part))]) for start, part in chunks]
        return torch.cat([self._runner.logits(plan) for plan in plans])

    def abort(self, request: Request) -> None:
        """End a request, with the ``finish_reason`` "abort", and free what it holds. One that is finished is left so.

        Raises:
            ValueError: the request is another ``LLM``'s.
        """
        with self._turns:
            for seq_id, sample in request.samples.items():
                if sample.finish_reason is not None:
                    continue
                if self._owners.get(seq_id) is not request:
                    raise ValueError(f"request {request.request_id} is not one of this LLM's")
                del self._owners[seq_id]
                self._core.abort(seq_id)
                sample.end("abort")

    def update_weights(self, model: str | os.PathLike[str] | torch.nn.Module | Checkpoint) -> None:
        """Take new weights for the same model, from whatever ``LLM`` takes a model from.

        Raises:
            ValueError: the model has another shape or does not load; requests are queued, whose K and V are the old
                weights'.
        """
        checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
        if checkpoint.config != self.model_config:
            raise ValueError(f"the new weights are of {checkpoint.config}, this LLM is of {self.model_config}")
        with self._turns:
            if self._core.has_work:
                raise ValueError("update_weights needs an idle engine, and requests are queued")
            self.backend.update_weights(checkpoint.weights)
            if isinstance(model, torch.nn.Module):
                self._check_module(model, checkpoint.source)

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None for a model that takes and gives ids only."""
        return self.tokenizer

    def _read(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt that can run with these options."""
        text, ids = self._reader.read(prompt, params)
        self._core.check(self._sequence(0, ids, params, seed=0, index=0))
        return text, ids

    def _sequence(
        self, seq_id: int, ids: Sequence[int], params: SamplingParams, seed: int, index: int
    ) -> PlannedSequence:
        return PlannedSequence(
            seq_id=seq_id,
            token_ids=list(ids),
            params=params,
            seed=seed,
            sample_index=index,
            context_length=self.max_model_len,
            eos_token_id=self._eos,
            slide=self.engine_config.context_overflow == "slide",
        )

    def _submit(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request that has been checked."""
        with self._turns:
            return self._queue(text, ids, params)

    def _queue(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> Request:
        seed = (self._random.getrandbits(64) if params.seed is None else params.seed) % 2**64
        request = Request(str(self._next_id), text, tuple(ids), seed)
        for index in range(params.n):
            seq_id, self._next_id = self._next_id, self._next_id + 1
            request.samples[seq_id] = Sample(index, params, self.tokenizer)
            self._owners[seq_id] = request
            self._core.add(self._sequence(seq_id, ids, params, seed, index))
        self._say_sliding(len(ids), params)
        return request

    def _say_sliding(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        longest = float("inf") if params.max_tokens is None else num_prompt_tokens + params.max_tokens
        if self.engine_config.context_overflow == "slide" and longest > self.max_model_len and not self._said_sliding:
            self._said_sliding = True
            self._log.warning(
                'context_overflow="slide": past %d tokens every new token is a whole prefill of the last %d',
                self.max_model_len,
                self.max_model_len,
            )
