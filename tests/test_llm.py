"""``LLM``: vLLM's shapes and defaults, text that is whole, tokens that depend on nothing but the request."""

import dataclasses

import pytest
import torch
from models import tiny_module

from engine import LLM, RequestOutput, SamplingParams
from engine.backends.registry import missing
from engine.checkpoints.canonical import Checkpoint
from engine.checkpoints.live import canonical_weights, recognise
from engine.logs import get_logger
from engine.reference import GPTModel, generate_greedy

get_logger()  # pytest listens to loggers that do not propagate if they exist before the test begins
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def module() -> GPTModel:
    return tiny_module(vocab_size=256)


class Bytes:
    """A tokenizer of bytes, as a user might pass one."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def llm(module: GPTModel) -> LLM:
    return LLM(module, tokenizer=Bytes(), dtype="float32", max_num_seqs=4, max_num_batched_tokens=32, seed=0)


def naive(module: GPTModel, prompt: list[int], steps: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(generate_greedy(module, torch.tensor([prompt]), steps)[0, len(prompt) :].tolist())


# --- shapes and defaults ---------------------------------------------------------------------------------------------


def test_defaults_are_vllms() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.max_tokens, p.top_p, p.top_k, p.min_p) == (1, 1.0, 16, 1.0, 0, 0.0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (p.seed, p.logprobs, p.ignore_eos, p.min_tokens, p.skip_special_tokens) == (None, None, False, 0, True)


def test_a_vllm_script(llm: LLM) -> None:
    """The quick start of vLLM's documentation, its loop over outputs included."""
    prompts = ["Hello, my name is", "The president", "The capital", "The future"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95))
    assert len(outputs) == 4
    for prompt, output in zip(prompts, outputs, strict=True):
        assert isinstance(output, RequestOutput)
        assert output.prompt == prompt
        assert output.prompt_token_ids == tuple(prompt.encode())
        assert output.finished
        (sample,) = output.outputs
        assert len(sample.token_ids) == 16
        assert sample.text == bytes(sample.token_ids).decode(errors="replace")
        assert (sample.index, sample.finish_reason, sample.stop_reason) == (0, "length", None)
        assert sample.logprobs is None
        assert sample.cumulative_logprob < 0


@pytest.mark.parametrize(
    "prompts",
    [
        "abc",
        [97, 98, 99],
        {"prompt": "abc"},
        {"prompt_token_ids": [97, 98, 99]},
        ["abc"],
        [[97, 98, 99]],
        [{"prompt": "abc"}],
    ],
)
def test_every_form_of_prompt(llm: LLM, module: GPTModel, prompts: object) -> None:
    (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    assert output.outputs[0].token_ids == naive(module, [97, 98, 99], 12)


def test_greedy_tokens_of_many_lengths_at_once(llm: LLM, module: GPTModel) -> None:
    prompts = [[(7 * i + j) % 256 for j in range(length)] for i, length in enumerate((1, 50, 3, 33, 17, 40, 8))]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == naive(module, prompt, 12)


def test_params_one_each(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], params)


