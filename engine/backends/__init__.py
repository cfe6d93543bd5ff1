"""Backends: each runs whole steps of a model. ``base.py`` is the contract, ``registry.py`` chooses."""
