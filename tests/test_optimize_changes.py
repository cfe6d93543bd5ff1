"""What is done to a module after ``optimize``: taken over or refused as at creation, never ignored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_models import random_book
from models import ODD_CONFIGS, tiny_module
from torch import nn

import engine
from engine.reference import GPTModel, MultiHeadAttention, TransformerBlock

IDS = torch.tensor([[5, 9, 2, 44, 3]])
Change = Callable[[GPTModel], object]


def same(fast: nn.Module, model: nn.Module, ids: torch.Tensor = IDS) -> bool:
    with torch.no_grad():
        return bool((fast(ids) - model(ids)).abs().max() < 1e-4)


def binds(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one whenever the module is read anew."""
    accelerator, seen = type(fast)._accelerator, []  # type: ignore[attr-defined,var-annotated]
    bind = accelerator._bind
    monkeypatch.setattr(accelerator, "_bind", lambda: (seen.append(1), bind()))
    return seen


def set_everywhere(name: str, value: object, *kinds: str) -> Change:
    """Set an attribute of every submodule of these classes."""

    def change(model: GPTModel) -> None:
        for part in model.modules():
            if type(part).__name__ in kinds:
                setattr(part, name, value)

    return change


def other_heads(model: GPTModel) -> None:
    set_everywhere("num_heads", 4, "MultiHeadAttention")(model)
    set_everywhere("head_dim", 10, "MultiHeadAttention")(model)


TAKEN: dict[str, Change] = {
    "scale of one layer": lambda m: setattr(m.trf_blocks[0].att, "scale", 5.0),
    "eps": set_everywhere("eps", 1.0, "LayerNorm"),
    "activation": set_everywhere("name", "relu", "Activation"),
    "heads": other_heads,
    "another block": lambda m: m.trf_blocks.append(TransformerBlock(m.config).eval()),
    "a block less": lambda m: m.trf_blocks.__delitem__(1),
}


