"""Files of tensors under the course's and nanoGPT's names: .pt in its wrappings, .safetensors, configs, errors."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import (
    BOOK_CONFIG,
    ODD_CONFIGS,
    SMALL,
    assert_same_logits,
    random_book,
    random_gpt,
    randomise,
)
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from engine.checkpoints.load import load_checkpoint

SAID = ("n_heads", "activation", "norm_eps", "attn_scale")


def said(config: dict[str, Any]) -> dict[str, Any]:
    """What the tensors do not show."""
    return {key: value for key, value in config.items() if key in SAID}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_bare_state_dict(name: str, tmp_path: Path) -> None:
    model, path = random_gpt(ODD_CONFIGS[name]), tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    checkpoint = load_checkpoint(path, config=said(ODD_CONFIGS[name]))
    assert_same_logits(checkpoint, model)
    assert checkpoint.config.tied_head == ODD_CONFIGS[name].get("tie_weights", False)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_wrapped_state_dict_of_the_book(key: str, prefix: str, tmp_path: Path) -> None:
    model, path = random_book(), tmp_path / "model.pt"
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert any(name.endswith("att.mask") for name in state)
    torch.save({key: state, "optimizer_state_dict": {"state": {}}, "epoch": 3}, path)
    checkpoint = load_checkpoint(str(path), config=BOOK_CONFIG)
    assert_same_logits(checkpoint, model)
    assert "also in the file, not read: epoch, optimizer_state_dict" in checkpoint.notes
    assert any("by default activation='gelu_tanh', norm_eps=1e-05" in note for note in checkpoint.notes)


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda width: nn.LayerNorm(width, bias=False)])
def test_torch_norms_in_a_file(norm: Any, tmp_path: Path) -> None:
    model, path = random_book(norm=norm, tied=True), tmp_path / "model.ckpt"
    torch.save(model.state_dict(), path)
    assert_same_logits(load_checkpoint(path, config={"n_heads": 2}), model)


@dataclass
class TrainConfig:
    n_heads: int = 2
    activation: str = "gelu"
    learning_rate: float = 3e-4


@pytest.mark.parametrize(
    ("key", "saved"),
    [
        ("config", {"n_heads": 2, "activation": "gelu", "emb_dim": 40}),
        ("model_config", TrainConfig()),
        ("args", argparse.Namespace(n_heads=2, activation="gelu", out="runs", when=Path("x"))),
    ],
)
def test_a_config_saved_beside_the_weights(key: str, saved: Any, tmp_path: Path) -> None:
    model, path = random_gpt({**SMALL, "activation": "gelu"}), tmp_path / "model.pt"
    torch.save({"model_state_dict": model.state_dict(), key: saved}, path)
    checkpoint = load_checkpoint(path)
    assert_same_logits(checkpoint, model)
    notes = " ".join(checkpoint.notes)
    if key == "model_config":
        assert "read as inert data, their code not imported: test_checkpoints_files.TrainConfig" in notes
        assert "not used: learning_rate" in notes


def test_safetensors_with_a_config_beside_it(tmp_path: Path) -> None:
    model = random_gpt(SMALL)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_logits(load_checkpoint(tmp_path / "model.safetensors", config={"n_heads": 2}), model)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "lr": 1}))
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert_same_logits(checkpoint, model)
    assert any("configuration from" in note for note in checkpoint.notes)
    (tmp_path / "mine.json").write_text(json.dumps(SMALL))
    checkpoint = load_checkpoint(tmp_path / "model.safetensors", config=str(tmp_path / "mine.json"))
    assert checkpoint.config.n_heads == 2


def test_a_tied_head_that_is_left_out(tmp_path: Path) -> None:
    model, path = random_gpt({**SMALL, "tie_weights": True}), tmp_path / "m.safetensors"
    state = model.state_dict()
    del state["out_head.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"out_head\.weight is missing, expected shape \[97, 40\].*tie_weights"):
        load_checkpoint(path, config={"n_heads": 2})
    checkpoint = load_checkpoint(path, config={"n_heads": 2, "tie_weights": True})
    assert_same_logits(checkpoint, model)
    assert checkpoint.weights["head"] is checkpoint.weights["tok_emb"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"n_heads cannot be seen in them; pass config=\{\"n_heads\": \.\.\.\} \(embed_dim is 40\)"),
        ({"n_heads": 2, "vocab_size": 98}, "config has vocab_size=98, the tensors in .* say vocab_size=97"),
        ({"n_heads": 2, "emb_dim": 48}, "config has embed_dim=48, the tensors .* embed_dim=40"),
        ({"n_heads": 2, "emb_dim": 40, "embed_dim": 48}, "embed_dim=48 and emb_dim=40; give one"),
        ({"n_heads": 2, "qkv_bias": True}, "qkv_bias=True, the tensors .* qkv_bias=False"),
        ({"n_heads": 2, "n_layers": 3}, "n_layers=3, the tensors .* n_layers=2"),
        ({"n_heads": 3}, "embed_dim=40 is not a multiple of n_heads=3"),
        ({"n_heads": 2, "actvation": "gelu"}, "unknown keys actvation; known: vocab_size"),
        ({"n_heads": 2, "activation": "mish"}, "activation='mish' is not supported; choose from gelu"),
        ({"n_heads": 2, "attn_scale": "x"}, "attn_scale must be a number, or one for each layer, got 'x'"),
        ({"n_heads": 2, "attn_scale": [1.0]}, "attn_scales has 1 entries for n_layers=2"),
        ({"n_heads": 2, "tie_weights": True}, "tie_weights=True, but in .* out_head.weight differs"),
        ("nowhere.json", "nowhere.json cannot be read as JSON"),
        (7, "config must be a mapping or the path of a JSON file, got a int"),
    ],
)
def test_configs_that_do_not_fit(config: Any, message: str, tmp_path: Path) -> None:
    torch.save(random_gpt(SMALL).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.pth", config=config)


def test_two_configs_that_disagree(tmp_path: Path) -> None:
    torch.save({"model": random_gpt(SMALL).state_dict(), "config": {"n_heads": 4}}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"config has n_heads=2 and the config saved with .* has n_heads=4"):
        load_checkpoint(tmp_path / "m.pth", config={"n_heads": 2})


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    state = random_gpt(SMALL).state_dict()
    del state["trf_blocks.1.att.out_proj.bias"]
    state["trf_blocks.0.gate.weight"] = torch.ones(2, 3)
    state["trf_blocks.1.ff.layers.2.weight"] = torch.ones(40, 159)
    state["final_norm.scale"] = torch.ones(40, dtype=torch.int64)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_checkpoint(tmp_path / "m.pth", config={"n_heads": 2})
    for part in (
        "trf_blocks.1.att.out_proj.bias is missing, expected shape [40]",
        "trf_blocks.0.gate.weight is not part of this model, shape [2, 3]",
        "trf_blocks.1.ff.layers.2.weight has shape [40, 159], expected [40, 160]",
        "final_norm.scale holds torch.int64, expected a floating-point type",
    ):
        assert part in str(caught.value)


def test_a_checkpoint_without_its_embedding(tmp_path: Path) -> None:
    state = random_gpt(SMALL).state_dict()
    del state["tok_emb.weight"]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"lacks tok_emb\.weight"):
        load_checkpoint(tmp_path / "m.pth", config={"n_heads": 2})


# nanoGPT


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)}
        )

    def forward(self, x: torch.Tensor, activation: Any) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attn["c_proj"](mixed)
        return x + self.mlp["c_proj"](activation(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's structure and names."""

    def __init__(self, args: dict[str, Any], activation: Any = F.gelu) -> None:
        super().__init__()
        width, bias = args["n_embd"], args.get("bias", True)
        self.activation = activation
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], width),
                "wpe": nn.Embedding(args["block_size"], width),
                "h": nn.ModuleList([NanoBlock(width, args["n_head"], bias) for _ in range(args["n_layer"])]),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x, self.activation)
        return self.lm_head(self.transformer["ln_f"](x))


ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 40, "block_size": 16, "bias": False, "vocab_size": 97, "dropout": 0.0}


