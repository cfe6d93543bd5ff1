"""``python -m engine.bench``: is the engine right, and how fast, beside the naive loop and the machine's limit."""
