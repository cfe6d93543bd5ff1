"""Checkpoints: a file a format, all turned into one set of named tensors (``canonical.py``)."""
