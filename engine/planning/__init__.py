"""The planning floor: which tokens of which sequences run next. Integers only, no torch."""