def save_nano(path: Path, args: dict[str, Any], prefix: str = "", **kwargs: Any) -> NanoGPT:
    torch.manual_seed(0)
    model = randomise(NanoGPT(args, **kwargs))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for i in range(args["n_layer"]):
        state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)  # versions without flash attention
    content = {"model": state, "model_args": args, "optimizer": {}, "iter_num": 1, "best_val_loss": torch.tensor(2.0)}
    torch.save({**content, "config": {"dataset": "shakespeare"}}, path)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(bias: bool, prefix: str, tmp_path: Path) -> None:
    model = save_nano(tmp_path / "ckpt.pt", {**ARGS, "bias": bias}, prefix)
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert_same_logits(checkpoint, model)
    assert checkpoint.config.tied_head
    assert checkpoint.weights["head"] is checkpoint.weights["tok_emb"]
    assert any("activation gelu: nn.GELU()" in note for note in checkpoint.notes)
    assert any("not read: best_val_loss, config, iter_num, optimizer" in note for note in checkpoint.notes)


def test_nanogpt_before_bias_was_an_option(tmp_path: Path) -> None:
    def tanh(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    args = {key: value for key, value in ARGS.items() if key != "bias"}
    model = save_nano(tmp_path / "ckpt.pt", args, activation=tanh)
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert_same_logits(checkpoint, model)
    assert any("activation gelu_tanh: as nanoGPT had it" in note for note in checkpoint.notes)
    model = save_nano(tmp_path / "new.pt", ARGS, activation=tanh)
    assert_same_logits(load_checkpoint(tmp_path / "new.pt", config={"activation": "gelu_tanh"}), model)


def test_nanogpt_bare_weights_and_padded_vocabulary(tmp_path: Path) -> None:
    args = {**ARGS, "vocab_size": 50304, "n_embd": 8, "n_layer": 1}
    model = save_nano(tmp_path / "ckpt.pt", args)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r'does not say n_head; pass config=\{"n_head": \.\.\.\}'):
        load_checkpoint(tmp_path / "bare.pt")
    checkpoint = load_checkpoint(tmp_path / "bare.pt", config={"n_head": 2})
    assert_same_logits(checkpoint, model)
    assert checkpoint.config.vocab_size == 50304


