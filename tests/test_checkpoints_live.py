"""Live modules: what is recognised gives the same logits, the rest is refused by class and place."""

from collections.abc import Callable

import pytest
import torch
from checkpoint_models import BOOK_CONFIG, ODD_CONFIGS, SMALL, BookGPT, assert_same_logits, random_book, random_gpt
from torch import nn

from engine.checkpoints.live import canonical_weights, recognise
from engine.checkpoints.load import load_checkpoint


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_reference_of_odd_shapes(name: str) -> None:
    model = random_gpt(ODD_CONFIGS[name])
    checkpoint = load_checkpoint(model)
    assert_same_logits(checkpoint, model)
    assert checkpoint.config.activation == ODD_CONFIGS[name].get("activation", "gelu_tanh")


class TanhByHand(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


class ErfInFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.float() * (1 + torch.erf(x.float() / 1.4142135))


BOOK_VARIANTS = {
    "as in the book": {},
    "tied": {"tied": True},
    "module list": {"container": nn.ModuleList},
    "torch's norm": {"norm": nn.LayerNorm},
    "torch's norm without bias": {"norm": lambda width: nn.LayerNorm(width, bias=False, eps=1e-3)},
    "tanh by hand": {"activation": TanhByHand()},
    "erf in float32": {"activation": ErfInFloat32()},
    "nn.GELU": {"activation": nn.GELU()},
    "nn.GELU tanh": {"activation": nn.GELU(approximate="tanh")},
    "nn.ReLU": {"activation": nn.ReLU()},
    "nn.SiLU": {"activation": nn.SiLU()},
}
EXACT = ("erf in float32", "nn.GELU")


@pytest.mark.parametrize("name", BOOK_VARIANTS)
def test_book_modules(name: str) -> None:
    model = random_book(**BOOK_VARIANTS[name])
    checkpoint = load_checkpoint(model)
    assert_same_logits(checkpoint, model)
    wanted = {"nn.ReLU": "relu", "nn.SiLU": "silu"}.get(name, "gelu" if name in EXACT else "gelu_tanh")
    assert checkpoint.config.activation == wanted
    assert "BookGPT: 2 layers, 2 heads of 20, vocabulary 97, context 16" in checkpoint.source


def test_weights_are_the_modules_own_and_read_anew() -> None:
    model = random_book(tied=True)
    found = recognise(model)
    weights = canonical_weights(found)
    assert next(iter(found.sources)) == "tok_emb"
    assert weights["head"] is weights["tok_emb"]
    assert weights["blocks.1.fc.weight"].data_ptr() == model.trf_blocks[1].ff.layers[0].weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in weights.values())
    assert found.sources["blocks.0.qkv.bias"] == ()
    assert weights["blocks.0.qkv.bias"].count_nonzero() == 0
    model.trf_blocks[0].att.W_key.weight = nn.Parameter(torch.full((40, 40), 7.0))
    assert (canonical_weights(found)["blocks.0.qkv.weight"][40:80] == 7).all()
    model.out_head.weight = nn.Parameter(model.tok_emb.weight.detach().clone())
    with pytest.raises(ValueError, match=r"was tied .* and is not now"):
        canonical_weights(found)


def test_dropouts_may_be_missing_and_dtype_is_kept() -> None:
    model = random_book().to(torch.bfloat16)
    del model.drop_emb
    model.trf_blocks[0].drop_resid = nn.Identity()
    checkpoint = load_checkpoint(model)
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.bfloat16}
    assert "bfloat16 on cpu" in checkpoint.source


def _set(path: str, value: Callable[[], object]) -> Callable[[BookGPT], None]:
    def change(model: BookGPT) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, value())

    return change


class DifferentLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(40)), 1e-5


