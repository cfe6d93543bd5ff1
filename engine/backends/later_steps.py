"""The steps that follow a step when nobody looks at its tokens in between (``Batch.num_steps``)."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from engine.backends.base import Batch


def later_steps(batch: Batch, block_size: int, count: int) -> Iterator[Batch]:
    """The ``count`` steps after ``batch``, each of which takes its tokens from the one before, on the device.

    ``check_batch`` has passed the batch. Every step's arrays are its own.
    """
    rows = np.arange(len(batch.token_ids), dtype=np.int32)
    for ahead in range(1, count + 1):
        positions = batch.positions + np.int32(ahead)
        blocks = batch.block_tables[rows, positions // block_size].astype(np.int64)
        assert batch.sampling is not None
        yield replace(
            batch,
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            context_lens=batch.context_lens + np.int32(ahead),
            previous_rows=rows,
            sampling=replace(batch.sampling, positions=batch.sampling.positions + np.uint32(ahead)),
            block_copies=None,
            num_steps=1,
        )
