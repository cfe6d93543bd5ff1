"""Hugging Face folders against transformers' own model, what is refused by name, and the hub (not reached)."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import assert_same_logits, randomise
from safetensors.torch import load_file, save_file

from engine.checkpoints import hub
from engine.checkpoints.load import load_checkpoint

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 16,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 2,
    "eos_token_id": 96,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "head_dim 80": {"n_embd": 80, "n_head": 1},
    "gelu": {"activation_function": "gelu"},
    "gelu_python": {"activation_function": "gelu_python"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "gelu_accurate": {"activation_function": "gelu_accurate"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "swish": {"activation_function": "swish"},
    "silu": {"activation_function": "silu"},
    "n_inner": {"n_inner": 24},
    "not scaled": {"scale_attn_weights": False},
    "scaled by layer, as CodeParrot": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "neither": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "own head": {"tie_word_embeddings": False},
}


def make(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SMALL, **config})))


@pytest.mark.parametrize("name", VARIANTS)
def test_against_transformers(name: str, tmp_path: Path) -> None:
    model = make(VARIANTS[name])
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, model)
    assert checkpoint.eos_token_id == 96
    assert checkpoint.folder == tmp_path
    assert not [note for note in checkpoint.notes if "not known" in note]
    tied = VARIANTS[name].get("tie_word_embeddings", True)
    assert (checkpoint.weights["head"] is checkpoint.weights["tok_emb"]) == tied


def write_bin(model: Any, folder: Path, shards: int) -> None:
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        torch.save({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_pytorch_model_bin(shards: int, tied: bool, tmp_path: Path) -> None:
    model = make({"tie_word_embeddings": tied})
    write_bin(model, tmp_path, shards)
    assert_same_logits(load_checkpoint(tmp_path), model)


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = make({"tie_word_embeddings": False})
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, model)
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"index\.json lists the file model-00001-of-.*safetensors, which is not in"):
        load_checkpoint(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **fields: Any) -> None:
    """Change the tensors of a saved folder, and fields of its config (None removes one)."""
    state = load_file(folder / "model.safetensors")
    state = change(state) or state
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None or key not in fields}
    (folder / "config.json").write_text(json.dumps(config))


def test_old_forms_of_the_file(tmp_path: Path) -> None:
    """No ``transformer.`` prefix, mask buffers, a copy of the tied head, fp16."""
    model = make({}).half().float()
    model.save_pretrained(tmp_path)

    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new = {name.removeprefix("transformer."): tensor.half() for name, tensor in state.items()}
        for i in range(2):
            new[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
            new[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return {**new, "lm_head.weight": new["wte.weight"].clone()}

    rewrite(tmp_path, old, n_ctx=16, task_specific_params={})
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, model)
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float16}


def test_weights_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    make({}).save_pretrained(tmp_path)
    weights = load_checkpoint(tmp_path).weights
    assert weights["blocks.0.fc.weight"].shape == (160, 40)
    assert weights["blocks.0.fc.weight"].stride() == (1, 160)
    if sys.platform == "linux":
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        maps = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "model.safetensors")]
        spans = [range(int(start, 16), int(end, 16)) for start, end in maps]
        assert all(any(tensor.data_ptr() in span for span in spans) for tensor in weights.values())


def test_a_file_by_itself(tmp_path: Path) -> None:
    model = make({})
    model.save_pretrained(tmp_path)
    assert_same_logits(load_checkpoint(tmp_path / "model.safetensors"), model)
    config = tmp_path / "config.json"
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    moved = config.rename(tmp_path / "other.json")
    assert_same_logits(load_checkpoint(tmp_path / "model.safetensors", config=moved), model)
    assert_same_logits(load_checkpoint(tmp_path / "weights.pt", config=json.loads(moved.read_text())), model)
    with pytest.raises(ValueError, match=r"Hugging Face's names and no configuration; put its config\.json beside"):
        load_checkpoint(tmp_path / "weights.pt")


def test_config_overrides_a_field(tmp_path: Path) -> None:
    make({}).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path, config={"activation_function": "relu"}).config.activation == "relu"
    assert load_checkpoint(tmp_path, config={"num_attention_heads": 4}).config.n_heads == 4
    with pytest.raises(
        ValueError, match="config has unknown keys n_heads; keys that count for a GPT-2 model: vocab_si"
    ):
        load_checkpoint(tmp_path, config={"n_heads": 4})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True changes the result and is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True changes the result"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads=\{'0': \[1\]\} changes the result"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* changes the result"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.* changes the result"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "architectures=.* is not supported; known: GPT2LMHead"),
        ({"activation_function": "mish"}, "activation_function='mish' is not supported; choose from gelu"),
        ({"n_head": 3}, "n_embd=40 is not a multiple of n_head=3"),
        ({"n_layer": "2"}, "n_layer must be a positive integer, got '2'"),
        ({"scale_attn_weights": "yes"}, "scale_attn_weights must be true or false, got 'yes'"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be a number of at least 0, got 'small'"),
        ({"hidden_size": 48}, "n_embd=40 and hidden_size=48; they are one field"),
        ({"vocab_size": 98}, r"wte\.weight has shape \[97, 40\], expected \[98, 40\]"),
        ({"n_inner": 50}, r"h\.0\.mlp\.c_fc\.weight has shape \[40, 160\], expected \[40, 50\]"),
        ({"n_layer": 3}, r"h\.2\.attn\.c_attn\.bias is missing, expected shape \[120\]"),
        ({"n_layer": 1}, r"h\.1\.attn\.c_attn\.bias is not part of this model, shape \[120\]"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing, expected shape \[97, 40\]"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    make({}).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state, **fields)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_a_tied_head_whose_copy_differs(tmp_path: Path) -> None:
    make({"tie_word_embeddings": False}).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight; set tie_word_embeddings to false"):
        load_checkpoint(tmp_path)


def test_defaults_and_unknown_fields_are_noted(tmp_path: Path) -> None:
    model = make({})
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state, activation_function=None, model_type=None, my_field=1, eos_token_id=[96, 3])
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, model)
    notes = "\n".join(checkpoint.notes)
    assert "the config does not say activation_function: GPT-2's default 'gelu_new'" in notes
    assert "no model_type: read as gpt2" in notes
    assert "not known and were not used: my_field" in notes
    assert "eos_token_id=[96, 3]: the first is the end of text" in notes
    assert checkpoint.eos_token_id == 96
    rewrite(tmp_path, lambda state: state, eos_token_id=50256)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.eos_token_id is None
    assert "eos_token_id=50256 is not in the vocabulary of 97: not used" in checkpoint.notes
    rewrite(tmp_path, lambda state: state, eos_token_id=None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert load_checkpoint(tmp_path).eos_token_id == 5


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not a Hugging Face folder$"):
        load_checkpoint(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"to load a file in it, give its path: .*ckpt\.pt"):
        load_checkpoint(tmp_path)
    make({}).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights: expected model\.safetensors or pytorch_model\.bin"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match=r"lists the file \.\./x\.safetensors, which is not in"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, it holds a list"):
        load_checkpoint(tmp_path)


# The hub


def fake_hub(monkeypatch: Any, function: Any) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hub_name(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = make({})
    calls: list[tuple[str, Any, list[str]]] = []

    def snapshot_download(name: str, revision: Any, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        if form == "safetensors":
            model.save_pretrained(tmp_path)
        elif "pytorch_model.bin" in allow_patterns:
            write_bin(model, tmp_path, 1)
        return str(tmp_path)

    fake_hub(monkeypatch, snapshot_download)
    assert_same_logits(load_checkpoint("someone/tiny-gpt2", revision="v2"), model)
    assert [call[:2] for call in calls] == [("someone/tiny-gpt2", "v2")] * (1 if form == "safetensors" else 2)
    assert {"config.json", "vocab.json", "merges.txt", "model.safetensors"} <= set(calls[0][2])
    assert not [pattern for pattern in calls[0][2] if pattern in ("*", "*.bin", "*.h5", "*.msgpack")]


def test_the_hub_out_of_reach(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host\nmore")

    fake_hub(monkeypatch, offline)
    message = (
        r"'gpt2' is neither a file nor a folder here.* at revision 'x': no route to host \(ConnectionError\)\. Without"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint("gpt2", revision="x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"neither a file nor a folder here; .* pip install huggingface_hub"):
        hub.download("gpt2", None)
