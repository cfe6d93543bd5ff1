"""The parts of a live module as they were found, and whether they are still the ones attached to it."""

from collections.abc import Mapping
from operator import is_

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
        links = [(part._modules, name, child) for part in module.modules() for name, child in part._modules.items()]
        self._links = [children for children, _, _ in links], [name for _, name, _ in links]
        self._children = [child for _, _, child in links]
        places = [place for found in sources.values() for place in found]
        self._places = [owner._parameters for owner, _ in places], [name for _, name in places]
        self._dropouts = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Dropout)]

    def parameters(self) -> list[torch.Tensor] | None:
        """The parameters that are attached now, always in the same order.

        None if a submodule is another than was found, or a parameter's place is empty.
        """
        # asked at every call, of hundreds of places: ``map`` looks them up without a Python frame for each
        if not all(map(is_, map(dict.get, *self._links), self._children)):
            return None
        found: list[torch.Tensor] = [parameter for parameter in map(dict.get, *self._places) if parameter is not None]
        return found if len(found) == len(self._places[0]) else None

    def active_dropout(self) -> tuple[str, float] | None:
        """Path and rate of a dropout that is in training mode and above 0, or None."""
        return next(((path, part.p) for path, part in self._dropouts if part.training and part.p > 0), None)
