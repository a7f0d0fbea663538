"""Shards that survive damage and kill -9; batches that come back exactly."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import time
import tracemalloc
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import END, Bytes

from minillm import loading
from minillm.attention import MultiHeadAttention
from minillm.files import locked
from minillm.loading import (
    Manifest,
    Mixture,
    Shards,
    TokenLoader,
    check_ids,
    document_ends,
    document_mask,
    document_pieces,
    pack_best_fit,
    random_words,
    read_shard,
    seeded_order,
    shard_name,
    shared_documents,
    token_dtype,
    tokenize_to_shards,
    tokenizer_hash,
    write_shard,
    write_shards,
)
from minillm.pretrain import (
    IGNORE_INDEX,
    document_rows,
    gather_rows,
    get_batch,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
DOCS = [f"document {i}: " + "words " * (i % 7) for i in range(40)]


def stream(docs):
    """What the shards of documents must hold."""
    rows = [[*doc.encode(), END] for doc in docs if doc]
    return np.array(list(chain.from_iterable(rows)))


def contents(folder):
    """Every file of a directory but the lock."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name != ".lock" and not p.name.endswith(".tmp")
    }


def same(a, b):
    return all(
        torch.equal(getattr(a, f), getattr(b, f))
        for f in ("tokens", "targets", "positions", "documents")
    )


@pytest.fixture
def folder(tmp_path):
    """A finished directory of shards of DOCS."""
    tokenize_to_shards(DOCS, Bytes(), tmp_path / "s", shard_tokens=100)
    return tmp_path / "s"


# --- one shard ------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [2, 2**16, 2**16 + 1, 200_000])
def test_a_shard_is_what_llm_c_reads(tmp_path, vocab_size):
    ids = np.random.default_rng(0).integers(0, vocab_size, 777)
    ids[0] = vocab_size - 1
    write_shard(tmp_path / "x.bin", ids, vocab_size)
    raw = (tmp_path / "x.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    wide = vocab_size > 2**16
    expected = (20240801, 7, 777) if wide else (20240520, 1, 777)
    assert tuple(header[:3]) == expected and not header[3:].any()
    body = np.frombuffer(raw[1024:], "<u4" if wide else "<u2")
    np.testing.assert_array_equal(body, ids)
    back = read_shard(tmp_path / "x.bin")
    np.testing.assert_array_equal(back, ids)
    assert back.dtype == token_dtype(vocab_size)
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1


def test_ids_that_do_not_fit_are_refused_not_wrapped(tmp_path):
    with pytest.raises(ValueError, match="id 70000 at place 1 is not in"):
        write_shard(tmp_path / "x.bin", [5, 70_000], 65_536)
    assert not (tmp_path / "x.bin").exists()
    for ids in ([-1], [1.5], [[1, 2]], ["a"], np.array([True])):
        with pytest.raises(ValueError):
            check_ids(ids, 10)
    with pytest.raises(ValueError, match="0 tokens"):
        write_shard(tmp_path / "x.bin", [], 10)
    for size in (0, -3, 2**32 + 1):
        with pytest.raises(ValueError, match="vocab_size"):
            token_dtype(size)


def test_an_existing_shard_is_not_overwritten(tmp_path):
    write_shard(tmp_path / "x.bin", [1], 10)
    with pytest.raises(FileExistsError, match="delete"):
        write_shard(tmp_path / "x.bin", [2], 10)
    assert read_shard(tmp_path / "x.bin")[0] == 1


def damage(path, what):
    """Damage one shard as disks, downloads and people do."""
    raw = bytearray(path.read_bytes())
    if what == "truncated":
        raw = raw[:-1]
    elif what == "header only":
        raw = raw[:700]
    elif what == "empty":
        raw = raw[:0]
    elif what == "longer":
        raw += b"\0\0"
    elif what == "foreign":
        raw[:4] = b"PK\3\4"
    elif what == "version":
        raw[4] = 9
    elif what == "wrong type":
        raw[:8] = np.array([20240801, 7], "<i4").tobytes()
    elif what == "swapped":
        raw = bytearray(
            np.frombuffer(bytes(raw[:1024]), "<i4").astype(">i4").tobytes()
            + np.frombuffer(bytes(raw[1024:]), "<u2").astype(">u2").tobytes()
        )
    elif what == "no tokens":
        raw[8:12] = b"\0\0\0\0"
        raw = raw[:1024]
    elif what == "negative":
        raw[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)


DAMAGES = {
    "truncated": "need", "header only": "shorter", "empty": "shorter",
    "longer": "need", "foreign": "no token file", "version": "no token file",
    "wrong type": "need", "swapped": "big-endian", "no tokens": "need",
    "negative": "need",
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_to_a_shard_is_named(folder, what):
    path = folder / shard_name(1)
    damage(path, what)
    for read in (lambda: read_shard(path), lambda: Shards(folder)):
        with pytest.raises(ValueError, match=DAMAGES[what]) as error:
            read()
        assert "\n" not in str(error.value)
        assert "again" in str(error.value)


def test_missing_extra_and_exchanged_shards_are_named(folder):
    name = folder / shard_name(1)
    shutil.copy(name, folder / "copy.bin")
    with pytest.raises(ValueError, match="copy.bin.* not in its manifest"):
        Shards(folder)
    (folder / "copy.bin").unlink()
    last = sorted(folder.glob("*.bin"))[-1]
    kept = name.read_bytes()
    shutil.copy(last, name)  # a good file, but another one
    with pytest.raises(ValueError, match="manifest says 100"):
        Shards(folder)
    name.write_bytes(kept)
    Shards(folder).verify()
    name.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Shards(folder)
    with pytest.raises(FileNotFoundError, match="manifest"):
        Shards(folder.parent)


def test_verify_finds_one_flipped_bit(folder):
    path = folder / shard_name(2)
    raw = bytearray(path.read_bytes())
    raw[1100] ^= 1
    path.write_bytes(raw)
    shards = Shards(folder)  # sizes are right
    with pytest.raises(ValueError, match="shard-00002.bin.*sha256"):
        shards.verify()


def test_verify_counts_the_documents(folder):
    path = folder / "manifest.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(good | {"documents": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="hold 40 documents.* says 3"):
        Shards(folder).verify()


def test_ids_outside_the_vocabulary_are_refused_on_reading(folder):
    path = folder / shard_name(0)
    raw = bytearray(path.read_bytes())
    raw[1024:1026] = b"\xff\xff"
    path.write_bytes(raw)
    shards = Shards(folder)
    for read in (
        lambda: shards[0], lambda: shards[0:5], lambda: shards[[1, 0]]
    ):  # fmt: skip
        with pytest.raises(ValueError, match="65535, outside"):
            read()
    assert len(shards[1:5]) == 4
    with pytest.raises(ValueError, match="65535|sha256"):
        shards.verify()


def test_a_damaged_manifest_is_named(folder):
    path = folder / "manifest.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    bad = [
        {"format": "other"}, {"version": 2}, {"dtype": "uint32"},
        {"tokens": 1}, {"shards": [{"name": "x"}]}, {"vocab_size": "a"},
    ]  # fmt: skip
    for change in bad:
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(ValueError, match="not a manifest"):
            Shards(folder)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="not a manifest"):
        Shards(folder)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        Shards(folder)


