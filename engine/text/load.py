"""Which tokenizer a model has: the one given, the one in its folder, GPT-2's by the size of its vocabulary, or none."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken

from engine.files import read_json_object
from engine.text.byte_pairs import (
    END_OF_TEXT,
    GPT2_SIZE,
    gpt2_encoding,
    make_encoding,
    ranks_of_merges,
    read_merges,
    read_ranks,
    to_bytes,
)
from engine.text.foreign import from_object, from_tokenizers
from engine.text.tokenizer import TextCodec, TiktokenCodec

LARGEST_PADDED = 51200  # a vocabulary up to here is taken for GPT-2's, padded


def load_tokenizer(
    folder: Path | None, vocab_size: int, eos_token_id: int | None = None, tokenizer: object | None = None
) -> TextCodec | None:
    """The tokenizer of a model, or None if it takes and gives token ids only.

    In this order: ``tokenizer``; a ``.tiktoken`` file, vocab.json with merges.txt, or tokenizer.json in ``folder``;
    GPT-2's vocabulary for 50257 tokens, for 50256 (without ``<|endoftext|>``), and for a padded size up to 51200 (its
    ``name`` then says so).

    Args:
        folder: where the checkpoint is, or None.
        vocab_size: the model's.
        eos_token_id: the end of text, where the checkpoint says one.
        tokenizer: any object with ``encode`` and ``decode``; a path of a folder, a ``.tiktoken`` file or a
            tokenizer.json; or ``"gpt2"``.

    Raises:
        ValueError: files are broken or do not fit the model, or ``tokenizer`` is none of these.
    """
    if tokenizer is not None:
        return _given(tokenizer, vocab_size, eos_token_id)
    codec = None if folder is None else _from_folder(folder, vocab_size, eos_token_id)
    if codec is None and GPT2_SIZE <= vocab_size <= LARGEST_PADDED:
        codec = _gpt2(vocab_size, eos_token_id)
    return codec


def _given(tokenizer: object, vocab_size: int, eos_token_id: int | None) -> TextCodec:
    if isinstance(tokenizer, str | os.PathLike):
        if tokenizer == "gpt2":
            return _gpt2(vocab_size, eos_token_id)
        return _from_path(Path(tokenizer).expanduser(), vocab_size, eos_token_id)
    if isinstance(tokenizer, tiktoken.Encoding):
        own = tokenizer.eot_token if END_OF_TEXT in tokenizer.special_tokens_set else None
        eos = own if eos_token_id is None and own is not None and own < vocab_size else eos_token_id
        return TiktokenCodec(tokenizer, vocab_size, eos, f"tiktoken {tokenizer.name}")
    if isinstance(tokenizer, TextCodec):
        return tokenizer
    return from_object(tokenizer, vocab_size, eos_token_id)


def _from_path(path: Path, vocab_size: int, eos_token_id: int | None) -> TextCodec:
    if path.is_dir():
        codec = _from_folder(path, vocab_size, eos_token_id)
        if codec is None:
            raise ValueError(
                f"{path} holds no tokenizer: no .tiktoken file, no vocab.json with merges.txt, and no tokenizer.json"
            )
        return codec
    if not path.is_file():
        raise ValueError(
            f"tokenizer {str(path)!r} does not exist; pass a folder, a .tiktoken file, a tokenizer.json or 'gpt2'"
        )
    if path.suffix == ".tiktoken":
        return _from_ranks(path, vocab_size, eos_token_id)
    if path.suffix == ".json":
        return _from_tokenizer_json(path, vocab_size, eos_token_id)
    raise ValueError(f"tokenizer {str(path)!r} is not of a known form; a .tiktoken file or a tokenizer.json is")


def _gpt2(vocab_size: int, eos_token_id: int | None) -> TiktokenCodec:
    if vocab_size < GPT2_SIZE:
        raise ValueError(
            f"GPT-2's vocabulary has {GPT2_SIZE + 1} tokens ({GPT2_SIZE} without {END_OF_TEXT}), the model's "
            f"{vocab_size}: pass its own tokenizer="
        )
    whole = vocab_size > GPT2_SIZE
    name = "GPT-2's vocabulary"
    if not whole:
        name += f" without {END_OF_TEXT}"
    elif vocab_size > GPT2_SIZE + 1:
        name += f", padded from {GPT2_SIZE + 1} to {vocab_size}"
    eos = GPT2_SIZE if whole and eos_token_id is None else eos_token_id
    return TiktokenCodec(gpt2_encoding(whole), vocab_size, eos, name)


def _from_folder(folder: Path, vocab_size: int, eos_token_id: int | None) -> TextCodec | None:
    found = sorted(folder.glob("*.tiktoken"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several vocabularies ({names}); pass one as tokenizer=")
    if found:
        return _from_ranks(found[0], vocab_size, eos_token_id)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_merges(folder, vocab_size, eos_token_id)
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json", vocab_size, eos_token_id)
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if (folder / name).is_file():
            raise ValueError(f"{folder} holds {name} but no {other}; add it, or pass tokenizer=")
    return None


def _fits(what: Path, largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{what} has ids up to {largest}, the model's vocabulary is {vocab_size}: it is not this model's"
        )


def _from_ranks(path: Path, vocab_size: int, eos_token_id: int | None) -> TiktokenCodec:
    ranks = read_ranks(path)
    _fits(path, len(ranks) - 1, vocab_size)
    special = {END_OF_TEXT: eos_token_id} if eos_token_id is not None and eos_token_id >= len(ranks) else {}
    return TiktokenCodec(make_encoding(path.stem, ranks, special), vocab_size, eos_token_id, str(path))


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that the folder's other files add to the vocabulary."""
    added: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        added |= {str(token): int(i) for token, i in read_json_object(folder / "added_tokens.json").items()}
    for i, token in (_tokenizer_config(folder).get("added_tokens_decoder") or {}).items():
        added[str(token["content"])] = int(i)
    return added


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _from_merges(folder: Path, vocab_size: int, eos_token_id: int | None) -> TextCodec:
    """vocab.json and merges.txt: by tiktoken if that is the same (see ``byte_pairs``), else by ``tokenizers``."""
    vocab, merges = read_json_object(folder / "vocab.json"), read_merges(folder / "merges.txt")
    if not vocab or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ValueError(f"{folder / 'vocab.json'} must map tokens to ids")
    added = _added_tokens(folder)
    prefix_space = bool(_tokenizer_config(folder).get("add_prefix_space", False))
    ranks, reason = ranks_of_merges(vocab, merges)
    if prefix_space:
        ranks, reason = {}, "a space is put before the text"
    if not ranks and (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json", vocab_size, eos_token_id)
    _fits(folder / "vocab.json", max(vocab.values()), vocab_size)
    made = set(ranks.values())
    special = {token: i for token, i in vocab.items() if i not in made} if ranks else _unmerged(vocab, merges)
    special |= added
    eos = special.get(END_OF_TEXT) if eos_token_id is None else eos_token_id
    if ranks:
        return TiktokenCodec(make_encoding(folder.name, ranks, special), vocab_size, eos, f"{folder / 'vocab.json'}")
    return _by_tokenizers(folder, vocab, merges, special, prefix_space, reason, vocab_size, eos)


def _unmerged(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Tokens that are neither single characters nor merges."""
    made = {left + right for left, right in merges}
    return {token: i for token, i in vocab.items() if len(token) > 1 and token not in made}


def _by_tokenizers(
    folder: Path,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    special: Mapping[str, int],
    prefix_space: bool,
    reason: str,
    vocab_size: int,
    eos_token_id: int | None,
) -> TextCodec:
    if any(to_bytes(token) is None for token in vocab if token not in special):
        raise ValueError(
            f"{folder / 'vocab.json'} is not a byte-level vocabulary; add its tokenizer.json, or pass tokenizer="
        )
    tokenizers = _tokenizers_library(folder / "vocab.json", reason)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(vocab), merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    in_order = sorted(special.items(), key=lambda item: item[1])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token, _ in in_order])
    return from_tokenizers(tokenizer, vocab_size, eos_token_id, f"{folder / 'vocab.json'} by tokenizers ({reason})")


def _from_tokenizer_json(path: Path, vocab_size: int, eos_token_id: int | None) -> TextCodec:
    tokenizers = _tokenizers_library(path, "")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    _fits(path, max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0), vocab_size)
    eos = tokenizer.token_to_id(END_OF_TEXT) if eos_token_id is None else eos_token_id
    return from_tokenizers(tokenizer, vocab_size, eos, str(path))


def _tokenizers_library(path: Path, reason: str) -> Any:
    try:
        import tokenizers  # an optional dependency
    except ImportError as error:
        why = f" ({reason})" if reason else ""
        raise ValueError(
            f"{path} needs the package tokenizers{why}: pip install tokenizers, or pass tokenizer="
        ) from error
    return tokenizers
