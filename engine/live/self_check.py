"""Is a live module what its structure says? It is run once on a probe, and so is every part of it.

Structure cannot tell a tanh-GELU from an erf-GELU, or one attention scale from another, and in a freshly initialised
model neither changes the logits much. So every norm, attention and feed-forward is run by itself, in float64, on
inputs scaled so that such differences are large, and compared with the formula. An attention is run on a whole context,
too, of 1,024 positions at most, so that a local window shows; of those that differ in their weights only, the first.
And the whole module is compared with the engine on a few tokens, and on a row of as many as are cheap.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from engine.config import ModelConfig
from engine.live.structure import INHERITED, alike
from engine.reference import ACTIVATIONS

ROWS = 12  # positions of the input; of a longer one, the last that are compared
LONGEST = 1024  # positions of a longer one at most
RELATIVE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of the largest output. In float64, activations with float32 constants agree to 1e-6, the two GELUs to 1e-4; float32
is for long inputs, in which what is looked for, a key that is not attended to, changes a hundredth or more."""


PROBE_ROWS, PROBE_LENGTH = 2, 24
PROBE_PRODUCTS = 1 << 34  # of weights and tokens that a long probe may take: a fraction of a second on two cores
TOLERANCE = {
    "float64": 1e-8,
    "float32": 1e-5,
    "float16": 5e-3,
    "bfloat16": 4e-2,
    "int8": 6e-2,
    "int4": 2e-1,
    "int4-g64": 2e-1,
    "int4-g128": 2e-1,
}
"""Largest logit difference accepted, as a share of the largest logit, which counts as 10 at least: 1e-4 in float32."""


def probe_ids(config: ModelConfig) -> torch.Tensor:
    """Token ids ``[B, T]`` to compare on."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_ROWS, min(PROBE_LENGTH, config.context_length))
    return torch.randint(config.vocab_size, shape, generator=generator)


def long_probe_ids(config: ModelConfig) -> torch.Tensor:
    """Token ids ``[1, T]``: a whole context, of 1,024 tokens at most, and no more than ``PROBE_PRODUCTS`` allows.

    That is all of it up to 16M parameters, and 105 tokens of GPT-2 small with a head of its own.
    """
    length = min(config.context_length, LONGEST, max(PROBE_LENGTH, PROBE_PRODUCTS // config.num_parameters))
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_logits(module: nn.Module, ids: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The module's own logits ``[B, T, V]`` in evaluation mode, whatever mode it is in.

    Raises:
        ValueError: its forward returns something else, or weights that are not finite make them so.
    """
    modes = [(part, part.training) for part in module.modules()]
    device = next(module.parameters()).device
    try:
        module.eval()
        with torch.autocast(device.type, enabled=False):
            logits = module(ids.to(device))
    finally:
        for part, mode in modes:
            part.training = mode
    shape = [*ids.shape, config.vocab_size]
    if not isinstance(logits, torch.Tensor) or list(logits.shape) != shape:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the module's forward returns {got} for ids {list(ids.shape)}; logits {shape} are needed")
    if not torch.isfinite(logits).all():
        _refuse_not_finite(module, "")
    return logits


def check_logits(got: torch.Tensor, wanted: torch.Tensor, dtype: str, description: str) -> float:
    """Largest difference between the engine's logits, computed in ``dtype``, and the module's.

    Raises:
        ValueError: it is more than rounding in the coarser of the two dtypes explains.
    """
    own = str(wanted.dtype).removeprefix("torch.")
    difference = (got - wanted.to(got.device)).abs().max().item()
    limit = max(TOLERANCE[dtype], TOLERANCE[own]) * max(10.0, wanted.abs().max().item())
    if not difference <= limit:
        raise ValueError(
            f"the module's logits differ by {difference:.1e} from this engine's on a probe ({limit:.1e} accepted), "
            f"so it does not compute what its structure says: {description}"
        )
    return difference


@torch.no_grad()
def check_parts(module: nn.Module, config: ModelConfig) -> None:
    """Refuse a module of the course's shape with a part that computes something else than its structure says.

    Args:
        module: as ``engine.checkpoints.live.recognise`` accepts it.
        config: what was recognised.

    Raises:
        ValueError: naming the part and how far off it is, or the error that it raised; or the weight of it that is
            not finite.
    """
    x = _input(ROWS, config)
    short, long = (_input(min(rows, config.context_length), config) for rows in (ROWS, LONGEST))
    seen: list[nn.Module] = []  # attentions whose code was run on a long input
    _check("final_norm", module.get_submodule("final_norm"), lambda part: _norm(part, config.norm_eps), x * 0.003)
    for i in range(config.n_layers):
        path = f"trf_blocks.{i}"
        for name in ("norm1", "norm2"):
            norm = module.get_submodule(f"{path}.{name}")
            _check(f"{path}.{name}", norm, lambda part: _norm(part, config.norm_eps), x * 0.003)
        attention = module.get_submodule(f"{path}.att")
        inputs = [short] if any(_same_code(attention, other) for other in seen) else [short, long.float()]
        for given in inputs:
            _check(f"{path}.att", attention, lambda part, i=i: _attention(part, config, i), given)  # type: ignore[misc]
        seen += [attention] * (len(inputs) - 1)
        _check(f"{path}.ff", module.get_submodule(f"{path}.ff"), lambda part: _feed_forward(part, config), x)


