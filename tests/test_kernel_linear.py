"""The fused linear against float64: K splits, epilogues, the paged cache, the next LayerNorm, row bits."""

from dataclasses import dataclass
from pathlib import Path

import kernel_harness as harness
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import tiles
from kernels.linear import KVCache, Residual, Workspace, cost, linear
from kernels.weights import Weights, pack, unpack

EPS = 1e-5
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def workspace(rows: int, n: int, k: int, dtype: torch.dtype, residual: bool = False) -> Workspace:
    partials, tile_counters, row_counters = Workspace.needed(rows, n, k, dtype.itemsize, residual)
    return Workspace(
        torch.full((partials,), torch.nan),
        torch.zeros(tile_counters, dtype=torch.int32),
        torch.zeros(row_counters, dtype=torch.int32),
    )


def counters_are_zero(space: Workspace) -> bool:
    return not space.tile_counters.any() and not space.row_counters.any()


def shared(space: Workspace) -> list[torch.Tensor]:
    return [space.partials, space.tile_counters, space.row_counters]


@dataclass
class Case:
    x: torch.Tensor
    weights: Weights
    bias: torch.Tensor
    dtype: torch.dtype

    @property
    def inputs(self) -> list[torch.Tensor]:
        scales = [] if self.weights.scales is None else [self.weights.scales]
        columns = self.weights.shape[1] if self.weights.kind != "int4" else None  # padding is not to be read
        return [self.x, self.weights.data[:, :columns], self.bias, *scales]


def make(rows: int, n: int, k: int, dtype: torch.dtype, kind: str = "float") -> Case:
    torch.manual_seed(rows * 7919 + n * 31 + k)
    x = harness.guarded_like(torch.randn(rows, k), dtype, gap=24)
    weights = pack(torch.randn(n, k) / k**0.5, dtype, kind)
    return Case(x, weights, harness.guarded_like(torch.randn(n), dtype), dtype)


