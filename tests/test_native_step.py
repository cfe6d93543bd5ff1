"""The native backend's step: held to ``GPTModel``, and to its own bits in every batch, chunking and thread count."""

import numpy as np
import pytest
import torch
from models import random_weights, tiny_config
from native_steps import BLOCK, ISAS, TOLERANCE, batch, ids_of, logits_of, make, neutral, run_in_process

from engine.backends.native_backend import NativeBackend
from engine.backends.torch_backend import TorchBackend
from engine.checkpoints.canonical import to_reference
from engine.config import ModelConfig

CONFIGS = {
    "plain": tiny_config(),
    "head_dim_20": tiny_config(embed_dim=60, n_heads=3, hidden_dim=101),
    "head_dim_80": tiny_config(embed_dim=80, n_heads=1, vocab_size=131),
    "narrow": tiny_config(embed_dim=6, n_heads=3, hidden_dim=5, vocab_size=3),
    "tied": tiny_config(tied_head=True),
    "exact_gelu": tiny_config(activation="gelu"),
    "relu": tiny_config(activation="relu", norm_eps=1e-3),
    "silu_scaled": tiny_config(activation="silu", attn_scales=(1.0, 0.25)),
    "gpt2_vocabulary": tiny_config(vocab_size=50257, embed_dim=16, n_layers=1, tied_head=True),
}
DTYPES = sorted(TOLERANCE)