Formula = Callable[[torch.Tensor], torch.Tensor]  # [T, D] to its last ROWS rows


def _input(rows: int, config: ModelConfig, seed: int = 0) -> torch.Tensor:
    """Normal float64 numbers ``[rows, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, config.embed_dim, generator=generator, dtype=torch.float64)


def _same_code(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules differ in nothing but their submodules: one class, the same attributes and buffers."""
    ours, theirs = ({name: value for name, value in vars(m).items() if name not in INHERITED} for m in (a, b))
    if type(a) is not type(b) or ours.keys() != theirs.keys() or a._buffers.keys() != b._buffers.keys():
        return False
    pairs = [(found, b._buffers[name]) for name, found in a._buffers.items()]
    same = (x is y or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)
    return all(alike(value, theirs[name]) for name, value in ours.items()) and all(same)


def _refuse_not_finite(module: nn.Module, prefix: str) -> None:
    """Refuse a module with a weight that is not finite, by the weight's name after ``prefix``."""
    for name, parameter in module.named_parameters():
        if count := int((~torch.isfinite(parameter)).sum()):
            raise ValueError(
                f"{prefix}{name} holds NaN or infinity in {count} of {parameter.numel()} elements, and a module can be "
                "checked with finite weights only"
            )


def _check(
    path: str, part: nn.Module, formula_of: Callable[[nn.Module], tuple[Formula, float]], x: torch.Tensor
) -> None:
    """Run a copy of ``part`` in the dtype of ``x`` ``[T, D]`` and compare the last rows with its formula."""
    name = f"{type(part).__qualname__} at {path}"
    dtype, shape = str(x.dtype).removeprefix("torch."), [1, *x.shape]
    try:
        copied = copy.deepcopy(part).to(x.dtype).cpu().eval()
        formula, gain = formula_of(copied)
        with torch.autocast("cpu", enabled=False):
            got = copied((x * gain)[None])[0]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} could not be checked: it does not run on {shape} in {dtype}: {error}") from error
    got, wanted, difference = got[-ROWS:], formula(x * gain), math.inf
    if got.shape == wanted.shape:
        difference = ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    if not difference <= RELATIVE[x.dtype]:
        _refuse_not_finite(part, f"{path}.")
        raise ValueError(
            f"{name} does not compute what its structure says (relative difference {difference:.1e} on {shape}): the "
            "engine runs causal softmax attention to all positions before, scaled by 1/sqrt(head_dim) or scale, "
            "Linear-activation-Linear and LayerNorm only"
        )


def _norm(part: nn.Module, eps: float) -> tuple[Formula, float]:
    weight, bias = (part.scale, part.shift) if hasattr(part, "scale") else (part.weight, part.bias)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x[-ROWS:], x.shape[-1:], weight, bias, eps)  # type: ignore[arg-type]

    return formula, 1.0


def _attention(part: nn.Module, config: ModelConfig, layer: int) -> tuple[Formula, float]:
    def heads(name: str, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = part.get_submodule(name)(x)
        return y.view(len(x), config.n_heads, config.head_dim).transpose(0, 1)  # [H, T, d]

    def scores_of(x: torch.Tensor) -> torch.Tensor:
        return heads("W_query", x[-ROWS:]) @ heads("W_key", x).transpose(1, 2) * config.attn_scales[layer]

    def formula(x: torch.Tensor) -> torch.Tensor:
        scores = scores_of(x)  # [H, R, T]
        rows, length = scores.shape[1:]
        future = torch.ones(rows, length, dtype=torch.bool).triu(1 + length - rows)
        mixed = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ heads("W_value", x)
        out: torch.Tensor = part.get_submodule("out_proj")(mixed.transpose(0, 1).flatten(1))
        return out

    weight = part.get_submodule("W_query").weight
    assert isinstance(weight, torch.Tensor)
    spread = scores_of(_input(ROWS, config, seed=1).to(weight.dtype)).std()
    return formula, (2.0 / spread.clamp_min(1e-6).item()) ** 0.5  # scores of about 2: a softmax that a scale changes


def _feed_forward(part: nn.Module, config: ModelConfig) -> tuple[Formula, float]:
    def formula(x: torch.Tensor) -> torch.Tensor:
        hidden = ACTIVATIONS[config.activation](part.get_submodule("layers.0")(x[-ROWS:]))
        out: torch.Tensor = part.get_submodule("layers.2")(hidden)
        return out

    first = part.get_submodule("layers.0").weight
    assert isinstance(first, torch.Tensor)
    return formula, 2.0 / first.norm(dim=1).mean().clamp_min(1e-6).item()  # |x| of about 2: where the GELUs differ most