@pytest.mark.parametrize(
    ("args", "config", "message"),
    [
        ({"use_rmsnorm": True}, None, "model_args has use_rmsnorm=True, which nanoGPT does not have"),
        ({"block_size": 32}, None, "say block_size=32, its tensors say 16"),
        ({"bias": True}, None, "say bias=True, its tensors say bias=False"),
        ({}, {"n_heads": 2}, "config has unknown keys n_heads; for nanoGPT: vocab_size"),
        ({}, {"n_head": 4}, "model_args has n_head=2 and config has n_head=4"),
        ({}, {"activation": "mish"}, "activation='mish' is not supported"),
    ],
)
def test_nanogpt_settings_that_do_not_fit(args: Any, config: Any, message: str, tmp_path: Path) -> None:
    model = save_nano(tmp_path / "ckpt.pt", ARGS)
    torch.save({"model": model.state_dict(), "model_args": {**ARGS, **args}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "ckpt.pt", config=config)


def test_nanogpt_switches_that_are_off_or_overridden(tmp_path: Path) -> None:
    model = save_nano(tmp_path / "ckpt.pt", ARGS)
    changed = {**ARGS, "use_rmsnorm": False, "name": "x"}
    torch.save({"model": model.state_dict(), "model_args": changed}, tmp_path / "ckpt.pt")
    assert_same_logits(load_checkpoint(tmp_path / "ckpt.pt", config={"name": None}), model)


def test_nanogpt_missing_tensor(tmp_path: Path) -> None:
    state = save_nano(tmp_path / "ckpt.pt", ARGS).state_dict()
    del state["transformer.h.1.mlp.c_proj.weight"]
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj\.weight is missing, expected shape \[40, 160\]"):
        load_checkpoint(tmp_path / "ckpt.pt")
