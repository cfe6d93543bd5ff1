"""Tokenizers of other makers behind the engine's interface: any object with ``encode`` and ``decode``."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from engine.text.byte_pairs import to_bytes
from engine.text.tokenizer import (
    REPLACEMENT,
    ByteLevelCodec,
    TextCodec,
    check_allowed,
    check_in_vocabulary,
    require_text,
)


def as_ids(result: Any) -> list[int]:
    """Token ids out of what an ``encode`` returned: a list, a tensor, an array, or an object with ``ids`` or
    ``input_ids``; a batch of one is taken apart.

    Raises:
        ValueError: there are no ids in it.
    """
    found = result
    if isinstance(found, Mapping) and "input_ids" in found:
        found = found["input_ids"]
    else:
        found = getattr(found, "input_ids", getattr(found, "ids", found))
    if callable(getattr(found, "tolist", None)):
        found = found.tolist()
    if isinstance(found, Sequence) and len(found) == 1 and isinstance(found[0], Sequence):
        found = found[0]
    try:
        if isinstance(found, str | bytes):
            raise TypeError
        return [value.__index__() for value in found]
    except (TypeError, AttributeError) as error:
        kind = type(result).__qualname__
        raise ValueError(f"the tokenizer's encode returned a {kind} that holds no token ids: {result!r:.80}") from error


class ForeignCodec:
    """A tokenizer that knows text only.

    Args:
        encode: text -> ids in any form that ``as_ids`` knows.
        decode: a list of ids -> text.
        vocab_size: the model's.
        eos_token_id: the end of text, or None.
        name: for people.
        special: name -> id of the special tokens, as far as they are known.
        known: whether ``decode`` knows an id, any integer; by default it is tried.
    """

    def __init__(
        self,
        encode: Callable[[str], Any],
        decode: Callable[[list[int]], Any],
        vocab_size: int,
        eos_token_id: int | None,
        name: str,
        special: Mapping[str, int] | None = None,
        known: Callable[[int], bool] | None = None,
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.special = dict(special or {})
        self._special_ids = {*self.special.values(), *(() if eos_token_id is None else (eos_token_id,))}
        self._encode, self._decode = encode, decode
        self._known = known

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        require_text(text)
        check_allowed(allowed_special, self.special)
        ids = encode_around(text, allowed_special, self.special, lambda part: as_ids(self._encode(part)))
        check_in_vocabulary(ids, self.vocab_size, self.name)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in self._special_ids)]
        if self._known is None and self._can_decode(kept):
            return self._text(kept)
        pieces, run = [], list[int]()
        for i in kept:
            if self._known(i) if self._known else self._can_decode([i]):
                run.append(i)
            else:
                pieces += [self._text(run), REPLACEMENT]
                run = []
        return "".join([*pieces, self._text(run)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes | None:
        return None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _text(self, ids: list[int]) -> str:
        text = self._decode(ids) if ids else ""
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer's decode returned a {type(text).__qualname__}, expected a str")
        return text

    def _can_decode(self, ids: list[int]) -> bool:
        if not all(0 <= i < self.vocab_size for i in ids):
            return False
        try:
            self._text(ids)
        except (LookupError, ValueError, OverflowError):
            return False
        return True


def encode_around(
    text: str, allowed: Collection[str], special: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Ids of ``text``: the ``allowed`` special tokens in it by their ids, what is between them by ``encode``."""
    if not allowed:
        return encode(text)
    longest_first = sorted(allowed, key=len, reverse=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
        ids += [special[part]] if part in allowed else encode(part) if part else []
    return ids


class TokenizersCodec(ByteLevelCodec):
    """A byte-level ``tokenizers.Tokenizer`` (prepared by ``from_tokenizers``)."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_id: int | None, name: str) -> None:
        special = _special_tokens(tokenizer)
        table: list[bytes | None] = []
        added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        for i in range(min(vocab_size, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1))):
            token = tokenizer.id_to_token(i)
            as_it_is = added.get(i)
            table.append(as_it_is.encode() if as_it_is is not None else None if token is None else to_bytes(token))
        super().__init__(table, special, vocab_size, eos_token_id, name)
        self._tokenizer = tokenizer

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        require_text(text)
        check_allowed(allowed_special, self.special)
        ids = encode_around(text, allowed_special, self.special, lambda part: _plain_ids(self._tokenizer, part))
        check_in_vocabulary(ids, self.vocab_size, self.name)
        return ids


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text``, lone surrogates (which are no characters) as U+FFFD."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return list(tokenizer.encode(clean, add_special_tokens=False).ids)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def from_tokenizers(tokenizer: Any, vocab_size: int, eos_token_id: int | None, name: str) -> TextCodec:
    """A ``tokenizers.Tokenizer`` as a codec: a copy of it, without truncation, padding and special tokens put in."""
    from tokenizers import decoders

    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True  # special tokens in a text are text
    if isinstance(copy.decoder, decoders.ByteLevel):
        return TokenizersCodec(copy, vocab_size, eos_token_id, name)
    return ForeignCodec(
        encode=lambda text: _plain_ids(copy, text),
        decode=lambda ids: copy.decode(ids, skip_special_tokens=False),
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        name=name,
        special=_special_tokens(copy),
        known=lambda i: 0 <= i < vocab_size and copy.id_to_token(i) is not None,
    )


def from_object(tokenizer: Any, vocab_size: int, eos_token_id: int | None) -> TextCodec:
    """Any object with ``encode`` and ``decode`` as a codec.

    ``eos_token_id`` of the object is taken where the checkpoint says none.

    Raises:
        ValueError: it has no such methods.
    """
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    own = getattr(tokenizer, "eos_token_id", None)
    if eos_token_id is None and isinstance(own, int) and 0 <= own < vocab_size:
        eos_token_id = own
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of transformers' fast tokenizers
    if type(inner).__module__.split(".")[0] == "tokenizers" and hasattr(inner, "to_str"):
        return from_tokenizers(inner, vocab_size, eos_token_id, kind)
    if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(f"tokenizer must be a path, 'gpt2', or an object with encode and decode; got a {kind}")
    return ForeignCodec(tokenizer.encode, tokenizer.decode, vocab_size, eos_token_id, kind)