def test_logprobs(llm: LLM, module: GPTModel) -> None:
    params = SamplingParams(temperature=0.7, max_tokens=6, logprobs=2, seed=1)
    (output,) = llm.generate("abc", params, use_tqdm=False)
    sample = output.outputs[0]
    assert sample.logprobs is not None
    ids = torch.tensor([[*b"abc", *sample.token_ids]])
    with torch.no_grad():
        wanted = torch.log_softmax(module(ids)[0], -1)[2:-1]
    total = 0.0
    for token_id, entry, row in zip(sample.token_ids, sample.logprobs, wanted, strict=True):
        assert set(entry) == {token_id, *row.topk(2).indices.tolist()}
        for i, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[i].item(), abs=1e-4)
            assert logprob.rank == int((row > row[i]).sum()) + 1
            assert logprob.decoded_token == bytes([i]).decode(errors="replace")
        total += row[token_id].item()
    assert sample.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_outputs_are_frozen(llm: LLM) -> None:
    (output,) = llm.generate("a", GREEDY, use_tqdm=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.finished = False  # type: ignore[misc]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, seed=42, top_p=0.95)
    alone = llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids
    crowd = [SamplingParams(max_tokens=9 + i, top_k=i) for i in range(6)]
    outputs = llm.generate(["x" * (i + 1) for i in range(6)] + ["hello"], [*crowd, params], use_tqdm=False)
    assert outputs[-1].outputs[0].token_ids == alone
    assert outputs[-1].seed == 42


def test_a_drawn_seed_is_reported_and_repeats(llm: LLM) -> None:
    first = llm.generate("hello", SamplingParams(max_tokens=20), use_tqdm=False)[0]
    other = llm.generate("hello", SamplingParams(max_tokens=20), use_tqdm=False)[0]
    assert first.seed != other.seed
    assert first.outputs[0].token_ids != other.outputs[0].token_ids
    again = llm.generate("hello", SamplingParams(max_tokens=20, seed=first.seed), use_tqdm=False)[0]
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_n_samples(llm: LLM) -> None:
    (output,) = llm.generate("hello", SamplingParams(n=6, max_tokens=10, seed=3), use_tqdm=False)
    assert [sample.index for sample in output.outputs] == list(range(6))
    assert len({sample.token_ids for sample in output.outputs}) == 6
    (one,) = llm.generate("hello", SamplingParams(max_tokens=10, seed=3), use_tqdm=False)
    assert one.outputs[0].token_ids == output.outputs[0].token_ids


def test_penalties_bias_and_masks_reach_the_sampler(llm: LLM, module: GPTModel) -> None:
    first = naive(module, [*b"abc"], 1)[0]
    bias = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={first: -100.0})
    assert llm.generate("abc", bias, use_tqdm=False)[0].outputs[0].token_ids != (first,)
    only = SamplingParams(max_tokens=5, allowed_token_ids=[65, 66])
    assert set(llm.generate("abc", only, use_tqdm=False)[0].outputs[0].token_ids) <= {65, 66}
    # With a frequency penalty the two allowed ids take turns.
    turns = dataclasses.replace(only, temperature=0.0, frequency_penalty=2.0, max_tokens=8, logit_bias={65: 20, 66: 20})
    tokens = llm.generate("abc", turns, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(tokens)) == 2


def test_stop_token_ids_and_min_tokens(llm: LLM, module: GPTModel) -> None:
    tokens = naive(module, [*b"abc"], 12)
    stopping = dataclasses.replace(GREEDY, stop_token_ids=[tokens[4]])
    (output,) = llm.generate("abc", stopping, use_tqdm=False)
    sample = output.outputs[0]
    end = tokens.index(tokens[4]) + 1
    assert sample.token_ids == tokens[:end]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", tokens[4])
    assert sample.text == bytes(tokens[: end - 1]).decode(errors="replace")
    later = dataclasses.replace(stopping, min_tokens=8)
    assert len(llm.generate("abc", later, use_tqdm=False)[0].outputs[0].token_ids) >= 8


def test_end_of_text_ends_a_row_and_is_no_text(module: GPTModel) -> None:
    tokens = naive(module, [1, 2, 3], 12)
    found = recognise(module)
    made = Checkpoint(found.config, canonical_weights(found), "test", eos_token_id=tokens[5])
    llm = LLM(made, dtype="float32")
    (output,) = llm.generate([1, 2, 3], dataclasses.replace(GREEDY, ignore_eos=False), use_tqdm=False)
    end = tokens.index(tokens[5]) + 1
    assert output.outputs[0].token_ids == tokens[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


# --- text ------------------------------------------------------------------------------------------------------------


def test_stop_strings(llm: LLM) -> None:
    base = SamplingParams(temperature=1.0, max_tokens=40, seed=11, allowed_token_ids=[*b"abcd"])
    whole = llm.generate("x", base, use_tqdm=False)[0].outputs[0].text
    stop = whole[9:11]
    at = whole.index(stop)
    (output,) = llm.generate("x", dataclasses.replace(base, stop=stop), use_tqdm=False)
    sample = output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (whole[:at], "stop", stop)
    assert len(sample.token_ids) == at + 2
    kept = dataclasses.replace(base, stop=[stop, "zzz"], include_stop_str_in_output=True)
    assert llm.generate("x", kept, use_tqdm=False)[0].outputs[0].text == whole[: at + 2]
    assert "".join(llm.stream("x", dataclasses.replace(base, stop=stop))) == whole[:at]


def test_stream_is_the_text_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=5)
    pieces = list(llm.stream("hello", params))
    assert "".join(pieces) == llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text
    assert all(pieces)


def test_stream_never_splits_a_character(llm: LLM) -> None:
    """Only the two bytes of an é can be drawn, so that most tokens complete nothing."""
    params = SamplingParams(max_tokens=60, seed=1, allowed_token_ids=list("é".encode()))
    pieces = list(llm.stream("a", params))
    whole = llm.generate("a", params, use_tqdm=False)[0].outputs[0]
    assert "".join(pieces) == whole.text == bytes(whole.token_ids).decode(errors="replace")
    assert "é" in whole.text
    assert len(pieces) < 60


