"""The machine of a GPU check: the backend under test, its device, and models on it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from backend_driver import BLOCK, Driver, random_weights

from engine.backends import registry
from engine.backends.base import Backend
from engine.backends.triton_compile import target_of
from engine.checkpoints.canonical import canonical_shapes
from engine.config import ModelConfig

Case = tuple[str, Callable[[], dict[str, Any]]]  # its name, and what runs it; a result with "ok" false is a failure
ROOT = Path(__file__).parent.parent.parent
SMALL = ModelConfig(vocab_size=97, context_length=150, embed_dim=80, n_heads=4, n_layers=2, hidden_dim=130)
HALF = ModelConfig(vocab_size=50257, context_length=1024, embed_dim=768, n_heads=12, n_layers=2, hidden_dim=3072)
GPT2 = {
    "gpt2": ModelConfig(50257, 1024, 768, 12, 12, 3072, tied_head=True),
    "gpt2-medium": ModelConfig(50257, 1024, 1024, 16, 24, 4096, tied_head=True),
    "gpt2-large": ModelConfig(50257, 1024, 1280, 20, 36, 5120, tied_head=True),
    "gpt2-xl": ModelConfig(50257, 1024, 1600, 25, 48, 6400, tied_head=True),
}


class Machine:
    """Where the check runs.

    Args:
        backend: "triton", or "triton-interpret" to take the same paths on a CPU.
        tiny: the smallest models and shapes, each timing once.
    """

    def __init__(self, backend: str, tiny: bool) -> None:
        self.adapter: Any = registry.BACKENDS[backend]()
        self.device = self.adapter.devices[0]
        if not self.on_gpu:
            from kernels import interpreter

            interpreter.install()
        self.tiny = tiny
        self._kept: dict[Any, Any] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are compiled and run on a GPU."""
        return bool(self.device == "cuda")

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the backend, each under one name."""
        return [dtype for dtype in self.adapter.dtypes if dtype != "int4-g64"]

    @property
    def has_dependent_launch(self) -> bool:
        """Whether the device can start a kernel while the one before it ends."""
        return self.on_gpu and bool(self.adapter._has_dependent_launch(torch.device(self.device)))

    @property
    def target(self) -> str | None:
        """What ``kernels/offline.py`` calls this GPU; None where it does not know it or nothing is compiled."""
        return target_of(torch.device(self.device))

    def driver(
        self, model: ModelConfig, dtype: str, blocks: int, adapter: type[Backend] | None = None, **options: Any
    ) -> Driver:
        """A backend with random weights, the same for the same model, on a cache of so many blocks."""
        return self.with_weights(random_weights(model), model, dtype, blocks, adapter, **options)

    def with_weights(
        self,
        weights: dict[str, torch.Tensor],
        model: ModelConfig,
        dtype: str,
        blocks: int,
        adapter: type[Backend] | None = None,
        **options: Any,
    ) -> Driver:
        """A backend with these canonical weights, on a cache of so many blocks."""
        made = (adapter or self.adapter)(model, weights, dtype=dtype, device=self.device, block_size=BLOCK, **options)
        made.allocate(blocks)
        return Driver(made, num_blocks=blocks)

    def weights(self, model: ModelConfig) -> dict[str, torch.Tensor]:
        """Random weights made on the device, for timing."""
        torch.manual_seed(0)
        made = {name: torch.randn(shape, device=self.device) * 0.02 for name, shape in canonical_shapes(model).items()}
        if model.tied_head:
            made["head"] = made["tok_emb"]
        return made

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept until another key is asked for: cases of one model come one after the other."""
        if key not in self._kept:
            self._kept.clear()
            if self.on_gpu:
                torch.cuda.empty_cache()
            self._kept[key] = make()
        return self._kept[key]

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def versions(self) -> dict[str, str]:
        """What a result holds for: other sources, another version or device measure anew."""
        import triton

        name = torch.cuda.get_device_name() if self.on_gpu else "CPU"
        return {
            "torch": torch.__version__, "triton": triton.__version__, "device": name, "tiny": str(self.tiny),
            "sources": sources(),
        }  # fmt: skip

    def alive(self) -> bool:
        """Whether the device still answers: after an access out of bounds it does not, until the process ends."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return True


def sources() -> str:
    """A hash of what the check runs: kernels, backends, and the check itself."""
    digest = hashlib.sha256()
    for pattern in ("kernels/*.py", "engine/backends/*.py", "tests/gpu/*.py", "tests/*_lives.py", "tests/backend_*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def float32_products() -> Iterator[None]:
    """PyTorch's float32 products in float32, for what the backend is held to."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
