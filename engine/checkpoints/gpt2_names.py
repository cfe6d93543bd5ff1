"""GPT-2's own tensor names (``wte``, ``h.0.attn.c_attn`` ...), which Hugging Face and nanoGPT share.

Hugging Face stores linear weights as its ``Conv1D`` does, [in, out]; nanoGPT as ``torch.nn.Linear`` does, [out, in].
"""

import re
from collections.abc import Mapping

import torch

from engine.checkpoints.tensors import bias_or_zeros, check_tensors, share_memory, strip_prefixes
from engine.config import ModelConfig

MASK_BUFFER = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")
HEAD = "lm_head.weight"
NORMS = {"ln_1": "norm1", "ln_2": "norm2"}
LINEARS = {"attn.c_attn": "qkv", "attn.c_proj": "proj", "mlp.c_fc": "fc", "mlp.c_proj": "fc2"}


def is_mask_buffer(name: str) -> bool:
    """Whether ``name`` is the causal mask that old versions stored with the weights."""
    return MASK_BUFFER.search(name) is not None


def bare_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without wrappers' prefixes, the prefix ``transformer.``, and the old masks."""
    stripped = strip_prefixes(tensors)
    return {name.removeprefix("transformer."): tensor for name, tensor in stripped.items() if not is_mask_buffer(name)}


def expected_shapes(config: ModelConfig, conv1d: bool, bias: bool, head: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint of ``config`` holds, biases and the head's own weight only if told so."""
    width, hidden = config.embed_dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.context_length, width),
        "ln_f.weight": (width,),
    }
    sizes = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (hidden, width), "mlp.c_proj": (width, hidden)}
    for i in range(config.n_layers):
        shapes |= {f"h.{i}.{norm}.weight": (width,) for norm in NORMS}
        shapes |= {f"h.{i}.{name}.weight": size[::-1] if conv1d else size for name, size in sizes.items()}
        if bias:
            shapes |= {f"h.{i}.{norm}.bias": (width,) for norm in NORMS}
            shapes |= {f"h.{i}.{name}.bias": size[:1] for name, size in sizes.items()}
    if bias:
        shapes["ln_f.bias"] = (width,)
    if head:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def to_canonical(
    what: str, config: ModelConfig, tensors: Mapping[str, torch.Tensor], conv1d: bool, bias: bool
) -> dict[str, torch.Tensor]:
    """The canonical tensors of a checkpoint with bare names; ``[in, out]`` weights are transposed as views.

    Args:
        what: the checkpoint in words, for errors.
        config: the architecture; a tied head may still have its copy in the file, it then has to be the same.
        tensors: what ``bare_names`` returned.
        conv1d: whether linear weights are [in, out].
        bias: whether linears and norms have biases.

    Raises:
        ValueError: a tensor is missing, left over or misshapen, or the copy of a tied head differs.
    """
    has_head = HEAD in tensors or not config.tied_head
    check_tensors(what, tensors, expected_shapes(config, conv1d, bias, has_head))
    if config.tied_head and HEAD in tensors:
        _check_tied(what, tensors["wte.weight"], tensors[HEAD])

    weights = {"tok_emb": tensors["wte.weight"], "pos_emb": tensors["wpe.weight"]}
    pairs = {"ln_f": "final_norm"}
    for i in range(config.n_layers):
        pairs |= {f"h.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in (NORMS | LINEARS).items()}
    for theirs, ours in pairs.items():
        stored = tensors[f"{theirs}.weight"]
        weight = stored.T if conv1d and stored.dim() == 2 else stored
        weights[f"{ours}.weight"] = weight
        weights[f"{ours}.bias"] = bias_or_zeros(tensors.get(f"{theirs}.bias"), weight, weight.shape[0])
    weights["head"] = weights["tok_emb"] if config.tied_head else tensors[HEAD]
    return weights


def _check_tied(what: str, embedding: torch.Tensor, head: torch.Tensor) -> None:
    if not share_memory(embedding, head) and not torch.equal(embedding, head):
        raise ValueError(
            f"{what}: the configuration ties the head to the token embedding, but lm_head.weight differs from "
            "wte.weight; set tie_word_embeddings to false if the head is its own"
        )