# --- many shards as one row -----------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_shards_index_like_an_array(tmp_path_factory, data):
    n = data.draw(st.integers(1, 60))
    size = data.draw(st.integers(1, 25))
    ids = np.arange(n) * 7 % 101
    out = tmp_path_factory.mktemp("s") / "x"
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    m = write_shards(np.split(ids, cuts), out, vocab_size=101,
                     shard_tokens=size)  # fmt: skip
    shards = Shards(out)
    shards.verify()
    assert [s.tokens for s in m.shards[:-1]] == [size] * (len(m.shards) - 1)
    assert len(shards) == n == m.tokens
    np.testing.assert_array_equal(np.asarray(shards), ids)
    index = st.one_of(st.none(), st.integers(-n - 3, n + 3))
    cut = slice(data.draw(index), data.draw(index))
    np.testing.assert_array_equal(shards[cut], ids[cut])
    i = data.draw(st.integers(-n, n - 1))
    assert shards[i] == ids[i] and type(shards[i]) is int
    many = np.array(
        data.draw(st.lists(st.integers(-n, n - 1), min_size=4, max_size=4))
    ).reshape(2, 2)
    np.testing.assert_array_equal(shards[many], ids[many])
    with pytest.raises(IndexError):
        shards[n]
    with pytest.raises(ValueError, match="steps of 1"):
        shards[::2]
    with pytest.raises(TypeError, match="integers"):
        shards[1.5]


def test_a_slice_of_one_shard_is_a_view_and_pickles_reopen(folder):
    shards = Shards(folder)
    assert np.shares_memory(shards[10:20], shards.arrays[0])
    data = pickle.dumps(shards)
    assert len(data) < 1000  # a path, no tokens
    np.testing.assert_array_equal(pickle.loads(data)[:], shards[:])


