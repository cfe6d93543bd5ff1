"""How the Triton backend draws: which launches a batch's options need, and the options as the kernels take them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Batch, SamplingBatch, Sparse
from kernels import sampling


@dataclass(frozen=True, slots=True)
class Head:
    """What becomes of a step's rows: how many are drawn from and asked for, and how.

    ``fused`` is ``head_sample``, without logits in memory, with ``head_ranks`` after it for ``ranks``; ``top`` is how
    many most probable tokens are reported.
    """

    draws: int
    asked: int
    fused: bool
    ranks: bool
    top: int

    @staticmethod
    def of(batch: Batch, vocab_size: int) -> "Head":
        """How a batch's rows are drawn from."""
        draws, asked, options = len(batch.draw_rows), len(batch.logits_rows), batch.sampling
        if options is None:
            return Head(0, asked, False, False, 0)
        fused, ranks = choose_head(options, vocab_size)
        return Head(draws, asked, fused and not asked, ranks, min(options.num_logprobs, vocab_size))


def choose_head(batch: SamplingBatch, vocab_size: int) -> tuple[bool, bool]:
    """(does one fused launch, ``head_sample``, draw all rows; does ``head_ranks`` have to follow it).

    A row with top-k, top-p or min-p needs its logits in memory, and so has all of the batch put there: two heads would
    read the largest matrix of the model twice. A rank is known without counting where a row is greedy and nothing
    changes its logits: it is 1.
    """
    sampled = batch.temperature != 0
    any_sampled = bool(sampled.any())
    filtered = False
    if any_sampled:
        top_k = (batch.top_k > 0) & (batch.top_k < vocab_size)
        filtered = bool((sampled & (top_k | (batch.top_p < 1) | (batch.min_p > 0))).any())
    edited = batch.output_counts is not None or batch.logit_bias is not None or batch.allowed is not None
    return not filtered, batch.num_logprobs > 0 or (batch.ranks and (edited or any_sampled))


def ascending(sparse: Sparse) -> Sparse:
    """The same entries, the ids of each row in ascending order."""
    rows = np.repeat(np.arange(len(sparse.starts) - 1, dtype=np.int64), np.diff(sparse.starts))
    order = np.argsort((rows << 32) | sparse.ids, kind="stable")
    return Sparse(sparse.starts, sparse.ids[order], sparse.values[order])


def sampling_arrays(batch: SamplingBatch) -> dict[str, npt.NDArray[np.generic]]:
    """The options by the names that ``device_options`` finds them under on the device."""
    names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    arrays: dict[str, npt.NDArray[np.generic]] = {name: getattr(batch, name) for name in names}
    arrays |= {"seeds": batch.seeds, "draw_positions": batch.positions, "sample_index": batch.sample_index}
    for name, sparse in (("counts", batch.output_counts), ("bias", batch.logit_bias)):
        if sparse is not None:
            ordered = ascending(sparse)
            arrays |= {f"{name}.{part}": getattr(ordered, part) for part in Sparse.__slots__}
    if batch.allowed is not None:
        arrays["allowed"] = batch.allowed
    return arrays


def device_options(inputs: Mapping[str, torch.Tensor]) -> "sampling.Options":
    """The uploaded arrays as the sampling kernels take them."""

    def sparse(name: str) -> "sampling.SparseRows | None":
        parts = [inputs[f"{name}.{p}"] for p in Sparse.__slots__ if f"{name}.{p}" in inputs]
        return sampling.SparseRows(*parts) if parts else None

    return sampling.Options(
        inputs["temperature"], inputs["top_k"], inputs["top_p"], inputs["min_p"], inputs["seeds"],
        inputs["draw_positions"], inputs["sample_index"], inputs["presence_penalty"], inputs["frequency_penalty"],
        inputs["repetition_penalty"], sparse("counts"), sparse("bias"), inputs.get("allowed"),
    )  # fmt: skip
