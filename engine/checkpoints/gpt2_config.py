"""Hugging Face's ``config.json`` of the GPT-2 family -> ``ModelConfig``: which fields count, which are refused."""

from collections.abc import Mapping
from typing import Any

from engine.checkpoints.activations import activation_named
from engine.config import ModelConfig

# The family's defaults for fields that change the result (transformers' GPT2Config).
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
QUIET_DEFAULTS = ("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel", "TFGPT2LMHeadModel", "FlaxGPT2LMHeadModel")
# Fields that change the result, with the values under which they do not.
REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, [], None),
    "quantization_config": (None, {}),
    "auto_map": (None, {}),
    "adapters": (None, {}),
}
# Fields that change nothing in the logits of a language model at inference.
HARMLESS = frozenset(
    """
    model_type architectures chunk_size_feed_forward _name_or_path name_or_path transformers_version torch_dtype
    dtype resid_pdrop embd_pdrop attn_pdrop initializer_range summary_type summary_use_proj summary_activation
    summary_proj_to_labels
    summary_first_dropout use_cache bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id n_ctx reorder_and_upcast_attn gradient_checkpointing task_specific_params is_decoder id2label
    label2id num_labels _num_labels problem_type output_attentions output_hidden_states output_past return_dict
    return_dict_in_generate output_scores torchscript use_bfloat16 tie_encoder_decoder finetuning_task prefix
    tokenizer_class cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset layer_types
    predict_special_tokens
    """.split()  # noqa: SIM905
)


def _complete(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields under their own names with defaults filled in, and notes on the defaults that were needed."""
    full = {key: value for key, value in fields.items() if key not in ALIASES}
    for alias, key in ALIASES.items():
        if alias in fields and full.setdefault(key, fields[alias]) != fields[alias]:
            raise ValueError(f"the config has {key}={full[key]!r} and {alias}={fields[alias]!r}; they are one field")
    absent = [key for key in DEFAULTS if key not in full and key not in QUIET_DEFAULTS]
    notes = tuple(f"the config does not say {key}: GPT-2's default {DEFAULTS[key]!r}" for key in absent)
    return {**DEFAULTS, **full}, notes


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raise for a field whose value changes the result in a way that this engine does not compute."""
    model_type = fields.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise ValueError(f"model_type={model_type!r} is not supported; the engine runs model_type 'gpt2'")
    for key, accepted in REFUSED_UNLESS.items():
        if key in fields and fields[key] not in accepted:
            raise ValueError(f"{key}={fields[key]!r} changes the result and is not supported; leave it out")
    for architecture in fields.get("architectures") or ():
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architectures={fields['architectures']!r} is not supported; known: {known}")


def _check_types(full: Mapping[str, Any]) -> None:
    for key in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
        if not isinstance(full[key], bool):
            raise ValueError(f"{key} must be true or false, got {full[key]!r}")
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if isinstance(full[key], bool) or not isinstance(full[key], int) or full[key] < 1:
            raise ValueError(f"{key} must be a positive integer, got {full[key]!r}")
    if full["n_embd"] % full["n_head"]:
        raise ValueError(f"n_embd={full['n_embd']} is not a multiple of n_head={full['n_head']}")
    epsilon = full["layer_norm_epsilon"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or epsilon < 0:
        raise ValueError(f"layer_norm_epsilon must be a number of at least 0, got {epsilon!r}")


def read_gpt2_config(fields: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The architecture that the fields of a ``config.json`` say, and notes: defaults used, fields not known.

    Raises:
        ValueError: a field that changes the result has a value that is not supported, or makes no sense.
    """
    _refuse_unsupported(fields)
    full, notes = _complete(fields)
    _check_types(full)
    scale = (full["n_embd"] // full["n_head"]) ** -0.5 if full["scale_attn_weights"] else 1.0
    by_layer = full["scale_attn_by_inverse_layer_idx"]
    model = ModelConfig(
        vocab_size=full["vocab_size"],
        context_length=full["n_positions"],
        embed_dim=full["n_embd"],
        n_heads=full["n_head"],
        n_layers=full["n_layer"],
        hidden_dim=4 * full["n_embd"] if full["n_inner"] is None else full["n_inner"],
        activation=activation_named(full["activation_function"], "activation_function"),
        norm_eps=float(full["layer_norm_epsilon"]),
        attn_scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(full["n_layer"])),
        tied_head=full["tie_word_embeddings"],
    )
    if "model_type" not in fields:
        notes += ("the config has no model_type: read as gpt2",)
    unknown = sorted(fields.keys() - DEFAULTS.keys() - ALIASES.keys() - REFUSED_UNLESS.keys() - HARMLESS)
    if unknown:
        notes += (f"fields of the config that are not known and were not used: {', '.join(unknown)}",)
    return model, notes


def end_of_text_id(fields: Mapping[str, Any], vocab_size: int) -> tuple[int | None, tuple[str, ...]]:
    """``eos_token_id`` of a config, None where it is not said or out of the vocabulary, and notes."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    notes: tuple[str, ...] = ()
    if len(ids) > 1:
        notes = (f"eos_token_id={value!r}: the first is the end of text, pass the others as stop_token_ids",)
    first = ids[0] if ids else None
    if first is None:
        return None, notes
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < vocab_size:
        return None, (*notes, f"eos_token_id={value!r} is not in the vocabulary of {vocab_size}: not used")
    return first, notes
