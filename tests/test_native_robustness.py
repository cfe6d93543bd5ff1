"""The native backend under bad input, forks, threads, exceptions, long runs: no crashes, hangs or leaks."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_weights, tiny_config
from native_steps import BLOCK, ISAS, batch, ids_of, logits_of, make, neutral, run_in_process

from engine.backends import native_backend
from engine.backends.native_backend import NativeBackend
from engine.machine import usable_cpus

CONFIG = tiny_config()


def greedy(rows: int, **changes: object) -> dict[str, object]:
    return {"sampling": neutral(rows, temperature=np.zeros(rows, np.float32), **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([1, 97, 2], np.int32)}, r"token id 97 is out of range: it must be in \[0, 97\)"),
        ({"token_ids": np.array([-1, 7, 2], np.int32)}, "token id -1"),
        ({"positions": np.array([0, 1, 64], np.int32)}, "position 64"),
        ({"positions": np.array([0, 1, 3], np.int32)}, r"position 3 is out of range: it must be in \[0, 3\)"),
        ({"slots": np.array([0, 1, 96 * BLOCK], np.int64)}, "slot 480"),
        ({"slots": np.array([0, -2, 1], np.int64)}, "slot -2"),
        ({"block_tables": np.array([[96]], np.int32)}, "block 96"),
        ({"block_tables": np.array([[-1]], np.int32)}, "block -1"),
        ({"context_lens": np.array([6], np.int32), "block_tables": np.array([[0]], np.int32)}, "context length 6"),
        ({"context_lens": np.array([2], np.int32)}, "position 2"),
        ({"query_starts": np.array([0, 2], np.int32)}, "last query start 2"),
        ({"query_starts": np.array([1, 3], np.int32)}, "first query start 1"),
        ({"logits_rows": np.array([3], np.int32)}, "logits row 3"),
        ({"block_copies": np.array([[0, 96]], np.int32)}, "block 96"),
        ({"previous_rows": np.array([-1, -1, 0], np.int32)}, "previous row 0"),
        ({"draw_rows": np.array([3], np.int32), **greedy(1)}, "draw row 3"),
        ({"token_ids": np.array([1, 2, 3], np.int64)}, "token_ids must be a contiguous array of int32"),
        ({"positions": np.array([0, 1], np.int32)}, "positions has 2 elements, expected 3"),
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, np.ndarray], message: str) -> None:
    backend = make(CONFIG)
    good = batch([(0, 0, [1, 2, 3])])
    before = logits_of(backend, [(0, 0, [1, 2, 3])])
    with pytest.raises(ValueError, match=message):
        backend.submit(replace(good, **changes))  # type: ignore[arg-type]
    assert torch.equal(logits_of(backend, [(0, 0, [1, 2, 3])]), before)


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        make(CONFIG).submit(batch([]))


def test_ids_of_sampling_options_are_checked() -> None:
    from engine.backends.base import Sparse

    outside = Sparse(np.array([0, 1], np.int32), np.array([97], np.int32), np.array([1], np.float32))
    for name in ("logit_bias", "output_counts"):
        step = batch([(0, 0, [1])], "none", neutral(1, **{name: outside}), [0])
        with pytest.raises(ValueError, match="token id of a sampling option 97"):
            make(CONFIG).submit(step)


@pytest.mark.parametrize("dtype", NativeBackend.dtypes)
@pytest.mark.parametrize(
    "name", ["tok_emb", "head", "blocks.1.fc.bias", "blocks.0.qkv.weight", "blocks.1.norm2.weight"]
)
def test_nan_in_the_weights_is_an_error(name: str, dtype: str) -> None:
    weights = random_weights(CONFIG)
    weights[name].view(-1)[3] = float("nan")
    backend = NativeBackend(CONFIG, weights, dtype=dtype, device="cpu", block_size=BLOCK, threads=2)
    backend.allocate(96)
    for temperature in (0.0, 1.0):
        sampling = neutral(1, temperature=np.full(1, temperature, np.float32))
        handle = backend.submit(batch([(0, 0, [0, 1, 2])], "none", sampling, [2]))
        with pytest.raises(ValueError, match="no token can be drawn from the logits of drawn row 0"):
            backend.collect(handle)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_another_request_left_in_a_block_does_no_harm(dtype: str) -> None:
    """Not even NaN: blocks are handed on as they are."""
    ids = ids_of(1, 2 * BLOCK + 2, CONFIG)
    clean = logits_of(make(CONFIG, dtype), [(0, 0, ids)])
    backend, broken = make(CONFIG, dtype), random_weights(CONFIG)
    for layer in range(CONFIG.n_layers):
        broken[f"blocks.{layer}.qkv.bias"].fill_(float("nan"))
    backend.update_weights(broken)
    assert logits_of(backend, [(0, 0, ids_of(2, 3 * BLOCK, CONFIG))]).isnan().all()
    backend.update_weights(random_weights(CONFIG, scale=0.15))
    assert torch.equal(logits_of(backend, [(0, 0, ids[:-2])]), clean[:-2])
    for at in (-2, -1):  # one token alone
        assert torch.equal(logits_of(backend, [(0, len(ids) + at, [ids[at]])])[0], clean[at])
    assert torch.equal(logits_of(backend, [(0, 0, ids)]), clean)


@pytest.mark.parametrize("isa", ISAS)
def test_what_comes_after_a_row_does_it_no_harm(isa: str) -> None:
    """Not even NaN, in the same step: queries are attended to together, each to its own past."""
    code = """
