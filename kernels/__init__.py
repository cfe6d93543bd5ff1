"""Triton kernels of the GPT forward pass, one operator a file. They know nothing of ``engine``.

This file imports nothing: another package named ``kernels`` exists and is looked for by other projects.
"""

__version__ = "0.1.0"
