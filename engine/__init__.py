"""An inference engine for GPT-2 family models.

``LLM`` generates from a checkpoint, ``optimize`` makes a live module fast, ``GPTModel`` is the plain PyTorch model
that both are held to.
"""

from engine.llm import LLM
from engine.messages import CompletionOutput, Logprob, RequestOutput, SamplingParams
from engine.optimize import optimize
from engine.reference import GPTModel

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "GPTModel",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "optimize",
]