def test_write_shards_refuses(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        write_shards([], tmp_path / "a", vocab_size=5)
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        write_shards([[1]], tmp_path / "b", vocab_size=5, shard_tokens=0)
    with pytest.raises(ValueError, match="id 5"):
        write_shards([[1], [5]], tmp_path / "c", vocab_size=5)
    write_shards([[1]], tmp_path / "d", vocab_size=5)
    with pytest.raises(FileExistsError, match="another directory"):
        write_shards([[1]], tmp_path / "d", vocab_size=5)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.bin").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="another directory"):
        write_shards([[1]], tmp_path / "e", vocab_size=5)
    assert (tmp_path / "e" / "mine.bin").read_bytes() == b"x"


# --- tokenizing -----------------------------------------------------------


def test_shards_hold_the_documents_and_count_them(folder):
    shards, m = Shards(folder), Manifest.load(folder)
    np.testing.assert_array_equal(shards[:], stream(DOCS))
    assert m.complete and m.documents == len(DOCS) and m.empty == 0
    assert m.bytes == sum(len(doc.encode()) for doc in DOCS)
    assert m.tokens == m.bytes + m.documents == len(shards)
    assert (m.vocab_size, m.end_of_text) == (257, END)
    shards.verify()


@settings(max_examples=40)
@given(
    docs=st.lists(st.text(max_size=40), max_size=12).filter(any),
    size=st.integers(4, 50),
)
def test_any_documents_come_back(tmp_path_factory, docs, size):
    docs = [d.encode("utf-8", "replace").decode() for d in docs]
    out = tmp_path_factory.mktemp("s") / "x"
    m = tokenize_to_shards(docs, Bytes(), out, shard_tokens=size)
    np.testing.assert_array_equal(Shards(out)[:], stream(docs))
    assert m.empty == docs.count("") and m.documents == len(docs) - m.empty
    again = tokenize_to_shards(docs, Bytes(), out, shard_tokens=size)
    assert again == m


def test_an_enormous_document_runs_over_shards(tmp_path):
    docs = ["a" * 1234, "", "b"]
    m = tokenize_to_shards(docs, Bytes(), tmp_path, shard_tokens=100)
    assert len(m.shards) == 13 and (m.documents, m.empty) == (2, 1)
    np.testing.assert_array_equal(Shards(tmp_path)[:], stream(docs))


def test_memory_is_bounded_however_long_the_corpus(tmp_path):
    def docs(n):
        return (f"{i} " * 200 for i in range(n))

    peaks = []
    for n in (300, 3000):  # 0.2 and 2 million bytes
        out = tmp_path / str(n)
        tracemalloc.start()
        tokenize_to_shards(docs(n), Bytes(), out, shard_tokens=20_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] < 10_000_000


class Stop(Exception):
    pass


def failing(docs, after):
    yield from docs[:after]
    raise Stop


@pytest.mark.parametrize("size", [5, 17, 100, 10_000])
def test_resume_ends_in_the_same_bytes(tmp_path, monkeypatch, size):
    monkeypatch.setattr(loading, "_text_batches",
                        lambda texts, n: ([t] for t in texts))  # fmt: skip
    docs = [*DOCS[:6], "", "x" * 250, "", *DOCS[6:12]]
    tokenize_to_shards(docs, Bytes(), tmp_path / "whole", shard_tokens=size)
    expected = contents(tmp_path / "whole")
    for after in range(len(docs) + 1):
        with pytest.raises(Stop):
            stopped = failing(docs, after)
            out = tmp_path / "cut"
            tokenize_to_shards(stopped, Bytes(), out, shard_tokens=size)
        part = Shards(tmp_path / "cut", partial=True)
        part.verify()
        np.testing.assert_array_equal(part[:], stream(docs)[: len(part)])
        with pytest.raises(ValueError, match="not finished"):
            Shards(tmp_path / "cut")
    tokenize_to_shards(docs, Bytes(), tmp_path / "cut", shard_tokens=size)
    assert contents(tmp_path / "cut") == expected
    Shards(tmp_path / "cut").verify()


class OtherBytes(Bytes):
    pass


def test_resume_with_something_else_is_refused(tmp_path):
    out = tmp_path / "s"
    with pytest.raises(Stop):
        tokenize_to_shards(failing(DOCS, 40), Bytes(), out, shard_tokens=9)
    # one batch is encoded at once, so nothing is in yet; feed it for real
    tokenize_to_shards(DOCS, Bytes(), tmp_path / "t", shard_tokens=100)
    for out in (tmp_path / "s", tmp_path / "t"):
        size = Manifest.load(out).shard_tokens
        with pytest.raises(ValueError, match="tokenizer="):
            tokenize_to_shards(DOCS, OtherBytes(), out, shard_tokens=size)
        with pytest.raises(ValueError, match="shard_tokens="):
            tokenize_to_shards(DOCS, Bytes(), out, shard_tokens=size + 1)
        with pytest.raises(ValueError, match="split="):
            tokenize_to_shards(DOCS, Bytes(), out, shard_tokens=size,
                               split="val")  # fmt: skip
        with pytest.raises(FileExistsError):
            tokenize_to_shards(DOCS, Bytes(), out, shard_tokens=size,
                               resume=False)  # fmt: skip
    before = contents(tmp_path / "t")
    for docs in (DOCS[:-1], [*DOCS, "more"], [DOCS[0] + "!", *DOCS[1:]], []):
        with pytest.raises(ValueError, match="not the one"):
            tokenize_to_shards(docs, Bytes(), tmp_path / "t",
                               shard_tokens=100)  # fmt: skip
    assert contents(tmp_path / "t") == before


def test_a_changed_corpus_is_noticed_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_text_batches",
                        lambda texts, n: ([t] for t in texts))  # fmt: skip
    with pytest.raises(Stop):
        tokenize_to_shards(failing(DOCS, 20), Bytes(), tmp_path,
                           shard_tokens=100)  # fmt: skip
    changed = ["changed", *DOCS[1:]]
    with pytest.raises(ValueError, match="not the one"):
        tokenize_to_shards(changed, Bytes(), tmp_path, shard_tokens=100)
    moved = [DOCS[0] + DOCS[1], *DOCS[2:]]  # the same text, cut elsewhere
    with pytest.raises(ValueError, match="not the one"):
        tokenize_to_shards(moved, Bytes(), tmp_path, shard_tokens=100)


class Leaky(Bytes):
    """A tokenizer that takes the name of END_OF_TEXT for the token."""

    def encode(self, text):
        return [END if c == "|" else ord(c) for c in text]


class Wide(Bytes):
    """A tokenizer whose ids are not all in its vocabulary."""

    def encode(self, text):
        return [70_000]


@dataclass
class Doc:
    text: str
    name: str = ""


def test_bad_corpora_and_tokenizers(tmp_path):
    def call(docs, tokenizer=None):
        folder = tmp_path / str(random.random())
        return tokenize_to_shards(docs, tokenizer or Bytes(), folder)

    with pytest.raises(ValueError, match="one string"):
        call("text")
    with pytest.raises(ValueError, match="document 1 is of type int"):
        call(["a", 5])
    with pytest.raises(ValueError, match="no text"):
        call(["", ""])
    with pytest.raises(ValueError, match="END_OF_TEXT"):
        call(["a|b"], Leaky())
    with pytest.raises(ValueError, match="70000"):
        call(["a"], Wide())
    without = Bytes()
    without.end_of_text = None
    with pytest.raises(ValueError, match="no END_OF_TEXT"):
        call(["a"], without)
    assert call([Doc("ab"), Doc("c")]).tokens == 5
    assert call(["\ud800x"], Replacing()).bytes == 4


class Replacing(Bytes):
    def encode(self, text):
        return list(text.encode("utf-8", "replace"))


def test_workers_do_not_change_the_files(tmp_path, monkeypatch):
    docs = [f"{i} " * 300 for i in range(1200)]  # several batches each
    one = tokenize_to_shards(docs, Bytes(), tmp_path / "1",
                             shard_tokens=200_000)  # fmt: skip
    two = tokenize_to_shards(docs, Bytes(), tmp_path / "2",
                             shard_tokens=200_000, n_workers=2)  # fmt: skip
    assert one == two and contents(tmp_path / "1") == contents(tmp_path / "2")


def test_workers_from_the_command_line_end_with_their_parent(tmp_path):
    script = textwrap.dedent("""
        import multiprocessing, os, sys
        sys.path.insert(0, sys.argv[1])
        from stand_ins import Bytes
        from minillm.loading import tokenize_to_shards

        def docs():
            for i in range(10**9):
                if i == 3000:
                    pids = [p.pid for p in multiprocessing.active_children()]
                    print(*pids, flush=True)
                    sys.stdin.read()
                yield "word " * 200

        tokenize_to_shards(docs(), Bytes(), sys.argv[2], n_workers=2)
    """)
    tests = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", script, tests, str(tmp_path / "s")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(p) for p in process.stdout.readline().split()]
    assert pids
    process.kill()
    process.communicate()
    if os.name != "posix":
        return
    deadline = time.time() + 20
    while time.time() < deadline and any(map(_alive, pids)):
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid):
    """Tell whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


CHILD = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    from stand_ins import Bytes
    from minillm import loading
    assert "torch" not in sys.modules
    loading._text_batches = lambda texts, n: ([t] for t in texts)
    docs = [f"{i} " * (i % 50) for i in range(400)]
    print("ready", flush=True)
    loading.tokenize_to_shards(docs, Bytes(), sys.argv[2], shard_tokens=400)
""")


