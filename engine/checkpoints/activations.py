"""Which of ``engine.config.ACTIVATIONS`` a name or a live module stands for."""

import torch
from torch import nn

from engine.config import ACTIVATIONS
from engine.reference import ACTIVATIONS as FUNCTIONS

NAMES = {name: name for name in ACTIVATIONS} | {
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
}

# A hand-written GELU may hold its constant in float32 or run in float32, 1e-6 off at most here; the tanh form and the
# exact one are 4.7e-4 apart at their furthest, at x = 2.2 or so.
TOLERANCE = 1e-5


def activation_named(name: object, key: str) -> str:
    """The activation that ``name`` stands for in the config field ``key``, by Hugging Face's names or by ours.

    Raises:
        ValueError: the name is not known.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{key}={name!r} is not supported; choose from {', '.join(sorted(NAMES))}")
    return NAMES[name]


@torch.no_grad()
def identify_activation(module: nn.Module, path: str) -> str:
    """The activation that ``module`` computes, found by running it in float64 and comparing values.

    Args:
        module: an elementwise module without parameters.
        path: where it is in the model, for the error.

    Raises:
        ValueError: it does not run on a float64 tensor, or it computes none of ``ACTIVATIONS``.
    """
    grid = torch.cat([torch.linspace(-6, 6, 241, dtype=torch.float64), torch.tensor([-40.0, 40.0]).double()])
    name = f"{type(module).__qualname__} at {path}"
    try:
        with torch.autocast("cpu", enabled=False):
            values = module(grid.clone())
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the activation {name} does not run on a float64 tensor: {error}") from error
    if isinstance(values, torch.Tensor) and values.shape == grid.shape:
        for activation in ACTIVATIONS:
            wanted = FUNCTIONS[activation](grid)
            if bool(((values.double() - wanted).abs() <= TOLERANCE * wanted.abs().clamp(min=1)).all()):
                return activation
    raise ValueError(f"the activation {name} computes none of the supported functions: {', '.join(ACTIVATIONS)}")
