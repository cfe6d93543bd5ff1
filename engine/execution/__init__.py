"""The execution floor: turns a plan into a ``Batch``, has a backend run it, and turns its output into a result."""