@posix
def test_kill_9_at_twenty_random_moments(tmp_path):
    docs = [f"{i} " * (i % 50) for i in range(400)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tests, rng = os.path.dirname(__file__), random.Random(0)
    command = [sys.executable, "-c", CHILD, tests]
    started = time.perf_counter()
    process = subprocess.Popen([*command, str(whole)], stdout=-1)
    process.stdout.readline()
    started = time.perf_counter()
    assert process.wait() == 0
    seconds = time.perf_counter() - started  # one run, from "ready" to end
    process.stdout.close()
    expected, n_killed, lengths = contents(whole), 0, set()
    for _ in range(80):
        if n_killed == 20:
            break
        process = subprocess.Popen([*command, str(cut)], stdout=-1)
        process.stdout.readline()
        time.sleep(rng.uniform(0, seconds / 4))
        process.kill()
        n_killed += process.wait() == -9
        process.stdout.close()
        if not (cut / "manifest.json").exists():
            assert not list(cut.glob("*.bin"))
            continue
        part = Shards(cut, partial=True)
        for info in part.manifest.shards:
            assert contents(cut)[info.name] == expected[info.name]
        np.testing.assert_array_equal(part[:], stream(docs)[: len(part)])
        lengths.add(len(part))
        if part.manifest.complete:
            shutil.rmtree(cut)
    assert n_killed == 20 and len(lengths) >= 3
    tokenize_to_shards_one_by_one(docs, cut)
    assert contents(cut) == expected and not list(cut.glob(".*.tmp"))
    Shards(cut).verify()


def tokenize_to_shards_one_by_one(docs, out):
    tokenize_to_shards(docs, Bytes(), out, shard_tokens=400)


@pytest.mark.parametrize("state", ["shard written", "half a shard"])
def test_what_a_crash_can_leave(tmp_path, state):
    """The two moments that matter, made by hand rather than by luck."""
    tokenize_to_shards(DOCS, Bytes(), tmp_path / "a", shard_tokens=100)
    expected = contents(tmp_path / "a")

    def broken(path, tokens, vocab_size):
        if path.name != shard_name(2):
            return write_shard(path, tokens, vocab_size)
        if state == "shard written":
            write_shard(path, tokens, vocab_size)
        else:
            stray = path.parent / f".{path.name}.abc.tmp"
            stray.write_bytes(b"half")
            (path.parent / ".manifest.json.abc.tmp").write_bytes(b"{")
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "write_shard", broken)
        with pytest.raises(Stop):
            tokenize_to_shards(DOCS, Bytes(), tmp_path / "b",
                               shard_tokens=100)  # fmt: skip
    part = Shards(tmp_path / "b", partial=True)
    assert len(part.manifest.shards) == 2 and len(part) == 200
    tokenize_to_shards(DOCS, Bytes(), tmp_path / "b", shard_tokens=100)
    assert contents(tmp_path / "b") == expected
    assert not list((tmp_path / "b").glob(".*.tmp"))


@posix
def test_a_full_disk_passes_on_and_leaves_a_consistent_directory(tmp_path):
    """The system refuses to let a file grow, as a full disk does."""
    script = textwrap.dedent("""
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        from stand_ins import Bytes
        from minillm.loading import tokenize_to_shards
        docs = ["x" * 99] * 60
        def limited():
            yield from docs
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            tokenize_to_shards(limited(), Bytes(), sys.argv[2],
                               shard_tokens=1000)
        except OSError as error:
            print("OSError", error.errno)
    """)
    out = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("OSError")
    assert len(Shards(out, partial=True)) == 0
    assert not list(out.glob("*.bin")) and not list(out.glob(".*.tmp"))
    docs = ["x" * 99] * 60
    tokenize_to_shards(docs, Bytes(), out, shard_tokens=1000)
    np.testing.assert_array_equal(Shards(out)[:], stream(docs))


def _hold(path, ready, stop):
    with locked(path):
        ready.set()
        stop.wait(30)


def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    holder = context.Process(
        target=_hold, args=(tmp_path / ".lock", ready, stop)
    )
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another process"):
            tokenize_to_shards(DOCS, Bytes(), tmp_path)
    finally:
        stop.set()
        holder.join()
    tokenize_to_shards(DOCS, Bytes(), tmp_path)


def test_progress_and_tokenizer_hash(tmp_path, capsys):
    from minillm.tokenizer import train_bpe

    tokenizer = train_bpe(DOCS, 300)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(train_bpe(DOCS, 300))
    assert tokenizer_hash(tokenizer) != tokenizer_hash(train_bpe(DOCS, 299))
    assert tokenizer_hash(Bytes()) != tokenizer_hash(OtherBytes())
    tokenize_to_shards(DOCS, tokenizer, tmp_path, progress=True)
    assert "tokenizing" in capsys.readouterr().err
    np.testing.assert_array_equal(
        Shards(tmp_path)[:], tokenizer.encode_documents(DOCS)
    )


# --- rows -----------------------------------------------------------------


TOKENS = stream(DOCS).astype(np.uint16)
PINNED = [5705853004827290377, 6584680345644299050, 680768428710196683]
PINNED_ORDER = [2, 5, 1, 3, 4, 0]


