"""Is a live module what its structure says? It is run once on a probe, and so is every part of it.

Structure cannot tell a tanh-GELU from an erf-GELU, or one attention scale from another, and in a freshly initialised
model neither changes the logits much. So every norm, attention and feed-forward is run by itself, in float64, on
inputs scaled so that such differences are large, and compared with the formula; and the whole module is compared with
the engine on a few tokens.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from engine.config import ModelConfig
from engine.reference import ACTIVATIONS

ROWS = 12  # positions of the input
RELATIVE = 1e-5  # of the largest output: activations with float32 constants agree to 1e-6, the two GELUs to 1e-4


PROBE_ROWS, PROBE_LENGTH = 2, 24
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


@torch.no_grad()
def plain_logits(module: nn.Module, ids: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The module's own logits ``[B, T, V]`` in evaluation mode, whatever mode it is in.

    Raises:
        ValueError: its forward returns something else.
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
        ValueError: naming the part and how far off it is, or the error that it raised.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, config.embed_dim, generator=generator, dtype=torch.float64)  # [T, D]
    _check("final_norm", module.get_submodule("final_norm"), lambda part: _norm(part, config.norm_eps), x * 0.003)
    for i in range(config.n_layers):
        path = f"trf_blocks.{i}"
        for name in ("norm1", "norm2"):
            norm = module.get_submodule(f"{path}.{name}")
            _check(f"{path}.{name}", norm, lambda part: _norm(part, config.norm_eps), x * 0.003)
        attention = module.get_submodule(f"{path}.att")
        _check(f"{path}.att", attention, lambda part, i=i: _attention(part, config, i), x)  # type: ignore[misc]
        _check(f"{path}.ff", module.get_submodule(f"{path}.ff"), lambda part: _feed_forward(part, config), x)


Formula = Callable[[torch.Tensor], torch.Tensor]


def _check(
    path: str, part: nn.Module, formula_of: Callable[[nn.Module], tuple[Formula, float]], x: torch.Tensor
) -> None:
    double = copy.deepcopy(part).double().cpu().eval()
    formula, gain = formula_of(double)
    x = x * gain
    name = f"{type(part).__qualname__} at {path}"
    try:
        with torch.autocast("cpu", enabled=False):
            got = double(x[None].clone())[0]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} could not be checked: it does not run on [1, T, D] in float64: {error}") from error
    wanted = formula(x)
    difference = ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    if got.shape != wanted.shape or not difference <= RELATIVE:
        raise ValueError(
            f"{name} does not compute what its structure says (relative difference {difference:.1e}): the engine "
            "runs causal softmax attention scaled by 1/sqrt(head_dim), Linear-activation-Linear and LayerNorm only"
        )


def _norm(part: nn.Module, eps: float) -> tuple[Formula, float]:
    weight, bias = (part.scale, part.shift) if hasattr(part, "scale") else (part.weight, part.bias)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)  # type: ignore[arg-type]

    return formula, 1.0


def _attention(part: nn.Module, config: ModelConfig, layer: int) -> tuple[Formula, float]:
    def scores_and_values(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (
            part.get_submodule(name)(x).view(len(x), config.n_heads, config.head_dim).transpose(0, 1)  # [H, T, d]
            for name in ("W_query", "W_key", "W_value")
        )
        return q @ k.transpose(1, 2) * config.attn_scales[layer], v

    def formula(x: torch.Tensor) -> torch.Tensor:
        scores, values = scores_and_values(x)  # [H, T, T], [H, T, d]
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ values
        out: torch.Tensor = part.get_submodule("out_proj")(mixed.transpose(0, 1).flatten(1))
        return out

    generator = torch.Generator().manual_seed(1)
    spread = scores_and_values(torch.randn(ROWS, config.embed_dim, generator=generator, dtype=torch.float64))[0].std()
    return formula, (2.0 / spread.clamp_min(1e-6).item()) ** 0.5  # scores of about 2: a softmax that a scale changes


def _feed_forward(part: nn.Module, config: ModelConfig) -> tuple[Formula, float]:
    def formula(x: torch.Tensor) -> torch.Tensor:
        hidden = ACTIVATIONS[config.activation](part.get_submodule("layers.0")(x))
        out: torch.Tensor = part.get_submodule("layers.2")(hidden)
        return out

    first = part.get_submodule("layers.0").weight
    assert isinstance(first, torch.Tensor)
    return formula, 2.0 / first.norm(dim=1).mean().clamp_min(1e-6).item()  # |x| of about 2: where the GELUs differ most