def output_floor(dtype: torch.dtype, oracle: torch.Tensor) -> float:
    """Half a unit in the last place of the largest output, and what adding a few hundred terms in float32 costs."""
    return (torch.finfo(dtype).eps / 2 + 4e-7) * oracle.abs().max().item()


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k", "activation"),
    [
        (1, 1, 1, "none"),
        pytest.param(3, 37, 37, "gelu_tanh", marks=pytest.mark.versions),
        pytest.param(9, 70, 200, "gelu", marks=pytest.mark.versions),
        (17, 64, 128, "relu"),
        (33, 130, 64, "silu"),
        (66, 65, 130, "none"),
        pytest.param(2, 1023, 768, "gelu_tanh", marks=pytest.mark.slow),
    ],
)
def test_activations(rows: int, n: int, k: int, activation: str, dtype: torch.dtype) -> None:
    case, space = make(rows, n, k, dtype), workspace(rows, n, k, dtype)
    y = harness.guarded([rows, n], dtype, gap=5)
    harness.run_in_every_order(
        lambda: linear(case.x, case.weights, case.bias, y, space, activation=activation),
        [y],
        case.inputs,
        shared(space),
    )
    w = unpack(case.weights)
    act = ACTIVATIONS[activation]
    oracle = act(F.linear(case.x.double(), w.double(), case.bias.double()))
    harness.assert_as_good_as_torch(
        y, oracle, act(F.linear(case.x, w.to(dtype), case.bias)), floor=output_floor(dtype, oracle)
    )
    assert counters_are_zero(space)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        pytest.param(2, 37, 200, marks=pytest.mark.versions),
        (12, 100, 64),
        (70, 64, 130),
        pytest.param(3, 768, 1023, marks=pytest.mark.slow),
    ],
)
def test_residual_and_the_next_norm(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    case, space = make(rows, n, k, dtype), workspace(rows, n, k, dtype, residual=True)
    gamma, beta = harness.guarded_like(torch.randn(n), dtype), harness.guarded_like(torch.randn(n), dtype)
    old = harness.guarded_like(torch.randn(rows, n), gap=17)
    new, normed = harness.guarded([rows, n], torch.float32), harness.guarded([rows, n], dtype, gap=9)
    residual = Residual(old, gamma, beta, normed, EPS)
    harness.run_in_every_order(
        lambda: linear(case.x, case.weights, case.bias, new, space, residual=residual),
        [new, normed],
        [*case.inputs, gamma, beta, old],
        [new, *shared(space)],  # the last to finish a row block reads what its neighbours wrote
    )
    w = unpack(case.weights)
    oracle = old.double() + F.linear(case.x.double(), w.double(), case.bias.double())
    theirs = F.linear(case.x, w.to(dtype), case.bias).float() + old
    harness.assert_as_good_as_torch(new, oracle, theirs, floor=2e-6 * oracle.abs().max().item())
    exact = F.layer_norm(new.double(), (n,), gamma.double(), beta.double(), EPS)
    plain = F.layer_norm(new, (n,), gamma.float(), beta.float(), EPS).to(dtype)
    harness.assert_as_good_as_torch(normed, exact, plain, floor=output_floor(dtype, exact))
    assert counters_are_zero(space)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [(1, 37, 4), pytest.param(3, 20, 16, marks=pytest.mark.versions), (2, 64, 16)]
)
def test_qkv_goes_into_the_paged_cache(heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    rows, width = 9, heads * head_dim
    case, space = make(rows, 3 * width, width, dtype), workspace(rows, 3 * width, width, dtype)
    slots = harness.guarded_like(torch.tensor([5, 2, -1, 4 * block_size, 7, 3, 4 * block_size + 1, -1, 0]))
    room = torch.zeros(2, 6, heads, block_size, head_dim, dtype=dtype)
    k, v = room[:, 1:].unbind()  # before each is a block, where slot -1 would be
    q = harness.guarded([rows, width], dtype)

    def launch() -> None:
        room.fill_(-7)
        linear(case.x, case.weights, case.bias, q, space, cache=KVCache(k, v, slots))

    harness.run_in_every_order(launch, [q], [*case.inputs, slots, k, v], shared(space))
    w = unpack(case.weights)
    oracle = F.linear(case.x.double(), w.double(), case.bias.double())
    theirs = F.linear(case.x, w.to(dtype), case.bias)
    floor = output_floor(dtype, oracle)
    harness.assert_as_good_as_torch(q, oracle[:, :width], theirs[:, :width], floor)
    kept = slots >= 0
    for part, cache in ((1, k), (2, v)):
        rows_of_cache = cache.transpose(1, 2).reshape(-1, width)  # [slots, heads * head_dim]
        columns = slice(part * width, (part + 1) * width)
        harness.assert_as_good_as_torch(rows_of_cache[slots[kept]], oracle[kept, columns], theirs[kept, columns], floor)
        untouched = torch.ones(len(rows_of_cache), dtype=torch.bool)
        untouched[slots[kept]] = False
        assert (rows_of_cache[untouched] == -7).all()
    assert (room[:, 0] == -7).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 37, 37), pytest.param(5, 70, 200, marks=pytest.mark.versions), (66, 64, 130)]
)
def test_weight_only_quantisation(rows: int, n: int, k: int, kind: str) -> None:
    dtype = torch.bfloat16
    case, space = make(rows, n, k, dtype, kind), workspace(rows, n, k, dtype)
    y = harness.guarded([rows, n], dtype)
    harness.run_in_every_order(
        lambda: linear(case.x, case.weights, case.bias, y, space), [y], case.inputs, shared(space)
    )
    w = unpack(case.weights)
    oracle = F.linear(case.x.double(), w.double(), case.bias.double())
    theirs = F.linear(case.x, w.to(dtype), case.bias)
    harness.assert_as_good_as_torch(y, oracle, theirs, floor=output_floor(dtype, oracle))


