"""A lock that threads get in the order in which they came."""

import os
import threading
from collections import deque
from types import TracebackType


class Turns:
    """A reentrant lock without overtaking: who takes it again and again lets those that wait go first.

    (Whoever releases a ``threading.RLock`` and takes it again at once is faster than a thread that has to wake up.)
    A forked child, which has none of the other threads, waits for none.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._depth = 0
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()  # a locked gate for each

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._process != os.getpid():
            self._begin()
            if self._owner != me:
                self._owner, self._depth = None, 0
        if self._owner == me:
            self._depth += 1
            return
        gate = threading.Lock()
        gate.acquire()
        with self._mutex:
            if self._depth == 0:
                self._depth = 1
                self._owner = me
                return
            self._waiting.append(gate)
        try:
            gate.acquire()
            self._owner = me
        except BaseException:  # Ctrl-C: the turn goes to the next, if it has come
            with self._mutex:
                if gate in self._waiting:
                    self._waiting.remove(gate)
                else:
                    self._hand_on()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth > 1:
            self._depth -= 1
            return
        with self._mutex:
            self._hand_on()

    def _hand_on(self) -> None:
        self._owner = None
        self._depth = 1 if self._waiting else 0
        if self._waiting:
            self._waiting.popleft().release()
