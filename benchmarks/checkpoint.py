"""The random GPT-2 that every engine is given: a Hugging Face folder, made once."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.bench.presets import preset_config, random_weights
from engine.config import ModelConfig

PRESETS = {
    "gpt2": preset_config("gpt2"),
    "tiny": ModelConfig(307, 128, 64, 4, 2, 256, tied_head=True),
}
_NAMES = {"norm1": "ln_1", "qkv": "attn.c_attn", "proj": "attn.c_proj", "norm2": "ln_2", "fc": "mlp.c_fc"}
_NAMES["fc2"] = "mlp.c_proj"


def shared_checkpoint(models: Path, preset: str) -> Path:
    """The folder ``models/preset`` with config.json and model.safetensors, float32, written if it is not there."""
    folder = models / preset
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = PRESETS[preset]
        save_file(hugging_face_names(config), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2), encoding="utf-8")
    return folder


def hugging_face_config(config: ModelConfig) -> dict[str, object]:
    """The fields of a GPT-2 config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.embed_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.hidden_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "torch_dtype": "float32",
    }


def hugging_face_names(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names; the matrices of the blocks are [in, out] there."""
    weights = random_weights(config)
    state = {"transformer.wte.weight": weights["tok_emb"], "transformer.wpe.weight": weights["pos_emb"]}
    if not config.tied_head:
        state["lm_head.weight"] = weights["head"]
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
        for i in range(config.n_layers):
            for name, theirs in _NAMES.items():
                tensor = weights[f"blocks.{i}.{name}.{kind}"]
                state[f"transformer.h.{i}.{theirs}.{kind}"] = tensor.t() if tensor.dim() == 2 else tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}
