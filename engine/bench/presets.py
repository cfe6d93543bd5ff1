"""Models to measure without a checkpoint: the GPT-2 sizes with random weights."""

import torch

from engine.checkpoints.canonical import Checkpoint, canonical_shapes
from engine.config import ModelConfig

_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PRESETS = tuple(_SIZES)


def preset_config(name: str) -> ModelConfig:
    """The architecture of a GPT-2 size (Radford et al. 2019, table 2)."""
    layers, heads, width = _SIZES[name]
    return ModelConfig(50257, 1024, width, heads, layers, 4 * width, tied_head=True)


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Canonical weights from N(0, 0.02), norms at 1 and biases at 0, the same at every call; float32."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for key, shape in canonical_shapes(config).items():
        if key == "head" and config.tied_head:
            weights[key] = weights["tok_emb"]
        elif len(shape) == 2:
            weights[key] = torch.randn(shape, generator=generator).mul_(0.02)
        else:
            weights[key] = torch.ones(shape) if "norm" in key and key.endswith("weight") else torch.zeros(shape)
    return weights


def random_checkpoint(name: str) -> Checkpoint:
    """A GPT-2 size with random weights."""
    config = preset_config(name)
    source = f"{name} with random weights: the speed is real, the text would be noise"
    return Checkpoint(config, random_weights(config), source)
