"""The contract of a backend: it owns the packed weights and the paged KV cache, and runs one step at a time.

A step takes a ``Batch`` of tokens from any number of sequences and returns, for the rows that ask, drawn tokens with
their logprobs, or logits. There is no phase flag: prefill, a chunk of it and decode differ only in how many tokens a
sequence brings.

One random stream for all backends
----------------------------------
A token is drawn by the Gumbel-max trick: ``argmax_v (x_v + g_v)`` over the kept tokens, ``x`` being the logits after
every option. That is an exact draw from ``softmax(x)``. The noise of vocabulary id v comes from Philox4x32-10 (Salmon
et al. 2011) with key = the 64-bit seed (low word, high word) and counter = (v >> 2, position of the drawn token in its
sequence, sample index, 0); v & 3 chooses one of the four words. A word r becomes, in float32, u = (r + 1/2) / 2**32,
E = -log(max(1 - u, 2**-32)) (u + u**2/2 + u**3/3 for u < 1e-3), g = -log E; the largest words round to u = 1, and the
maximum keeps g finite there. Ties go to the lowest id. So a token is a function of (logits, options, seed,
position, sample index) and of nothing else.

The kept tokens
---------------
Logit bias and penalties, then division by the temperature, then top-k (ties with the k-th stay), then top-p, then
min-p. For top-p each kept token has the integer mass floor(exp(x - max x) * 2**30); the kept set is
{x >= t} for the largest t at which the mass reaches top_p times the whole. Integers make the sum independent of order.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from engine.config import ModelConfig

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sparse:
    """Values on some vocabulary ids of each of R rows, in compressed rows.

    Row r has the ids ``ids[starts[r]:starts[r + 1]]`` with the values at the same places.
    """

    starts: I32  # [R + 1]
    ids: I32  # [N]
    values: F32  # [N]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The options of the R tokens that a step draws, one entry a row. Neutral values switch an option off.

    ``output_counts`` holds how often an id was generated in the row's sequence; an id of the prompt that was never
    generated is there with the count 0. ``allowed`` has bit (id & 31) of word (id >> 5) set for ids that may be drawn.
    """

    temperature: F32  # [R], 0 = greedy
    top_k: I32  # [R], 0 = all
    top_p: F32  # [R]
    min_p: F32  # [R]
    seeds: U64  # [R]
    positions: U32  # [R], position in its sequence of the token to draw
    sample_index: U32  # [R]
    num_logprobs: int  # most probable tokens to report for each row (the most that any row asks for)
    presence_penalty: F32  # [R]
    frequency_penalty: F32  # [R]
    repetition_penalty: F32  # [R]
    output_counts: Sparse | None = None
    logit_bias: Sparse | None = None
    allowed: U32 | None = None  # [R, ceil(vocab_size / 32)]
    ranks: bool = True  # whether ranks are read: if not, one above 1 may be given as 0
    token_only: npt.NDArray[np.bool_] | None = None  # [R], no option but a temperature, and nobody reads the logprob


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: T tokens of S sequences, R rows to draw from, L rows whose logits are returned.

    Tokens of one sequence are consecutive and in order. Arrays are views into persistent buffers of the caller, valid
    until the step is collected.

    Where every sequence has one token and a draw after it, ``num_steps`` may be above 1. A backend may then go on by
    itself, so that nobody has to look at a token before the next one is computed: each further step runs, for every
    sequence, the token that it drew, one position on, with the same options. It may run fewer steps, or one. It stops
    after a step that draws one of ``ending_ids`` if it can see that before it begins the next.
    """

    token_ids: I32  # [T]
    positions: I32  # [T], position in its sequence
    slots: I64  # [T], block id * block_size + offset where K and V are written; -1 writes nothing
    query_starts: I32  # [S + 1], sequence s has the rows query_starts[s]:query_starts[s + 1]
    context_lens: I32  # [S], positions that the sequence has once this step's are written
    block_tables: I32  # [S, B], block ids; entries past the sequence's last block are not read
    draw_rows: I32  # [R], rows of the batch after which a token is drawn; may repeat
    logits_rows: I32  # [L], rows of the batch whose logits are returned as they are
    sampling: SamplingBatch | None = None  # None exactly when R is 0
    previous_rows: I32 | None = None  # [T], >= 0: the token is row i of the step before, not token_ids; else -1
    block_copies: I32 | None = None  # [C, 2], blocks (source, destination) to copy before anything is written
    num_steps: int = 1  # steps to run, at most: see below
    ending_ids: I32 | None = None  # [E], who draws one of these goes on in vain


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step returns. Logprobs and ranks are of the raw logits (no option applied); rank 1 is the most probable.

    Where several steps ran, the rows of the first come first: R is then that many times the rows drawn in one.

    ``logits`` is on the backend's device, in its logits dtype: float32 or wider. On a GPU, what reads them has to be in
    the stream that was current at ``submit``, as PyTorch's own results.
    """

    token_ids: I32  # [R]
    logprobs: F32  # [R]
    ranks: I32  # [R]
    top_ids: I32  # [R, num_logprobs]
    top_logprobs: F32  # [R, num_logprobs]
    logits: torch.Tensor | None = None  # [L, vocab_size], None when L is 0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a backend holds and can hold, in bytes."""

    weight_bytes: int  # packed weights
    bytes_per_block: int  # K and V of one block over all layers
    free_bytes: int  # memory that the KV cache may take


class Backend(ABC):
    """Runs steps of one model. One thread at a time; ``collect`` takes the handles in the order of ``submit``.

    Args:
        model: the architecture.
        weights: canonical tensors (``engine.checkpoints.canonical``), any float dtype, not modified.
        dtype: what weights and KV cache are stored in; one of the class's ``dtypes``.
        device: where to run; one of the kinds in the class's ``devices``.
        block_size: tokens in a block of the KV cache.
        threads: CPU threads, for the backends that compute with them; None is as many as the process may use.
        memory_fraction: share of the device's memory that weights and KV cache may take.
        strict_jit: raise where a step would compile a kernel after warm-up; for backends that compile while they run.
        screen_head: draw ``token_only`` rows with the help of a quantised head: the same tokens, a less exact logprob.

    Raises:
        ValueError: a dtype, device, shape or option that the backend does not have, with what it accepts.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]]
    batch_invariant: ClassVar[bool]  # whether a row's bits are the same in any batch and any chunking

    @abstractmethod
    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: str,
        device: str,
        block_size: int,
        threads: int | None = None,
        memory_fraction: float = 0.9,
        strict_jit: bool = False,
        screen_head: bool = False,
    ) -> None: ...

    @abstractmethod
    def capacity(self) -> Capacity:
        """What the weights take, what a block takes, and how much the KV cache may take."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Make a KV cache of ``num_blocks`` blocks; what an earlier one held is gone."""

    @abstractmethod
    def submit(self, batch: Batch) -> Any:
        """Start a step and return a handle for ``collect``. A synchronous backend returns a finished one.

        Raises:
            ValueError: a token id, position, slot or block out of range.
        """

    @abstractmethod
    def collect(self, handle: Any) -> StepOutput:
        """Return a submitted step's output, waiting for what of it comes to the host.

        Raises:
            UndrawableRow: the logits of a drawn row hold NaN or +inf, or exclude every token. The step can be taken
                again without that row.
        """

    @abstractmethod
    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take new values for all weights, of the same shapes. The KV cache is not touched: it is stale then."""