import numpy as np, torch
from models import random_weights, tiny_config
from native_steps import BLOCK, NativeBackend, batch, logits_of
config = tiny_config()
for dtype in ("float32", "bfloat16", "int8"):
    for bad in ("nan", "inf"):
        weights = random_weights(config, scale=0.15)
        weights["tok_emb"][7] = float(bad)
        backend = NativeBackend(config, weights, dtype=dtype, device="cpu", block_size=BLOCK, threads=2)
        backend.allocate(96)
        for length in (3, 7, 8, 20):
            ids = [1 + i % 6 for i in range(length)]
            alone = logits_of(backend, [(1, 0, ids)])
            together = logits_of(backend, [(0, 0, [*ids, 7])])
            assert torch.equal(together[:-1], alone) and alone.isfinite().all(), (dtype, bad, length)
            assert together[-1].isnan().all()
print("fine")
"""
    assert run_in_process(code, ENGINE_ISA=isa) == "fine\n"


def test_denormals_are_numbers_whatever_the_caller_has_set() -> None:
    """Of the threads that share a step one is the caller's, here the only one."""
    code = """
import torch
from models import random_weights, tiny_config
from native_steps import BLOCK, NativeBackend, batch, ids_of, logits_of
config = tiny_config()
weights = random_weights(config, scale=0.15)
weights["head"] = weights["head"] * 1e-38
weights["final_norm.weight"] = torch.full_like(weights["final_norm.weight"], 1e-2)
weights["final_norm.bias"] = torch.zeros_like(weights["final_norm.bias"])
backend = NativeBackend(config, weights, dtype="float32", device="cpu", block_size=BLOCK, threads=1)
backend.allocate(96)
ids = ids_of(1, 60, config)
wanted = logits_of(backend, [(0, 0, ids)])
assert (wanted != 0).any() and wanted.abs().max() < torch.finfo(torch.float32).tiny
assert torch.set_flush_denormal(True)
one = torch.full((1,), 1e-38)
assert logits_of(backend, [(0, 0, ids)]).numpy().tobytes() == wanted.numpy().tobytes()
assert (one * 0.1).item() == 0  # what the caller has set still holds for the caller
print("fine")
"""
    if not torch.set_flush_denormal(False):
        pytest.skip("PyTorch cannot flush denormals here")
    assert run_in_process(code) == "fine\n"


