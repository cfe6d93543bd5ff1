"""Which backend and device are chosen, and devices that are not here."""

import pytest
import torch

from engine.backends.registry import available_devices, choose, missing


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "mps:0", "cpu:1", "tpu", "cpu:", None])
@pytest.mark.parametrize("backend", ["auto", "torch", "native"])
def test_a_device_that_is_not_here_is_refused(backend: str, device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device {device!r} is not available here; choose from auto, cpu$"):
        choose(backend, "float32", device)


@pytest.mark.usefixtures("no_gpu")
def test_the_first_cpu_is_the_cpu() -> None:
    for backend in ("auto", "torch"):
        assert choose(backend, "float32", "cpu:0") == choose(backend, "float32", "cpu")
    if not missing("native"):
        assert choose("auto", "float32", "cpu:0").backend.name == "native"


def test_devices_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert available_devices() == ["cpu", "cuda", "cuda:0", "cuda:1", "mps"]
    assert choose("torch", "float32", "cuda:1").device == "cuda:1"
    assert choose("torch", "float32", "mps:0").device == "mps"
    with pytest.raises(ValueError, match=r"'cuda:2' is not available here; .* cuda:1, mps"):
        choose("torch", "float32", "cuda:2")