def epoch(loader, n_rows=None):
    """The first rows of a loader, as many as it has."""
    n = -(-(n_rows or loader.n_rows) // loader.batch_size)
    return list(islice(loader, n))


def counted(batches):
    """(tokens, targets) at all places that count, as two flat arrays."""
    x = torch.cat([b.tokens.flatten() for b in batches])
    y = torch.cat([b.targets.flatten() for b in batches])
    return x[y != IGNORE_INDEX], y[y != IGNORE_INDEX]


@settings(max_examples=60)
@given(
    n=st.integers(2, 60), T=st.integers(1, 20), end=st.booleans(),
    seed=st.integers(0, 2**64 - 1), shuffle=st.booleans(),
)  # fmt: skip
def test_sequential_has_every_token_as_a_target_once(n, T, end, seed, shuffle):
    tokens = np.arange(1, n + 1)
    loader = TokenLoader(tokens, 1, T, mode="sequential", seed=seed,
                         end_of_text=0 if end else None,
                         shuffle=shuffle)  # fmt: skip
    for _ in range(3):
        batches = list(islice(loader, loader.n_rows))
        x, y = counted(batches)
        assert sorted(y.tolist()) == list(range(1 if end else 2, n + 1))
        np.testing.assert_array_equal(y, x + 1)  # shifted by one, exactly
        assert loader.row == 0
    assert loader.epochs == 3


def test_random_windows_reach_both_ends_and_shift_by_one():
    loader = TokenLoader(np.arange(12), 50, 8, seed=3)
    x, y = counted(list(islice(loader, 20)))
    np.testing.assert_array_equal(y, x + 1)
    starts = {int(b.tokens[i, 0]) for b in islice(loader, 20)
              for i in range(50)}  # fmt: skip
    assert starts == {0, 1, 2, 3}  # the last start is N - T - 1
    assert int(y.max()) == 11  # and the last token is a target
    with pytest.raises(ValueError, match="needs 13"):
        TokenLoader(np.arange(12), 1, 12)
    TokenLoader(np.arange(13), 1, 12)


def test_random_starts_are_uniform():
    loader = TokenLoader(np.arange(1008), 1, 8, seed=5)
    starts = [row[0][0] for row in loader.take_rows(100_000)]
    counts = np.bincount(starts, minlength=1000)
    chi2 = ((counts - 100) ** 2 / 100).sum()
    assert len(counts) == 1000 and 850 < chi2 < 1150  # 3 sigma is +- 134


def test_random_numbers_are_pinned():
    """Philox is specified; a resume must not depend on numpy's version."""
    assert random_words(3, 1, 2).tolist() == PINNED
    assert seeded_order(6, 7, 0).tolist() == PINNED_ORDER
    orders = {tuple(seeded_order(3, 0, i)) for i in range(200)}
    assert len(orders) == 6
    assert list(seeded_order(9, 1, 0)) != list(seeded_order(9, 2, 0))


def test_the_same_windows_as_get_batch():
    loader = TokenLoader(TOKENS, 4, 16, seed=0)
    rows = TokenLoader(TOKENS, 4, 16, seed=0).take_rows(4)
    batch = next(loader)
    starts = torch.tensor([row[0][0] for row in rows])
    x, y = gather_rows(TOKENS, starts, torch.full((4,), 16))
    assert torch.equal(batch.tokens, x) and torch.equal(batch.targets, y)


def test_shards_serve_train_get_batch_too(folder):
    generator = torch.Generator().manual_seed(0)
    a = get_batch(Shards(folder), 4, 16, generator)
    b = get_batch(TOKENS, 4, 16, torch.Generator().manual_seed(0))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    starts, lengths = document_rows(Shards(folder), 16, END)
    ours = document_pieces(document_ends(Shards(folder), END), 16)
    np.testing.assert_array_equal(starts, ours[0])
    np.testing.assert_array_equal(lengths, ours[1])


@pytest.mark.parametrize("bucket", [0, 1, 4])
def test_rows_of_documents_are_those_of_the_evaluation(bucket):
    """Two epochs give the rows of minillm.pretrain twice, in any order."""
    loader = TokenLoader(TOKENS, 4, 32, mode="sequential", bucket=bucket,
                         align="documents", end_of_text=END)  # fmt: skip

    def rows(batches):
        out = []
        for x, y in batches:
            for a, b in zip(x.tolist(), y.tolist()):
                n = sum(t != IGNORE_INDEX for t in b)
                out.append((tuple(a[:n]), tuple(b[:n])))
        return sorted(out)

    n = 2 * loader.n_rows // 4
    assert 2 * loader.n_rows % 4 == 0
    new = [(b.tokens, b.targets) for b in islice(loader, n)]
    listed = document_rows(TOKENS, 32, END)
    all_rows = gather_rows(TOKENS, *listed, end_of_text=END)
    assert rows(new) == rows(2 * [all_rows])


def test_buckets_waste_little_and_hold_every_row_once():
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 9, n) for n in rng.integers(5, 90, 333)]
    tokens = np.concatenate([np.append(d, 9) for d in docs])

    def waste(**more):
        loader = TokenLoader(tokens, 8, 96, mode="sequential", end_of_text=9,
                             align="documents", **more)  # fmt: skip
        batches = list(islice(loader, 120))
        loader = TokenLoader(tokens, 8, 96, mode="sequential", end_of_text=9,
                             align="documents", **more)  # fmt: skip
        for _ in range(3):  # epochs that do not end with a batch
            starts = sorted(r[0][0] for r in loader.take_rows(loader.n_rows))
            assert starts == sorted(loader.pieces[0])
        pad = sum(int((b.targets == IGNORE_INDEX).sum()) for b in batches)
        return pad / sum(b.targets.numel() for b in batches)

    assert waste(bucket=16) < 0.15 < 0.4 < waste()


def test_shuffled_epochs_are_not_periodic_and_natural_order_is():
    def starts(shuffle):
        loader = TokenLoader(
            np.arange(2001), 1, 20, mode="sequential", shuffle=shuffle
        )
        rows = [row[0][0] for row in loader.take_rows(300)]
        return [rows[i : i + 100] for i in (0, 100, 200)]

    natural, mixed = starts(False), starts(True)
    assert natural == [list(range(0, 2000, 20))] * 3
    assert len(set(map(tuple, mixed))) == 3
    for order in mixed:
        assert sorted(order) == natural[0]
        assert abs(np.corrcoef(order, natural[0])[0, 1]) < 0.35
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(mixed[a], mixed[b])[0, 1]) < 0.35