def test_a_stream_goes_on_beside_other_requests(llm: LLM) -> None:
    params = SamplingParams(max_tokens=25, seed=5)
    wanted = llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text
    stream = llm.stream("hello", params)
    first = next(stream)
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert first + "".join(stream) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "ignore_eos": True},
        {"max_tokens": None},
        {"n": 3, "min_tokens": 9, "stop_token_ids": [65, 66, 200]},
        {"stop_token_ids": list(range(0, 256, 9))},
        {"logprobs": 2, "logit_bias": {70: 3.0}, "top_p": 0.9},
        {"stop": ["A", "\u00fe"]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"allowed_token_ids": [65, 66, 67, 68]},
    ],
)
def test_several_steps_at_a_time_change_nothing(llm: LLM, options: dict[str, object]) -> None:
    """``generate`` lets the backend run ahead: its outputs are those of a loop over ``step``. Not all requests fit."""
    base = {"max_tokens": 40, "seed": 5}
    params = [SamplingParams(**base | options), SamplingParams(**base), SamplingParams(max_tokens=3, seed=1)]  # type: ignore[arg-type]
    prompts = [[1, 2, 3], [7] * 35, [9], [4, 4], [1, 2, 3, 4, 5], [6]]
    chosen = [params[0], params[0], params[2], params[1], params[0], params[0]]
    requests = [llm.submit(prompt, p) for prompt, p in zip(prompts, chosen, strict=True)]
    while not all(request.finished for request in requests):
        llm.step()
    wanted = [request.output().outputs for request in requests]
    assert [output.outputs for output in llm.generate(prompts, chosen, use_tqdm=False)] == wanted
    alone = [llm.generate(prompt, p, use_tqdm=False)[0].outputs for prompt, p in zip(prompts, chosen, strict=True)]
    assert alone == wanted
    assert not llm._core.has_work


def test_a_loop_may_take_several_steps_at_a_time(llm: LLM) -> None:
    request = llm.submit("hello", GREEDY)
    counts = []
    while not request.finished:
        llm.step(5)
        counts.append(request.num_output_tokens)
    ahead = llm.backend.name == "native"
    assert counts == ([1, 6, 11, 12] if ahead else list(range(1, 13)))
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        llm.step(0)


def test_a_closed_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    llm.step()
    assert not llm._core.has_work


# --- the context's end -----------------------------------------------------------------------------------------------


def test_context_length(llm: LLM, module: GPTModel) -> None:
    (output,) = llm.generate([1] * 60, SamplingParams(temperature=0.0, max_tokens=None), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].token_ids == naive(module, [1] * 60, 5)
    with pytest.raises(ValueError, match="the prompt has 65 tokens and the context 64"):
        llm.generate([1] * 65)


def nanogpt_crop(module: GPTModel, prompt: list[int], steps: int) -> tuple[int, ...]:
    """nanoGPT's loop: the last ``context_length`` tokens, positions from 0, every time."""
    idx = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(steps):
            cropped = idx if idx.size(1) <= 64 else idx[:, -64:]
            idx = torch.cat([idx, module(cropped)[:, -1].argmax(-1, keepdim=True)], 1)
    return tuple(idx[0, len(prompt) :].tolist())


@pytest.mark.parametrize("length", [3, 60, 64, 90])
def test_slide_is_nanogpts_loop(module: GPTModel, caplog: pytest.LogCaptureFixture, length: int) -> None:
    llm = LLM(module, dtype="float32", context_overflow="slide", max_num_batched_tokens=40, max_num_seqs=2)
    prompt = [(5 * i) % 256 for i in range(length)]
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    with caplog.at_level("WARNING", logger="engine"):
        outputs = llm.generate([prompt, prompt[:2]], params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == nanogpt_crop(module, prompt, 80)
    assert outputs[1].outputs[0].token_ids == nanogpt_crop(module, prompt[:2], 80)
    assert sum("whole prefill" in record.message for record in caplog.records) == 1


def test_a_temperature_that_would_overflow_is_greedy(llm: LLM) -> None:
    """Logits over 1e-38 are infinite, and which of the infinite ones is drawn would be each backend's own."""
    assert SamplingParams(temperature=1e-38) == SamplingParams(temperature=0.0)
    assert SamplingParams(temperature=1e-5).temperature == 1e-5
    cold = dataclasses.replace(GREEDY, temperature=1e-38, top_p=0.9, seed=1)
    assert llm.generate("abc", cold)[0].outputs == llm.generate("abc", GREEDY)[0].outputs


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be in \[0.0, inf\], got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must be in \(0.0, 1.0\], got 0.0"),
        ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1 or None, got 0"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens=3 is above max_tokens=2"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20 or None, got 21"),
        ({"seed": "x"}, "seed must be an integer or None, got 'x'"),
        ({"stop": ["a", ""]}, "stop must hold non-empty strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
    ],
)
def test_bad_sampling_params(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**option)  # type: ignore[arg-type]


