"""What every test runs under."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: one process has one mode


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models: a second thread only gets in the way of the other worker."""
    torch.set_num_threads(1)
