"""The loop: plan a step, have it run, commit what it gave."""

from collections.abc import Callable, Iterable

from engine.messages import Event, StepPlan, StepResult, UndrawableRow
from engine.planning.scheduler import Scheduler
from engine.planning.sequence import Sequence


class EngineCore:
    """Runs sequences to their ends, a step at a time.

    Args:
        scheduler: decides what runs.
        execute: runs a plan and returns a result for every step that it ran (``Runner.execute``).
    """

    def __init__(self, scheduler: Scheduler, execute: Callable[[StepPlan], Iterable[StepResult]]) -> None:
        self._scheduler = scheduler
        self._execute = execute

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self._scheduler.has_work

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for a sequence that could never run."""
        self._scheduler.check(sequence)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it may join any later step."""
        self._scheduler.add(sequence)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence and free what it held."""
        self._scheduler.abort(seq_id)

    def step(self, most: int = 1) -> list[Event]:
        """Run one step, or up to ``most`` where nothing that is decided between them could be decided otherwise.

        Returns the tokens drawn, step by step, at most one per sequence in each; none when idle. A sequence for which
        none can be drawn ends alone: that is what is returned then, and the others take the same step again.
        """
        plan = self._scheduler.plan(most)
        if not plan.sequences:
            return []
        try:
            results = self._execute(plan)
        except UndrawableRow as error:
            return [self._scheduler.fail(plan, error)]
        return [event for result in results for event in self._scheduler.commit(plan, result)]