@pytest.mark.parametrize(
    ("changes", "dtype", "block", "message"),
    [
        ({}, "float32", 2**62, r"block_size is 4611686018427387904: it must be in \[1, 65536\]"),
        ({}, "float32", 0, "block_size is 0"),
        ({"hidden_dim": 130_001}, "int8", 5, r"hidden_dim is 130001: it must be in \[1, 130000\]"),
        ({"hidden_dim": 2**20 + 1}, "float32", 5, "hidden_dim is 1048577"),
        ({"context_length": 2**40}, "float32", 5, "context_length is 1099511627776"),
    ],
)
def test_sizes_that_overflow_are_refused(changes: dict[str, int], dtype: str, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeBackend(replace(CONFIG, **changes), {}, dtype=dtype, device="cpu", block_size=block, threads=1)


def test_a_cache_that_no_machine_has_is_refused() -> None:
    backend = make(CONFIG)
    wanted = logits_of(backend, [(0, 0, [1, 2, 3])])
    for count in (2**60, -1):
        with pytest.raises(ValueError, match=rf"num_blocks is {count}: it must be in \[0, "):
            backend.allocate(count)
    assert torch.equal(logits_of(backend, [(0, 0, [1, 2, 3])]), wanted)


def test_what_is_no_array_is_refused() -> None:
    good = batch([(0, 0, [1, 2])])
    with pytest.raises(ValueError, match="token_ids must be an array, got <class 'list'>"):
        make(CONFIG).submit(replace(good, token_ids=[1, 2]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions must be a contiguous array of int32, got one of int64"):
        make(CONFIG).submit(replace(good, positions=np.array([0, 1])))


def test_threads_that_cannot_be_had_are_an_error() -> None:
    code = """
import os, resource, time
from models import tiny_config
from native_steps import make
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 400 * 2**20,) * 2)
threads = lambda: len(os.listdir("/proc/self/task"))
make(tiny_config(), threads=2)  # a sanitizer's own thread comes with the first
before = threads()
try:
    make(tiny_config(), threads=2000)
except RuntimeError as error:
    print(error)
end = time.monotonic() + 10  # one that was waited for may be listed a moment longer
while threads() > before and time.monotonic() < end:
    time.sleep(0.01)
assert threads() <= before, (threads(), before)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    assert "of 2000 could not be started: " in run_in_process(code)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory")
def test_an_update_for_which_memory_is_short() -> None:
    """Weights that cannot be coded take more (csrc/coding.inc): the model has none then, until it gets some."""
    code = """
import resource, torch
from models import random_weights, tiny_config
from native_steps import BLOCK, ids_of, logits_of
from engine.backends.native_backend import NativeBackend
config = tiny_config(embed_dim=1024, n_heads=16, hidden_dim=4096, vocab_size=20000, n_layers=1)
usual = random_weights(config, scale=0.1)
wild = {name: torch.exp2(-100 * torch.rand(tensor.shape)) for name, tensor in usual.items()}
backend = NativeBackend(config, usual, dtype="bfloat16", device="cpu", block_size=BLOCK, threads=1)
backend.allocate(8)
step = lambda: logits_of(backend, [(0, 0, ids_of(1, 5, config))])
before = step()
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), -1))
try:
    backend.update_weights(wild)
    print("enough")
except MemoryError:
    try:
        step()
    except ValueError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