@pytest.mark.parametrize("key", TAKEN)
def test_a_change_of_the_structure_is_taken_over(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_module()
    fast = engine.optimize(model)
    before = fast(IDS).detach().clone()
    seen = binds(fast, monkeypatch)
    TAKEN[key](model)
    assert same(fast, model)
    assert not torch.allclose(fast(IDS), before, atol=1e-3)
    assert len(seen) == 1


REFUSED: dict[str, tuple[Change, str]] = {
    "hook": (
        lambda m: m.trf_blocks[0].register_forward_hook(lambda part, args, out: out * 0),
        r"trf_blocks\.0 .* has a forward hook",
    ),
    "hook on the head": (
        lambda m: m.out_head.register_forward_hook(lambda part, args, out: out + 1),
        "out_head .* has a forward hook",
    ),
    "pre-hook": (
        lambda m: m.trf_blocks[1].ff.register_forward_pre_hook(lambda part, args: (args[0] * 2,)),
        r"trf_blocks\.1\.ff .* has a forward hook",
    ),
    "forward on the object": (
        lambda m: setattr(m.trf_blocks[0], "forward", lambda x: x),
        r"trf_blocks\.0 .* has a forward set on the object",
    ),
    "one eps": (lambda m: setattr(m.trf_blocks[0].norm1, "eps", 1.0), r"norm1 has eps 1\.0 and norm2 1e-05"),
    "one activation": (
        lambda m: setattr(m.trf_blocks[1].ff.layers[1], "name", "relu"),
        r"trf_blocks\.0 has activation gelu_tanh and trf_blocks\.1 has relu",
    ),
    "bias of the head": (lambda m: setattr(m.out_head, "bias", nn.Parameter(torch.ones(97))), "out_head has a bias"),
    "max_norm": (lambda m: setattr(m.tok_emb, "max_norm", 1.0), r"max_norm=1\.0"),
    "mask": (
        lambda m: setattr(m.trf_blocks[0].att, "mask", torch.zeros(64, 64, dtype=torch.bool)),
        r"MultiHeadAttention at trf_blocks\.0\.att does not compute",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_that_is_refused_at_creation_is_refused_later(key: str) -> None:
    change, message = REFUSED[key]
    model = tiny_module()
    fast = engine.optimize(model)
    fast(IDS)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fast(IDS)
    with pytest.raises(ValueError, match=message):
        engine.optimize(model)


def test_after_a_hook_is_gone_it_goes_on() -> None:
    model = tiny_module()
    fast = engine.optimize(model)
    handle = model.final_norm.register_forward_hook(lambda part, args, out: out * 0)
    with pytest.raises(ValueError, match=r"final_norm .* has a forward hook"):
        fast(IDS)
    handle.remove()
    assert same(fast, model)


def test_a_forward_replaced_in_a_class_is_seen() -> None:
    class Block(TransformerBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = tiny_module()
    model.trf_blocks[1].__class__ = Block
    fast = engine.optimize(model)
    fast(IDS)
    Block.forward = lambda self, x: x + self.att(self.norm1(x))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="differ by"):
        fast(IDS)


def test_refresh_checks_another_structure() -> None:
    model = tiny_module()
    fast = engine.optimize(model)
    model.trf_blocks[0].forward = lambda x: x
    with pytest.raises(ValueError, match="forward set on the object"):
        fast.refresh()


def test_a_constant_set_to_what_it_was_and_weights_do_not_read_the_module_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_module()
    fast = engine.optimize(model)
    seen = binds(fast, monkeypatch)
    for block in model.trf_blocks:
        block.norm1.eps = float("1e-5")
        block.att.scale = block.att.head_dim**-0.5
    assert same(fast, model)
    model.load_state_dict(tiny_module(seed=3).state_dict())
    model.note = "an attribute more"
    assert same(fast, model)
    assert not seen


class Counting(MultiHeadAttention):
    """Notes how it was called, as one does to look at attention weights."""

    calls, seen = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls, self.seen = self.calls + 1, x.shape[1]
        return super().forward(x)


def test_what_the_modules_own_forward_notes_is_no_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_module()
    for block in model.trf_blocks:
        block.att.__class__ = Counting
        block.att.calls, block.att.seen = 0, None
    fast = engine.optimize(model)
    seen = binds(fast, monkeypatch)
    assert same(fast, model)
    assert same(fast, model, IDS[:, :3])
    assert not seen


def test_the_books_module_may_share_its_activation() -> None:
    model = random_book()
    fast = engine.optimize(model)
    model.trf_blocks[0].att.num_heads = 4
    with pytest.raises(ValueError, match=r"trf_blocks\.0 has n_heads 4 and trf_blocks\.1 has 2"):
        fast(IDS)


# --- dropout ---------------------------------------------------------------------------------------------------------


def flash_attention(self: Any, x: torch.Tensor) -> torch.Tensor:
    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    q, k, v = heads(self.W_query(x)), heads(self.W_key(x)), heads(self.W_value(x))
    rate = self.dropout if self.training else 0.0
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
    return self.out_proj(mixed.transpose(1, 2).flatten(2))


def with_flash(rate: float) -> GPTModel:
    model = tiny_module()
    for block in model.trf_blocks:
        del block.att.dropout
        block.att.dropout = rate
        block.att.__class__ = type("Flash", (MultiHeadAttention,), {"forward": flash_attention})
    return model


def test_a_rate_that_is_an_attribute_counts_as_a_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_flash(0.0)
    fast = engine.optimize(model)
    seen = binds(fast, monkeypatch)
    assert same(fast.train(), model)
    model.trf_blocks[1].att.dropout = 0.2
    with pytest.raises(ValueError, match=r"training mode and trf_blocks\.1\.att has dropout 0\.2"):
        fast(IDS)
    assert same(fast.eval(), model)
    assert not seen
    created = engine.optimize(with_flash(0.1).train())
    with pytest.raises(ValueError, match=r"trf_blocks\.0\.att has dropout 0\.1"):
        created(IDS)


# --- what is given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"), [(None, "NoneType"), (GPTModel, "the class GPTModel"), ("gpt2", "str"), (len, "builtin")]
)
def test_what_is_no_module_is_refused(given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"takes a live GPT module, an instance of .*nn\.Module, got {named}"):
        engine.optimize(given)


def test_a_forward_set_on_the_module_itself_is_refused() -> None:
    """It would be found before that of any class, and the module would be no faster."""
    model = GPTModel(ODD_CONFIGS["plain"])
    model.forward = model.forward
    with pytest.raises(ValueError, match="GPTModel has a forward set on the object"):
        engine.optimize(model)
