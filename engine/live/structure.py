"""The parts of a live module as they were found, and whether they are still the ones attached to it."""

from collections.abc import Mapping

import torch
from torch import nn

from engine.checkpoints.live import Source


class LiveStructure:
    """Submodules, parameters and dropouts of a module.

    Args:
        module: the module.
        sources: canonical name -> where its parameters are, as ``recognise`` found them.
    """

    def __init__(self, module: nn.Module, sources: Mapping[str, tuple[Source, ...]]) -> None:
        self._links = [
            (part._modules, name, child) for part in module.modules() for name, child in part._modules.items()
        ]
        self._places = [(owner._parameters, name) for found in sources.values() for owner, name in found]
        self._dropouts = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Dropout)]

    def is_attached(self) -> bool:
        """Whether every submodule is the one that was found, and every parameter's place still has one."""
        return all(children.get(name) is child for children, name, child in self._links) and all(
            parameters.get(name) is not None for parameters, name in self._places
        )

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that are attached now, always in the same order."""
        return [parameter for parameters, name in self._places if (parameter := parameters[name]) is not None]

    def active_dropout(self) -> tuple[str, float] | None:
        """Path and rate of a dropout that is in training mode and above 0, or None."""
        return next(((path, part.p) for path, part in self._dropouts if part.training and part.p > 0), None)
