"""Are a row's bits the same: whole, in chunks, one by one, beside others; as a graph; with dependent launch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from backend_driver import greedy, same_bits, tokens
from step_lives import a_life, first_difference

from engine.config import ModelConfig
from gpu.machine import HALF, SMALL, Case, Machine

LIVED = ModelConfig(vocab_size=97, context_length=150, embed_dim=32, n_heads=1, n_layers=1, hidden_dim=32)


def cases(machine: Machine) -> Iterator[Case]:
    """Batch invariance in every dtype; captured steps against the same launches one by one."""
    models = {"small": SMALL} if machine.tiny else {"small": SMALL, "gpt2 with 2 layers": HALF}
    for name, model in models.items():
        for dtype in machine.dtypes:
            yield f"rows of {name} in {dtype}", lambda m=model, d=dtype: _rows(machine, m, d)
            yield f"draws of {name} in {dtype}", lambda m=model, d=dtype: _draws(machine, m, d)
    ways = {"graphs": {"graphs": True}}
    if machine.has_dependent_launch:
        ways["dependent launch"] = {"graphs": False, "dependent_launch": True}
        ways["dependent launch in graphs"] = {"graphs": True, "dependent_launch": True}
    for dtype in ("float32",) if machine.tiny else machine.dtypes:
        for way, options in ways.items():
            yield f"{way} = eager in {dtype}", lambda d=dtype, o=options: _alike(machine, d, o)


def _rows(machine: Machine, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The bits of a sequence's last logits. Another first token is the negative control: it must change them."""
    company = 3 if machine.tiny else 63
    ids = tokens(100 if machine.tiny else 140, vocab_size=model.vocab_size)
    driver = machine.driver(model, dtype, 60 + 2 * company)
    whole = driver.in_chunks(ids, [])
    cuts = ([70], [5, 21, 64], list(range(len(ids) - 3, len(ids))))
    chunks = all(same_bits(driver.in_chunks(ids, at), whole) for at in cuts)
    driver.release()
    first = driver.sequence(len(ids))
    others = [driver.sequence(20) for _ in range(company)]
    driver.run([(first, ids[:-1])])
    beside = driver.logits([*((s, [7]) for s in others), (first, ids[-1:])])[-1]
    driver.release()
    other = driver.in_chunks([ids[0] ^ 1, *ids[1:]], [])
    result = {"chunks": chunks, "beside": same_bits(beside, whole[-1]), "control": not same_bits(other[-1], whole[-1])}
    return result | {"ok": all(result.values())}


def _draws(machine: Machine, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """A token and its logprob: drawn alone, by the fused head, and beside a neighbour that wants top-k, from logits."""
    driver = machine.driver(model, dtype, 60)
    ids, found = tokens(20, vocab_size=model.vocab_size), []
    for neighbours in (0, 3):
        driver.release()
        parts = [(driver.sequence(20), ids)] + [(driver.sequence(9), [7, i]) for i in range(neighbours)]
        count = len(parts)
        top_k = np.array([0] + [5] * neighbours, np.int32)
        out = driver.run(parts, greedy(count, temperature=np.ones(count, np.float32), top_k=top_k, num_logprobs=2))
        found.append([out.token_ids[0], out.logprobs[0].tobytes(), out.ranks[0], out.top_logprobs[0].tobytes()])
    return {"drawn": int(found[0][0]), "ok": found[0] == found[1]}


def _alike(machine: Machine, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Outputs and cache of steps of every kind, against eager ones without dependent launch."""
    ours, eager = (machine.driver(LIVED, dtype, 40, **chosen) for chosen in (options, {"graphs": False}))
    for driver in (ours, eager):
        driver.backend._step.cache.zero_()  # type: ignore[attr-defined]
    difference = first_difference(a_life(ours), a_life(eager))
    graphs = ours.backend._step.graphs  # type: ignore[attr-defined]
    captured = 0 if graphs is None else len(graphs)
    ok = difference is None and (captured > 0) == options["graphs"]
    return {"first difference": difference, "graphs captured": captured, "ok": ok}
