"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models: a second thread only gets in the way of the other worker."""
    torch.set_num_threads(1)