backend.update_weights(usual)
print(torch.equal(step(), before))
"""
    coded = make(tiny_config(), "bfloat16").coded
    wanted = "the model has no weights yet" if coded else "enough"
    assert run_in_process(code) == wanted + "\nTrue\n"


def test_wrong_weights_are_refused() -> None:
    weights = random_weights(CONFIG)
    backend = make(CONFIG)
    with pytest.raises(ValueError, match=r"head has shape \[96, 40\], expected \[97, 40\]"):
        backend.update_weights({**weights, "head": weights["head"][1:]})
    with pytest.raises(ValueError, match="pos_emb is missing"):
        backend.update_weights({name: tensor for name, tensor in weights.items() if name != "pos_emb"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float16"},
            "native backend has no dtype 'float16'; it accepts float32, bfloat16, int8, int4, int4-g64, int4-g128",
        ),
        ({"device": "cuda"}, "native backend has no device 'cuda'; it accepts cpu"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_what_it_lacks_is_refused(options: dict[str, object], message: str) -> None:
    settings = {"dtype": "float32", "device": "cpu", "block_size": BLOCK, **options}
    with pytest.raises(ValueError, match=message):
        NativeBackend(CONFIG, random_weights(CONFIG), **settings)  # type: ignore[arg-type]


def test_without_the_extension_it_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engine.backends._native", None)
    monkeypatch.delattr("engine.backends._native", raising=False)
    with pytest.raises(ValueError, match="build_ext --inplace"):
        native_backend.load_extension()


def test_a_forked_child_goes_on() -> None:
    """The child has none of the parent's threads: it makes its own, and so does a grandchild."""
    backend = make(CONFIG, threads=3)
    ids = ids_of(1, 20, CONFIG)
    wanted = logits_of(backend, [(0, 0, ids)])
    child = os.fork()
    if child == 0:
        same = torch.equal(logits_of(backend, [(0, 0, ids)]), wanted)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(logits_of(backend, [(0, 0, ids)]), wanted) else 1)
        fine = os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if same and fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(logits_of(backend, [(0, 0, ids)]), wanted)


