"""The parts of ``gpu_check.py``: each gives named cases, which return what they found."""
