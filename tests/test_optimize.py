"""The one-line door: the same answers, the module's own manners, every change of weights noticed."""

import copy
import functools
import io
import pickle
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ODD_CONFIGS, tiny_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine.live import weights
from engine.live.logits import MANY, SERIAL
from engine.reference import GPTModel, TransformerBlock, generate_greedy, generate_sampled

IDS = torch.tensor([[5, 9, 2, 44, 3]])


def fast_and_plain(**changes: object) -> tuple[GPTModel, GPTModel]:
    model = tiny_module(**changes)
    return engine.optimize(model), model


def same(fast: nn.Module, model: nn.Module, ids: torch.Tensor = IDS) -> bool:
    with torch.no_grad():
        return bool((fast(ids) - model(ids)).abs().max() < 1e-4)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what PyTorch runs: the operator's name and how many elements its first argument has."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self.ran.append((func.__name__, first.numel() if isinstance(first, torch.Tensor) else 0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("key", ODD_CONFIGS)
def test_logits_and_greedy_tokens(key: str) -> None:
    torch.manual_seed(1)
    model = GPTModel(ODD_CONFIGS[key]).eval()
    fast = engine.optimize(model)
    ids = torch.randint(model.config["vocab_size"], (2, 7))
    assert same(fast, model, ids)
    steps = 20
    assert torch.equal(generate_greedy(fast, ids, steps), generate_greedy(model, ids, steps))


@pytest.mark.slow
def test_tokens_of_the_triton_kernels_are_the_references() -> None:
    """Greedy, interpreted; with other weights, too."""
    pytest.importorskip("triton")
    model = tiny_module(n_layers=1)
    fast = engine.optimize(model, backend="triton-interpret")
    first = generate_greedy(fast, IDS, 6)
    assert torch.equal(first, generate_greedy(model, IDS, 6))
    model.load_state_dict(tiny_module(seed=8, n_layers=1).state_dict())
    again = generate_greedy(fast, IDS, 3)
    assert torch.equal(again, generate_greedy(model, IDS, 3))
    assert not torch.equal(again, first[:, : again.shape[1]])
    assert same(fast, model)


def test_the_pages_own_loop_runs_unchanged() -> None:
    """Sampled, without no_grad, as the course page has it."""
    fast, model = fast_and_plain()
    torch.manual_seed(3)
    got = generate_sampled(fast, IDS, 30)
    torch.manual_seed(3)
    assert torch.equal(got, generate_sampled(model, IDS, 30))


def book_generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None):
    """The shape of the book's loop: crop, last logits, top-k by where, temperature, draw, stop at eos."""
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]
        with torch.no_grad():
            logits = model(idx_cond)
        logits = logits[:, -1, :]
        if top_k is not None:
            top_logits, _ = torch.topk(logits, top_k)
            logits = torch.where(logits < top_logits[:, -1:], torch.tensor(float("-inf")), logits)
        if temperature > 0.0:
            idx_next = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            idx_next = torch.argmax(logits, dim=-1, keepdim=True)
        if idx_next == eos_id:
            break
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "top_k": 25}, {"temperature": 0.8, "eos_id": 7}])
def test_the_books_loop(options: dict[str, float]) -> None:
    """Past the context length too, where every call is another window."""
    fast, model = fast_and_plain()
    torch.manual_seed(4)
    got = book_generate(fast, IDS, 80, 64, **options)
    torch.manual_seed(4)
    assert torch.equal(got, book_generate(model, IDS, 80, 64, **options))


def test_the_original_forward_is_not_called_again() -> None:
    calls = []

    class Counting(GPTModel):
        def forward(self, in_idx: torch.Tensor) -> torch.Tensor:
            calls.append(in_idx.shape)
            return super().forward(in_idx)

    torch.manual_seed(0)
    fast = engine.optimize(Counting(ODD_CONFIGS["plain"]).eval())
    assert len(calls) == 2  # the self-check's probes
    generate_greedy(fast, IDS, 20)
    assert len(calls) == 2