def test_two_backends_in_two_threads() -> None:
    backends = [make(CONFIG, threads=2, seed=seed) for seed in (1, 2)]
    ids = ids_of(2, 30, CONFIG)
    wanted = [logits_of(backend, [(0, 0, ids)]) for backend in backends]
    same = [True, True]

    def run(i: int) -> None:
        for _ in range(100):
            same[i] &= torch.equal(logits_of(backends[i], [(0, 0, ids)]), wanted[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert same == [True, True]


def test_one_backend_in_two_threads_takes_turns() -> None:
    backend = make(CONFIG, threads=2)
    ids = [ids_of(seed, 12, CONFIG) for seed in (3, 4)]
    wanted = [logits_of(backend, [(i, 0, ids[i])]) for i in range(2)]
    same = [True, True]

    def run(i: int) -> None:
        for _ in range(100):
            same[i] &= torch.equal(logits_of(backend, [(i, 0, ids[i])]), wanted[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert same == [True, True]


def test_it_goes_on_after_an_error() -> None:
    backend = make(CONFIG)
    wanted = logits_of(backend, [(0, 0, [1, 2, 3])])
    for _ in range(50):
        with pytest.raises(ValueError, match="token id 97"):
            backend.submit(batch([(0, 0, [97])]))
        nothing = neutral(1, allowed=np.zeros((1, 4), np.uint32))
        handle = backend.submit(batch([(1, 0, [5])], "none", nothing, [0]))
        with pytest.raises(ValueError, match="no token can be drawn"):
            backend.collect(handle)
    assert torch.equal(logits_of(backend, [(0, 0, [1, 2, 3])]), wanted)


def test_ctrl_c_between_steps() -> None:
    """SIGINT in a loop of steps: KeyboardInterrupt within seconds, and the process ends with its threads."""
    code = """
import signal, threading, os
from native_steps import make, logits_of, ids_of
from models import tiny_config
config = tiny_config()
backend = make(config, threads=3)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        logits_of(backend, [(0, 0, ids_of(1, 20, config))])
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run_in_process(code) == "interrupted\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_that_share_a_cpu_pass_it_on() -> None:
    """Without yields each barrier would last until the scheduler ends a time slice: a tenth of a second a step."""
    code = """
import os, time
from native_steps import make, logits_of
from models import tiny_config
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
backend = make(tiny_config(), threads=4)
logits_of(backend, [(0, 0, [1, 2, 3])])
start = time.perf_counter()
for _ in range(100):
    logits_of(backend, [(0, 0, [1, 2, 3])])
print(time.perf_counter() - start < 3)
"""
    assert run_in_process(code) == "True\n"


YIELDS = """
#include <sys/syscall.h>
#include <unistd.h>
long yields = 0;
int sched_yield(void) { __atomic_fetch_add(&yields, 1, __ATOMIC_RELAXED); return syscall(SYS_sched_yield); }
"""


@pytest.mark.skipif(sys.platform != "linux" or usable_cpus() < 2, reason="needs Linux and two CPUs")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("apart", [True, False])
def test_who_waits_yields_only_where_its_own_threads_are(apart: bool, tmp_path: Path) -> None:
    """Two threads on two CPUs, or on one: a library before libc counts the yields of steps with pauses between them."""
    (tmp_path / "yields.c").write_text(YIELDS, encoding="ascii")
    library = tmp_path / "yields.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "yields.c"), "-o", str(library)], check=True)
    code = f"""
import ctypes, os, time
from native_steps import make, logits_of
from models import tiny_config
first, second, *_ = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, [second])
backend = make(tiny_config(), threads=2)  # the second thread inherits this CPU
os.sched_setaffinity(0, [first if {apart} else second])
yields = ctypes.c_long.in_dll(ctypes.CDLL({str(library)!r}), "yields")
fewest = 1e9  # of a step and the pause after it: another process may come between
for _ in range(21):
    logits_of(backend, [(0, 0, [1, 2, 3])])
    before = yields.value
    logits_of(backend, [(0, 0, [1, 2, 3])])
    time.sleep(0.0005)
    fewest = min(fewest, yields.value - before)
print(fewest)
"""
    before_libc = f"{os.environ.get('LD_PRELOAD', '')} {library}"
    assert (int(run_in_process(code, LD_PRELOAD=before_libc)) == 0) == apart


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.skipif(native_backend._openmp_pause() is None, reason="no OpenMP 5.0")
@pytest.mark.parametrize(("room", "ended"), [(0, 2), (1, 2), (2, 0)])
def test_a_step_ends_pytorchs_spinning_threads_where_cores_are_short(room: int, ended: int) -> None:
    """Of 3 threads of PyTorch's 2 are others than the caller; the step goes on as it did, and PyTorch, too."""
    code = f"""
import os, torch
from native_steps import make, logits_of
from models import tiny_config
threads = lambda: len(os.listdir("/proc/self/task"))
backend = make(tiny_config(), threads=2)
backend._room = {room}
torch.set_num_threads(3)
ones = torch.ones(1 << 20)
first = logits_of(backend, [(0, 0, [1, 2, 3])])
for _ in range(20):
    assert torch.equal(ones + ones, 2 * ones)
    with_pool = threads()
    assert torch.equal(logits_of(backend, [(0, 0, [1, 2, 3])]), first)
print(with_pool - threads())
"""
    assert run_in_process(code) == f"{ended}\n"


def anonymous_kib() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise OSError("no RssAnon")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow() -> None:
    """1,000 generations of a prompt and 5 tokens; and backends made and dropped."""
    backend = make(CONFIG, threads=2)

    def generate(count: int) -> None:
        for _ in range(count):
            for t in range(6):
                part = (0, 0, [1, 2, 3]) if t == 0 else (0, 2 + t, [t])
                backend.collect(backend.submit(batch([part], "last", neutral(1), [len(part[2]) - 1])))

    generate(50)
    start = anonymous_kib()
    generate(1000)
    assert anonymous_kib() - start < 1024
    for _ in range(3):
        make(CONFIG, threads=2)
    start = anonymous_kib()
    for _ in range(40):
        make(CONFIG, threads=2)
    assert anonymous_kib() - start < 2048


def test_usable_cpus_respects_a_quota(tmp_path: Path) -> None:
    everything = usable_cpus(tmp_path)
    assert everything == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert usable_cpus(tmp_path) == everything
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    assert usable_cpus(tmp_path) == 1
