"""Where kernels are timed, and how: GB/s from each kernel's ``cost()``, beside what a copy reaches on the same GPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

COPY_BYTES = 1 << 30
ROTATION = 4  # times the L2 cache that the operands of one round fill, so that a launch reads from memory
MOST_COPIES = 512  # 64 left the 768 x 768 matrices of int8 and int4 in an H100's cache
RESULTS: list[str] = []  # a line for each benchmark, printed at the end


@dataclass
class Machine:
    """Where kernels run: its device, what a copy reaches there (bytes/s), and the bytes of its L2 cache."""

    device: str
    tiny: bool
    copy: float = 0.0
    cache: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)  # large operands that launches share

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def replayable(self, launches: list[Callable[[], None]]) -> Callable[[], None]:
        """One call that makes all launches and waits for them: on a GPU a CUDA graph, so that Python costs nothing."""

        def run() -> None:
            for launch in launches:
                launch()
            self.wait()

        if self.device == "cpu":
            return run
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()

        def replay() -> None:
            graph.replay()
            self.wait()

        return replay


def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes read and written a second by a copy of 1 GiB, the median of 20."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(25):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(taken[5:])
