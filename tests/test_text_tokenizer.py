"""Tokenizers: GPT-2's, a folder's own in every form against tokenizers, those of other makers, what is refused."""

import base64
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch

from engine.text.byte_pairs import (
    END_OF_TEXT,
    bytes_of_characters,
    gpt2_ranks,
    make_encoding,
    ranks_of_merges,
    read_merges,
)
from engine.text.foreign import as_ids
from engine.text.load import load_tokenizer
from engine.text.tokenizer import TextCodec, TiktokenCodec

TEXTS = [
    "hello world",
    "",
    "  Spaces,\n\nlines\tand 12345 numbers!  ",
    "Ünïcödé — 日本語 🙂🙃 'tis they'll",
    "x" * 300,
    END_OF_TEXT,
    "\x00\x7f\u2028\ud7ff",
]


def given(vocab_size: int, **kwargs: Any) -> TextCodec:
    codec = load_tokenizer(kwargs.pop("folder", None), vocab_size, **kwargs)
    assert codec is not None
    assert isinstance(codec, TextCodec)
    return codec


@pytest.mark.parametrize("vocab_size", [50256, 50257, 50304, 51200])
def test_gpt2_by_the_size_of_the_vocabulary(vocab_size: int) -> None:
    codec = given(vocab_size)
    assert codec.encode("hello world") == [31373, 995]
    for text in TEXTS:
        assert codec.decode(codec.encode(text)) == text
    assert codec.eos_token_id == (None if vocab_size == 50256 else 50256)
    assert ("padded from 50257 to" in codec.name) == (vocab_size > 50257)
    assert codec.is_special(50256) == (vocab_size > 50256)
    assert not codec.is_special(995)
    assert codec.vocab_size == vocab_size


@pytest.mark.parametrize("vocab_size", [97, 50255, 51201, 100000])
def test_no_tokenizer_for_other_sizes(vocab_size: int, tmp_path: Path) -> None:
    assert load_tokenizer(None, vocab_size) is None
    assert load_tokenizer(tmp_path, vocab_size) is None


def test_ids_that_stand_for_nothing() -> None:
    codec = given(50304)
    ids = [31373, 50303, 10**9, -1, 50256, 995]
    assert codec.decode(ids) == f"hello\ufffd\ufffd\ufffd{END_OF_TEXT} world"
    assert codec.decode(ids, skip_special_tokens=True) == "hello\ufffd\ufffd\ufffd world"
    assert codec.decode_bytes([50256, 50257]) == END_OF_TEXT.encode() + "\ufffd".encode()
    assert given(50256).decode([50256]) == "\ufffd"


def test_special_tokens_are_text_unless_allowed() -> None:
    codec = given(50257)
    assert codec.encode(f"a{END_OF_TEXT}b") == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
    assert codec.encode(f"a{END_OF_TEXT}b", allowed_special=[END_OF_TEXT]) == [64, 50256, 65]
    with pytest.raises(ValueError, match=r"allowed_special names '<pad>'; this tokenizer has: <\|endoftext\|>"):
        codec.encode("a", allowed_special={"<pad>"})
    with pytest.raises(ValueError, match="must be a collection of names, got the str 'all'"):
        codec.encode("a", allowed_special="all")
    with pytest.raises(ValueError, match="this tokenizer has: none"):
        given(50256).encode("a", allowed_special=[END_OF_TEXT])


@pytest.mark.parametrize("text", [None, b"x", 3, ["x"]])
def test_text_must_be_str(text: Any) -> None:
    with pytest.raises(TypeError, match=f"text must be a str, got a {type(text).__name__}"):
        given(50257).encode(text)


def test_lone_surrogates_do_not_raise() -> None:
    assert given(50257).decode(given(50257).encode("a\ud800b")) == "a\ufffdb"


# A folder's own