@pytest.mark.parametrize(("kind", "worst"), [("int8", 1 / 254), ("int4", 1 / 14)])
def test_packing_rounds_to_the_nearest_step(kind: str, worst: float) -> None:
    weight = torch.randn(20, 300)
    error = (unpack(pack(weight, torch.bfloat16, kind)) - weight).abs()
    assert error.max() <= worst * weight.abs().max() * 1.01


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [*((dtype, "float") for dtype in harness.DTYPES), (torch.bfloat16, "int8"), (torch.float16, "int4")],
)
@pytest.mark.parametrize("k", [pytest.param(200, marks=pytest.mark.versions), 512])
def test_a_row_has_the_same_bits_in_any_batch(k: int, dtype: torch.dtype, kind: str) -> None:
    """1, 8 and 16 rows split K over programs; 30, 64 and 80 rows walk the splits inside one."""
    n, total = 96, 80
    case = make(total, n, k, dtype, kind)
    assert tiles.split_k(n, k)[0] == tiles.cdiv(k, tiles.MIN_BLOCKS_PER_SPLIT * tiles.BLOCK_K)
    whole = torch.empty(total, n, dtype=dtype)
    linear(case.x, case.weights, case.bias, whole, workspace(total, n, k, dtype), activation="gelu_tanh")
    for first, rows in ((0, 1), (79, 1), (5, 8), (3, 16), (40, 30), (10, 64)):
        y = torch.empty(rows, n, dtype=dtype)
        x = case.x[first : first + rows]
        linear(x, case.weights, case.bias, y, workspace(rows, n, k, dtype), activation="gelu_tanh")
        assert harness.same_bits(y, whole[first : first + rows])


@pytest.mark.parametrize(
    ("kind", "most"), [("float", 64), ("int8", 32), pytest.param("int4", 16, marks=pytest.mark.slow)]
)
def test_a_normalised_row_has_the_same_bits_in_any_batch(kind: str, most: int) -> None:
    """Row blocks of 16 and of more rows, and one that is not full; with 4 rows or fewer, 4 are normalised at a time."""
    n, k, total, dtype = 600, 130, 300, torch.bfloat16
    case, old = make(total, n, k, dtype, kind), torch.randn(total, n)
    whole, parts = torch.empty(2, total, n), torch.empty(2, total, n)
    assert [tiles.linear_tiles(rows, n, k, 2, True, kind).block_t for rows in (5, 64, total)] == [16, 16, most]
    for target, steps in ((whole, [total]), (parts, [5, 64, 1, 2, 228])):
        first = 0
        for rows in steps:
            to = slice(first, first + rows)
            residual = Residual(old[to], *torch.ones(2, n), target[1, to], EPS)
            space = workspace(rows, n, k, dtype, residual=True)
            linear(case.x[to], case.weights, case.bias, target[0, to], space, residual=residual)
            first += rows
    assert harness.same_bits(whole, parts)


def test_a_split_that_follows_the_batch_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    import kernels.tiles as module

    n, k = 96, 512
    case = make(8, n, k, torch.float32)
    whole, alone = torch.empty(8, n), torch.empty(1, n)
    linear(case.x, case.weights, case.bias, whole, workspace(8, n, k, torch.float32))
    monkeypatch.setattr(module, "split_k", lambda n, k: (2, 4))
    linear(case.x[:1], case.weights, case.bias, alone, workspace(1, n, k, torch.float32))
    assert not harness.same_bits(alone, whole[:1])


@pytest.mark.parametrize(("kind", "epilogue"), [("float", "none"), ("float", "residual"), ("int4", "residual")])
def test_cost_is_what_is_touched(kind: str, epilogue: str) -> None:
    rows, n, k, dtype = 3, 192, 256, torch.bfloat16
    case, space = make(rows, n, k, dtype, kind), workspace(rows, n, k, dtype, epilogue == "residual")
    norm, old, new = torch.ones(2, n, dtype=dtype), torch.zeros(rows, n), torch.zeros(rows, n)
    normed = torch.empty(rows, n, dtype=dtype)
    y = new if epilogue == "residual" else normed
    with harness.recording() as trace:
        residual = Residual(old, *norm, normed, EPS) if epilogue == "residual" else None
        linear(case.x, case.weights, case.bias, y, space, residual=residual)
    expected = cost(rows, case.weights, 2, epilogue)
    scales = [case.weights.scales] if case.weights.scales is not None else []
    weights = trace.bytes(False, case.weights.data, case.bias, *scales, *([norm] if residual else []))
    assert weights == pytest.approx(expected.weights, rel=0.02)
    reads = trace.bytes(False, case.x, *([old] if residual else []))
    assert reads == pytest.approx(expected.reads, rel=0.02)
    assert trace.bytes(True, y, *([normed] if residual else [])) == expected.writes
    assert trace.sectors(case.weights.data) <= 1.1


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 140), st.integers(1, 200), st.sampled_from(harness.DTYPES),
    st.sampled_from(["float", "int8", "int4"]),
)  # fmt: skip
def test_any_shape(rows: int, n: int, k: int, dtype: torch.dtype, kind: str) -> None:
    case, space = make(rows, n, k, dtype, kind), workspace(rows, n, k, dtype)
    y = torch.full((rows, n), torch.nan)
    linear(case.x, case.weights, case.bias, y, space)
    w = unpack(case.weights)
    rounded = w.to(dtype) if kind == "int4" else w  # int8's scale multiplies the sum
    oracle = F.linear(case.x.double(), rounded.double(), case.bias.double())
    torch.testing.assert_close(y.double(), oracle, rtol=0, atol=4e-6 * (1 + oracle.abs().max().item()))
    assert counters_are_zero(space)


