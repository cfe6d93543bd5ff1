"""Steps of every kind, one after the other, and whether two backends live them alike to the bit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from backend_driver import Driver, Running, greedy, same_bits, tokens

from engine.backends.base import SamplingBatch

Options = Callable[[int], SamplingBatch]
NAMES = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")


def heat(rows: int) -> SamplingBatch:
    """Draws with temperature, top-k and top-N."""
    values = np.linspace(0, 1.2, rows).astype(np.float32)
    return greedy(rows, temperature=values, top_k=np.full(rows, 9, np.int32), num_logprobs=3)


def masked(rows: int) -> SamplingBatch:
    """Greedy draws of which half the vocabulary is allowed."""
    return greedy(rows, allowed=np.full((rows, 4), 0x0F0F0F0F, np.uint32))


def decode(
    d: Driver, running: Sequence[Running], options: Options = greedy, previous: Sequence[int] | None = None
) -> Any:
    """Submit a step of one token for each sequence; ``previous`` has the rows of the step before that it takes."""
    batch = d.batch([(s, [5 + i]) for i, s in enumerate(running)], options(len(running)))
    if previous is not None:
        batch = replace(batch, previous_rows=np.array(previous, np.int32))
    return d.backend.submit(batch)


def several(d: Driver, running: Sequence[Running], options: Options = heat, count: int = 4) -> Any:
    """Submit ``count`` steps of one token for each sequence in one batch."""
    step = d.batch([(s, [5 + i]) for i, s in enumerate(running)], options(len(running)))
    tables = np.zeros((len(running), max(len(s.blocks) for s in running)), np.int32)  # later steps read further
    for row, s in enumerate(running):
        tables[row, : len(s.blocks)] = s.blocks
        s.done += count - 1
    return d.backend.submit(replace(step, block_tables=tables, num_steps=count))


def a_life(d: Driver) -> Iterator[tuple[Any, torch.Tensor]]:
    """Steps of every kind, and the cache after each: contexts grow, sequences come and go, tokens stay there."""
    a, b, c = d.sequence(149), d.sequence(40), d.sequence(40)

    def after(found: Any) -> tuple[Any, torch.Tensor]:
        return found, d.backend._step.cache.clone()

    yield after(d.run([(a, tokens(60, 1)), (b, tokens(7, 2)), (c, [3])], greedy(3)))
    for options, previous in ((greedy, None), (greedy, [2, 0, 1]), (heat, [1, 1, -1]), (heat, [0, 1, 2])):
        yield after(d.backend.collect(decode(d, [a, b, c], options, previous)))
    yield after(d.logits([(a, [9]), (c, [8])]))  # a passes 64 keys here
    yield after(d.logits([(c, [1]), (a, [2])]))
    yield after(d.backend.collect(decode(d, [c, a])))
    yield after(d.backend.collect(decode(d, [a, c], greedy, [1, 0])))
    yield after(d.run([(a, tokens(62, 3)), (b, [1])], greedy(2)))  # and 128 keys here
    yield after(d.backend.collect(decode(d, [c, a], greedy, [1, 0])))
    yield after(d.backend.collect(decode(d, [a], masked, [1])))
    yield after(d.backend.collect(several(d, [b, c, a])))
    yield after(d.backend.collect(decode(d, [c, a], greedy, [1, 2])))


def first_difference(ours: Iterable[Any], theirs: Iterable[Any]) -> str | None:
    """The first step in which two lives differ in a bit of what was returned, or of the cache; None if none does."""
    for step, ((x, cache), (y, wanted)) in enumerate(zip(ours, theirs, strict=True)):
        pairs = [(x, y)] if isinstance(x, torch.Tensor) else [(getattr(x, n), getattr(y, n)) for n in NAMES]
        if not all(same_bits(torch.as_tensor(p), torch.as_tensor(q)) for p, q in pairs):
            return f"step {step}: output"
        if not same_bits(cache, wanted):
            return f"step {step}: cache"
    return None