def test_validation_documents_in_training_are_counted(folder):
    held_out = stream(["new text", DOCS[3], "another", DOCS[9] + "!"])
    assert shared_documents(TOKENS, held_out, END) == 1
    assert shared_documents(Shards(folder), held_out, END) == 1
    assert shared_documents(Shards(folder), TOKENS, END) == len(DOCS)
    # two documents are not the one that they would make joined
    joined = stream([DOCS[0] + DOCS[1]])
    assert shared_documents(TOKENS, joined, END) == 0


def test_seeds_that_float64_cannot_hold_apart_differ():
    big = 2**64 - 1
    a, b = (random_words(3, seed, 1) for seed in (big, big - 1))
    assert (a != b).all()


def test_documents_without_a_separator_are_refused():
    for settings_ in ({"mode": "packed"}, {"align": "documents"}):
        with pytest.raises(ValueError, match="no END_OF_TEXT"):
            TokenLoader(np.arange(20), 2, 4, end_of_text=99, **settings_)
        with pytest.raises(ValueError, match="need end_of_text"):
            TokenLoader(np.arange(20), 2, 4, **settings_)


# --- packing --------------------------------------------------------------


@settings(max_examples=150)
@given(
    capacity=st.integers(1, 40),
    data=st.data(),
)
def test_packing_holds_everything_once(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = pack_best_fit(lengths, capacity)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < s <= capacity for s in sums)
    # best-fit decreasing: no two rows could be one, at most 11/9 OPT + 1
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > capacity
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // capacity) * 1.5 + 1
    assert rows == naive_best_fit(lengths, capacity)


def naive_best_fit(lengths, capacity):
    rows, left = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if left[r] >= lengths[i]]
        if not fits:
            rows.append([])
            left.append(capacity)
            fits = [len(rows) - 1]
        tightest = min(left[r] for r in fits)
        # of equally tight rows, the one that became so last
        row = [r for r in fits if left[r] == tightest]
        r = max(row, key=lambda r: stamp(rows[r]))
        rows[r].append(i)
        left[r] -= lengths[i]
        clock[0] += 1
        stamps[tuple(rows[r])] = clock[0]
    return rows


clock, stamps = [0], {}


def stamp(row):
    return stamps.get(tuple(row), 0)


def test_packing_by_hand_and_refusals():
    assert pack_best_fit([2, 7, 3, 5], 10) == [[1, 2], [3, 0]]
    assert pack_best_fit([], 10) == []
    for lengths in ([0], [11], [-1, 3]):
        with pytest.raises(ValueError, match="1 ... 10"):
            pack_best_fit(lengths, 10)


@pytest.mark.parametrize("T", [5, 24, 64, 500])
@pytest.mark.parametrize("pool", [3, 4096])
def test_packed_rows_are_whole_documents(T, pool):
    loader = TokenLoader(TOKENS, 1, T, mode="packed", pool=pool,
                         end_of_text=END, seed=1)  # fmt: skip
    starts = []
    while loader.block < 2 * loader.blocks_per_epoch:
        n = loader.rows_given
        row = loader.take_rows(1)[0]
        assert loader.rows_given == n + 1
        starts += [s for s, _ in row]
        batch_rows = loader.read_rows([row])[:, 0]
        check_row(batch_rows, row, T)
    assert sorted(starts) == sorted([*loader.pieces[0]] * 2)


def check_row(fields, row, T):
    tokens, targets, positions, documents = fields
    at = 0
    for d, (start, n) in enumerate(row):
        here = slice(at, at + n)
        assert (documents[here] == d).all()
        np.testing.assert_array_equal(positions[here], np.arange(n))
        np.testing.assert_array_equal(
            targets[here], TOKENS[start + 1 : start + 1 + n]
        )
        first = END if start < 0 else TOKENS[start]
        assert tokens[at] == first
        np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
        assert END not in targets[here][:-1]  # no target of another document
        at += n
    assert (documents[at:] == -1).all() and at <= T == len(tokens)
    assert (targets[at:] == IGNORE_INDEX).all()
    assert (tokens[at:] == END).all() and not positions[at:].any()


def test_windows_know_their_documents_too():
    tokens = np.array([1, 2, 9, 3, 9, 4, 5, 6, 9])
    loader = TokenLoader(tokens, 1, 9, mode="sequential", end_of_text=9)
    batch = next(loader)
    assert batch.tokens[0].tolist() == [9, 1, 2, 9, 3, 9, 4, 5, 6]
    assert batch.targets[0].tolist() == tokens.tolist()
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_the_mask_by_definition_and_by_intervention():
    batch = next(TokenLoader(TOKENS, 3, 64, mode="packed", end_of_text=END))
    mask = document_mask(batch.documents)
    docs = batch.documents.tolist()
    for b in range(3):
        for i in range(64):
            for j in range(64):
                allowed = j <= i and docs[b][i] == docs[b][j]
                assert mask[b, i, j].item() == allowed
    assert mask.any(-1).all()  # padding looks at padding: no empty row
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 2).eval()
    table = torch.randn(257, 16)
    row, changed = batch.tokens[:1], batch.tokens[:1].clone()
    first = batch.documents[0] == 0
    changed[0, first] = (changed[0, first] + 1) % 256
    for m, moves in ((mask[:1], False), (None, True)):
        if m is None:
            m = torch.ones(64, 64).tril().bool()
        a, b = layer(table[row], mask=m), layer(table[changed], mask=m)
        assert torch.equal(a[0, ~first], b[0, ~first]) != moves
        assert not torch.equal(a[0, first], b[0, first])


# --- resume and ranks -----------------------------------------------------


MODES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["random", "sequential", "packed"]),
        "align": st.sampled_from(["windows", "documents"]),
        "shuffle": st.booleans(),
        "pool": st.integers(1, 50),
        "seed": st.integers(0, 2**63),
    }
)


