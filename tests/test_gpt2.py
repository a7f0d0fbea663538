"""Our tokenizer with GPT-2's vocabulary gives the ids that tiktoken gives.

`tests/golden/gpt2.json` holds ids that tiktoken made, and the part of the
vocabulary that could take part in them, so the golden tests run everywhere.
The tests marked `gpt2` run once with that part and once more with the whole
vocabulary where TIKTOKEN_CACHE_DIR holds it.
"""

import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.tokenizer import BPETokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "gpt2.json"
BASE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FOLDER = os.environ.get("TIKTOKEN_CACHE_DIR")


def cached_file(name: str) -> Path | None:
    """Find a file of GPT-2's vocabulary in tiktoken's cache."""
    if not FOLDER:
        return None
    path = Path(FOLDER) / hashlib.sha1((BASE + name).encode()).hexdigest()
    return path if path.exists() else None


@cache
def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@cache
def part() -> tuple[tiktoken.Encoding, list[int]]:
    """Make an engine from the committed part; its ids -> GPT-2's ids."""
    vocab = golden()["vocab"]
    by_rank = sorted(vocab, key=vocab.get)
    engine = tiktoken.Encoding(
        "part of gpt2",
        pat_str=PATTERN,
        mergeable_ranks={bytes.fromhex(t): i for i, t in enumerate(by_rank)},
        special_tokens={"<|endoftext|>": len(by_rank)},
    )
    return engine, [vocab[t] for t in by_rank]


PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
WHOLE = all(map(cached_file, ("vocab.bpe", "encoder.json")))
ENGINES = ["part", pytest.param("gpt2", marks=pytest.mark.skipif(
    not WHOLE, reason="TIKTOKEN_CACHE_DIR does not hold GPT-2's vocabulary"))]


@cache
def pair(name: str) -> tuple[tiktoken.Encoding, BPETokenizer]:
    """Give the reference and our tokenizer made from it."""
    engine = part()[0] if name == "part" else tiktoken.get_encoding("gpt2")
    return engine, BPETokenizer.from_tiktoken(engine)


@cache
def disputed() -> frozenset[str]:
    """Find characters of which the two regex engines think differently.

    They know different versions of Unicode. Such characters must be younger
    than Python's own tables, or there is a real difference.
    """
    found = []
    for group in (r"\p{L}", r"\p{N}", r"\s"):
        ours = regex.compile(group)
        theirs = tiktoken.Encoding(
            "probe", pat_str=group, special_tokens={},
            mergeable_ranks={bytes([i]): i for i in range(256)},
        )  # fmt: skip
        for i in range(sys.maxunicode + 1):
            if 0xD800 <= i < 0xE000:
                continue
            c = chr(i)
            if bool(ours.match(c)) != bool(theirs.encode_ordinary(c)):
                found.append(c)
    old = [c for c in found if unicodedata.category(c) != "Cn"]
    assert not old, f"both should know {old[:5]}"
    return frozenset(found)


COMPARED = Counter()  # what the summary at the end of a run reports


def compare(name: str, texts: list[str]) -> None:
    engine, ours = pair(name)
    for text in texts:
        if not disputed().isdisjoint(text):
            text = "".join(c for c in text if c not in disputed())
        ids = ours.encode(text)
        assert ids == engine.encode_ordinary(text), ascii(text)
        assert ours.decode(ids) == text
        COMPARED[name, "texts"] += 1
        COMPARED[name, "ids"] += len(ids)


# Golden ids: the same numbers on every machine.


def test_golden_texts():
    back = part()[1]
    ours = pair("part")[1]
    cases = golden()["texts"]
    assert len(cases) > 600
    for raw, ids in cases:
        text = bytes.fromhex(raw).decode("utf-8")
        found = ours.encode(text)
        assert [back[i] for i in found] == ids, ascii(text)
        assert ours.decode(found) == text


def test_golden_texts_in_bulk():
    back = part()[1]
    ours = pair("part")[1]
    texts = [bytes.fromhex(raw).decode("utf-8")
             for raw, _ in golden()["texts"]]
    for found, (_, ids) in zip(ours.encode_batch(texts), golden()["texts"]):
        assert [back[i] for i in found.tolist()] == ids


def test_golden_bytes():
    back = part()[1]
    ours = pair("part")[1]
    for raw, ids in golden()["bytes"]:
        raw = bytes.fromhex(raw)
        found = ours.encode_bytes(raw)
        assert [back[i] for i in found] == ids, raw
        assert ours.decode_bytes(found) == raw


def test_golden_survives_save_and_load(tmp_path):
    ours = pair("part")[1]
    ours.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    for raw, _ in golden()["texts"]:
        text = bytes.fromhex(raw).decode("utf-8")
        assert again.encode(text) == ours.encode(text)