def test_refuses() -> None:
    case, space = make(1, 8, 8, torch.float32), workspace(1, 8, 8, torch.float32)
    y = torch.empty(1, 8)
    with pytest.raises(ValueError, match="'swish'"):
        linear(case.x, case.weights, case.bias, y, space, activation="swish")
    with pytest.raises(ValueError, match="9 columns"):
        linear(torch.empty(1, 9), case.weights, case.bias, y, space)
    with pytest.raises(ValueError, match="'int3'"):
        pack(torch.ones(2, 2), torch.float16, "int3")
    with pytest.raises(ValueError, match="got 48"):
        pack(torch.ones(2, 2), torch.float16, "int4", group=48)


@pytest.mark.slow
def test_slots_past_2_to_the_31_elements() -> None:
    """A cache of more than 2**31 elements, of which the last block's pages alone are touched."""
    heads, head_dim, block_size, dtype = 16, 64, 16, torch.float16
    width, blocks = heads * head_dim, 2**31 // (heads * head_dim * block_size) + 3
    case, space = make(1, 3 * width, width, dtype), workspace(1, 3 * width, width, dtype)
    k, v = (torch.empty((blocks, heads, block_size, head_dim), dtype=dtype) for _ in range(2))
    k[-1], v[-1] = torch.nan, torch.nan
    q, slots = torch.empty(1, width, dtype=dtype), torch.tensor([blocks * block_size - 1])
    linear(case.x, case.weights, case.bias, q, space, cache=KVCache(k, v, slots))
    expected = F.linear(case.x.double(), unpack(case.weights).double(), case.bias.double())[0]
    for part, cache in ((1, k), (2, v)):
        written = cache[-1, :, -1].flatten().double()
        torch.testing.assert_close(written, expected[part * width : (part + 1) * width], rtol=0, atol=5e-3)
        assert cache[-1, :, :-1].isnan().all()


def test_rows_past_2_to_the_31(tmp_path: Path) -> None:
    rows, n, k, dtype = 3, 70, 80, torch.float16
    case, space = make(rows, n, k, dtype), workspace(rows, n, k, dtype)
    x, old = harness.far_rows(case.x, tmp_path), harness.far_rows(torch.randn(rows, n), tmp_path)
    y, new = harness.far_rows(torch.zeros(rows, n).half(), tmp_path), harness.far_rows(torch.zeros(rows, n), tmp_path)
    normed = harness.far_rows(torch.zeros(rows, n).half(), tmp_path)
    linear(x, case.weights, case.bias, y, space)
    space = workspace(rows, n, k, dtype, residual=True)
    linear(x, case.weights, case.bias, new, space, residual=Residual(old, *torch.ones(2, n), normed, EPS))
    oracle = F.linear(x.double(), unpack(case.weights).double(), case.bias.double())
    torch.testing.assert_close(y.double(), oracle, rtol=0, atol=5e-3)
    torch.testing.assert_close(new.double(), oracle + old.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.double(), F.layer_norm(new.double(), (n,)) + 1, rtol=0, atol=5e-3)
