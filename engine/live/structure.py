"""The parts of a live module as they were found, and whether they are still the ones attached to it."""

from collections.abc import Iterator, Mapping
from operator import is_, is_not
from typing import Any, TypeAlias

import torch
from torch import nn

from engine.checkpoints.live import Source
from engine.checkpoints.live_checks import HOOKS

Place: TypeAlias = tuple[dict[str, Any], str, Any]  # a dictionary of a module, a name in it, what is there

INHERITED = frozenset(vars(nn.Module()))  # attributes that every module has
READ = ("eps", "num_heads", "head_dim", "scale")  # by ``recognise``, of the object or else of its class
WITHOUT_CONSTANTS = (nn.Linear, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList)


class LiveStructure:
    """Submodules, parameters, constants, forwards and dropouts of a module.

    Constants are the numbers, strings, booleans and functions that its parts have as attributes. What an attribute of
    another kind refers to is not looked at.

    Args:
        module: the module.
        sources: canonical name -> where its parameters are, as ``recognise`` found them.
    """

    def __init__(self, module: nn.Module, sources: Mapping[str, tuple[Source, ...]]) -> None:
        parts = list(module.modules())
        self._hooks = [getattr(part, name) for part in parts if part is not module for name in HOOKS]
        self._values: list[Any] = []
        self._remember([place for part in parts for place in (*_attached(part), *_constants(part))])
        self._children = [part._modules for part in parts if part._modules]
        self._counts = list(map(len, self._children))
        self._classes = list({type(part) for part in parts if part is not module})
        self._forwards = [cls.forward for cls in self._classes]
        sources_of = [place for found in sources.values() for place in found]
        self._sources = [owner._parameters for owner, _ in sources_of], [name for _, name in sources_of]
        self._dropouts = [(path, part, name) for path, part in module.named_modules() for name in _rates(part)]

    def parameters(self) -> list[torch.Tensor] | None:
        """The parameters that are attached now, always in the same order.

        None if anything else is another than was found, a hook is there, or a parameter's place is empty.
        """
        # asked at every call, of hundreds of places: ``map`` looks them up without a Python frame for each
        if any(self._hooks) or list(map(len, self._children)) != self._counts:
            return None
        now = list(map(dict.get, *self._places))
        if not all(map(is_, now, self._values)):
            if not all(map(alike, now, self._values)):
                return None
            self._values = now
        if any(map(is_not, [cls.forward for cls in self._classes], self._forwards)):
            return None
        found: list[torch.Tensor] = [parameter for parameter in map(dict.get, *self._sources) if parameter is not None]
        return found if len(found) == len(self._sources[0]) else None

    def settle(self) -> None:
        """Forget the places whose values changed since: the module's own forward, which ran meanwhile, writes there."""
        places = zip(*self._places, self._values, strict=True)
        self._remember([place for place in places if alike(place[0].get(place[1]), place[2])])

    def active_dropout(self) -> tuple[str, float] | None:
        """Path and rate of a dropout that is in training mode and above 0, or None."""
        rates = ((path, getattr(part, name, None)) for path, part, name in self._dropouts if part.training)
        return next(((path, rate) for path, rate in rates if isinstance(rate, float | int) and 0 < rate <= 1), None)

    def _remember(self, places: list[Place]) -> None:
        self._places = [where for where, _, _ in places], [name for _, name, _ in places]
        self._values = [value for _, _, value in places]


def alike(a: object, b: object) -> bool:
    """Whether two attributes are the same object, or equal numbers or strings of one type."""
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def _attached(part: nn.Module) -> Iterator[Place]:
    """Submodules and buffers, parameters that are not there, and the forward that the object does not have."""
    yield from ((part._modules, name, child) for name, child in part._modules.items())
    yield from ((part._buffers, name, buffer) for name, buffer in part._buffers.items())
    yield from ((part._parameters, name, None) for name, found in part._parameters.items() if found is None)
    yield vars(part), "forward", None


def _constants(part: nn.Module) -> Iterator[Place]:
    if type(part) in WITHOUT_CONSTANTS:
        return
    own = vars(part)
    yield from ((own, name, None) for name in READ if name not in own and hasattr(type(part), name))
    for name, value in own.items():
        kept = value is None or isinstance(value, bool | int | float | str) or callable(value)
        if name not in INHERITED and "drop" not in name.lower() and kept:
            yield own, name, value


def _rates(part: nn.Module) -> Iterator[str]:
    """Attributes that are the rate of a dropout: a number whose name has "drop" in it, or ``p`` of ``nn.Dropout``."""
    if isinstance(part, nn.Dropout):
        yield "p"
    else:
        numbers = (name for name, value in vars(part).items() if type(value) in (int, float))
        yield from (name for name in numbers if "drop" in name.lower())
