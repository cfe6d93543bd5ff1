"""What the engine asks of a tokenizer (``TextCodec``), and the one on byte-pair ranks through tiktoken."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import tiktoken

REPLACEMENT = "\ufffd"


@runtime_checkable
class TextCodec(Protocol):
    """Text to token ids and back.

    ``name`` says for people what it is; ``vocab_size`` is the model's; ``eos_token_id`` ends a text, or is None.
    """

    name: str
    vocab_size: int
    eos_token_id: int | None

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of ``text``. Special tokens in it are plain text, but for those that ``allowed_special`` names."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; an id that stands for nothing, or bytes that are no UTF-8, become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes | None:
        """The bytes that ``ids`` stand for, each on its own; None where the tokenizer knows text only."""

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token's."""


def require_text(text: object) -> None:
    """Raise TypeError, naming the type, for anything but a str."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got a {type(text).__qualname__}")


def check_allowed(allowed: Collection[str], special: Mapping[str, int]) -> None:
    """Raise ValueError for a name in ``allowed`` that is not in ``special``, or for a bare str."""
    if isinstance(allowed, str):
        raise ValueError(f"allowed_special must be a collection of names, got the str {allowed!r}")
    unknown = sorted(set(allowed) - special.keys())
    if unknown:
        known = ", ".join(sorted(special)) or "none"
        raise ValueError(f"allowed_special names {', '.join(map(repr, unknown))}; this tokenizer has: {known}")


def check_in_vocabulary(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise ValueError for an id that the model does not have."""
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"the tokenizer ({name}) gave the id {token_id}, the model's vocabulary is {vocab_size}")


class ByteLevelCodec:
    """Decoding from a table of each id's bytes: what all byte-level tokenizers share.

    Args:
        table: the bytes of each id from 0 on; None for an id that stands for nothing.
        special: name -> id of the special tokens, each of them with its bytes in ``table``.
        vocab_size: the model's.
        eos_token_id: the end of text, or None.
        name: for people.
    """

    def __init__(
        self,
        table: Sequence[bytes | None],
        special: Mapping[str, int],
        vocab_size: int,
        eos_token_id: int | None,
        name: str,
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.special = {text: i for text, i in special.items() if i < vocab_size}
        self._special_ids = frozenset(self.special.values())
        unknown = REPLACEMENT.encode()
        self._table = {i: unknown if token is None else token for i, token in enumerate(table[:vocab_size])}
        self._unknown = unknown

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._table.get(i, self._unknown) for i in ids])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


class TiktokenCodec(ByteLevelCodec):
    """A ``tiktoken.Encoding``.

    Args:
        encoding: the encoding; it may have fewer tokens than the model (padding), and more if text never uses them.
        vocab_size: the model's.
        eos_token_id: the end of text, or None.
        name: for people.
    """

    def __init__(self, encoding: tiktoken.Encoding, vocab_size: int, eos_token_id: int | None, name: str) -> None:
        special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        table = [_bytes_of(encoding, i) for i in range(min(vocab_size, encoding.max_token_value + 1))]
        super().__init__(table, special, vocab_size, eos_token_id, name)
        self._encoding = encoding

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        require_text(text)
        check_allowed(allowed_special, self.special)
        ids = self._encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())
        check_in_vocabulary(ids, self.vocab_size, self.name)
        return ids


def _bytes_of(encoding: tiktoken.Encoding, token_id: int) -> bytes | None:
    try:
        return encoding.decode_single_token_bytes(token_id)
    except KeyError:  # an id between the ranks and the special tokens
        return None