def test_unknown_sampling_param() -> None:
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", SamplingParams(), "the prompt has no tokens"),
        ([300], SamplingParams(), "the prompt has token id 300; this model's ids are 0 to 255"),
        ([3], SamplingParams(stop_token_ids=[256]), "stop_token_ids has token id 256"),
        ([3], SamplingParams(logit_bias={999: 1.0}), "logit_bias has token id 999"),
        ([3], SamplingParams(allowed_token_ids=[256]), "allowed_token_ids has token id 256"),
        ({"promt": "a"}, SamplingParams(), r"got keys \['promt'\]"),
        ({}, SamplingParams(), "a prompt has 'prompt' or 'prompt_token_ids'"),
        (3.5, SamplingParams(), "prompts must be a prompt or a list of prompts, got float"),
        ([3.5], SamplingParams(), "a prompt is a string, token ids, or a dict"),
    ],
)
def test_bad_requests(llm: LLM, prompt: object, params: SamplingParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, params)  # type: ignore[arg-type]
    assert not llm._core.has_work  # nothing of it was queued


def test_text_without_a_tokenizer(module: GPTModel) -> None:
    llm = LLM(module, dtype="float32")
    with pytest.raises(ValueError, match="the model has 256 tokens and came without a tokenizer"):
        llm.generate("hello")
    with pytest.raises(ValueError, match="stop strings need text"):
        llm.generate([1, 2], SamplingParams(stop="x"))
    assert llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].text == ""


def test_arguments(module: GPTModel) -> None:
    LLM(module, tensor_parallel_size=1, enforce_eager=True, gpu_memory_utilization=0.5, trust_remote_code=True)
    for options, message in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported; it can only be 1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
        ({"max_model_len": 65}, "max_model_len=65 is above the model's context of 64"),
        ({"backend": "tpu"}, "unknown backend 'tpu'; choose from auto"),
        ({"dtype": "int3"}, "no backend has dtype 'int3': native has float32, bfloat16, int8, .* torch has float32"),
        ({"context_overflow": "wrap"}, "context_overflow must be 'stop' or 'slide'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens=8 is below"),
        ({"kv_cache_memory_bytes": 10}, "no room for a block"),
        ({"kv_cache_memory_bytes": 10**18}, "more than the"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(module, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LLM has no argument 'tensor_paralel_size'"):
        LLM(module, tensor_paralel_size=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_live_module_in_every_native_dtype(module: GPTModel, dtype: str) -> None:
    """The check of a live module allows for the rounding of the dtype asked for."""
    if missing("native"):
        pytest.skip("the C++ extension is not built")
    (output,) = LLM(module, backend="native", dtype=dtype).generate([1, 2, 3], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 12


def test_a_small_cache_runs_requests_one_after_another(module: GPTModel) -> None:
    per_block = LLM(module, dtype="float32").backend.capacity().bytes_per_block
    llm = LLM(module, dtype="float32", kv_cache_memory_bytes=3 * per_block)  # 48 tokens
    prompts = [[i] * 20 for i in range(1, 6)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [naive(module, prompt, 12) for prompt in prompts]
    with pytest.raises(ValueError, match="4 blocks of the KV cache, which has 3"):
        llm.generate([1] * 40, GREEDY)


def test_a_failing_step_leaves_the_engine_usable(module: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(module, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(llm.backend, "collect", lambda handle: (_ for _ in ()).throw(ValueError("bad logits")))
        with pytest.raises(ValueError, match="bad logits"):
            llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)
    assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == naive(module, [1, 2, 3], 12)


def test_logits(llm: LLM, module: GPTModel) -> None:
    ids = [(3 * i) % 256 for i in range(50)]
    with torch.no_grad():
        assert (llm.logits(ids) - module(torch.tensor([ids]))[0]).abs().max() < 1e-4
    stream = llm.stream("a", SamplingParams(max_tokens=5))
    next(stream)
    with pytest.raises(ValueError, match="needs an idle engine"):
        llm.logits(ids)
    stream.close()  # type: ignore[attr-defined]
