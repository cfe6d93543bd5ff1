"""Stop strings in text as it comes."""

from collections.abc import Sequence


class StopFinder:
    """Finds the first stop string in a text that arrives in pieces, and shows nothing of it before.

    The match is the one that is complete first, reading character by character; of several that end there, the
    longest. So it does not depend on how the text is cut into pieces.

    Args:
        stops: the stop strings.
        include: whether the matched one belongs to the text.

    Raises:
        ValueError: ``stops`` is a str, or one of them is empty or no str.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        if isinstance(stops, str):
            raise ValueError(f"stops must be a sequence of str, got the str {stops!r}")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"a stop string must be a str that is not empty, got {stop!r}")
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show now. After a match, nothing more."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        keep = self._could_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text has ended without a match."""
        rest, self._held = self._held, ""
        return rest

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
