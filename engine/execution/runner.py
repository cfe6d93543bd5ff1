"""Runs a plan on a backend: builds its batch, submits it, and turns the output into a result."""

from dataclasses import dataclass
from typing import Any

import torch

from engine.backends.base import Backend, StepOutput
from engine.execution.batch_builder import BatchBuilder
from engine.messages import Drawn, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that was submitted and not yet collected."""

    plan: StepPlan
    handle: Any


class Runner:
    """Executes plans, one at a time.

    Args:
        backend: with its KV cache allocated.
        builder: makes the batches.
    """

    def __init__(self, backend: Backend, builder: BatchBuilder) -> None:
        self._backend = backend
        self._builder = builder

    def submit(self, plan: StepPlan) -> Pending:
        """Start a step."""
        return Pending(plan, self._backend.submit(self._builder.build(plan)))

    def collect(self, pending: Pending) -> list[StepResult]:
        """Wait for a step and return what it drew, and what those drew that followed it."""
        return _results(pending.plan, self._backend.collect(pending.handle))

    def execute(self, plan: StepPlan) -> list[StepResult]:
        """Run a plan to its end. Returns a result for every step that ran, one unless the plan allows more."""
        return self.collect(self.submit(plan))

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Run a step that draws nothing; return the logits its sequences ask for, ``[sum(num_logits), V]``."""
        logits = self._backend.collect(self._backend.submit(self._builder.build(plan))).logits
        assert logits is not None, "the plan asks for no logits"
        return logits


def _results(plan: StepPlan, output: StepOutput) -> list[StepResult]:
    token_ids, logprobs, ranks = output.token_ids.tolist(), output.logprobs.tolist(), output.ranks.tolist()
    top_ids, top_logprobs = output.top_ids.tolist(), output.top_logprobs.tolist()
    results: list[StepResult] = []
    row = 0
    while not results or row < len(token_ids):
        drawn: list[Drawn | None] = []
        for part in plan.sequences:
            if part.draw is None:
                drawn.append(None)
                continue
            top: tuple[tuple[int, float], ...] = ()
            if wanted := part.draw.params.logprobs:
                top = tuple(zip(top_ids[row][:wanted], top_logprobs[row][:wanted], strict=True))
            drawn.append(Drawn(token_ids[row], logprobs[row], ranks[row], top))
            row += 1
        results.append(StepResult(drawn))
    return results
