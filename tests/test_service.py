"""``LLM`` inside a service: one request fails, others are aborted, many threads call it, the process forks."""

import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import tiny_module
from native_steps import run_in_process
from test_llm import Bytes

from engine import LLM, RequestOutput, SamplingParams
from engine.backends.registry import missing
from engine.checkpoints.live import canonical_weights, recognise
from engine.logs import get_logger
from engine.messages import Event
from engine.reference import GPTModel
from engine.requests import Request, Sample
from engine.turns import Turns

get_logger()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
BROKEN = 7  # a token whose embedding is no number


@pytest.fixture(scope="module", params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and missing("native"):
        pytest.skip("the native backend is not here")
    return str(request.param)


def make(backend: str, module: GPTModel | None = None, **options: object) -> LLM:
    module = tiny_module(vocab_size=256) if module is None else module
    return LLM(module, **{"tokenizer": Bytes(), "backend": backend, "dtype": "float32", "max_num_seqs": 8, **options})


def broken(backend: str) -> LLM:
    """A model that gives NaN after one token."""
    llm = make(backend)
    with torch.no_grad():
        module = tiny_module(vocab_size=256)
        module.tok_emb.weight[BROKEN] = float("nan")
    llm.backend.update_weights(canonical_weights(recognise(module)))
    return llm


def said(output: RequestOutput) -> list[tuple[str, tuple[int, ...], str | None]]:
    """What does not depend on the rounding of PyTorch's products, which is another in another batch."""
    return [(sample.text, sample.token_ids, sample.finish_reason) for sample in output.outputs]


def finish(llm: LLM, requests: list[Request], most: int = 1) -> None:
    for _ in range(200):
        if all(request.finished for request in requests):
            return
        llm.step(most)
    raise AssertionError("requests do not end")


# --- one that fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 8])
def test_a_request_that_cannot_go_on_ends_alone(backend: str, most: int) -> None:
    llm = broken(backend)
    prompts = [[1, 2, 3], [4, BROKEN, 5], [6], [BROKEN], [8, 9]]
    good = [0, 2, 4]
    wanted = [said(llm.generate(prompts[i], GREEDY, use_tqdm=False)[0]) for i in good]
    requests = [llm.submit(prompt, GREEDY) for prompt in prompts]
    finish(llm, requests, most)
    assert [said(requests[i].output()) for i in good] == wanted
    for i in (1, 3):
        (sample,) = requests[i].output().outputs
        assert (sample.finish_reason, sample.token_ids) == ("error", ())
        assert "no token can be drawn" in str(sample.stop_reason)
    assert not llm._core.has_work
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length", "error", "length"]
    assert llm._core._scheduler._blocks.num_free == llm._core._scheduler._blocks.num_blocks


def test_one_failed_sample_of_several_is_no_failed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make("torch")
    take = Sample.take

    def take_or_fail(sample: Sample, event: Event) -> None:
        take(sample, event)
        if sample.index == 1:
            raise KeyError("no such piece")

    monkeypatch.setattr(Sample, "take", take_or_fail)
    (output,) = llm.generate("x", SamplingParams(n=3, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert [sample.finish_reason for sample in output.outputs] == ["length", "error", "length"]


def test_what_fails_whole_raises(backend: str) -> None:
    llm = broken(backend)
    with pytest.raises(ValueError, match="no token can be drawn"):
        llm.generate([[BROKEN], [1, BROKEN]], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="no token can be drawn"):
        list(llm.stream([BROKEN], GREEDY))
    assert not llm._core.has_work
    assert llm.generate([1], GREEDY, use_tqdm=False)[0].finished


def test_text_that_cannot_be_made_does_no_harm_to_others(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(backend)
    plain = [said(llm.generate([i], GREEDY, use_tqdm=False)[0]) for i in range(4)]
    take = Sample.take

    def take_or_fail(sample: Sample, event: Event) -> None:
        take(sample, event)
        if event.seq_id == failing and len(sample.token_ids) == 3:
            raise KeyError("no such piece")

    monkeypatch.setattr(Sample, "take", take_or_fail)
    requests = [llm.submit([i], GREEDY) for i in range(4)]
    failing = next(iter(requests[2].samples))
    finish(llm, requests)
    assert [said(requests[i].output()) for i in (0, 1, 3)] == [plain[i] for i in (0, 1, 3)]
    (sample,) = requests[2].output().outputs
    assert (sample.finish_reason, sample.stop_reason, len(sample.token_ids)) == (
        "error",
        "KeyError: 'no such piece'",
        3,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 must be a number of at most"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of token 5"),
        ({"logit_bias": {5: 1e39}}, "logit_bias of token 5"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must hold token ids, integers of at least 0, got 'a'"),
        ({"allowed_token_ids": [5.0]}, "allowed_token_ids must hold token ids, integers of at least 0, got 5.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids"),
        ({"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 2}, "min_tokens=2 leaves nothing to draw"),
        ({"temperature": "1"}, "temperature must be in"),
        ({"temperature": float("nan")}, "temperature must be in"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
    ],
)
def test_options_that_would_fail_later_are_refused_at_once(options: dict[str, object], message: str) -> None:
    llm = make("torch")
    with pytest.raises(ValueError, match=message):
        llm.submit("x", SamplingParams(**options))  # type: ignore[arg-type]
    assert not llm._core.has_work


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2**31},
        {"temperature": 1e39, "allowed_token_ids": [5, 6]},
        {"top_p": 1e-50},
        {"min_p": 1e-50},
        {"logit_bias": {5: -1e39}},
        {"logit_bias": {5: float("-inf")}},
        {"repetition_penalty": 1e39},
    ],
)
def test_options_beyond_float32_are_its_ends(backend: str, options: dict[str, object]) -> None:
    llm = make(backend)
    (output,) = llm.generate("x", SamplingParams(max_tokens=8, seed=1, **options), use_tqdm=False)  # type: ignore[arg-type]
    assert len(output.outputs[0].token_ids) == 8
    if "allowed_token_ids" in options:
        assert set(output.outputs[0].token_ids) <= {5, 6}


def test_ids_come_in_any_iterable_once() -> None:
    wanted = SamplingParams(stop_token_ids=[0], allowed_token_ids=[5, 6], logit_bias={5: 1.0})
    ids = (i for i in (5, 6))
    given = SamplingParams(stop_token_ids=np.array([0]), allowed_token_ids=ids, logit_bias={"5": 1.0})  # type: ignore[arg-type, dict-item]
    assert given == wanted
    assert SamplingParams(stop_token_ids=np.array([5, 6])).stop_token_ids == (5, 6)  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        seed=np.int64(4),  # type: ignore[arg-type]
        stop_token_ids=np.array([5]),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(temperature=0.5, max_tokens=3, seed=4, stop_token_ids=[5])
    llm = make("torch")
    wanted = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
    for prompt in (np.array([1, 2, 3]), torch.tensor([1, 2, 3]), [np.int64(1), np.int64(2), np.int64(3)]):
        found = llm.generate(prompt, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert [output.outputs for output in found] == [output.outputs for output in wanted]


@pytest.mark.parametrize("prompt", [b"It is", [True, False], {"prompt": 5, "prompt_token_ids": [1]}, 5, [1.0]])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(ValueError, match="prompt"):
        make("torch").generate(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [{"temperature": 0}, [SamplingParams(), None], "greedy"])
def test_what_are_no_options_is_refused(params: object) -> None:
    with pytest.raises(ValueError, match="sampling_params must be SamplingParams"):
        make("torch").generate(["a", "b"], params)  # type: ignore[arg-type]


# --- the life of a request -------------------------------------------------------------------------------------------


def test_an_aborted_request_is_finished(backend: str) -> None:
    llm, other = make(backend), make(backend)
    first, second = llm.submit("one", GREEDY), llm.submit("two", GREEDY)
    foreign = other.submit("three", GREEDY)
    llm.step()
    llm.abort(first)
    assert first.finished
    assert first.output().outputs[0].finish_reason == "abort"
    with pytest.raises(ValueError, match="is not one of this LLM's"):
        llm.abort(foreign)
    finish(llm, [second])
    finish(other, [foreign])
    llm.abort(second)
    assert second.output().outputs[0].finish_reason == "length"


def test_an_idle_engine_takes_any_number_of_steps(backend: str) -> None:
    llm = make(backend)
    llm.step()
    llm.step(32)


def test_a_stream_that_nobody_reads_is_no_request(backend: str) -> None:
    llm = make(backend)
    unread = llm.stream("hello", GREEDY)
    assert not llm._core.has_work
    del unread
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        llm.stream("")  # at once, and not when it is read


def test_stop_strings_count_from_min_tokens_on(backend: str) -> None:
    """A character is a token here; the third one is the stop string."""
    llm = make(backend)
    letters = list(range(97, 101))  # few, so that they come again
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True, "allowed_token_ids": letters}
    text = llm.generate("ab", SamplingParams(**options), use_tqdm=False)[0].outputs[0].text  # type: ignore[arg-type]
    places = [i for i, character in enumerate(text) if character == text[2]]
    assert len(text) == 12
    assert len(places) > 1
    for min_tokens in range(12):
        params = SamplingParams(**options, min_tokens=min_tokens, stop=text[2])  # type: ignore[arg-type]
        ending = next((i for i in places if i >= min_tokens), 12)
        assert llm.generate("ab", params, use_tqdm=False)[0].outputs[0].text == text[:ending]


def test_new_weights(backend: str) -> None:
    llm, module = make(backend), tiny_module(vocab_size=256)
    before = llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    llm.update_weights(module)
    wanted = make(backend, module).generate([1, 2], GREEDY, use_tqdm=False)[0].outputs
    assert llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs == wanted != before
    request = llm.submit([1], GREEDY)
    with pytest.raises(ValueError, match="requests are queued"):
        llm.update_weights(module)
    finish(llm, [request])
    with pytest.raises(ValueError, match="the new weights are of"):
        llm.update_weights(tiny_module(vocab_size=128))


# --- threads and processes -------------------------------------------------------------------------------------------


def in_threads(*bodies: Callable[[], None]) -> None:
    """Run the bodies side by side; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def test_threads_that_generate_get_what_they_get_alone(backend: str) -> None:
    llm = make(backend)
    wanted = {i: said(llm.generate([i, i + 1], GREEDY, use_tqdm=False)[0]) for i in range(4)}

    def generate(i: int) -> None:
        for _ in range(10):
            assert said(llm.generate([i, i + 1], GREEDY, use_tqdm=False)[0]) == wanted[i]
            assert "".join(llm.stream([i, i + 1], GREEDY)) == wanted[i][0][0]

    in_threads(*(lambda i=i: generate(i) for i in range(4)))  # type: ignore[misc]
    assert not llm._core.has_work


def test_an_abort_from_another_thread_costs_nobody_a_token(backend: str) -> None:
    llm = make(backend, max_num_seqs=4)
    wanted = said(llm.generate([1, 2], GREEDY, use_tqdm=False)[0])
    kept: list[Request] = []
    stop = threading.Event()

    def step() -> None:
        while not stop.is_set() or llm._core.has_work:
            llm.step()

    def come_and_go() -> None:
        try:
            for i in range(60):
                kept.append(llm.submit([1, 2], GREEDY))
                leaving = llm.submit([3, i], SamplingParams(max_tokens=40, ignore_eos=True))
                if i % 2:
                    while not leaving.num_output_tokens:
                        pass
                llm.abort(leaving)
        finally:
            stop.set()

    in_threads(step, come_and_go)
    assert [said(request.output()) for request in kept] == [wanted] * 60


def test_turns_are_taken_in_order() -> None:
    """A thread that takes its turn again and again does not keep out one that waits; a thread may take several."""
    turns, order = Turns(), []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        with turns:
            order.append("waited")

    with turns, turns:
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
        while not turns._waiting:
            pass
    for _ in range(3):
        with turns:
            order.append("again")
    thread.join(10)
    assert order == ["waited", "again", "again", "again"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(bool(missing("native")), reason="the native backend is not here")
def test_a_forked_child_generates() -> None:
    """PyTorch's threads, which the parent has used, are not there to be ended."""
    code = """
import os, signal, torch
from engine import LLM, RequestOutput, SamplingParams
torch.set_num_threads(4)
llm = LLM(backend="native", dtype="float32")
(torch.randn(1500, 1500) @ torch.randn(1500, 1500)).sum()
greedy = SamplingParams(temperature=0.0, max_tokens=5)
wanted = llm.generate("It was", greedy, use_tqdm=False)[0].outputs
torch.randn(4_000_000).exp()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if llm.generate("It was", greedy, use_tqdm=False)[0].outputs == wanted else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_in_process(code) == "0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    code = """
import os, signal, threading
from engine import LLM, SamplingParams
llm = LLM(backend="torch", dtype="float32", threads=1)
greedy = SamplingParams(temperature=0.0, max_tokens=5)
wanted = llm.generate("It was", greedy, use_tqdm=False)[0].outputs
held, done = threading.Event(), threading.Event()
def hold():
    with llm._turns:
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if llm.generate("It was", greedy, use_tqdm=False)[0].outputs == wanted else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
thread.join()
"""
    assert run_in_process(code) == "0\n"
