"""The logits that an optimized module gave: right again after whatever a caller did to them in place."""

import pytest
import torch
from models import tiny_module
from torch import nn

import engine
from engine.live.edits import SAMPLES, EditWatch
from engine.reference import GPTModel

IDS = torch.tensor([[5, 9, 2, 44, 3, 7, 1, 60]])
LONGER = torch.cat([IDS, IDS], dim=1)


def fast_and_plain() -> tuple[GPTModel, GPTModel]:
    model = tiny_module()
    return engine.optimize(model), model


def same(fast: nn.Module, model: nn.Module, ids: torch.Tensor = IDS) -> bool:
    with torch.no_grad():
        return bool((fast(ids) - model(ids)).abs().max() < 1e-4)


def through_numpy(logits: torch.Tensor) -> None:
    array = logits.detach().numpy()
    array /= 0.5


def through_data(logits: torch.Tensor) -> None:
    logits.data.mul_(2)


def one_element(logits: torch.Tensor) -> None:
    logits.detach().numpy()[..., 11] = -torch.inf


EDITS = {"numpy": through_numpy, "data": through_data, "one element": one_element}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_edit_of_the_last_position_is_not_given_again(key: str, rows: int) -> None:
    fast, model = fast_and_plain()
    ids, longer = IDS.repeat(rows, 1), LONGER.repeat(rows, 1)
    edited = []
    with torch.no_grad():
        for given in (ids, ids, ids[:, :5], ids, longer, longer[:, :9], ids + 1, ids[:, :4] + 1, longer + 1):
            logits = fast(given)
            assert (logits - model(given)).abs().max() < 1e-4
            EDITS[key](logits[-1, -1])
            edited.append((logits[-1, -1], logits[-1, -1].clone()))
    assert all(torch.equal(now, then) for now, then in edited)  # they are the caller's


def test_the_position_shown_last_is_the_one_of_the_latest_call() -> None:
    fast, model = fast_and_plain()
    for given in (IDS, LONGER[:, :9], LONGER, IDS[:, :3]):
        fast(given)
        one_element(fast(given)[0, -1])
        assert same(fast, model, given)


@pytest.mark.parametrize("key", ["numpy", "data"])
def test_an_edit_of_an_earlier_position_is_not_given_again(key: str) -> None:
    fast, model = fast_and_plain()
    for given in (IDS, IDS, LONGER, IDS[:, :6]):
        EDITS[key](fast(given)[0, 3])
        assert same(fast, model, given)
        EDITS[key](fast(given)[0, :-1])
        assert same(fast, model, LONGER)
        EDITS[key](fast(given))
        assert same(fast, model, given)


def test_an_edit_of_the_last_position_costs_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = fast_and_plain()
    with torch.no_grad():
        through_numpy(fast(LONGER[:, :4])[0, -1])
        backend, counts = type(fast)._accelerator._backend, []
        submit = backend.submit
        monkeypatch.setattr(backend, "submit", lambda batch: (counts.append(len(batch.token_ids)), submit(batch))[1])
        for end in range(5, 17):
            logits = fast(LONGER[:, :end])
            assert (logits - model(LONGER[:, :end])).abs().max() < 1e-4
            through_numpy(logits[0, -1])
    assert counts == [1] * 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 97])
def test_what_the_watch_sees(dtype: torch.dtype, width: int) -> None:
    """Every element of the position shown, and at least one and at most ``SAMPLES`` of every other; NaN is no edit."""
    tensor = torch.full((2, 6, width), torch.nan, dtype=dtype)
    watch = EditWatch(tensor, 5)
    watch.showing(3)
    assert not watch.earlier_edited(5)
    assert not watch.last_edited()
    for position in range(5):
        seen = 0
        for element in range(width):
            tensor[1, position, element] = 1.0
            assert watch.last_edited() == (position == 3)
            seen += watch.earlier_edited(5)
            tensor[1, position, element] = torch.nan
        assert 1 <= seen <= SAMPLES or position == 3
        assert seen == 0 or position != 3


def test_of_a_buffer_on_another_device_nothing_is_remembered() -> None:
    watch = EditWatch(torch.empty(2, 6, 97, device="meta"), 3)
    watch.filled(3, 4)
    watch.showing(3)
    assert not watch.earlier_edited(4)
    assert not watch.last_edited()
    copy = torch.zeros(2, 6, 97)
    watch.restore(copy)
    assert not copy.any()


def test_a_change_of_requires_grad_is_followed() -> None:
    fast, model = fast_and_plain()
    assert fast(IDS).requires_grad
    model.requires_grad_(False)
    assert torch.allclose(torch.from_numpy(fast(IDS).numpy()), model(IDS), atol=1e-4)
    model.requires_grad_(True)
    assert fast(IDS).requires_grad
    assert same(fast, model)
