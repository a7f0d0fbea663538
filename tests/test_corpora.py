"""Corpora: files of every kind, splits by name, downloads that break off."""

import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm import corpora
from minillm.corpora import (
    Corpus,
    Document,
    download,
    download_corpus,
    list_files,
    load_corpus,
    read_text,
    split_of,
)  # fmt: skip

TEXTS = ["one", "zwei\r\nZeilen\n", "три", "四 🙂", "  five  "]


def rows(texts=TEXTS) -> bytes:
    return b"".join(json.dumps({"text": t, "n": i}).encode() + b"\n"
                    for i, t in enumerate(texts))


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == "":
        return data
    if suffix == ".gz":
        return gzip.compress(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def table(texts=TEXTS, **columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "n": list(range(len(texts))),
                       **columns}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def put(tmp_path):
    def put(name: str, data: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str):
            data = data.encode("utf-8")
        path.write_bytes(data)
        return path

    return put


# -- documents, splits, limits


def test_a_corpus_can_be_read_twice_and_pickled():
    corpus = load_corpus(["a", "b"])
    assert list(corpus) == list(corpus) == ["a", "b"]
    assert [d.text for d in corpus.documents()] == ["a", "b"]
    assert list(pickle.loads(pickle.dumps(corpus))) == ["a", "b"]
    for name in ("tales", "python"):
        again = pickle.loads(pickle.dumps(load_corpus(name, max_bytes=9000)))
        assert list(again) == list(load_corpus(name, max_bytes=9000))


def test_two_passes_at_once_do_not_disturb_each_other():
    corpus = load_corpus(["a", "b", "c"])
    assert [(x, y) for x, y in zip(corpus, corpus)] == [
        (x, x) for x in "abc"]


@given(st.lists(st.text(max_size=20), max_size=30), st.integers(1, 60))
def test_max_bytes_takes_whole_documents_and_never_nothing(texts, limit):
    texts = [t for t in texts if t]
    if not texts:
        return
    given_ = list(load_corpus(texts, max_bytes=limit))
    sizes = [len(t.encode()) for t in texts]
    assert given_ == texts[: len(given_)]
    size = sum(sizes[: len(given_)])
    assert len(given_) == 1 or size <= limit
    if len(given_) < len(texts):
        assert size + sizes[len(given_)] > limit


def test_max_bytes_does_not_read_the_rest():
    asked = []

    class Endless:
        def __iter__(self):
            for n in range(10**9):
                asked.append(n)
                yield "x" * 10

    assert len(list(load_corpus(Endless(), max_bytes=50))) == 5
    assert len(asked) == 5


@given(st.text(max_size=30), st.integers(0, 5))
def test_split_of_is_one_of_three_and_repeatable(name, seed):
    assert split_of(name, seed=seed) in ("train", "val", "test")
    assert split_of(name, seed=seed) == split_of(name, seed=seed)
    assert split_of(name, val=0, test=0, seed=seed) == "train"
    assert split_of(name, val=1, test=0, seed=seed) == "val"
    assert split_of(name, val=0, test=1, seed=seed) == "test"


def test_split_of_keeps_its_shares_and_its_promises():
    names = [f"doc/{i}" for i in range(20_000)]
    shares = Counter(split_of(name) for name in names)
    # 10 % of 20,000 is 2,000 with a standard deviation of 42
    assert abs(shares["val"] - 2000) < 170
    assert abs(shares["test"] - 2000) < 170
    for name in names[:2000]:  # a larger share only adds to a split
        if split_of(name) == "val":
            assert split_of(name, val=0.2) == "val"
        if split_of(name) == "test":
            assert split_of(name, val=0.3) == "test"
    # these values are for ever: other machines hold data split by them
    assert [split_of(f"a/{i}.txt") for i in range(12)] == GOLDEN


GOLDEN = ["train"] * 4 + ["test"] * 2 + ["val"] + ["train"] * 5


@pytest.mark.parametrize("shares", [
    {"val": -0.1}, {"test": 2}, {"val": 0.6, "test": 0.6},
    {"val": float("nan")}])
def test_split_of_refuses_impossible_shares(shares):
    with pytest.raises(ValueError, match="at most 1"):
        split_of("a", **shares)


def test_splits_part_a_source_without_loss():
    texts = [f"text {i}" for i in range(300)]
    parts = {s: list(load_corpus(texts, split=s))
             for s in ("train", "val", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    assert all(len(part) > 10 for part in parts.values())
    # the order of the source does not matter
    again = load_corpus(texts[::-1], split="val")
    assert sorted(again) == sorted(parts["val"])


def test_names_that_are_no_text_have_a_split_too():
    assert split_of("caf\udce9.txt") in corpora.SPLITS  # as Linux may list it


def test_equal_texts_share_a_split():
    texts = [f"text {i}" for i in range(200)] * 2
    train = set(load_corpus(texts, split="train"))
    val = set(load_corpus(texts, split="val"))
    assert not train & val


def test_a_split_that_holds_nothing_says_so(put):
    path = put("a.txt", "words")
    empty = [s for s in ("train", "val", "test") if s != split_of("a.txt")][0]
    with pytest.raises(ValueError, match=f"no text in split '{empty}'"):
        list(load_corpus(path, split=empty))


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="did you mean 'train'"):
        load_corpus("tales", split="trian")
    with pytest.raises(ValueError, match="max_bytes is 0"):
        load_corpus("tales", max_bytes=0)
    with pytest.raises(ValueError, match="known are tales.*mean 'tales'"):
        load_corpus("tale")
    with pytest.raises(FileNotFoundError, match="none.txt"):
        load_corpus("none.txt")
    with pytest.raises(FileNotFoundError, match="none.txt"):
        load_corpus([Path("none.txt")])
    with pytest.raises(ValueError, match="put texts into a list"):
        load_corpus("Once upon a time\nthere was")
    for nonsense in (3, None, b"bytes", {"text": "a"}):
        with pytest.raises(ValueError, match="is no corpus"):
            load_corpus(nonsense)


# -- texts in memory


def test_an_iterator_can_be_read_once():
    corpus = load_corpus(x for x in ["a", "b"])
    assert list(corpus) == ["a", "b"]
    with pytest.raises(ValueError, match="read once; make it from a list"):
        list(corpus)


def test_items_may_be_texts_documents_or_rows():
    corpus = load_corpus(["a", Document("b", "my/b"), {"body": "c"}],
                         text_field="body")
    assert list(corpus) == ["a", "b", "c"]
    assert [d.name for d in corpus.documents()][1] == "my/b"
    with pytest.raises(ValueError, match="item 1 is a int"):
        list(load_corpus(["a", 3]))
    with pytest.raises(ValueError, match="there is body"):
        list(load_corpus([{"body": "c"}]))


def test_empty_texts_are_left_out_and_counted():
    corpus = load_corpus(["a", "", "b", ""])
    assert list(corpus) == ["a", "b"] and corpus.skipped == {"empty": 2}
    assert list(corpus) and corpus.skipped == {"empty": 2}  # not 4
    with pytest.raises(ValueError, match="no text"):
        list(load_corpus([""]))
    with pytest.raises(ValueError, match="no text"):
        list(load_corpus([]))


def test_paths_as_strings_in_a_list_are_not_taken_for_texts(put):
    path = put("a.txt", "words")
    with pytest.raises(ValueError, match="give Path objects"):
        load_corpus([str(path)])
    assert list(load_corpus([path])) == ["words"]


def test_a_lone_surrogate_is_refused_with_the_name():
    with pytest.raises(ValueError, match="'x/y' has a lone surrogate at "
                                         "character 1"):
        list(load_corpus([Document("a\ud800", "x/y")]))


# -- files


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_every_kind_of_file_compressed_or_not(put, suffix):
    text = put(f"a.txt{suffix}", packed("ä\r\nb".encode(), suffix))
    lines = put(f"b.jsonl{suffix}", packed(rows(), suffix))
    other = put(f"c.ndjson{suffix}", packed(rows(), suffix))
    columns = put(f"d.parquet{suffix}", packed(table(), suffix))
    assert list(load_corpus(text)) == list(load_corpus(str(text))) == [
        "ä\r\nb"]
    for path in (lines, other, columns):
        assert list(load_corpus(path)) == TEXTS
    names = [d.name for d in load_corpus(
        [text, lines, columns]).documents()]
    assert names == [text.name] + [
        f"{p.name}:{n}" for p in (lines, columns) for n in range(1, 6)]


def test_a_directory_is_read_sorted_with_names_from_its_root(put, tmp_path):
    put("d/b.txt", "b")
    put("d/a/z.md", "z")
    put("d/a/c.jsonl.gz", gzip.compress(rows(["j"])))
    put("d/a.txt", "a")
    put("d/.hidden/x.txt", "no")
    put("d/.x.txt", "no")
    put("d/picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    put("d/empty.txt", "")
    corpus = load_corpus(tmp_path / "d")
    docs = {d.name: d.text for d in corpus.documents()}
    assert docs == {"a.txt": "a", "a/c.jsonl.gz:1": "j", "a/z.md": "z",
                    "b.txt": "b"}
    assert list(docs) == sorted(docs)
    assert corpus.skipped == {"not text": 1, "empty": 1}


def test_an_empty_directory_has_no_text(tmp_path):
    with pytest.raises(ValueError, match="has no text"):
        list(load_corpus(tmp_path))


def test_a_byte_order_mark_is_dropped(put):
    assert list(load_corpus(put("a.txt", b"\xef\xbb\xbfhi"))) == ["hi"]
    assert list(load_corpus(put("a.jsonl", b"\xef\xbb\xbf" + rows(["x"])))
                ) == ["x"]
    assert read_text(put("b.txt", b"\xef\xbb\xbfhi\r\n")) == "hi\r\n"


def test_invalid_utf8_names_file_byte_and_remedy(put):
    says = r"latin.*byte 5 is 0xe9; save it as UTF-8"
    path = put("latin.txt", b"a caf\xe9")
    for read in (read_text, lambda p: list(load_corpus(p))):
        with pytest.raises(ValueError, match=says):
            read(path)
    lines = put("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl.*byte 24 is 0xe9"):
        list(load_corpus(lines))


def test_read_text_refuses_what_is_no_text(put, tmp_path):
    with pytest.raises(IsADirectoryError, match="name the text files"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="is empty"):
        read_text(put("blank.txt", " \n"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_damaged_compressed_file_is_never_read_in_part(put, name, suffix):
    """The zstandard library ends a cut file without a word."""
    data = packed(rows([os.urandom(9000).hex()] * 9), suffix)
    for bad in (data[:-5], data[: len(data) // 2], b"not compressed"):
        path = put(name + suffix, bad)
        with pytest.raises(ValueError, match="damaged, or not compressed"):
            list(load_corpus(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_several_compressed_parts_is_read_whole(put, suffix):
    one, two = (packed(rows([t]), suffix) for t in ("first", "second"))
    path = put("a.jsonl" + suffix, one + two)
    assert list(load_corpus(path)) == ["first", "second"]


# -- rows


def test_bad_rows_are_named_by_line(put):
    for data, says in (
        (b'{"text": "a"}\n{oops\n', r"line 2 is not JSON \(column 2"),
        (b'["a"]\n', "line 1: the row is a list"),
        (b'{"body": "a", "n": 1}\n', "no field 'text'; there is body, n"),
        (b'{"text": 3}\n', "field 'text' is a int, not a string"),
    ):
        with pytest.raises(ValueError, match=says):
            list(load_corpus(put("a.jsonl", data)))
    with pytest.raises(ValueError, match="no field 'body'; there is text, n"):
        list(load_corpus(put("a.parquet", table()), text_field="body"))
    with pytest.raises(ValueError, match="row 1: field 'n' is a int"):
        list(load_corpus(put("a.parquet", table()), text_field="n"))
    with pytest.raises(ValueError, match="damaged or not parquet"):
        list(load_corpus(put("a.parquet", b"no parquet at all")))


def test_null_texts_and_blank_lines_are_left_out(put):
    path = put("a.jsonl", b'{"text": null}\n\n{"text": "x"}\r\n')
    corpus = load_corpus(path)
    assert list(corpus) == ["x"] and corpus.skipped == {"empty": 1}
    assert [d.name for d in corpus.documents()] == ["a.jsonl:3"]


def test_other_fields_may_hold_anything(put):
    """Columns with types fail or turn such texts into other things."""
    path = put("a.jsonl", b"".join([
        b'{"text": "2020-01-01", "meta": 1}\n',
        b'{"text": "5", "meta": {"a": [1, "x"]}}\n',
        b'{"text": "line\\u2028separator", "more": null}\n']))
    assert list(load_corpus(path)) == ["2020-01-01", "5",
                                       "line\u2028separator"]


def test_json_lines_are_streamed(put):
    """What comes after max_bytes is not even parsed."""
    path = put("a.jsonl", rows(["x" * 10] * 5) + b"garbage\n")
    assert len(list(load_corpus(path, max_bytes=50))) == 5
    with pytest.raises(ValueError, match="line 6"):
        list(load_corpus(path))


# -- built-in sources


def test_tales_have_their_own_splits():
    parts = {s: [d.name for d in load_corpus(
        "tales", split=s, max_bytes=20_000).documents()]
        for s in ("train", "val", "test")}
    assert [p[0] for p in parts.values()] == [
        "tales/train/0", "tales/val/0", "tales/test/0"]
    from minillm.tales import corpus

    assert list(load_corpus("tales", max_bytes=20_000)) == corpus(20_000)


def test_python_is_the_running_library():
    docs = list(load_corpus("python", max_bytes=400_000).documents())
    assert docs[0].name.startswith("python/__")
    assert [d.name for d in docs] == sorted(d.name for d in docs)
    import this  # noqa: F401  (any module will do)

    names = {f"python/{p.name}" for p in corpora.python_files()}
    assert "python/this.py" in names
    assert not any("site-packages" in str(p) for p in corpora.python_files())
    assert load_corpus("python").n_bytes > 5_000_000


def test_python_files_in_odd_encodings_are_decoded_or_counted(
        put, tmp_path, monkeypatch):
    put("os.py", "x = 1\n")
    put("latin.py", "# coding: latin-1\n# é\n".encode("latin-1"))
    put("bad.py", b"# \xff\xfe\n")
    put("lies.py", b"# coding: no-such-code\n")
    put("site-packages/other.py", "y = 1\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: tmp_path)
    corpus = load_corpus("python")
    assert {d.name: d.text for d in corpus.documents()} == {
        "python/latin.py": "# coding: latin-1\n# é\n",
        "python/os.py": "x = 1\n"}
    assert corpus.skipped == {"not readable": 2}


def test_a_zipped_library_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_path",
                        lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match="zipped or frozen"):
        load_corpus("python")


def test_list_files_follows_no_hidden_or_excluded_folder(put, tmp_path):
    put("a.py", "")
    put("no/b.py", "")
    assert [p.name for p in list_files(tmp_path, without=["no"])] == ["a.py"]


# -- downloads, from a server on this machine


class Server:
    """Serves `data`; a list of tricks says how each request goes wrong."""

    def __init__(self, data: bytes):
        self.data, self.tricks, self.requests = data, [], []
        self.etag, self.ranges = '"v1"', True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self.http = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.txt"
        threading.Thread(target=self.http.serve_forever, args=(0.01,),
                         daemon=True).start()

    def answer(self, h):
        self.requests.append(dict(h.headers))
        trick = self.tricks.pop(0) if self.tricks else None
        if isinstance(trick, int):
            h.send_error(trick)
            return
        start, asked = 0, h.headers.get("Range")
        fits = h.headers.get("If-Range") in (None, self.etag)
        if asked and self.ranges and fits:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.data):
                h.send_response(416)
                h.send_header("Content-Range", f"bytes */{len(self.data)}")
                h.send_header("Content-Length", "0")
                h.end_headers()
                return
            h.send_response(206)
            h.send_header("Content-Range", f"bytes {start}-"
                          f"{len(self.data) - 1}/{len(self.data)}")
        else:
            h.send_response(200)
        body = self.data[start:]
        h.send_header("Content-Length", str(len(body)))
        if self.etag:
            h.send_header("ETag", self.etag)
        h.end_headers()
        if trick == "break":
            h.wfile.write(body[: len(body) // 2])
            h.wfile.flush()
            h.connection.shutdown(socket.SHUT_RDWR)
        elif trick == "hang":
            h.wfile.write(body[:10])
            h.wfile.flush()
            threading.Event().wait(1.0)
        else:
            h.wfile.write(body)

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = Server(os.urandom(300_000))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def get(server, tmp_path):
    def get(name="got/file.txt", **options):
        options = {"wait": 0.01, "tries": 3, "timeout": 5} | options
        return download(server.url, tmp_path / name, **options)

    return get


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()
                  if not p.name.endswith(".lock"))


def test_a_download_arrives_whole_and_alone(server, get):
    path = get(sha256=server.sha256, size=len(server.data))
    assert path.read_bytes() == server.data
    assert left(path.parent) == ["file.txt"]
    assert get(sha256=server.sha256.upper()) == path
    assert len(server.requests) == 1  # the second call only checked


def test_a_broken_connection_is_resumed_where_it_broke(server, get):
    server.tricks = ["break", "break"]
    path = get()
    assert path.read_bytes() == server.data
    ranges = [r.get("Range") for r in server.requests]
    assert ranges == [None, "bytes=150000-", "bytes=225000-"]
    assert server.requests[1]["If-Range"] == '"v1"'


def test_a_later_call_goes_on_with_the_part(server, get, tmp_path):
    server.tricks = ["break"] + [404]
    with pytest.raises(ConnectionError, match="HTTP 404"):
        get()
    assert left(tmp_path / "got") == ["file.txt.part", "file.txt.part.json"]
    assert get().read_bytes() == server.data
    assert server.requests[-1]["Range"] == "bytes=150000-"
    assert left(tmp_path / "got") == ["file.txt"]


def test_a_file_that_changed_in_between_starts_again(server, get):
    server.tricks = ["break", 404]
    with pytest.raises(ConnectionError):
        get()
    server.data, server.etag = os.urandom(200_000), '"v2"'
    assert get(sha256=server.sha256).read_bytes() == server.data
    assert server.requests[-1]["If-Range"] == '"v1"'


def test_without_a_tag_the_hash_catches_a_changed_file(server, get):
    server.etag = None
    server.tricks = ["break", 404]
    with pytest.raises(ConnectionError):
        get(sha256="0" * 64)
    server.data = os.urandom(300_000)
    assert get(sha256=server.sha256).read_bytes() == server.data
    assert [r.get("Range") for r in server.requests][2:] == [
        "bytes=150000-", None]


def test_without_tag_and_hash_nothing_is_glued_together(server, get):
    server.etag, server.tricks = None, ["break", 404]
    with pytest.raises(ConnectionError):
        get()
    server.data = os.urandom(300_000)
    assert get().read_bytes() == server.data
    assert server.requests[-1].get("Range") is None


def test_a_server_without_ranges_is_read_from_the_start(server, get):
    server.ranges, server.tricks = False, ["break", None]
    assert get(sha256=server.sha256).read_bytes() == server.data


def test_a_whole_part_needs_no_more_bytes(server, get, tmp_path):
    """The process died between the last byte and the renaming."""
    server.tricks = [404]
    with pytest.raises(ConnectionError):
        get()
    part = tmp_path / "got" / "file.txt.part"
    part.write_bytes(server.data)
    part.with_name("file.txt.part.json").write_text(
        json.dumps({"url": server.url, "etag": '"v1"'}), encoding="utf-8")
    assert get(sha256=server.sha256).read_bytes() == server.data
    # a part longer than the file is thrown away
    path = tmp_path / "got" / "file.txt"
    path.unlink()
    part.write_bytes(server.data + b"more")
    part.with_name("file.txt.part.json").write_text(
        json.dumps({"url": server.url, "etag": '"v1"'}), encoding="utf-8")
    assert get().read_bytes() == server.data


def test_busy_servers_are_asked_again(server, get):
    server.tricks = [500, 503]
    assert get().read_bytes() == server.data
    assert len(server.requests) == 3


def test_patience_ends(server, get, tmp_path):
    server.tricks = [500] * 10
    with pytest.raises(ConnectionError, match="HTTP 500.*try again later"):
        get()
    assert len(server.requests) == 3
    assert not (tmp_path / "got" / "file.txt").exists()


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusals_are_final(server, get, code):
    server.tricks = [code]
    with pytest.raises(ConnectionError, match=f"HTTP {code}"):
        get()
    assert len(server.requests) == 1


def test_a_silent_server_times_out(server, get):
    server.tricks = ["hang"]
    assert get(timeout=0.3).read_bytes() == server.data
    assert len(server.requests) == 2


def test_the_wrong_content_is_not_kept(server, get, tmp_path):
    with pytest.raises(ValueError) as caught:
        get(sha256="0" * 64)
    assert "0" * 64 in str(caught.value) and server.sha256 in str(
        caught.value)
    with pytest.raises(ValueError, match="300,000 bytes instead of 5"):
        get(size=5)
    assert left(tmp_path / "got") == []


def test_a_file_of_the_users_is_not_overwritten(server, get, put):
    path = put("got/file.txt", "mine")
    with pytest.raises(ValueError, match="delete it to get it again"):
        get(sha256=server.sha256)
    with pytest.raises(ValueError, match="has 4 bytes instead of 9"):
        get(size=9)
    assert path.read_text() == "mine" and get() == path
    assert not server.requests


def test_no_server_and_no_web_address(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(ConnectionError, match="cannot reach"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "x")
    with pytest.raises(ValueError, match="no http or https"):
        download((tmp_path / "x").as_uri(), tmp_path / "y")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_files_name(server, get, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "file.txt.part").symlink_to("/dev/full")
    (tmp_path / "got" / "file.txt.part.json").write_text(
        json.dumps({"url": server.url, "etag": '"v1"'}), encoding="utf-8")
    with pytest.raises(OSError, match="No space left") as caught:
        get()
    assert caught.value.filename.endswith("file.txt.part")
    assert not (tmp_path / "got" / "file.txt").exists()


def test_the_bar_is_shown_when_asked_for(server, get, capsys):
    get("a/file.txt", progress=True)
    assert "300k/300k" in capsys.readouterr().err
    get("b/file.txt")
    assert capsys.readouterr().err == ""


def _download(url, path, queue):
    queue.put(str(download(url, path)))


def test_two_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(
        target=_download, args=(server.url, tmp_path / "x", queue))
        for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
        assert w.exitcode == 0
    assert (tmp_path / "x").read_bytes() == server.data
    assert len(server.requests) == 1


# -- Tiny Shakespeare


@pytest.fixture
def plays(server, monkeypatch):
    """Let the server stand in for the real one."""
    server.data = "".join(f"LORD {i}:\nAlas, é.\n\n" for i in range(99)
                          ).encode()
    real = corpora.REMOTES["shakespeare"]
    monkeypatch.setitem(corpora.REMOTES, "shakespeare", corpora.Remote(
        real.about, real.splits, url=server.url, sha256=server.sha256,
        size=len(server.data)))
    return server


def test_shakespeare_is_cut_as_nanogpt_cuts_it(plays, tmp_path):
    text = plays.data.decode()
    load = {"cache_dir": tmp_path}
    assert "".join(load_corpus("shakespeare", **load)) == text
    train, = load_corpus("shakespeare", split="train", **load)
    val, = load_corpus("shakespeare", split="val", **load)
    assert train == text[: int(0.9 * len(text))] and train + val == text
    assert len(plays.requests) == 1  # then from the cache
    with pytest.raises(ValueError, match="no split 'test'; it has train and"):
        load_corpus("shakespeare", split="test", **load)


def test_without_a_network_the_error_says_what_to_do(plays, tmp_path):
    plays.http.shutdown()
    plays.http.server_close()
    for call in (load_corpus, download_corpus):
        with pytest.raises(ConnectionError) as caught:
            call("shakespeare", cache_dir=tmp_path)
        text = str(caught.value)
        assert "\n" not in text
        for piece in ("'shakespeare'", str(tmp_path / "corpora"),
                      "minillm download shakespeare", plays.sha256,
                      str(tmp_path / "corpora" / "shakespeare.txt")):
            assert piece in text
    # by hand, as the error says
    (tmp_path / "corpora" / "shakespeare.txt").write_bytes(plays.data)
    assert list(load_corpus("shakespeare", cache_dir=tmp_path))


def test_the_known_hash_is_well_formed():
    remote = corpora.REMOTES["shakespeare"]
    assert len(remote.sha256) == 64 and remote.size == 1_115_394


# -- the hub, with a stand-in for it


class Stream:
    """What `load_dataset(..., streaming=True)` gives: rows, again and again"""

    def __init__(self, rows, fails_after=None):
        self.rows, self.fails_after, self.read = rows, fails_after, 0

    def __iter__(self):
        for n, row in enumerate(self.rows):
            if n == self.fails_after:
                raise ConnectionError("the hub has gone away")
            self.read += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    import datasets

    held = {
        ("roneneldan/TinyStories", None, "train"):
            Stream([{"text": f"story {i}"} for i in range(1000)]),
        ("roneneldan/TinyStories", None, "validation"):
            Stream([{"text": f"held-out story {i}"} for i in range(10)]),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"):
            Stream([{"text": f"page {i}", "id": f"<urn:{i}>", "score": 3.5}
                    for i in range(1000)]),
    }

    def load_dataset(path, name=None, *, split, streaming):
        assert streaming
        return held[path, name, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_tinystories_streams(hub, tmp_path):
    corpus = load_corpus("tinystories", split="train", max_bytes=70,
                         cache_dir=tmp_path)
    docs = list(corpus.documents())
    assert [d.text for d in docs] == [f"story {i}" for i in range(10)]
    assert docs[3].name == "tinystories/train/3"
    assert hub["roneneldan/TinyStories", None, "train"].read <= 11
    assert len(list(load_corpus("tinystories", split="val",
                                cache_dir=tmp_path))) == 10
    assert len(list(load_corpus("tinystories", cache_dir=tmp_path))) == 1010
    with pytest.raises(ValueError, match="no split 'test'"):
        load_corpus("tinystories", split="test", cache_dir=tmp_path)


def test_fineweb_is_split_by_its_own_ids(hub, tmp_path):
    parts = [[d.name for d in load_corpus(
        "fineweb-edu", split=s, cache_dir=tmp_path).documents()]
        for s in ("train", "val", "test")]
    assert sum(map(len, parts)) == 1000
    assert parts[0][0].startswith("fineweb-edu/train/<urn:")
    assert all(split_of(name) == "val" for name in parts[1])


def test_a_copy_serves_without_the_hub(hub, tmp_path, monkeypatch):
    load = {"cache_dir": tmp_path}
    paths = download_corpus("tinystories", max_bytes=800, **load)
    assert [p.name for p in paths] == ["tinystories-train.jsonl.gz",
                                       "tinystories-validation.jsonl.gz"]
    streamed = list(load_corpus("tinystories", split="train", max_bytes=800,
                                **load).documents())
    monkeypatch.setattr("datasets.load_dataset", None)
    corpus = load_corpus("tinystories", split="train", max_bytes=800, **load)
    assert list(corpus.documents()) == streamed
    assert "copy of the first" in corpus.about
    with pytest.raises(ValueError, match="--max-bytes 5000"):
        load_corpus("tinystories", split="train", max_bytes=5000, **load)
    # validation was copied whole, so that more than it has may be asked for
    val = load_corpus("tinystories", split="val", max_bytes=5000, **load)
    assert len(list(val)) == 10 and val.about.endswith("local copy")
    assert download_corpus("tinystories", max_bytes=700, **load) == paths


def test_a_copy_brought_by_hand_is_counted(hub, tmp_path):
    load = {"cache_dir": tmp_path}
    path = download_corpus("fineweb-edu", max_bytes=100, **load)[0]
    path.with_name("fineweb-edu-train.json").unlink()
    corpus = load_corpus("fineweb-edu", max_bytes=90, **load)
    assert "first 100 bytes" in corpus.about or "first 10" in corpus.about
    assert list(corpus)


def test_a_failing_hub_leaves_no_half_copy(hub, tmp_path):
    hub["HuggingFaceFW/fineweb-edu", "sample-10BT", "train"].fails_after = 5
    with pytest.raises(ConnectionError,
                       match="gone away.*minillm download fineweb-edu"):
        download_corpus("fineweb-edu", cache_dir=tmp_path)
    assert left(tmp_path / "corpora") == []
    with pytest.raises(ConnectionError, match="gone away"):
        list(load_corpus("fineweb-edu", cache_dir=tmp_path))


def test_no_hub_at_all(hub, tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConnectionError) as caught:
        load_corpus("tinystories", cache_dir=tmp_path)
    text = str(caught.value)
    assert "\n" not in text and "minillm download tinystories" in text
    assert "tinystories-train.jsonl.gz" in text


def test_the_hubs_own_cache_is_used_offline(tmp_path):
    """`datasets` itself finds what it has cached; in a process offline."""
    import subprocess

    make = (
        "import datasets, os\n"
        "from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo\n"
        "d = os.path.join(os.environ['HF_DATASETS_CACHE'],\n"
        "    'roneneldan___tiny_stories', 'default', '0.0.0', 'abc')\n"
        "ds = Dataset.from_dict({'text': ['cached story'] * 3})\n"
        "ds.save_to_disk(d + '-x')\n"
        "import glob, shutil\n"
        "os.makedirs(d)\n"
        "shutil.copy(glob.glob(d + '-x/*.arrow')[0],\n"
        "            d + '/tiny_stories-train.arrow')\n"
        "shutil.rmtree(d + '-x')\n"
        "DatasetInfo(features=ds.features, config_name='default',\n"
        "    dataset_name='tiny_stories', version='0.0.0',\n"
        "    splits=SplitDict({\n"
        "    'train': SplitInfo('train', num_examples=3)})\n"
        "    ).write_to_directory(d)\n"
    )
    use = (
        "from minillm.corpora import load_corpus\n"
        f"c = load_corpus('tinystories', split='train',\n"
        f"                cache_dir={str(tmp_path / 'own')!r})\n"
        "print(list(c))\n"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "hf"),
                        "HF_HOME": str(tmp_path / "home"),
                        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for code in (make, use):
        done = subprocess.run([sys.executable, "-c", code], env=env,
                              capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["cached story"] * 3)


def test_download_corpus_knows_what_it_can_download():
    with pytest.raises(ValueError, match="there already"):
        download_corpus("tales")
    with pytest.raises(ValueError, match="mean 'shakespeare'"):
        download_corpus("shakespear")


def test_rows_of_a_data_set_of_ones_own():
    import datasets

    own = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    assert list(load_corpus(own)) == ["a", "b"]
    assert list(load_corpus(own.to_iterable_dataset())) == ["a", "b"]


def test_a_corpus_needs_only_a_reader():
    def read(skipped):
        skipped["odd"] += 1
        yield Document("a", "x")

    corpus = Corpus("mine", "made here", read)
    assert list(corpus) == ["a"] and corpus.skipped == {"odd": 1}


# -- one file, many documents


SEPARATED = st.lists(st.text("ab\n<|> e", max_size=8), max_size=8)


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=SEPARATED, mark=st.sampled_from(["<|e|>", "\n\n", "||", "a"]))
def test_separated_documents_are_those_of_split(tmp_path, pieces, mark):
    text = mark.join(pieces)
    path = tmp_path / "all.txt"
    path.write_bytes(text.encode("utf-8"))
    want = text.split(mark)
    if len(want) > 1 and not want[-1]:
        want.pop()  # a mark at the end begins no document
    found = list(corpora.read_separated(path, "all.txt", mark))
    assert [doc.text for doc in found] == [w.strip("\r\n") for w in want]
    assert [doc.name for doc in found] == [
        f"all.txt:{i + 1}" for i in range(len(want))]


@pytest.mark.parametrize("size", [2**20 - 3, 2**20 - 1, 2**20, 3 * 2**20])
def test_a_mark_across_two_blocks(tmp_path, size):
    path = tmp_path / "all.txt"
    path.write_bytes(b"x" * size + b"<|endoftext|>\n" + b"second")
    docs = list(load_corpus(path, separator="<|endoftext|>"))
    assert [len(doc) for doc in docs] == [size, 6]


def test_separated_files_keep_their_errors_and_splits(tmp_path):
    path = tmp_path / "all.txt"
    path.write_bytes(b"one--two--caf\xe9--four")
    with pytest.raises(ValueError, match="byte 13 is 0xe9"):
        list(load_corpus(path, separator="--"))
    path.write_bytes("--".join(f"text {i}" for i in range(200)).encode())
    parts = {split: list(load_corpus(path, separator="--", split=split))
             for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 200 and all(parts.values())
    with pytest.raises(ValueError, match="separator is empty"):
        load_corpus(path, separator="")


def test_separated_files_are_not_held_in_memory(tmp_path):
    path = tmp_path / "all.txt"  # 30 MB
    path.write_bytes((b"0123456789abcdef" * 64 + b"--") * 30_000)
    tracemalloc.start()
    assert sum(1 for _ in load_corpus(path, separator="--")) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