def test_it_is_the_module() -> None:
    fast, model = fast_and_plain()
    assert isinstance(fast, GPTModel)
    assert fast.tok_emb is model.tok_emb
    assert dict(fast.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert fast.eval() is fast
    assert fast.train() is fast
    assert model.training
    assert fast.to("cpu") is fast
    fast.note = "shared"
    assert model.note == "shared"
    assert set(fast.state_dict()) == set(model.state_dict())


def test_an_inherited_generate_runs_on_it() -> None:
    class WithGenerate(GPTModel):
        def generate(self, ids: torch.Tensor, steps: int) -> torch.Tensor:
            seen.append(type(self).__name__)
            return generate_greedy(self, ids, steps)

    seen: list[str] = []
    torch.manual_seed(0)
    model = WithGenerate(ODD_CONFIGS["plain"]).eval()
    fast = engine.optimize(model)
    assert torch.equal(fast.generate(IDS, 5), model.generate(IDS, 5))
    assert seen == ["OptimizedWithGenerate", "WithGenerate"]


def test_copies_and_pickles_are_plain() -> None:
    fast, model = fast_and_plain()
    for plain in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert type(plain) is GPTModel
        assert torch.equal(plain(IDS), model(IDS))
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)


def test_optimizing_twice_is_refused() -> None:
    fast, _ = fast_and_plain()
    with pytest.raises(ValueError, match=r"was made by engine\.optimize already"):
        engine.optimize(fast)


def test_forward_hooks_of_the_module_run() -> None:
    fast, model = fast_and_plain()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fast(IDS)
    assert seen == [torch.Size([1, 5, 97])]


# --- arguments and modes ---------------------------------------------------------------------------------------------


def test_arguments() -> None:
    fast, model = fast_and_plain()
    assert torch.allclose(fast(in_idx=IDS), model(IDS), atol=1e-4)
    with pytest.raises(TypeError, match="takes 'in_idx' only, got targets"):
        fast(IDS, targets=IDS)
    with pytest.raises(TypeError, match="one argument"):
        fast(IDS, IDS)
    with pytest.raises(TypeError, match="must be a tensor of token ids, got list"):
        fast([[1, 2]])
    with pytest.raises(ValueError, match=r"integer ids \[B, T\], not empty, got torch.float32"):
        fast(IDS.float())
    with pytest.raises(ValueError, match="not empty"):
        fast(IDS[:, :0])
    with pytest.raises(ValueError, match="65 tokens and the model's context is 64"):
        fast(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="token id 97; this model's ids are 0 to 96"):
        fast(torch.tensor([[1, 97]]))
    with pytest.raises(TypeError, match="unexpected keyword"):
        engine.optimize(model, fusion=True)
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        engine.optimize(model, backend="tpu")


def test_training_mode() -> None:
    fast, model = fast_and_plain(drop_rate=0.1)
    fast.train()
    with pytest.raises(ValueError, match=r"training mode and drop_emb has dropout 0\.1"):
        fast(IDS)
    assert fast.eval()(IDS).shape == (1, 5, 97)
    still, _ = fast_and_plain(drop_rate=0.0)
    assert still.train()(IDS).shape == (1, 5, 97)
    assert model.training is False


def test_optimizing_in_training_mode_leaves_the_modes_alone() -> None:
    model = tiny_module(drop_rate=0.1).train()
    model.trf_blocks[0].eval()
    engine.optimize(model)
    assert model.training
    assert not model.trf_blocks[0].training
    assert model.trf_blocks[1].training


