"""The self-check: what a module does beyond a few tokens only, short contexts, weights that are not finite."""

from typing import Any

import pytest
import torch
from models import tiny_module
from torch import nn

import engine
from engine.config import ModelConfig
from engine.live import self_check
from engine.reference import GPTModel, MultiHeadAttention, TransformerBlock

CONFIG: dict[str, Any] = {"vocab_size": 97, "context_length": 64, "embed_dim": 40, "n_heads": 2, "n_layers": 3}


class Windowed(MultiHeadAttention):
    """Attends to the last ``window`` positions only."""

    window = 24

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        old = self.mask
        far = torch.ones_like(old).tril(-self.window)
        try:
            self.mask = old | far
            return super().forward(x)
        finally:
            self.mask = old


class Chunked(TransformerBlock):
    """Attends within chunks of 24 positions: its attention by itself is the usual one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.cat([self.att(chunk) for chunk in self.norm1(x).split(24, dim=1)], dim=1)
        return x + self.ff(self.norm2(x))


def fresh(**changes: Any) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel({**CONFIG, **changes}).eval()


def windowed(layer: int, window: int, **changes: Any) -> GPTModel:
    model = fresh(**changes)
    model.trf_blocks[layer].att.__class__ = type("Windowed", (Windowed,), {"window": window})
    return model


@pytest.mark.parametrize(("layer", "window"), [(0, 24), (2, 24), (1, 63)])
def test_a_local_window_is_refused(layer: int, window: int) -> None:
    model = windowed(layer, window)
    message = rf"Windowed at trf_blocks\.{layer}\.att does not compute .* on \[1, 64, 40\]"
    with pytest.raises(ValueError, match=message):
        engine.optimize(model)
    with pytest.raises(ValueError, match=message):
        engine.LLM(model)


def test_a_window_of_one_layer_among_attentions_of_one_class_is_refused() -> None:
    model = fresh()
    for layer, block in enumerate(model.trf_blocks):
        block.att.__class__ = Windowed
        block.att.window = 24 if layer == 1 else 64
    with pytest.raises(ValueError, match=r"Windowed at trf_blocks\.1\.att does not compute"):
        engine.optimize(model)


def test_a_mask_of_one_layer_is_refused() -> None:
    model = fresh()
    model.trf_blocks[2].att.mask |= torch.ones(64, 64, dtype=torch.bool).tril(-40)
    with pytest.raises(ValueError, match=r"trf_blocks\.2\.att does not compute"):
        engine.optimize(model)


def test_a_block_that_attends_in_chunks_is_refused() -> None:
    model = fresh()
    model.trf_blocks[1].__class__ = Chunked
    with pytest.raises(ValueError, match=r"differ by .* on a probe"):
        engine.optimize(model)


def test_a_window_as_long_as_the_context_is_not_seen() -> None:
    assert engine.optimize(windowed(0, 64))(torch.tensor([[1, 2]])).shape == (1, 2, 97)


def test_alike_attentions_are_run_on_a_long_input_once() -> None:
    lengths = []

    class Noting(MultiHeadAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lengths.append(x.shape[1])
            return super().forward(x)

    for scale, longs in ((None, 1), ([0.1, 0.2, 0.1], 2)):
        model = fresh(context_length=1100, attn_scale=scale)
        for block in model.trf_blocks:
            block.att.__class__ = Noting
        lengths.clear()
        config = engine.checkpoints.live.recognise(model).config
        self_check.check_parts(model, config)
        assert lengths.count(self_check.LONGEST) == longs
        assert lengths.count(self_check.ROWS) == 3


@pytest.mark.parametrize(("sizes", "length"), [((97, 50, 40), 50), ((97, 5000, 40), 1024), ((50257, 1024, 768), 105)])
def test_the_long_probe_is_as_long_as_is_cheap(sizes: tuple[int, int, int], length: int) -> None:
    vocab_size, context_length, embed_dim = sizes
    layers = {"n_heads": 4, "n_layers": 12, "hidden_dim": 4 * embed_dim}
    config = ModelConfig(vocab_size=vocab_size, context_length=context_length, embed_dim=embed_dim, **layers)
    assert self_check.long_probe_ids(config).shape == (1, length)


@pytest.mark.parametrize("context_length", [1, 2, 3, 8, 11, 12, 13])
def test_short_contexts(context_length: int) -> None:
    model = tiny_module(context_length=context_length)
    ids = torch.arange(context_length)[None]
    fast, llm = engine.optimize(model), engine.LLM(model, dtype="float32")
    with torch.no_grad():
        assert (fast(ids) - model(ids)).abs().max() < 1e-4
        assert (llm.logits(ids[0].tolist()) - model(ids)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "trf_blocks.1.norm2.scale",
        "final_norm.shift",
        "trf_blocks.0.att.W_key.weight",
        "pos_emb.weight",
        "out_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = tiny_module()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    count = model.get_parameter(name).numel()
    for door in (engine.optimize, engine.LLM):
        with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinity in 1 of {count} elements"):
            door(model)


def test_a_part_of_another_shape_is_refused_by_name() -> None:
    class Tuple(MultiHeadAttention):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), None

    model = fresh()
    model.trf_blocks[1].att.__class__ = Tuple
    with pytest.raises(ValueError, match=r"Tuple at trf_blocks\.1\.att does not compute"):
        engine.optimize(model)


def test_parts_are_left_as_they_were() -> None:
    model = fresh().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.optimize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert isinstance(model.trf_blocks[0].att.dropout, nn.Dropout)