def test_golden_in_hugging_face(tmp_path):
    from tokenizers import Tokenizer

    ours = pair("part")[1]
    ours.to_huggingface(tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for raw, _ in golden()["texts"]:
        text = bytes.fromhex(raw).decode("utf-8")
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids, ascii(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text


# Side by side with tiktoken, on the part and on the whole vocabulary.


@pytest.mark.parametrize("name", ENGINES)
def test_every_character_of_unicode(name):
    """Every code point, in rows of 64 alone and in words, so every block."""
    rows = []
    for first in range(0, sys.maxunicode + 1, 64):
        row = [chr(c) for c in range(first, first + 64)
               if not 0xD800 <= c < 0xE000]
        if 0x40000 <= first < 0xE0000 and first % 4096:
            continue  # planes that hold nothing: one row in 64
        rows += ["".join(row), " ".join(row)]
    assert len(rows) > 6000
    compare(name, rows)


@pytest.mark.parametrize("name", ENGINES)
def test_long_runs_of_one_character(name):
    units = ["a", " ", "\n", "\t", "0", "=", "-", ".", "\u00e9", "\u6bcd",
             "\U0001f414", "\u00a0", "\u3000", "\u200d", "\u0301", "\r\n"]
    compare(name, [u * n for u in units for n in (1, 2, 3, 100, 3001)])
    compare(name, ["x" + u * 999 + "y" for u in units])


@pytest.mark.parametrize("name", ENGINES)
def test_all_white_space(name):
    spaces = [chr(c) for c in range(sys.maxunicode + 1)
              if chr(c).isspace()]
    assert len(spaces) > 20
    pairs = [a + b for a in spaces for b in spaces]
    compare(name, ["".join(spaces), *pairs])
    compare(name, [f"a{p}b" for p in pairs] + [f"{p}." for p in pairs])


@pytest.mark.parametrize("name", ENGINES)
def test_emoji_sequences(name):
    people = ["\U0001f468", "\U0001f469", "\U0001f9d1"]
    tones = [chr(c) for c in range(0x1F3FB, 0x1F400)]
    things = ["\u2764\ufe0f", "\U0001f680", "\U0001f33e", "\u2695\ufe0f"]
    flags = [chr(a) + chr(b) for a in range(0x1F1E6, 0x1F200)
             for b in range(0x1F1E6, 0x1F200)]
    joined = [f"{p}{t}\u200d{x}" for p in people for t in tones
              for x in things]
    keys = [f"{k}\ufe0f\u20e3" for k in "0123456789#*"]
    compare(name, joined + flags + keys + ["".join(joined), " ".join(flags)])


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=10_000, deadline=None, database=None,
          suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=60))
def test_ten_thousand_random_strings(name, text):
    compare(name, [text])


# Words, contractions, digits and space: what text() rarely puts together.
MIXED = st.lists(st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "'s", "'ll", "'S", "the", " the", "hen",
     "HEN", "7", "1234", "!", "...", "\u00e9", "\u2019", "\u6bcd", "<|",
     "endoftext", "|>", "\U0001f414", "\ufe0f", "\u200d", "\u0301", "=="]
), max_size=30).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=3_000, deadline=None, database=None)
@given(text=MIXED)
def test_random_mixtures(name, text):
    compare(name, [text])


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=2_000, deadline=None, database=None)
@given(raw=st.binary(max_size=40) | st.tuples(
    MIXED, st.binary(max_size=4), MIXED
).map(lambda t: t[0].encode() + t[1] + t[2].encode()))
def test_random_bytes(name, raw):
    engine, ours = pair(name)
    if not disputed().isdisjoint(raw.decode("utf-8", "ignore")):
        return
    ids = ours.encode_bytes(raw)
    assert ids == engine._encode_bytes(raw), raw
    assert ours.decode_bytes(ids) == raw
    COMPARED[name, "byte strings"] += 1
    COMPARED[name, "ids"] += len(ids)


@pytest.mark.parametrize("name", ENGINES)
def test_lone_surrogates(name):
    engine, ours = pair(name)
    for text in ("\ud800", "a\udfffb", "\ud83d\udc14", "\udc14\ud83d x"):
        assert ours.encode(text) == engine.encode_ordinary(text)


@pytest.mark.skipif(not WHOLE, reason="needs GPT-2's vocabulary")
def test_the_files_that_gpt2_was_published_as():
    engine, ours = pair("gpt2")
    files = [cached_file(n) for n in ("vocab.bpe", "encoder.json")]
    read = BPETokenizer.from_gpt2(*files)
    assert read.vocab == ours.vocab and read.merges == ours.merges
    assert read.special_tokens == engine._special_tokens
    assert read.vocab_size == engine.n_vocab == 50257
    text = "The hen's 12 eggs<|endoftext|>"
    for allowed in ((), "all"):
        assert read.encode(text, allowed_special=allowed) == engine.encode(
            text, allowed_special=set() if not allowed else "all",
            disallowed_special=())
    back = read.to_tiktoken()
    assert back._mergeable_ranks == engine._mergeable_ranks
