"""The reference model: the course page's names, its arithmetic, its loops, its refusals."""

import math

import pytest
import torch
from models import ODD_CONFIGS, tiny_module

from engine.reference import (
    GPTModel,
    LayerNorm,
    complete_config,
    generate_greedy,
    generate_next_token,
    generate_sampled,
)

BASE = {"vocab_size": 97, "context_length": 16, "embed_dim": 12, "n_heads": 3, "n_layers": 2}


def test_submodules_have_the_course_names() -> None:
    model = GPTModel({**BASE, "drop_rate": 0.1, "qkv_bias": True})
    names = dict(model.named_modules())
    for name in ("tok_emb", "pos_emb", "drop_emb", "trf_blocks", "final_norm", "out_head"):
        assert name in names
    for name in ("att", "ff", "norm1", "norm2", "drop_shortcut", "att.W_query", "att.out_proj", "ff.layers.2"):
        assert f"trf_blocks.1.{name}" in names
    assert model.out_head.bias is None
    assert set(dict(model.final_norm.named_parameters())) == {"scale", "shift"}


def test_emb_dim_is_accepted() -> None:
    config = {key: value for key, value in BASE.items() if key != "embed_dim"}
    assert GPTModel({**config, "emb_dim": 12}).config["embed_dim"] == 12
    with pytest.raises(ValueError, match="embed_dim=12 and emb_dim=24"):
        complete_config({**BASE, "emb_dim": 24})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "embed_dim=12 is not a multiple of n_heads=5"),
        ({"activation": "swiglu"}, "'swiglu' is not known"),
        ({"rope": True}, "unknown keys rope"),
        ({"vocab_size": 0}, r"config\['vocab_size'\] must be a positive integer, got 0"),
    ],
)
def test_bad_config_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTModel({**BASE, **change})


def test_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="config lacks n_layers"):
        GPTModel({key: value for key, value in BASE.items() if key != "n_layers"})


def test_layer_norm_by_hand() -> None:
    norm = LayerNorm(4)
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    mean, var = 3.0, 3.5
    assert torch.allclose(norm(x), (x - mean) / math.sqrt(var + 1e-5))


def test_attention_is_causal() -> None:
    model = tiny_module()
    ids = torch.randint(97, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    assert torch.allclose(model(ids)[0, :12], model(changed)[0, :12], atol=1e-6)
    assert not torch.allclose(model(ids)[0, 12:], model(changed)[0, 12:], atol=1e-2)


def test_dropout_acts_in_training_only() -> None:
    model = GPTModel({**BASE, "drop_rate": 0.5})
    ids = torch.randint(97, (2, 8))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_odd_configs_run(name: str) -> None:
    config = ODD_CONFIGS[name]
    ids = torch.randint(config["vocab_size"], (2, 9))
    assert GPTModel(config)(ids).shape == (2, 9, config["vocab_size"])


def test_loops() -> None:
    model = tiny_module()
    context = torch.randint(97, (2, 5))
    assert generate_next_token(model, context).shape == (2, 1)
    greedy = generate_greedy(model, context, 4)
    assert greedy.shape == (2, 9)
    assert torch.equal(greedy[:, 5], model(context)[:, -1].argmax(-1))
    torch.manual_seed(0)
    first = generate_sampled(model, context, 4)
    torch.manual_seed(0)
    assert torch.equal(first, generate_sampled(model, context, 4))