def train(size: int) -> tuple[dict[str, int], list[tuple[str, str]], Any]:
    """A small byte-level vocabulary trained by tokenizers: vocab, merges, and the tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    sentence = "the cat sat on the mat and then the other cat ate the rat that sat there banana bandana"
    words = sentence.split()
    source = random.Random(0)
    tokenizer.train_from_iterator([" ".join(source.choices(words, k=40)) for _ in range(50)], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [(left, right) for left, right in state["merges"]], tokenizer


def save_merges(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


SAMPLES = [*TEXTS, "the cat's banana bandana ththe catt", "thethe thereat a  b\n\n c"]


def test_vocab_and_merges_by_tiktoken(tmp_path: Path) -> None:
    vocab, merges, tokenizer = train(290)
    save_merges(tmp_path, vocab, merges)
    codec = given(290, folder=tmp_path)
    assert isinstance(codec, TiktokenCodec)
    assert codec.eos_token_id == vocab[END_OF_TEXT] == 0
    tokenizer.encode_special_tokens = True
    for text in SAMPLES:
        ids = codec.encode(text)
        assert ids == tokenizer.encode(text).ids
        assert codec.decode(ids) == text
    assert codec.encode(END_OF_TEXT, [END_OF_TEXT]) == [0]
    with pytest.raises(ValueError, match=r"vocab\.json has ids up to 289, the model's vocabulary is 289"):
        load_tokenizer(tmp_path, 289)


def test_added_tokens_are_special(tmp_path: Path) -> None:
    vocab, merges, _ = train(290)
    save_merges(tmp_path, vocab, merges)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 320}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"321": {"content": "<sep>"}}}')
    codec = given(322, folder=tmp_path, eos_token_id=321)
    assert codec.encode("<pad><sep>", ["<pad>", "<sep>"]) == [320, 321]
    assert codec.decode([320, 321]) == "<pad><sep>"
    assert codec.is_special(320)
    assert codec.eos_token_id == 321


def shuffle_ids(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    a, b = ("".join(merges[i]) for i in (3, 20))
    vocab[a], vocab[b] = vocab[b], vocab[a]


def drop_byte(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    vocab["<gone>"] = vocab.pop("ð")


def other_split(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """A merge of parts that are never side by side: x and y are merged before y and z."""
    merges += [("x", "y"), ("y", "z"), ("x", "yz")]
    vocab |= {"xy": len(vocab), "yz": len(vocab) + 1, "xyz": len(vocab) + 2}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shuffle_ids, "the ids of the merges do not ascend"),
        (drop_byte, "the byte 0xf0 is not in the vocabulary"),
        (other_split, "ranks would not merge b'xyz' from b'x' and b'yz'"),
    ],
)
def test_merges_that_are_not_ranks_go_to_tokenizers(change: Callable[..., None], reason: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab, merges, _ = train(290)
    change(vocab, merges)
    save_merges(tmp_path, vocab, merges)
    codec = given(400, folder=tmp_path)
    assert f"by tokenizers ({reason}" in codec.name
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    for text in ("the cat's banana bandana ththe catt", "thethe xyz a  b\n\n c", END_OF_TEXT):
        ids = codec.encode(text)
        assert ids == theirs.encode(text).ids
        assert codec.decode(ids) == text
    assert codec.encode(f"a{END_OF_TEXT}", [END_OF_TEXT])[-1] == 0
    assert codec.decode([0, 399, 10**9]) == f"{END_OF_TEXT}\ufffd\ufffd"
    assert codec.decode_bytes([vocab["the"]]) == b"the"


def test_the_hand_made_list_that_fooled_a_bare_conversion() -> None:
    """Merges out of order: by ranks the text becomes one token, by merges two."""
    characters = list(bytes_of_characters())
    vocab = {character: i for i, character in enumerate(characters)} | {"bc": 300, "ab": 301, "abc": 302}
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    assert ranks_of_merges(vocab, merges) == ({}, "the ids of the merges do not ascend at 'bc'")
    vocab |= {"ab": 300, "bc": 301}
    ranks, reason = ranks_of_merges(vocab, merges)
    assert (ranks, reason) == ({}, "ranks would not merge b'abc' from b'a' and b'bc'")


def test_the_first_of_gpt2s_merges(tmp_path: Path) -> None:
    """vocab.json and merges.txt for the beginning of GPT-2's ranks: read as ranks, and equal to tokenizers."""
    tokenizers = pytest.importorskip("tokenizers")
    ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < 3000}
    stand_in = {byte: character for character, byte in bytes_of_characters().items()}
    spelled = {token: "".join(stand_in[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    assert ranks_of_merges(vocab, merges) == (ranks, "")
    save_merges(tmp_path, vocab, merges)
    codec = given(3000, folder=tmp_path)
    assert isinstance(codec, TiktokenCodec)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*SAMPLES, (Path(__file__).read_text(encoding="utf-8"))]:
        assert codec.encode(text) == theirs.encode(text).ids


def test_prefix_space_is_kept(tmp_path: Path) -> None:
    vocab, merges, _ = train(290)
    save_merges(tmp_path, vocab, merges)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    codec = given(290, folder=tmp_path)
    assert "a space is put before" in codec.name
    assert codec.decode(codec.encode("the")) == " the"


def test_tokenizer_json(tmp_path: Path) -> None:
    vocab, _, tokenizer = train(290)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = given(330, folder=tmp_path)
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    for text in SAMPLES:
        assert codec.encode(text) == tokenizer.encode(text).ids
        assert codec.decode(codec.encode(text)) == text
    assert codec.eos_token_id == vocab[END_OF_TEXT]
    assert codec.decode([vocab["the"], 0, 325], skip_special_tokens=True) == "the\ufffd"
    assert codec.encode("a\ud800")[-1:] == codec.encode("\ufffd")[-1:]
    again = given(330, tokenizer=tmp_path / "tokenizer.json")
    assert again.encode("the cat") == codec.encode("the cat")
    with pytest.raises(ValueError, match=r"tokenizer\.json has ids up to 289, the model's vocabulary is 280"):
        load_tokenizer(tmp_path, 280)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, 330)


def test_a_tokenizer_of_words(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    codec = given(5, tokenizer=tokenizer, eos_token_id=1)
    assert codec.encode("a b a z") == [0, 1, 0, 2]
    assert codec.decode([0, 4, 1, 0]) == "a\ufffdb a"
    assert codec.decode([0, 1], skip_special_tokens=True) == "a"
    assert codec.decode_bytes([0]) is None


def test_the_library_may_be_absent(tmp_path: Path, monkeypatch: Any) -> None:
    train(290)[2].save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json needs the package tokenizers: pip install tokenizers, or"):
        load_tokenizer(tmp_path, 290)


def write_ranks(path: Path, tokens: list[bytes]) -> None:
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


BYTES = [bytes([byte]) for byte in range(256)]


def test_tiktoken_ranks_of_a_folder(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tokenizer.tiktoken", [*BYTES, b"he", b"ll", b"hell"])
    codec = given(300, folder=tmp_path, eos_token_id=299)
    assert codec.encode("hello") == [258, ord("o")]
    assert codec.encode(END_OF_TEXT, [END_OF_TEXT]) == [299]
    assert codec.decode([258, 270, 299]) == f"hell\ufffd{END_OF_TEXT}"
    assert codec.eos_token_id == 299
    assert given(300, tokenizer=str(tmp_path / "tokenizer.tiktoken")).encode("he") == [256]
    assert given(300, tokenizer=tmp_path).encode("he") == [256]
    with pytest.raises(ValueError, match="has ids up to 258, the model's vocabulary is 258"):
        load_tokenizer(tmp_path, 258)
    write_ranks(tmp_path / "other.tiktoken", BYTES)
    with pytest.raises(ValueError, match=r"several vocabularies \(other\.tiktoken, tokenizer\.tiktoken\)"):
        load_tokenizer(tmp_path, 300)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nnot a line at all\n", "line 2: expected a token in base64 and its rank, got 'not a line at all'"),
        (b"YQ== 0\n", "lacks 255 of the 256 single bytes, the first 0x00"),
        (
            b"".join(base64.b64encode(b) + b" %d\n" % (i * 2) for i, b in enumerate(BYTES)),
            "ranks of its 256 tokens are",
        ),
    ],
)
def test_broken_ranks(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, 300)


def test_folders_with_half_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds vocab\.json but no merges\.txt; add it, or pass tokenizer="):
        load_tokenizer(tmp_path, 97)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="must map tokens to ids"):
        load_tokenizer(tmp_path, 97)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="line 1: expected two tokens, got 'a b c'"):
        read_merges(tmp_path / "merges.txt")
    save_merges(tmp_path, {"a</w>": 0, "日": 1}, [])
    with pytest.raises(ValueError, match="is not a byte-level vocabulary"):
        load_tokenizer(tmp_path, 97)