def fresh(kwargs, **more):
    return TokenLoader(TOKENS, more.pop("batch_size", 3), 24,
                       end_of_text=END, **kwargs, **more)  # fmt: skip


@settings(max_examples=80)
@given(kwargs=MODES, n=st.integers(0, 60), bucket=st.integers(0, 5))
def test_the_next_batch_after_a_resume_is_the_next_batch(kwargs, n, bucket):
    fits = (kwargs["mode"], kwargs["align"]) == ("sequential", "documents")
    kwargs = kwargs | {"bucket": bucket if fits else 0}
    loader = fresh(kwargs)
    for _ in islice(loader, n):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 1000
    expected = list(islice(loader, 5))
    other = fresh(kwargs)
    next(other)
    other.load_state_dict(state)
    assert other.epochs == pytest.approx(fresh_epochs(kwargs, n), abs=1e-9)
    for a, b in zip(expected, islice(other, 5)):
        assert same(a, b)
    assert other.state_dict() == loader.state_dict()


def fresh_epochs(kwargs, n):
    loader = fresh(kwargs)
    loader.take_rows(3 * n)
    return loader.epochs


def test_resume_in_a_fresh_process(tmp_path, folder):
    loader = TokenLoader(folder, 3, 24, mode="packed", seed=11)
    for _ in islice(loader, 7):
        pass
    state = json.dumps(loader.state_dict())
    code = textwrap.dedent("""
        import json, sys
        from minillm.loading import TokenLoader
        loader = TokenLoader(sys.argv[1], 3, 24, mode="packed", seed=11)
        loader.load_state_dict(json.loads(sys.argv[2]))
        print(json.dumps([next(loader).tokens.tolist() for _ in range(6)]))
    """)
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), state],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ours = [batch.tokens.tolist() for batch in islice(loader, 6)]
    assert json.loads(out) == ours


def test_a_state_that_does_not_fit_is_refused():
    kwargs = {"mode": "sequential", "seed": 1}
    loader = fresh(kwargs)
    next(loader)
    state = loader.state_dict()
    others = {
        "data": TokenLoader(TOKENS[:-9], 3, 24, end_of_text=END, **kwargs),
        "seed": fresh({"mode": "sequential", "seed": 2}),
        "mode": fresh({"mode": "random", "seed": 1}),
        "context_length": TokenLoader(
            TOKENS, 3, 25, end_of_text=END, **kwargs
        ),  # fmt: skip
        "end_of_text": TokenLoader(TOKENS, 3, 24, **kwargs),
        "shuffle": fresh(kwargs | {"shuffle": False}),
        "align": fresh(kwargs | {"align": "documents"}),
    }
    for name, other in others.items():
        before = other.state_dict()
        with pytest.raises(ValueError, match=f"{name}="):
            other.load_state_dict(state)
        assert other.state_dict() == before
    bad = [
        {"row": 10**6}, {"row": -1}, {"block": "1"}, {"block": None},
        {"version": 2}, {"format": "x"}, {"rows_given": 1.5},
        {"row": True},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            loader.load_state_dict(state | change)
    for wrong in ({}, None, [], "state"):
        with pytest.raises(ValueError):
            loader.load_state_dict(wrong)
    assert loader.state_dict() == state


@settings(max_examples=40)
@given(kwargs=MODES, world_size=st.integers(1, 4))
def test_ranks_share_the_batch_of_one(kwargs, world_size):
    alone = fresh(kwargs, batch_size=2 * world_size)
    ranks = [fresh(kwargs, batch_size=2, rank=r, world_size=world_size)
             for r in range(world_size)]  # fmt: skip
    for _ in range(6):
        parts, whole = [next(r) for r in ranks], next(alone)
        for field in ("tokens", "targets", "positions", "documents"):
            joined = torch.cat([getattr(p, field) for p in parts])
            assert torch.equal(joined, getattr(whole, field))


def test_a_run_can_go_on_with_another_number_of_ranks():
    kwargs = {"mode": "packed", "seed": 4}
    one = fresh(kwargs, batch_size=6)
    next(one)
    state, expected = one.state_dict(), next(one)
    parts = []
    for rank in range(3):
        loader = fresh(kwargs, batch_size=2, rank=rank, world_size=3)
        loader.load_state_dict(state)
        parts.append(next(loader).tokens)
    assert torch.equal(torch.cat(parts), expected.tokens)


def test_ranks_are_disjoint_within_an_epoch():
    tokens = np.arange(1, 24 * 8 + 2)  # 8 full windows, none twice
    ranks = [TokenLoader(tokens, 1, 24, mode="sequential", rank=r,
                         world_size=4) for r in range(4)]  # fmt: skip
    seen = [{int(b.tokens[0, 0]) for b in islice(r, 2)} for r in ranks]
    assert len(set.union(*seen)) == 8 == sum(map(len, seen))


# --- mixtures -------------------------------------------------------------


def sources(**more):
    """Two loaders whose tokens tell them apart."""
    return {
        "low": TokenLoader(np.arange(100), 4, 8, mode="sequential", **more),
        "high": TokenLoader(np.arange(500, 900), 4, 8, seed=1, **more),
        "top": TokenLoader(np.arange(900, 2000), 4, 8, seed=2, **more),
    }


WEIGHTS = {"low": 1, "high": 2, "top": 5}


def test_realised_shares_stay_within_a_row():
    mixture = Mixture(sources(), WEIGHTS)
    ideal = np.array([1, 2, 5]) / 8
    for n in range(1, 400):
        mixture.choose(1)
        assert np.abs(mixture.taken - n * ideal).max() < 1.001
    mixture = Mixture(sources(), WEIGHTS)
    rows = torch.cat([b.tokens[:, 0] for b in islice(mixture, 100)])
    counts = np.histogram(rows, [0, 500, 900, 2000])[0]
    assert counts.tolist() == [50, 100, 250]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(max_examples=40)
def test_shares_of_any_weights(weights):
    names = [str(i) for i in range(len(weights))]
    loaders = {name: TokenLoader(np.arange(50), 1, 4) for name in names}
    mixture = Mixture(loaders, dict(zip(names, weights)))
    mixture.choose(500)
    ideal = 500 * np.array(weights) / sum(weights)
    assert np.abs(mixture.taken - ideal).max() <= len(weights)


def test_mixture_resumes_and_shards_like_a_loader():
    mixture = Mixture(sources(), WEIGHTS)
    for _ in islice(mixture, 13):
        pass
    state = json.loads(json.dumps(mixture.state_dict()))
    expected = list(islice(mixture, 4))
    other = Mixture(sources(), WEIGHTS)
    other.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(expected, other))
    ranks = []
    for rank in range(2):
        loaders = {
            name: TokenLoader(x.tokens, 2, 8, mode=x.mode, seed=x.seed,
                              rank=rank, world_size=2)
            for name, x in sources().items()
        }  # fmt: skip
        ranks.append(Mixture(loaders, WEIGHTS))
        ranks[-1].load_state_dict(state)
    for whole in expected:
        parts = torch.cat([next(r).tokens for r in ranks])
        assert torch.equal(parts, whole.tokens)


