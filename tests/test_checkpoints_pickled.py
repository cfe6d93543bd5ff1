"""Pickles: nothing in them is run, and a file that cannot be read says why."""

import io
import os
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import SMALL, assert_same_logits, random_book, random_gpt

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.pickled import Stub, read_pickled


class Malicious:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def touch(path: str) -> None:
    Path(path).write_text("ran")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "alone", "config"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "function of this file"])
def test_nothing_in_a_pickle_is_run(kind: str, place: str, legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = {
        "os.system": Malicious(os.system, f"touch {mark}"),
        "eval": Malicious(eval, f"open({str(mark)!r}, 'w')"),
        "function of this file": Malicious(touch, str(mark)),
    }[kind]
    state = random_gpt(SMALL).state_dict()
    content = {"beside": {"model": state, "x": evil}, "alone": evil, "config": {"model": state, "config": evil}}[place]
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    try:
        load_checkpoint(tmp_path / "model.pt", config={"n_heads": 2})
    except ValueError as error:
        assert str(tmp_path / "model.pt") in str(error)  # noqa: PT017
    assert not mark.exists()
    mark.unlink(missing_ok=True)
    torch.load(tmp_path / "model.pt", weights_only=False)  # the file is what it is taken for
    assert mark.exists()


def test_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Malicious(os.system, f"touch {mark}")))
    with pytest.raises(ValueError, match=r"model\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "model.pt")
    assert not mark.exists()


class Config:
    __slots__ = ("n_heads",)

    def __init__(self) -> None:
        self.n_heads = 2

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("the real class was used")


def test_objects_are_stubs_with_their_attributes(tmp_path: Path) -> None:
    model = random_gpt(SMALL)
    extras = {"loss": np.float64(2.5), "when": Path("x"), "space": types.SimpleNamespace(a=1)}
    torch.save({"model": model.state_dict(), "cfg": Config(), **extras}, tmp_path / "m.pt")
    content, names = read_pickled(tmp_path / "m.pt")
    assert isinstance(content["cfg"], Stub)
    assert type(content["cfg"]).__qualname__ == "Config"
    assert content["cfg"].n_heads == 2
    assert content["space"].a == 1
    assert "test_checkpoints_pickled.Config" in names
    assert_same_logits(load_checkpoint(tmp_path / "m.pt"), model)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 1}])
def test_a_whole_module_is_refused(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(random_book()), tmp_path / "model.pth")
    message = r'whole pickled module \(checkpoint_models\.BookGPT\).*torch\.save\(model\.state_dict\(\), "model\.pth"\)'
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.pth")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive; save the weights alone with torch\.save"):
        load_checkpoint(tmp_path / "model.pt")


def test_the_old_file_format_is_read(tmp_path: Path) -> None:
    model = random_gpt(SMALL)
    torch.save(model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert_same_logits(load_checkpoint(tmp_path / "m.pt", config={"n_heads": 2}), model)


def _truncated(part: float) -> bytes:
    buffer = io.BytesIO()
    torch.save(random_gpt(SMALL).state_dict(), buffer)
    return buffer.getvalue()[: int(part * buffer.tell())]


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("hello.txt", "hello")
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "the file is empty"),
    "4 bytes": (b"PK\x03\x04", "truncated, corrupt, or no file of torch.save"),
    "half": (_truncated(0.5), "truncated, corrupt, or no file of torch.save"),
    "all but the end": (_truncated(0.99), "truncated, corrupt, or no file of torch.save"),
    "another zip": (_zip(), "truncated, corrupt, or no file of torch.save"),
    "text": (b"these are not weights\n", "not a file of torch.save|no file of torch.save"),
    "zeros": (bytes(1000), "not a file of torch.save|no file of torch.save"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "no file of torch.save|not a file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_so(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.pt cannot be read as a checkpoint: .*({message})"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("part", [0, 4, 300, -10])
def test_broken_safetensors_say_so(part: int, tmp_path: Path) -> None:
    from safetensors.torch import save

    content = save(random_gpt(SMALL).state_dict())
    (tmp_path / "model.safetensors").write_bytes(content[:part])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: it is truncated, corrupt, or not"):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state_dict"),
        ({}, "its keys: nothing"),
        ({"epoch": 1, "weights": {}}, "neither bare nor under .*its keys: epoch, weights"),
        ({"conv.weight": torch.ones(2)}, r"names that are not known \(conv\.weight\); known are the course's"),
    ],
)
def test_files_without_a_model(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder/model.pt", r"no/such/folder/model\.pt does not exist"),
        ("./gpt2", "gpt2 does not exist"),
        (Path("gpt2"), "gpt2 does not exist"),
        ("model.safetensors", "does not exist"),
        (42, "a checkpoint is a path, a hub name or a torch.nn.Module, got a int"),
    ],
)
def test_sources_that_are_not_there(source: Any, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(source)


def test_unknown_suffix_and_revision_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.onnx is no checkpoint by its name; accepted: a folder, or .*\.pt, "):
        load_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="revision='main' is for a name on the Hugging Face hub"):
        load_checkpoint(tmp_path / "model.onnx", revision="main")
