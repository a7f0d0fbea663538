"""The book's extension and its tools: directives, copies, checks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "_ext"), str(ROOT / "tools")]
pytest.importorskip("sphinx")
import build_book  # noqa: E402
import check_book  # noqa: E402
import minillm_book as book  # noqa: E402


def code(source, *tags):
    return {
        "cell_type": "code",
        "metadata": {"tags": list(tags)} if tags else {},
        "source": source.splitlines(keepends=True),
    }


def test_directives_leave_the_shown_code_alone():
    source = "#| export\n#|eval: false\nx = 1  # | not one\n"
    assert book.directives(source) == {"export": "", "eval": "false"}
    assert book.strip_directives(source) == "x = 1  # | not one"


def test_prepare_translates_directives_and_keeps_the_code():
    cells = [
        code("#| hide\n#| default_exp attention"),
        code("#| export\nx = 1"),
        code("#| export other\ny = 1"),
        code("#| echo: false\nz = 1", "hide-input"),
        code("#| eval: false\nraise SystemExit"),
    ]
    before = [list(cell["source"]) for cell in cells]
    book.prepare({"cells": cells})
    assert [cell["source"] for cell in cells] == before
    tags = [cell["metadata"].get("tags") for cell in cells]
    assert tags == [
        ["remove-cell"],
        None,
        None,
        ["hide-input", "remove-input"],
        ["skip-execution"],
    ]
    named = [cell["metadata"].get("exported_to") for cell in cells]
    assert named[1:3] == ["minillm.attention", "minillm.other"]


def test_readers_get_notebooks_without_directives():
    notebook = {"cells": [code("#| default_exp x"), code("#| export\nx = 1")]}
    copy = book.clean_copy(book.prepare(notebook))
    assert [cell["source"] for cell in copy["cells"]] == [["x = 1"]]
    assert "#|" not in json.dumps(copy)


def test_cache_folder_follows_the_code(tmp_path):
    for name in ("settings.ini", "constraints.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "minillm").mkdir()
    module = tmp_path / "minillm" / "a.py"
    module.write_text("x = 1\n", encoding="utf-8")
    first = book.cache_path(tmp_path)
    assert book.cache_path(tmp_path) == first
    module.write_text("x = 2\n", encoding="utf-8")
    assert book.cache_path(tmp_path) != first


def test_table_of_contents_names_every_notebook():
    listed = set(build_book.documents())
    here = set((ROOT / "nbs").rglob("*.ipynb"))
    here = {p for p in here if ".ipynb_checkpoints" not in p.parts}
    assert listed == here


def test_config_repeats_nothing_from_settings():
    facts = book.read_settings()
    text = (ROOT / "_config.yml").read_text(encoding="utf-8")
    for name in ("version", "author", "copyright", "git_url"):
        assert facts[name] not in text, name


def test_checker_sees_what_is_wrong(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text(
        "<article><h1>T</h1><p>#| export</p><img src='a.png'>"
        "<a href='gone.html'>x</a><a href='#nowhere'>y</a>"
        "<script src='https://cdn.example/x.js'></script></article>",
        encoding="utf-8",
    )
    monkeypatch.setattr(check_book, "HTML", tmp_path)
    parsed = check_book.Page(page)
    found = "\n".join(check_book.check_page(page, parsed, {page: parsed}))
    for sign in (
        "shows a directive",
        "no alt text",
        "broken link gone.html",
        "no anchor for the link #nowhere",
        "from the network",
    ):
        assert sign in found


def test_missing_system_packages_are_named(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_book.py"), "pdf"],
        env={"PATH": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "apt-get install" in done.stderr
    assert "texlive-luatex" in done.stderr and "latexmk" in done.stderr
