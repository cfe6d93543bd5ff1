"""The native backend with ``screen_head``: an int8 copy of the head tells which outputs have to be computed."""

from pathlib import Path

from ours_peer import Engine, versions

__all__ = ["load", "versions"]


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(checkpoint, precision, threads, max_seqs, screen_head=True)
