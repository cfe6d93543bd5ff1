"""Text as it comes: never half a character, nothing of a stop string, and in total all of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.byte_pairs import END_OF_TEXT, make_encoding
from engine.text.detokenizer import Detokenizer
from engine.text.load import load_tokenizer
from engine.text.stops import StopFinder
from engine.text.tokenizer import TextCodec, TiktokenCodec

BYTES = [bytes([byte]) for byte in range(256)]
RANKS = {
    token: i
    for i, token in enumerate(
        dict.fromkeys([*BYTES, "é".encode(), "日".encode(), "日".encode()[:2], "🙂".encode()[1:3], b"ab"])
    )
}


def byte_codec() -> TextCodec:
    return TiktokenCodec(make_encoding("bytes", RANKS, {END_OF_TEXT: 270}), 280, 270, "bytes")


class Foreign:
    """The same vocabulary for someone who only knows text."""

    def __init__(self) -> None:
        self.inner = byte_codec()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids)


class Words:
    """Text that depends on what comes before: a space between words, none at the start or before a comma."""

    words = ("one", "two", ",", "three", "\ufffd")

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids).replace(" ,", ",")


def codec_of(kind: str) -> TextCodec:
    if kind == "bytes":
        return byte_codec()
    codec = load_tokenizer(
        None,
        280 if kind == "foreign" else 8,
        270 if kind == "foreign" else 7,
        Foreign() if kind == "foreign" else Words(),
    )
    assert codec is not None
    return codec


CODECS = {kind: codec_of(kind) for kind in ("bytes", "foreign", "words")}


@pytest.mark.parametrize("kind", CODECS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_detokenizer_gives_the_whole_text(kind: str, data: Any, skip: bool) -> None:
    codec = CODECS[kind]
    if kind == "words":
        ids = data.draw(st.lists(st.integers(0, 4) | st.just(4), max_size=60))
    else:
        whole = st.text(alphabet="aé日🙂b ", max_size=6).map(codec.encode)
        parts = data.draw(st.lists(whole | st.lists(st.integers(0, 285), max_size=3), max_size=12))
        ids = [i for part in parts for i in part]
    detokenizer = Detokenizer(codec, skip)
    shown = ""
    for i in ids:
        shown += detokenizer.push(i)
    assert shown + detokenizer.flush() == codec.decode(ids, skip_special_tokens=skip)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", ["bytes", "foreign"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_nothing_is_shown_that_a_later_byte_would_mend(kind: str, text: str) -> None:
    """Byte by byte, what was shown is at all times a beginning of the text, at most one character behind."""
    detokenizer, shown = Detokenizer(CODECS[kind], False), ""
    for count, byte in enumerate(text.encode(), start=1):
        shown += detokenizer.push(byte)
        assert text.startswith(shown)
        if kind == "bytes":
            assert shown == text.encode()[:count].decode("utf-8", "ignore")
    assert shown + detokenizer.flush() == text


def test_detokenizer_by_example() -> None:
    for kind in ("bytes", "foreign"):
        detokenizer = Detokenizer(CODECS[kind], True)
        assert [detokenizer.push(i) for i in "a日".encode()] == ["a", "", "", "日"]
        assert detokenizer.push(270) == ""
        assert detokenizer.push(0xE6) == ""
        assert detokenizer.flush() == "\ufffd"


def test_a_long_run_of_padding_is_shown_as_it_comes() -> None:
    detokenizer = Detokenizer(CODECS["foreign"], False)
    shown = "".join(detokenizer.push(279) for _ in range(500))
    assert 497 <= len(shown) <= 500
    assert shown + detokenizer.flush() == "\ufffd" * 500


def test_cost_of_a_token_does_not_grow() -> None:
    """Every byte-level push asks for the bytes of one token only."""

    class Counting(TiktokenCodec):
        asked = 0

        def decode_bytes(self, ids: Iterable[int]) -> bytes:
            ids = list(ids)
            self.asked += len(ids)
            return super().decode_bytes(ids)

    codec = Counting(make_encoding("bytes", RANKS, {}), 280, None, "bytes")
    detokenizer = Detokenizer(codec, False)
    for _ in range(200):
        detokenizer.push(0xE6)
    assert codec.asked == 200


def test_a_foreign_tokenizer_decodes_a_short_window() -> None:
    class Longest(Foreign):
        seen = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.seen = max(self.seen, len(ids))
            return super().decode(ids)

    foreign = Longest()
    codec = load_tokenizer(None, 280, None, foreign)
    assert codec is not None
    detokenizer = Detokenizer(codec, False)
    for i in [97] * 100 + [279] * 100:
        detokenizer.push(i)
    assert foreign.seen <= 5 + 32


# Stop strings


def by_character(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """What is before the first stop string to be complete, the longest of those that end there; and which it is."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=5), max_size=10),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    include=st.booleans(),
)
def test_stop_finder_for_any_split(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    before, matched = by_character(text, stops)
    finder, shown = StopFinder(stops, include), ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.matched is None or not include:
            assert not any(stop in shown for stop in stops)
        assert (before + (matched or "") if include else before).startswith(shown)
    shown += finder.flush()
    assert finder.matched == matched
    assert shown == before + (matched or "" if include else "")


def test_only_what_could_begin_a_stop_string_is_held() -> None:
    finder = StopFinder(["\n\nUser:", "END"], include=False)
    assert finder.push("Hello\n") == "Hello"
    assert finder.push("there E") == "\nthere "
    assert finder.push("N.") == "EN."
    assert finder.push("EN") == ""
    assert finder.push("D and more") == ""
    assert finder.matched == "END"
    assert finder.push("more") == ""
    assert finder.flush() == ""


def test_include_shows_the_stop_string_and_no_more() -> None:
    finder = StopFinder(["ab"], include=True)
    assert finder.push("xa") == "x"
    assert finder.push("bc") == "ab"
    assert finder.matched == "ab"


@pytest.mark.parametrize(
    ("stops", "message"),
    [("stop", "must be a sequence of str, got the str 'stop'"), ([""], "not empty, got ''"), ([3], "not empty, got 3")],
)
def test_stops_that_are_none(stops: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopFinder(stops, include=False)
