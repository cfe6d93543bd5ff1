"""What backends ask alike: is this option one of ours, is this batch within bounds, how much memory is free."""

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Batch
from engine.config import ModelConfig
from engine.machine import available_memory


def check_choice(what: str, value: str, accepted: tuple[str, ...], owner: str) -> None:
    """Refuse a value that a backend does not have, naming it and what is accepted."""
    if value not in accepted:
        raise ValueError(f"the {owner} backend has no {what} {value!r}; it accepts {', '.join(accepted)}")


def check_no_strict_jit(strict_jit: bool, owner: str) -> None:
    """Refuse ``strict_jit`` where nothing is compiled while steps run."""
    if strict_jit:
        raise ValueError(
            f"the {owner} backend compiles nothing while it runs, so it has no strict_jit=True; it accepts False"
        )


def check_no_screen_head(screen_head: bool, owner: str) -> None:
    """Refuse ``screen_head`` where the head is always computed whole."""
    if screen_head:
        raise ValueError(f"the {owner} backend has no screen_head=True, the native one has; it accepts False")


def check_no_threads(threads: int | None, owner: str) -> None:
    """Refuse a number of threads where the work is not done by CPU threads."""
    if threads is not None:
        raise ValueError(f"the {owner} backend has no number of CPU threads, got threads={threads}; it accepts None")


def check_batch(batch: Batch, model: ModelConfig, num_blocks: int, block_size: int, num_drawn: int) -> None:
    """Refuse a batch that is empty or points outside of the model, the KV cache, itself or the step before.

    Args:
        batch: what ``submit`` was given.
        model: the architecture.
        num_blocks: blocks of the KV cache.
        block_size: tokens in a block.
        num_drawn: tokens that the step before drew.

    Raises:
        ValueError: with the value and the range that it must be in.
    """
    if len(batch.token_ids) == 0:
        raise ValueError("the batch has no tokens")
    _check_range("number of steps", np.array([batch.num_steps]), 1, model.context_length + 1)
    ahead = batch.num_steps - 1  # positions that every sequence goes on by
    if ahead:
        _check_several_steps(batch, ahead, model.context_length, block_size)
    _check_range("token id", batch.token_ids, 0, model.vocab_size)
    _check_range("position", batch.positions, 0, model.context_length)
    _check_range("slot", batch.slots, -1, num_blocks * block_size)
    used = np.arange(batch.block_tables.shape[1]) < -(-(batch.context_lens + ahead) // block_size)[:, None]
    _check_range("block", batch.block_tables[used], 0, num_blocks)
    for what, rows in (("drawn row", batch.draw_rows), ("logits row", batch.logits_rows)):
        _check_range(what, rows, 0, len(batch.token_ids))
    if batch.previous_rows is not None:
        _check_range("row of the step before", batch.previous_rows, -1, num_drawn)
    if batch.block_copies is not None:
        _check_range("block to copy", batch.block_copies, 0, num_blocks)


def _check_several_steps(batch: Batch, ahead: int, context_length: int, block_size: int) -> None:
    rows = np.arange(len(batch.token_ids))
    plain = (
        len(batch.context_lens) == len(rows)
        and np.array_equal(batch.query_starts[1:], rows + 1)
        and np.array_equal(batch.draw_rows, rows)
        and len(batch.logits_rows) == 0
        and (batch.sampling is None or batch.sampling.output_counts is None)
    )
    if not plain:
        raise ValueError(
            f"num_steps is {batch.num_steps}: several steps need one token of every sequence and a draw after it, in "
            "order, no logits and no penalties"
        )
    room = batch.block_tables.shape[1] * block_size
    _check_range("position in the last step", batch.positions + ahead, 0, context_length)
    _check_range("context length in the last step", batch.context_lens + ahead, 0, room + 1)


def _check_range(what: str, values: npt.NDArray[np.integer], low: int, high: int) -> None:
    if values.size == 0 or (
        np.minimum.reduce(values, axis=None) >= low and np.maximum.reduce(values, axis=None) < high
    ):
        return
    bad = values[(values < low) | (values >= high)]
    raise ValueError(f"{what} {int(bad.flat[0])} is out of range: it must be in [{low}, {high})")


def free_memory(device: torch.device, fraction: float) -> int:
    """Bytes that a KV cache may take: ``fraction`` of a GPU's memory less what is used, or of the free main memory."""
    if device.type != "cuda":
        return int(available_memory() * fraction)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int((1 - fraction) * total))