def reference(config: ModelConfig, ids: list[int], seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return to_reference(config, random_weights(config, seed=seed, scale=0.15))(torch.tensor([ids]))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", CONFIGS)
def test_logits(key: str, dtype: str) -> None:
    config = CONFIGS[key]
    ids = ids_of(1, 37, config)
    wanted = reference(config, ids)
    got = logits_of(make(config, dtype), [(0, 0, ids)])
    assert (got - wanted).abs().max() < TOLERANCE[dtype]
    if dtype == "float32":
        assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batch(dtype: str) -> None:
    """A decode, a whole prompt and a chunk in one step; then rows asked for twice and in any order."""
    config = CONFIGS["head_dim_20"]
    a, b, c = ids_of(2, 20, config), ids_of(3, 9, config), ids_of(4, 30, config)
    backend = make(config, dtype)
    logits_of(backend, [(0, 0, a[:19]), (2, 0, c[:10])], "last")
    got = logits_of(backend, [(0, 19, a[19:]), (1, 0, b), (2, 10, c[10:])])
    wanted = torch.cat([reference(config, a)[19:], reference(config, b), reference(config, c)[10:]])
    assert (got - wanted).abs().max() < TOLERANCE[dtype]


def every_way(backend: NativeBackend, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Logits of one sequence of 40 tokens, whole, in chunks, token by token and among neighbours."""
    ids = ids_of(5, 40, config)
    others = [ids_of(10 + i, 40, config) for i in range(5)]
    found = {"whole": logits_of(backend, [(0, 0, ids)])}
    for name, sizes in {"chunks": [7, 1, 2, 16, 14], "tokens": [1] * 40, "last alone": [39, 1]}.items():
        rows, start = [], 0
        for size in sizes:
            rows.append(logits_of(backend, [(0, start, ids[start : start + size])]))
            start += size
        found[name] = torch.cat(rows)
    together = logits_of(backend, [(3, 0, others[2]), (0, 0, ids), *((i, 0, others[i - 1]) for i in (1, 2, 4, 5))])
    found["among others"] = together[40:80]
    rows = []
    for t in range(40):  # decoding beside five others
        parts = [(0, t, ids[t : t + 1]), *((i, t, others[i - 1][t : t + 1]) for i in range(1, 6))]
        rows.append(logits_of(backend, parts)[:1])
    found["decoded among others"] = torch.cat(rows)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_bit_for_bit(dtype: str) -> None:
    config = tiny_config(embed_dim=120, n_heads=3, hidden_dim=333, vocab_size=131)
    one = every_way(make(config, dtype, threads=1), config)
    for name, got in one.items():
        assert torch.equal(got, one["whole"]), name
    for threads in (2, 3, 4):
        more = every_way(make(config, dtype, threads=threads), config)
        assert all(torch.equal(more[name], one["whole"]) for name in more), threads


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_those_of_each_sequence(dtype: str) -> None:
    """300 rows, which several threads share out between them: by rows, by both, and by columns."""
    config = tiny_config(embed_dim=120, n_heads=3, hidden_dim=333, vocab_size=131)
    prompts = [(row, 0, ids_of(10 + row, 50, config)) for row in range(6)]
    wanted = torch.cat([logits_of(make(config, dtype, threads=1), [part]) for part in prompts])
    for threads in (2, 3, 4, 6, 20):
        assert torch.equal(logits_of(make(config, dtype, threads=threads), prompts), wanted), threads


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 9, 4), (60, 1, 33, 63, 60, 61)], ids=["decode", "few", "many"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_which_nothing_is_wanted(dtype: str, lengths: tuple[int, ...]) -> None:
    """They end in the last layer with their K and V; the others, in whatever order, keep their bits."""
    config = CONFIGS["head_dim_20"]
    ids = [ids_of(60 + row, length + 1, config) for row, length in enumerate(lengths)]
    parts = [(row, 0, tokens[:-1]) for row, tokens in enumerate(ids)]
    following = [(row, len(tokens) - 1, tokens[-1:]) for row, tokens in enumerate(ids)]
    whole = make(config, dtype)
    wanted = logits_of(whole, parts)
    after = logits_of(whole, following)
    total = sum(lengths)
    some = np.random.default_rng(total).integers(total, size=7).tolist()  # twice the same one, too
    for threads, rows in [(1, some), (2, some), (3, some), (2, [0]), (2, [total - 1]), (2, [])]:
        backend = make(config, dtype, threads)
        found = backend.collect(backend.submit(batch(parts, rows))).logits
        assert found is None if not rows else torch.equal(found, wanted[rows])
        assert torch.equal(logits_of(backend, following), after)
    drawn, both = [total - 1, 0, total // 2], make(config, dtype)  # and draws besides logits
    result = both.collect(both.submit(batch(parts, some, neutral(3, temperature=np.zeros(3, np.float32)), drawn)))
    assert result.logits is not None
    assert torch.equal(result.logits, wanted[some])
    assert result.token_ids.tolist() == wanted[drawn].argmax(1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "head_dim"), [(16, 64), (24, 80), (40, 33), (64, 128), (150, 33)])
def test_long_contexts_bit_for_bit(block: int, head_dim: int, dtype: str) -> None:
    """Many blocks, of one chunk of lanes and of several, whole, in chunks and token by token."""
    config = tiny_config(embed_dim=8 * head_dim, n_heads=8, n_layers=1, context_length=200, attn_scales=(0.01,))
    weights = random_weights(config, scale=0.15)
    # Large scores that differ by little, so that the order of their sums shows.
    weights["blocks.0.qkv.bias"][: 2 * config.embed_dim] = 8
    ids = ids_of(6, 190, config)
    backend = NativeBackend(config, weights, dtype=dtype, device="cpu", block_size=block, threads=2)
    backend.allocate(96)
    whole = logits_of(backend, [(0, 0, ids)], block=block)
    with torch.no_grad():
        wanted = to_reference(config, weights)(torch.tensor([ids]))[0]
    assert (whole - wanted).abs().mean() < {"float32": 1e-5, "bfloat16": 0.025}[dtype] * wanted.std()
    for row, sizes in ((1, [33, 1, 16, 2, 138]), (2, [100] + [1] * 90)):
        start = 0
        for size in sizes:
            got = logits_of(backend, [(row, start, ids[start : start + size])], block=block)
            assert torch.equal(got, whole[start : start + size]), (sizes, start)
            start += size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_softmax_of_negative_scales(dtype: str) -> None:
    """The largest score is no longer the one that weighs most."""
    config = tiny_config(attn_scales=(-3.0, -3.0))
    ids = ids_of(7, 60, config)
    errors = logits_of(make(config, dtype), [(0, 0, ids)]) - reference(config, ids)
    assert errors.abs().max() < {"float32": 1e-4, "bfloat16": 0.5}[dtype]  # and no NaN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_softmax_to_the_base_e(dtype: str) -> None:
    """One token with a score of 3.5 ln 2 has as much weight as 128 with -3.5 ln 2, and the opposite V: nothing is left.

    All numbers are exact in these precisions, so that a base that is off by a thousandth would show.
    """
    width = 32
    sizes = {"vocab_size": 2, "embed_dim": width, "hidden_dim": 16, "context_length": 129}
    config = tiny_config(**sizes, n_heads=1, n_layers=1, attn_scales=(np.log(2),))
    weights = {name: torch.zeros_like(value) for name, value in random_weights(config).items()}
    for name in ("norm1", "norm2"):
        weights[f"blocks.0.{name}.weight"] += 1
    weights["final_norm.weight"] += 1
    pattern = torch.tensor([1.0, -1.0]).repeat(width // 2)
    weights["tok_emb"][:] = torch.stack([pattern, -pattern])
    weights["blocks.0.qkv.bias"][0] = 1
    weights["blocks.0.qkv.weight"][width] = pattern * (3.5 / width)
    weights["blocks.0.qkv.weight"][2 * width] = pattern / width
    weights["blocks.0.proj.weight"][0, 0] = 64
    weights["head"][0, 0] = 1
    ids = [0] + [1] * 128
    backend = NativeBackend(config, weights, dtype=dtype, device="cpu", block_size=16, threads=2)
    backend.allocate(96)
    got = logits_of(backend, [(0, 0, ids)], block=16)
    with torch.no_grad():
        wanted = to_reference(config, weights)(torch.tensor([ids]))[0]
    assert wanted[-1, 0] == pytest.approx(-1, abs=1e-3)
    assert (got - wanted)[-1].abs().max() < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_smallest_numbers_bit_for_bit(dtype: str) -> None:
    """V so small that products with it are denormal, which tiles flush, in a model whose logits show it."""
    config = tiny_config(embed_dim=64, n_heads=2, n_layers=1)
    weights = random_weights(config, scale=0.15)
    for name in ("tok_emb", "blocks.0.qkv.bias", "blocks.0.fc2.weight", "blocks.0.fc2.bias"):
        weights[name].zero_()
    weights["blocks.0.qkv.weight"][128:] = 0
    weights["blocks.0.qkv.bias"][128:] = 2e-38
    weights["pos_emb"] = torch.rand(config.context_length, 64, generator=torch.Generator().manual_seed(0)) * 1e-36
    weights["blocks.0.norm1.weight"].fill_(1e34)
    weights["blocks.0.norm1.bias"].zero_()
    weights["blocks.0.proj.weight"], weights["blocks.0.proj.bias"] = 64 * torch.eye(64), torch.zeros(64)
    weights["final_norm.bias"].zero_()
    backend = NativeBackend(config, weights, dtype=dtype, device="cpu", block_size=BLOCK, threads=2)
    backend.allocate(96)
    ids = ids_of(7, 40, config)
    whole = logits_of(backend, [(0, 0, ids)])
    assert whole.isfinite().all()
    assert (whole != 0).any()
    for t in range(40):
        assert torch.equal(logits_of(backend, [(1, t, ids[t : t + 1])])[0], whole[t]), t


def test_the_bit_test_can_fail() -> None:
    """The negative control: PyTorch's linear layers, whose sums depend on the number of rows, do not pass it."""
    config = tiny_config(embed_dim=120, n_heads=3, hidden_dim=333, vocab_size=131)
    backend = TorchBackend(config, random_weights(config), dtype="float32", device="cpu", block_size=BLOCK)
    backend.allocate(96)
    found = every_way(backend, config)  # type: ignore[arg-type]
    assert not all(torch.equal(got, found["whole"]) for got in found.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_do_not_depend_on_neighbours(dtype: str) -> None:
    """Tokens, logprobs and ranks of a row are the same bits alone, beside others, and on another thread count."""
    config = CONFIGS["plain"]
    parts = [(i, 0, ids_of(20 + i, 9 + i, config)) for i in range(6)]
    ends = (np.cumsum([len(part[2]) for part in parts]) - 1).tolist()
    options = {
        "temperature": np.array([1, 0, 0.7, 2, 1, 1], np.float32),
        "top_k": np.array([0, 0, 5, 0, 20, 0], np.int32),
        "top_p": np.array([1, 1, 1, 0.6, 0.9, 1], np.float32),
    }
    seeds, positions = np.arange(6, dtype=np.uint64), np.arange(6, dtype=np.uint32)
    results = []
    for threads in (1, 3):
        backend = make(config, dtype, threads)
        sampling = neutral(6, **options, seeds=seeds, positions=positions, num_logprobs=4)
        together = backend.collect(backend.submit(batch(parts, "none", sampling, ends)))
        results.append(together)
        for i, part in enumerate(parts):
            own = {name: values[i : i + 1] for name, values in options.items()}
            sampling = neutral(1, **own, seeds=seeds[i : i + 1], positions=positions[i : i + 1], num_logprobs=4)
            alone = backend.collect(backend.submit(batch([part], "none", sampling, [len(part[2]) - 1])))
            for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
                assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[i]), (name, i)
    assert np.array_equal(results[0].token_ids, results[1].token_ids)
    assert np.array_equal(results[0].logprobs, results[1].logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """Conformance and invariance in a process of their own under each instruction set that this CPU has."""
    code = """
import test_native_step as t
for dtype in t.DTYPES:
    for key in ("plain", "head_dim_20", "narrow"):
        t.test_logits(key, dtype)
    t.test_mixed_batch(dtype)
    t.test_batch_invariance_bit_for_bit(dtype)
print(t.make(t.CONFIGS["plain"]).isa)
"""
    assert run_in_process(code, ENGINE_ISA=isa).strip() == isa


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"'avx1024' is not available here; this CPU and this build have .*generic"):
        make(CONFIGS["plain"])


def test_update_weights_in_place() -> None:
    config = CONFIGS["tied"]
    ids = ids_of(6, 12, config)
    for dtype in DTYPES:
        backend = make(config, dtype)
        before = backend.capacity().weight_bytes
        weights = random_weights(config, seed=9, scale=0.15)
        backend.update_weights(weights)
        assert backend.capacity().weight_bytes == before
        assert torch.equal(logits_of(backend, [(0, 0, ids)]), logits_of(make(config, dtype, seed=9), [(0, 0, ids)]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wild", [False, True])
def test_bfloat16_weights_with_rare_exponents(wild: bool, tied: bool) -> None:
    """A few, and so many that the matrices are not coded: the logits are those of the module with the same weights, and
    after updates those of the new ones. What could not be coded once is not coded later."""
    config = tiny_config(tied_head=tied)
    weights = random_weights(config, scale=0.15)
    generator = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        if weight.dim() < 2 or name == "pos_emb" or (tied and name == "head"):
            continue
        if wild:  # of no consequence, but with any exponent
            chosen = torch.rand(weight.shape, generator=generator) < 0.3
            weight[chosen] = torch.exp2(-15 - 100 * torch.rand(weight.shape, generator=generator))[chosen]
        weight[5, 3], weight[6, 0], weight[-1, -1] = 8.0, -5.0, 1e-12
    if tied:
        weights["head"] = weights["tok_emb"]
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    ids = [5, 6, *ids_of(1, 20, config)]
    with torch.no_grad():
        wanted = to_reference(config, rounded)(torch.tensor([ids]))[0]
    backend = NativeBackend(config, weights, dtype="bfloat16", device="cpu", block_size=BLOCK, threads=2)
    backend.allocate(96)
    assert backend.coded == (backend.isa == "avx512_bf16" and not wild)
    found = logits_of(backend, [(0, 0, ids)])
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    first_coded = backend.coded
    usual = logits_of(make(config, "bfloat16", seed=3), [(0, 0, ids)])
    for changed, logits in ((random_weights(config, seed=3, scale=0.15), usual), (weights, found)):
        backend.update_weights(changed)
        assert torch.equal(logits_of(backend, [(0, 0, ids)]), logits)
        assert backend.coded == first_coded
    for name, weight in weights.items():
        if weight.dim() == 2 and name != "pos_emb":
            weight.copy_(torch.exp2(-100 * torch.rand(weight.shape, generator=generator)))
    for changed in (weights, random_weights(config, seed=3, scale=0.15)):
        backend.update_weights(changed)
        assert not backend.coded
    assert torch.equal(logits_of(backend, [(0, 0, ids)]), usual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    """Half types and views of transposed storage are read as they are; the values are those of ``float()``."""
    config = CONFIGS["plain"]
    stored = {name: tensor.to(dtype) for name, tensor in random_weights(config, scale=0.15).items()}
    strided = {n: t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for n, t in stored.items()}
    ids, found = ids_of(7, 12, config), []
    for weights in (strided, {name: tensor.float() for name, tensor in stored.items()}):
        backend = NativeBackend(config, weights, dtype="float32", device="cpu", block_size=BLOCK, threads=2)
        backend.allocate(96)
        found.append(logits_of(backend, [(0, 0, ids)]))
    assert torch.equal(*found)


def test_capacity() -> None:
    config = tiny_config(embed_dim=128, n_heads=2, hidden_dim=256)
    sizes = {}
    items = {"float32": 4, "bfloat16": 1.5, "int8": 1, "int4": 0.5, "int4-g64": 0.5, "int4-g128": 0.5}
    for dtype, item in items.items():
        backend = NativeBackend(config, random_weights(config), dtype=dtype, device="cpu", block_size=16)
        sizes[dtype] = backend.capacity()
        assert backend.coded == (dtype == "bfloat16" and backend.isa == "avx512_bf16")
        if dtype == "bfloat16":
            assert backend.coded == (sizes[dtype].weight_bytes < 1.8 * config.num_parameters)
        assert sizes[dtype].weight_bytes >= item * config.num_parameters
        assert sizes[dtype].free_bytes > 0
        assert sizes[dtype].bytes_per_block == 2 * config.n_layers * 16 * config.embed_dim * max(2, item)
    by_size = sorted(items, key=lambda dtype: -sizes[dtype].weight_bytes)
    assert by_size == ["float32", "bfloat16", "int8", "int4", "int4-g64", "int4-g128"]