def test_mixture_refuses():
    with pytest.raises(ValueError, match="same sources"):
        Mixture(sources(), {"low": 1})
    with pytest.raises(ValueError, match="same sources"):
        Mixture({}, {})
    for w in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            Mixture(sources(), WEIGHTS | {"low": w})
    odd = sources() | {"low": TokenLoader(np.arange(100), 5, 8)}
    with pytest.raises(ValueError, match="alike"):
        Mixture(odd, WEIGHTS)
    mixture = Mixture(sources(), WEIGHTS)
    next(mixture)
    state = mixture.state_dict()
    bad = [
        {"weights": [1, 2, 3]}, {"taken": [0, 0, 0]}, {"loaders": {}},
        {"loaders": None}, {"format": "minillm-loader"},
        {"loaders": dict(reversed(state["loaders"].items()))},
        {"loaders": state["loaders"]
         | {"top": state["loaders"]["top"] | {"seed": 9}}},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            mixture.load_state_dict(state | change)
        assert mixture.state_dict() == state


# --- memory, devices, settings --------------------------------------------


@posix
def test_a_window_touches_only_itself(tmp_path):
    """Four gigabytes that are not there: a sparse file."""
    path, n = tmp_path / "big.bin", 2**31 - 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, n
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(1024 + 2 * n)
    tracemalloc.start()
    loader = TokenLoader(read_shard(path), 8, 1024)
    for _ in islice(loader, 50):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # 4.3 GB are mapped


def test_pinned_and_non_blocking_only_on_cuda(monkeypatch):
    calls = []

    def pin(tensor):
        calls.append("pin")
        return tensor

    def to(tensor, device, non_blocking=False):
        calls.append((str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    next(TokenLoader(TOKENS, 2, 8, device="cpu"))
    assert calls == [("cpu", False)] * 4
    calls.clear()
    next(TokenLoader(TOKENS, 2, 8, device=torch.device("cuda", 1)))
    assert calls == ["pin", ("cuda:1", True)] * 4


def test_batches_are_long_tensors_of_their_own():
    tokens = torch.arange(100)
    batch = next(TokenLoader(tokens, 2, 8))
    for field in (batch.tokens, batch.targets, batch.positions,
                  batch.documents):  # fmt: skip
        assert field.shape == (2, 8) and field.dtype == torch.int64
    batch.tokens.fill_(0)
    assert tokens[5] == 5 and not (batch.targets == 0).all()


def test_bad_settings_say_what_to_do():
    bad = [
        {"mode": "shuffled"}, {"align": "left"}, {"seed": -1}, {"rank": 2},
        {"rank": -1}, {"world_size": 0}, {"pool": 0}, {"bucket": -1},
        {"bucket": 2}, {"context_length": 0}, {"batch_size": 0},
    ]  # fmt: skip
    for change in bad:
        kwargs = {"batch_size": 2, "context_length": 8} | change
        with pytest.raises(ValueError, match=str(next(iter(change)))):
            TokenLoader(TOKENS, **kwargs)
    for tokens in (np.ones(50), np.ones((5, 10), int), [0.5] * 50):
        with pytest.raises(ValueError, match="one row of integers"):
            TokenLoader(tokens, 2, 8)
    with pytest.raises(ValueError, match="below"):
        TokenLoader(TOKENS, 2, 8, seed=2**64)
    for n, mode in ((0, "random"), (8, "random"), (1, "sequential")):
        with pytest.raises(ValueError, match="longer text"):
            TokenLoader(np.arange(n), 1, 8, mode=mode)


def test_a_mixture_takes_loaders_that_have_not_begun():
    ids = np.arange(500) % 7
    begun = TokenLoader(ids, 2, 8)
    next(begun)
    with pytest.raises(ValueError, match="given rows already"):
        Mixture({"a": begun}, {"a": 1})
    new = TokenLoader(ids, 2, 8)
    with pytest.raises(ValueError, match="under two names"):
        Mixture({"a": new, "b": new}, {"a": 1, "b": 1})
    mixture = Mixture({"a": new}, {"a": 1})
    state = mixture.state_dict()
    with pytest.raises(ValueError, match="damaged"):
        mixture.load_state_dict(state | {"loaders": {"a": [1]}})
    with pytest.raises(ValueError, match="damaged"):
        new.load_state_dict(new.state_dict() | {"block": 2**70})


def test_a_change_in_the_middle_of_an_array_is_another_text():
    ids = np.zeros(300_000, np.int64)
    state = TokenLoader(ids, 2, 8).state_dict()
    ids[150_000] = 7
    with pytest.raises(ValueError, match="data"):
        TokenLoader(ids, 2, 8).load_state_dict(state)


def test_shards_that_no_header_could_count(tmp_path):
    with pytest.raises(ValueError, match="shard_tokens"):
        write_shards([np.zeros(3, np.int64)], tmp_path / "s", vocab_size=9,
                     shard_tokens=2**31)
    assert not (tmp_path / "s" / "manifest.json").exists()