REFUSED: dict[str, tuple[Callable[[BookGPT], object], str]] = {
    "no att": (
        lambda m: delattr(m.trf_blocks[1], "att"),
        r"trf_blocks\.1 \(.*BookBlock\) has no submodule att; support",
    ),
    "extra submodule": (
        _set("trf_blocks.0.adapter", lambda: nn.Linear(4, 4)),
        r"trf_blocks\.0 has a submodule adapter",
    ),
    "extra parameter": (
        _set("trf_blocks.0.gain", lambda: nn.Parameter(torch.ones(1))),
        r"trf_blocks\.0 .* parameter gain",
    ),
    "extra buffer": (lambda m: m.register_buffer("bias", torch.ones(3)), r"BookGPT .* has a buffer bias"),
    "head bias": (_set("out_head", lambda: nn.Linear(40, 97)), "out_head has a bias"),
    "other linear": (
        _set("trf_blocks.0.att.W_key", lambda: DifferentLinear(40, 40)),
        r"att\.W_key is a .*DifferentLinear",
    ),
    "other norm": (_set("final_norm", RMSNorm), r"final_norm \(.*RMSNorm\) has parameters scale and eps 1e-05"),
    "other eps": (_set("trf_blocks.1.norm2.eps", lambda: 1e-6), r"trf_blocks\.1: norm1 has eps 1e-05 and norm2 1e-06"),
    "final eps": (_set("final_norm.eps", lambda: 1e-6), "final_norm has eps 1e-06 and the blocks 1e-05"),
    "activation": (_set("trf_blocks.0.ff.layers.1", nn.Tanh), r"Tanh at trf_blocks\.0\.ff\.layers\.1 computes none"),
    "two activations": (
        _set("trf_blocks.1.ff.layers.1", nn.ReLU),
        r"trf_blocks\.0 has activation gelu_tanh and .*1 has relu",
    ),
    "half activation": (_set("trf_blocks.0.ff.layers.1", nn.GLU), "GLU at .* float64 tensor|GLU at .* computes none"),
    "longer ff": (
        lambda m: m.trf_blocks[0].ff.layers.append(nn.Dropout()),
        r"layers holds \[Linear, BookGELU, Linear, Drop",
    ),
    "half qkv bias": (_set("trf_blocks.0.att.W_key", lambda: nn.Linear(40, 40)), "must all have a bias, or none"),
    "heads": (_set("trf_blocks.0.att.num_heads", lambda: 3), r"num_heads=3; a divisor of 40"),
    "heads differ": (
        _set("trf_blocks.0.att.num_heads", lambda: 4),
        r"trf_blocks\.0 has n_heads 4 and trf_blocks\.1 has 2",
    ),
    "head_dim": (_set("trf_blocks.0.att.head_dim", lambda: 10), "head_dim=10; 20 is supported"),
    "scale": (_set("trf_blocks.0.att.scale", lambda: torch.ones(2)), "scale=tensor.*a number is supported"),
    "hook": (lambda m: m.trf_blocks[0].att.register_forward_hook(print), r"trf_blocks\.0\.att .* has a forward hook"),
    "pre-hook": (lambda m: m.tok_emb.register_forward_pre_hook(print), "tok_emb .* has a forward hook"),
    "hook on the model": (lambda m: m.register_forward_hook(print), "BookGPT .* has a forward hook"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.out_head),
        "out_head .* is parametrized",
    ),
    "forward on the object": (_set("trf_blocks.0.ff.forward", lambda: abs), "forward set on the object"),
    "meta": (lambda m: m.to("meta"), "tok_emb is on the meta device"),
    "mixed dtypes": (
        lambda m: m.trf_blocks[1].ff.half(),
        r"tok_emb is torch.float32 .* blocks\.1\.fc\.weight is torch.float16",
    ),
    "max_norm": (_set("tok_emb.max_norm", lambda: 1.0), "max_norm=1.0"),
    "a wide feed-forward": (
        _set("trf_blocks.1.ff.layers", lambda: nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 40))),
        r"trf_blocks\.0 has shape .* and trf_blocks\.1 has",
    ),
    "a head of another size": (
        _set("out_head", lambda: nn.Linear(40, 96, bias=False)),
        r"shape \[96, 40\], expected \[97, 40\]",
    ),
    "no blocks": (_set("trf_blocks", nn.ModuleList), "trf_blocks is empty"),
    "a dictionary of blocks": (_set("trf_blocks", nn.ModuleDict), "ModuleDict; nn.Sequential and nn.ModuleList are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    change, message = REFUSED[name]
    model = random_book()
    change(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model)


def test_quantised_linears_are_refused() -> None:
    model = random_book()
    module = torch.ao.nn.quantized.dynamic.Linear
    model.trf_blocks[0].ff.layers[0] = module(40, 160)
    with pytest.raises(ValueError, match=r"ff\.layers\.0 is a torch\.ao.*dynamic.*Linear; a plain nn\.Linear"):
        load_checkpoint(model)


class PeftModel(nn.Module):
    pass


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"DataParallel wraps a model .* pass its \.module"),
        (lambda model: torch.compile(model), r"OptimizedModule wraps a model .* pass its \._orig_mod"),
        (lambda model: PeftModel(), r"PeftModel wraps a model .* pass \.merge_and_unload\(\)"),
        (lambda model: nn.Linear(3, 3), "Linear .* has no submodule tok_emb; supported is a GPTModel"),
    ],
)
def test_wrappers_are_refused(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(wrap(random_book()))


def test_options_that_a_live_module_does_not_take() -> None:
    model = random_gpt(SMALL)
    with pytest.raises(ValueError, match="config= is not used with a live module"):
        load_checkpoint(model, config=BOOK_CONFIG)
    with pytest.raises(ValueError, match="revision= is not used"):
        load_checkpoint(model, revision="main")
