"""Text out of tokens as they come: never half a character, and in the end the very text of all tokens."""

import codecs

from engine.text.tokenizer import REPLACEMENT, TextCodec

CONTEXT = 4  # tokens kept before new ones, for a tokenizer whose text depends on what comes before
LONGEST = 32  # tokens after which a window of unfinished text is cut
HELD = 3  # bytes that an unfinished character has at most, so many U+FFFD may yet become one


class Detokenizer:
    """Turns one sequence of tokens into text, token by token.

    A byte-level codec costs the same for every token. For one that knows text only, a short window is decoded again
    with each token, and up to three U+FFFD at its end are held back.

    Args:
        codec: the tokenizer.
        skip_special_tokens: whether special tokens leave no text.
    """

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._stream = _Window(codec) if codec.decode_bytes(()) is None else _Bytes(codec)

    def push(self, token_id: int) -> str:
        """The text that became complete with this token, perhaps none."""
        if self._skip and self._codec.is_special(token_id):
            return ""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """What is left at the end; bytes of an unfinished character become U+FFFD."""
        return self._stream.flush()


class _Bytes:
    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        raw = self._codec.decode_bytes((token_id,))
        assert raw is not None
        return self._decoder.decode(raw)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._shown = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._codec.decode(self._ids)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), HELD)
        end = len(text) - held
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if held == 0 or len(self._ids) > LONGEST:
            self._ids = self._ids[-CONTEXT if held == 0 else -LONGEST // 2 :]
            self._shown = len(self._codec.decode(self._ids)) - held
        return new

    def flush(self) -> str:
        rest = self._codec.decode(self._ids)[self._shown :] if self._ids else ""
        self._ids, self._shown = [], 0
        return rest
