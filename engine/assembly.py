"""The parts behind an ``LLM``: a backend for a checkpoint and options, and the loop that runs sequences on it."""

from engine.backends.base import Backend
from engine.backends.registry import Choice, choose
from engine.checkpoints.canonical import Checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.execution.batch_builder import BatchBuilder
from engine.execution.runner import Runner
from engine.logs import get_logger
from engine.planning.block_manager import BlockManager
from engine.planning.core import EngineCore
from engine.planning.scheduler import Scheduler

CPU_MEMORY_FRACTION = 0.9  # of what is free, that the KV cache may take


def choose_backend(checkpoint: Checkpoint, config: EngineConfig) -> Choice:
    """Settle backend, dtype and device for a model, and say in the log what it is and why."""
    choice = choose(config.backend, config.dtype, config.device, checkpoint.config)
    log = get_logger()
    for line in (checkpoint.source, *checkpoint.notes):
        log.info(line)
    log.info("backend %s, %s on %s (%s)", choice.backend.name, choice.dtype, choice.device, choice.reason)
    return choice


def make_backend(choice: Choice, checkpoint: Checkpoint, config: EngineConfig, gpu_memory: float) -> Backend:
    """The backend with its weights.

    Args:
        choice: which one, and in what.
        checkpoint: the weights.
        config: the other options.
        gpu_memory: share of a GPU's memory that weights and KV cache may take.
    """
    return choice.backend(
        checkpoint.config,
        checkpoint.weights,
        dtype=choice.dtype,
        device=choice.device,
        block_size=config.block_size,
        threads=config.threads,
        memory_fraction=gpu_memory if choice.device.startswith("cuda") else CPU_MEMORY_FRACTION,
        strict_jit=config.strict_jit,
        screen_head=config.screen_head,
    )


def make_core(
    backend: Backend, model: ModelConfig, config: EngineConfig, max_model_len: int
) -> tuple[EngineCore, Runner]:
    """Give the backend its KV cache; return the loop that plans and runs sequences on it, and what runs a plan.

    Raises:
        ValueError: more memory is asked for than is free, or what there is has no room for a block.
    """
    blocks_each = -(-max_model_len // config.block_size)
    capacity = backend.capacity()
    memory = config.kv_cache_memory_bytes or capacity.free_bytes
    if memory > capacity.free_bytes:
        raise ValueError(f"kv_cache_memory_bytes={memory} is more than the {capacity.free_bytes} bytes that are free")
    num_blocks = min(config.max_num_seqs * blocks_each, memory // capacity.bytes_per_block)
    if num_blocks < 1:
        raise ValueError(f"a KV cache of {memory} bytes has no room for a block of {capacity.bytes_per_block} bytes")
    backend.allocate(num_blocks)
    get_logger().info(
        "KV cache of %d blocks of %d tokens (%.0f MB), room for %.1f sequences of %d tokens",
        num_blocks,
        config.block_size,
        num_blocks * capacity.bytes_per_block / 1e6,
        num_blocks / blocks_each,
        max_model_len,
    )
    builder = BatchBuilder(
        config.max_num_batched_tokens, config.max_num_seqs, blocks_each, config.block_size, model.vocab_size
    )
    runner = Runner(backend, builder)
    return EngineCore(Scheduler(config, BlockManager(num_blocks, config.block_size)), runner.execute), runner
