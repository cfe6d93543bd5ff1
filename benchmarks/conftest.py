"""The command line and the machine of the kernel benchmarks."""

import os
from typing import Any

import pytest
import torch
from kernel_timing import RESULTS, Machine, copy_bandwidth


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        action="store_true",
        help="run every benchmark's code once, interpreted, at a tiny shape: no GPU is needed, nothing is measured",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--tiny"):
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in RESULTS:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """This machine, or a skip that says what is missing."""
    if request.config.getoption("--tiny"):
        from kernels import interpreter

        interpreter.install()
        return Machine("cpu", tiny=True)
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU to measure; --tiny runs the code of the benchmarks interpreted")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Machine("cuda", False, copy_bandwidth(), cache)