# Those of other makers


class Letters:
    """A tokenizer as people write one."""

    eos_token_id = 27

    def encode(self, text: str) -> Any:
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def test_any_object_with_encode_and_decode() -> None:
    codec = given(30, tokenizer=Letters())
    assert codec.encode("abc") == [0, 1, 2]
    assert codec.decode([0, 29, 99, 1]) == "a\ufffd\ufffdb"
    assert codec.decode([]) == ""
    assert codec.eos_token_id == 27
    assert codec.decode([0, 27], skip_special_tokens=True) == "a"
    assert codec.name.endswith("Letters")
    assert codec.decode_bytes([0]) is None
    with pytest.raises(ValueError, match=r"Letters\) gave the id -32, the model's vocabulary is 30"):
        codec.encode("A")
    with pytest.raises(TypeError, match="text must be a str, got a bytes"):
        codec.encode(b"abc")
    with pytest.raises(ValueError, match="this tokenizer has: none"):
        codec.encode("abc", allowed_special=["a"])
    assert load_tokenizer(None, 30, tokenizer=codec) is codec


class WithIds:
    ids = (1, 2)


class WithInputIds(dict):
    def __init__(self) -> None:
        super().__init__(input_ids=[[1, 2]])


@pytest.mark.parametrize(
    "result",
    [[1, 2], (1, 2), torch.tensor([[1, 2]]), np.array([1, 2]), WithIds(), WithInputIds(), [np.int64(1), 2], [[1, 2]]],
)
def test_forms_of_ids(result: Any) -> None:
    assert as_ids(result) == [1, 2]
    assert all(type(i) is int for i in as_ids(result))