def test_a_backward_says_why_it_cannot() -> None:
    fast, _ = fast_and_plain()
    logits = fast(IDS)
    loss = F.cross_entropy(logits[0], IDS[0])
    with pytest.raises(RuntimeError, match=r"engine\.optimize.*no gradients"):
        loss.backward()
    with torch.no_grad():
        assert not fast(IDS).requires_grad
    with torch.inference_mode():
        fast(IDS[:, :3])
        longer = torch.cat([IDS, IDS], dim=1)
        assert same(fast, _, longer)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_autocast_is_off_inside(backend: str) -> None:
    model = tiny_module()
    fast = engine.optimize(model, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fast(IDS)
    assert got.dtype == torch.float32
    assert torch.allclose(got, model(IDS), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_modules_dtype_is_kept(dtype: torch.dtype) -> None:
    model = tiny_module().to(dtype)
    fast = engine.optimize(model)
    got = fast(IDS)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.bfloat16: 0.3, torch.float16: 0.03}[dtype]
    assert (got - model(IDS)).abs().max() < tolerance


def test_a_move_to_another_dtype_is_followed() -> None:
    fast, model = fast_and_plain()
    fast(IDS)
    assert fast.double() is fast
    assert fast(IDS).dtype == torch.float64
    assert (fast(IDS) - model(IDS)).abs().max() < 1e-9


# --- the buffer of logits --------------------------------------------------------------------------------------------


def computed_tokens(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every later call appends how many tokens it ran."""
    counts: list[int] = []
    backend = type(fast)._accelerator._backend
    submit = backend.submit

    def counting(batch):  # type: ignore[no-untyped-def]
        counts.append(len(batch.token_ids))
        return submit(batch)

    monkeypatch.setattr(backend, "submit", counting)
    return counts


def test_only_new_tokens_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = fast_and_plain()
    counts = computed_tokens(fast, monkeypatch)
    generate_greedy(fast, IDS, 10)
    assert counts == [5, *[1] * 9]
    counts.clear()
    other = torch.cat([IDS, torch.tensor([[1, 2, 3]])], dim=1)
    assert same(fast, model, other)
    assert sum(counts) == 3  # the prompt of five was known
    counts.clear()
    assert same(fast, model, IDS[:, :2])
    assert counts == []
    assert same(fast, model, IDS.expand(3, -1))
    assert sum(counts) == 15


def test_logits_given_before_stay_as_they_were() -> None:
    fast, _ = fast_and_plain()
    first = fast(IDS)
    kept = first.clone()
    fast(torch.cat([IDS, IDS], dim=1))
    fast(IDS + 1)
    generate_greedy(fast, IDS + 2, 40)
    assert torch.equal(first, kept)


def test_an_edit_in_place_is_noticed() -> None:
    """Loops that write -inf into the logits they got must not find it there again."""
    fast, model = fast_and_plain()
    logits = fast(IDS)
    logits[:, -1, :] = float("-inf")
    assert same(fast, model)
    assert same(fast, model, torch.cat([IDS, IDS], dim=1))
    with torch.no_grad():
        fast(IDS).mul_(2)
    assert same(fast, model)
    with torch.inference_mode():
        fast(IDS).zero_()
    assert same(fast, model)


def test_a_few_rows_are_copied_without_pytorchs_threads() -> None:
    """Which they would leave spinning on the cores that the next step needs."""
    fast, model = fast_and_plain(vocab_size=50257, n_layers=1)
    fast(IDS)
    with Operations() as operations:
        assert same(fast, model, torch.cat([IDS, IDS[:, :2]], dim=1))
    copied = [count for name, count in operations.ran if name == "copy_.default"]
    assert sum(copied) == 2 * 50257 < MANY
    assert max(copied) <= SERIAL < 1 << 15  # PyTorch's grain size


def test_a_context_too_large_for_the_buffer_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.live.logits.MAX_BYTES", 97 * 4 * 7)
    fast, model = fast_and_plain()
    assert torch.equal(generate_greedy(fast, IDS, 12), generate_greedy(model, IDS, 12))


def test_long_prefill_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.optimize"], "STEP_TOKENS", 11)
    fast, model = fast_and_plain()
    assert same(fast, model, torch.randint(97, (3, 40)))


def test_rows_are_refused_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = fast_and_plain()
    accelerator = type(fast)._accelerator
    capacity = accelerator._backend.capacity()
    small = type(capacity)(capacity.weight_bytes, capacity.bytes_per_block, 5 * capacity.bytes_per_block)
    monkeypatch.setattr(accelerator._backend, "capacity", lambda: small)
    with pytest.raises(ValueError, match="take fewer rows"):
        fast(IDS.expand(8, -1))


def test_two_threads() -> None:
    fast, model = fast_and_plain()
    errors = []

    def work(seed: int) -> None:
        ids = torch.randint(97, (1, 6), generator=torch.Generator().manual_seed(seed))
        if not torch.equal(generate_greedy(fast, ids, 15), generate_greedy(model, ids, 15)):
            errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- new weights -----------------------------------------------------------------------------------------------------


def adamw(**options: object):  # type: ignore[no-untyped-def]
    def step(model: GPTModel) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)  # type: ignore[arg-type]
        F.cross_entropy(model(IDS)[0], IDS[0]).backward()
        optimizer.step()

    return step


def load_other(model: GPTModel) -> None:
    model.load_state_dict(tiny_module(seed=8).state_dict())


def edit_data(model: GPTModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.05)


def ema_through_data(model: GPTModel) -> None:
    other = tiny_module(seed=9)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.1)


def replace_parameter(model: GPTModel) -> None:
    model.out_head.weight = nn.Parameter(torch.randn_like(model.out_head.weight))


def replace_data(model: GPTModel) -> None:
    model.trf_blocks[1].ff.layers[0].weight.data = torch.randn_like(model.trf_blocks[1].ff.layers[0].weight) * 0.2


def replace_submodule(model: GPTModel) -> None:
    model.trf_blocks[0] = TransformerBlock(model.config).eval()


def through_numpy(model: GPTModel) -> None:
    model.final_norm.scale.detach().numpy()[:] += 0.5


CHANGES = {
    "adamw": adamw(foreach=False),
    "adamw_foreach": adamw(foreach=True),
    "adamw_fused": adamw(fused=True),
    "load_state_dict": load_other,
    "data": edit_data,
    "ema": ema_through_data,
    "new_parameter": replace_parameter,
    "new_data": replace_data,
    "new_submodule": replace_submodule,
    "numpy": through_numpy,
}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take fingerprints as they are taken of tensors on a GPU."""
    monkeypatch.setattr(weights, "_Fingerprint", functools.partial(weights._Fingerprint, through_numpy=False))


@pytest.mark.parametrize("as_on", ["cpu", "gpu"])
@pytest.mark.parametrize("key", CHANGES)
def test_new_weights_are_seen(key: str, as_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if as_on == "gpu":
        as_on_a_gpu(monkeypatch)
    fast, model = fast_and_plain()
    before = fast(IDS).detach().clone()
    CHANGES[key](model)
    assert same(fast, model)
    assert not torch.allclose(fast(IDS), before, atol=1e-3)
    assert torch.equal(generate_greedy(fast, IDS, 10), generate_greedy(model, IDS, 10))


def varied_tensors() -> list[torch.Tensor]:
    """Contiguous, transposed and with gaps, of 16 to 64 bits, with fewer elements than are sampled and with many."""
    shapes = [(), (1,), (31,), (32,), (33,), (62,), (63,), (100, 7), (3, 4, 5)]
    made = [
        torch.randn(shape).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64) for shape in shapes
    ]
    return [*made, torch.randn(50, 8).t(), torch.randn(40, 9)[:, ::2], torch.zeros(0)]


@pytest.mark.parametrize("through_numpy", [True, False])
def test_the_fingerprint_sees_every_place_that_it_says(through_numpy: bool) -> None:
    """The first element, others at equal distances, the last one within 30 of the end; 32 where there are as many."""
    none = torch.empty(0, dtype=torch.int64)
    for tensor in varied_tensors():
        fingerprint = weights._Fingerprint([tensor], through_numpy)
        before, _ = fingerprint.take(none)
        seen = []
        in_memory = tensor.t() if tensor.dim() == 2 and tensor.t().is_contiguous() else tensor
        for place in range(tensor.numel()):
            index = np.unravel_index(place, in_memory.shape)
            old = in_memory[index].clone()
            in_memory[index] = old + 1
            now, _ = fingerprint.take(none)
            in_memory[index] = old
            if not all(map(np.array_equal, now, before)):
                seen.append(place)
        count = tensor.numel()
        assert len(seen) >= min(count, 32), tensor.shape
        assert len(seen) < 64
        if count:
            assert seen == list(range(0, count, max(1, (count - 1) // 31)))
            assert count - 1 - seen[-1] <= 30


def test_ids_come_with_the_fingerprint() -> None:
    for through_numpy in (True, False):
        fingerprint = weights._Fingerprint(varied_tensors(), through_numpy)
        without, _ = fingerprint.take(torch.empty(0, dtype=torch.int64))
        for ids in (IDS, IDS.int(), torch.arange(12).view(3, 4).t()):
            values, host_ids = fingerprint.take(ids)
            assert host_ids.dtype == torch.int64
            assert torch.equal(host_ids, ids.long())
            assert all(map(np.array_equal, values, without))


def test_a_fingerprint_takes_as_many_operations_for_many_tensors_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each one is a launch: a call runs one concatenation, and one copy to the host."""
    as_on_a_gpu(monkeypatch)
    for n_layers in (1, 5):
        fast = engine.optimize(tiny_module(n_layers=n_layers))
        fast(IDS)
        with Operations() as operations:
            fast(IDS)
        assert [name for name, _ in operations.ran] == ["cat.default"]


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_an_optimizer_step_on_one_element_is_seen(options: dict[str, bool]) -> None:
    """A fused step leaves the version counter alone, and the fingerprint does not sample this element."""
    fast, model = fast_and_plain()
    fast(IDS)
    weight = model.tok_emb.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[5, 7] = 1.0
    torch.optim.AdamW([weight], lr=2.0, weight_decay=0.0, **options).step()  # type: ignore[arg-type]
    assert same(fast, model)


@pytest.mark.parametrize("place", [(5, 7), 5, (slice(None), 7)], ids=["element", "row", "column"])
def test_refresh_after_an_edit_that_nothing_sees(place: Any) -> None:
    fast, model = fast_and_plain()
    fast(IDS)
    model.tok_emb.weight.data[place] *= -9.0
    assert not same(fast, model)  # as the docstring says
    fast.refresh()
    assert same(fast, model)


@pytest.mark.parametrize("width", [17, 40, 768])
def test_a_30th_of_a_tensor_edited_in_one_piece_is_seen(width: int) -> None:
    tensor = torch.zeros(97, width)
    watch = weights.WeightWatch([tensor])
    flat, none = tensor.view(-1).data, torch.empty(0, dtype=torch.int64)
    piece = len(flat) // 30
    for start in range(0, len(flat) - piece, 7):
        flat[start : start + piece] += 1
        assert watch.compare(none)[1]
        flat[start : start + piece] -= 1
    assert not watch.compare(none)[1]


def test_another_models_optimizer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = fast_and_plain()
    fast(IDS)
    counts = computed_tokens(fast, monkeypatch)
    adamw(foreach=False)(tiny_module(seed=5))
    fast(IDS)
    assert counts == []


# --- refusals --------------------------------------------------------------------------------------------------------


def with_part(path: str, forward) -> GPTModel:  # type: ignore[no-untyped-def]
    """A freshly initialised model, where such differences are small, one part of which computes something else."""
    torch.manual_seed(0)
    model = GPTModel(ODD_CONFIGS["plain"]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    part = model.get_submodule(path)
    part.__class__ = type("Odd" + type(part).__name__, (type(part),), {"forward": forward})
    return model


def erf_feed_forward(self, x):  # type: ignore[no-untyped-def]
    return self.layers[2](F.gelu(self.layers[0](x)))


def other_scale(self, x):  # type: ignore[no-untyped-def]
    old, self.scale = self.scale, 1.05 * self.head_dim**-0.5
    try:
        return type(self).__mro__[1].forward(self, x)
    finally:
        self.scale = old


def unbiased_norm(self, x):  # type: ignore[no-untyped-def]
    return self.scale * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + self.eps) + self.shift


def parallel_block(self, x):  # type: ignore[no-untyped-def]
    return x + self.att(self.norm1(x)) + self.ff(self.norm2(x))


@pytest.mark.parametrize(
    ("path", "forward", "message"),
    [
        ("trf_blocks.1.ff", erf_feed_forward, r"OddFeedForward at trf_blocks\.1\.ff does not compute"),
        ("trf_blocks.0.att", other_scale, r"OddMultiHeadAttention at trf_blocks\.0\.att does not compute"),
        ("trf_blocks.1.norm2", unbiased_norm, r"OddLayerNorm at trf_blocks\.1\.norm2 does not compute"),
    ],
)
def test_a_part_that_is_not_what_it_seems_is_refused(path: str, forward, message: str) -> None:  # type: ignore[no-untyped-def]
    model = with_part(path, forward)
    with pytest.raises(ValueError, match=message):
        engine.optimize(model)
    with pytest.raises(ValueError, match=message):
        engine.LLM(model)


def test_a_module_that_was_refused_at_a_change_is_refused_again() -> None:
    fast, model = fast_and_plain()
    block, odd = model.trf_blocks[0], with_part("trf_blocks.0.ff", erf_feed_forward).trf_blocks[0]
    model.trf_blocks[0] = odd
    for _ in range(2):
        with pytest.raises(ValueError, match="does not compute"):
            fast(IDS)
    model.trf_blocks[0] = block
    assert same(fast, model)


def test_another_wiring_is_refused() -> None:
    model = tiny_module()
    model.trf_blocks[0].__class__ = type("ParallelBlock", (TransformerBlock,), {"forward": parallel_block})
    with pytest.raises(ValueError, match=r"differ by .* on a probe"):
        engine.optimize(model)


def test_a_forward_that_returns_something_else_is_refused() -> None:
    class WithLoss(GPTModel):
        def forward(self, in_idx: torch.Tensor):  # type: ignore[no-untyped-def,override]
            return super().forward(in_idx), None

    with pytest.raises(ValueError, match="forward returns tuple"):
        engine.optimize(WithLoss(ODD_CONFIGS["plain"]))


def test_other_modules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear"):
        engine.optimize(nn.Linear(3, 3))


@pytest.mark.parametrize("threads", [0, 1.5, 60_000])
def test_threads_that_are_no_number_of_threads_are_refused(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be"):
        engine.optimize(tiny_module(), threads=threads)
