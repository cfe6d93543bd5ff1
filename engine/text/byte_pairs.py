"""Byte-pair vocabularies: tiktoken's rank files, and Hugging Face's vocab.json with merges.txt as ranks.

A vocabulary with merges equals ranks (where the pair whose concatenation has the lowest rank is merged first) only if
all 256 bytes are in it, the merges' ids ascend in order, and every token splits, by the ranks below its own, into the
very pair that its merge names. Then the two agree on every text: inside a token no merge crosses its border, so what
happens there does not depend on what surrounds it.
"""

import base64
import binascii
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_SIZE = 50256  # ranks of GPT-2's vocabulary, without <|endoftext|>
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in a ``.tiktoken`` file: a token in base64 and its rank on each line.

    Raises:
        ValueError: a line is of another form, a byte is missing, or the ranks are not 0, 1, 2 ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            text = line[:40].decode("utf-8", "replace")
            raise ValueError(f"{path}, line {number}: expected a token in base64 and its rank, got {text!r}") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the 256 single bytes, the first 0x{missing[0]:02x}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")
    return ranks


@functools.lru_cache(maxsize=1)
def gpt2_ranks() -> Mapping[bytes, int]:
    """GPT-2's ranks, which the package ships."""
    return read_ranks(Path(__file__).with_name("gpt2.tiktoken"))


@functools.lru_cache(maxsize=2)
def gpt2_encoding(end_of_text: bool) -> tiktoken.Encoding:
    """GPT-2's encoding, with or without ``<|endoftext|>`` (50256)."""
    return make_encoding("gpt2", gpt2_ranks(), {END_OF_TEXT: GPT2_SIZE} if end_of_text else {})


def make_encoding(name: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> tiktoken.Encoding:
    """An encoding that splits text as GPT-2 does. ``ranks`` must hold all 256 bytes: tiktoken panics without them."""
    assert all(bytes([byte]) in ranks for byte in range(256))
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=dict(ranks), special_tokens=dict(special))


@functools.lru_cache(maxsize=1)
def bytes_of_characters() -> Mapping[str, int]:
    """GPT-2's printable stand-ins: character -> byte. Printable bytes are themselves, the others U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def to_bytes(token: str) -> bytes | None:
    """The bytes that a token of a byte-level vocab.json stands for; None if it holds any other character."""
    table = bytes_of_characters()
    values = [table.get(character) for character in token]
    return None if None in values else bytes(value for value in values if value is not None)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs in a merges.txt, in order.

    Raises:
        ValueError: a line does not hold two tokens.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{path}, line {number}: expected two tokens, got {line[:60]!r}")
        pairs.append((left, right))
    return pairs


def ranks_of_merges(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> tuple[dict[bytes, int], str]:
    """The ranks that say what ``vocab`` and ``merges`` say; or no ranks and the reason why there are none.

    Tokens of ``vocab`` that are neither bytes nor merges are left out: they are special tokens.
    """
    ranks: dict[bytes, int] = {}
    for character, byte in bytes_of_characters().items():
        if character not in vocab:
            return {}, f"the byte 0x{byte:02x} is not in the vocabulary"
        ranks[bytes([byte])] = vocab[character]
    splits: dict[bytes, tuple[bytes, bytes]] = {}
    last = -1
    for left, right in merges:
        a, b, token_id = to_bytes(left), to_bytes(right), vocab.get(left + right)
        if a is None or b is None or token_id is None or left not in vocab or right not in vocab:
            return {}, f"the merge {left!r} {right!r} is not in the vocabulary"
        if token_id <= last:
            return {}, f"the ids of the merges do not ascend at {left + right!r}"
        ranks[a + b] = last = token_id
        splits[a + b] = (a, b)
    if ranks != gpt2_ranks():  # which are known to be right
        for token, pair in splits.items():
            if _last_split(token, ranks) != pair:
                return {}, f"ranks would not merge {token!r} from {pair[0]!r} and {pair[1]!r}"
    return ranks, ""


def _last_split(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """What is left of ``token`` when merging stops short of ``token`` itself."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(found)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)