@pytest.mark.parametrize("result", ["ab", None, [1.5], ["a"], {"x": 1}])
def test_what_holds_no_ids(result: Any) -> None:
    with pytest.raises(ValueError, match=f"returned a {type(result).__name__} that holds no token ids"):
        as_ids(result)


def test_a_tiktoken_encoding() -> None:
    encoding = make_encoding("mine", gpt2_ranks(), {END_OF_TEXT: 50256, "<far>": 60000})
    codec = given(50304, tokenizer=encoding)
    assert codec.eos_token_id == 50256
    assert codec.encode(f"hello world{END_OF_TEXT}")[:2] == [31373, 995]
    assert codec.decode([50256, 50300]) == f"{END_OF_TEXT}\ufffd"
    with pytest.raises(ValueError, match=r"names '<far>'; this tokenizer has: <\|endoftext\|>"):
        codec.encode("", ["<far>"])
    small = given(300, tokenizer=encoding)
    with pytest.raises(ValueError, match=r"tiktoken mine\) gave the id 31373, the model's vocabulary is 300"):
        small.encode("hello")


def test_transformers_tokenizers() -> None:
    transformers = pytest.importorskip("transformers")
    vocab, _, tokenizer = train(290)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    codec = given(290, tokenizer=fast)
    assert codec.encode("the cat") == fast("the cat")["input_ids"]
    assert len(codec.encode(END_OF_TEXT)) > 1
    assert codec.eos_token_id == vocab[END_OF_TEXT]
    assert fast(END_OF_TEXT)["input_ids"] == [0]  # the user's object is as it was


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        (3, 97, "tokenizer must be a path, 'gpt2', or an object with encode and decode; got a builtins.int"),
        ("gpt2", 97, r"GPT-2's vocabulary has 50257 tokens \(50256 without <\|endoftext\|>\), the model's 97: pass"),
        ("nowhere", 97, "tokenizer 'nowhere' does not exist; pass a folder, a .tiktoken file"),
    ],
)
def test_tokenizers_that_are_none(tokenizer: Any, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(None, vocab_size, tokenizer=tokenizer)


def test_paths_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(None, 97, tokenizer=tmp_path)
    (tmp_path / "x.model").write_bytes(b"")
    with pytest.raises(ValueError, match="is not of a known form"):
        load_tokenizer(None, 97, tokenizer=tmp_path / "x.model")
    assert given(60000, tokenizer="gpt2").encode("hello world") == [31373, 995]


def test_a_decode_that_returns_no_text() -> None:
    class Bad(Letters):
        def decode(self, ids: list[int]) -> Any:
            return ids

    with pytest.raises(TypeError, match="the tokenizer's decode returned a list, expected a str"):
        given(30, tokenizer=Bad()).decode([1])


def test_shipped_vocabulary_has_its_licence() -> None:
    import engine.text

    notice = (Path(engine.text.__file__).parent / "gpt2.LICENSE").read_text()
    assert "MIT License" in notice
    assert "OpenAI" in notice
    assert len(gpt2_ranks()) == 50256
    assert isinstance(make_encoding("x", gpt2_ranks(), {}), tiktoken.Encoding)
