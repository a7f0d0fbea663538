"""The project's shape: one source, clean notebooks, honest requirements."""

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from clean_notebooks import cleaned, notebooks  # noqa: E402

NOTEBOOKS = notebooks()
NAMES = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS]
MODULES = sorted(
    p.stem for p in (ROOT / "minillm").glob("*.py") if p.stem != "_modidx"
)
BIN = Path(sysconfig.get_path("scripts"))
PLACEHOLDER = "OWNER"


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def tracked_files():
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / n for n in done.stdout.decode().split("\0") if n]


# One source: the package is what the notebooks export.


def test_package_is_a_fresh_export(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copytree(
        ROOT / "minillm",
        tmp_path / "minillm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        [BIN / "nbdev_export"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fresh = {p.name: p for p in (tmp_path / "minillm").glob("*.py")}
    here = {p.name: p for p in (ROOT / "minillm").glob("*.py")}
    assert fresh.keys() == here.keys()
    for name, path in here.items():
        text = path.read_text(encoding="utf-8")
        assert text == fresh[name].read_text(encoding="utf-8"), (
            f"minillm/{name} is not what the notebooks export: run make export"
        )


def test_no_module_without_its_notebook():
    for name in MODULES:
        if name == "__init__":
            continue
        text = (ROOT / "minillm" / f"{name}.py").read_text(encoding="utf-8")
        match = re.search(r"File to edit: \.\./(nbs/\S+\.ipynb)", text)
        assert match, f"minillm/{name}.py comes from no notebook"
        assert (ROOT / match.group(1)).exists(), f"{match.group(1)} is gone"


def test_one_notebook_one_module():
    homes = {}
    for path in NOTEBOOKS:
        for cell in cells(path):
            for name in re.findall(
                r"^#\| *default_exp +(\S+)", source(cell), re.M
            ):
                assert name not in homes, (
                    f"{path.name} and {homes[name]} both export to {name}"
                )
                homes[name] = path.name


# Notebooks are committed clean, and cleaning loses nothing.


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_is_clean(path):
    text = path.read_text(encoding="utf-8")
    assert text == cleaned(text), "run: python tools/clean_notebooks.py"
    ids = [cell["id"] for cell in cells(path)]
    assert len(set(ids)) == len(ids), "two cells with one id"


def test_nbdev_clean_changes_nothing(tmp_path):
    """Tags survive nbdev's own cleaning, and so does every other byte."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    tagged = {
        "cell_type": "code", "execution_count": 3, "id": "t1", "outputs": [],
        "metadata": {"tags": ["hide-input"], "scrolled": True}, "source": "1",
    }  # fmt: skip
    extra = tmp_path / "nbs" / "tagged.ipynb"
    nb = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    extra.write_text(json.dumps({**nb, "cells": [tagged]}))
    done = subprocess.run(
        [BIN / "nbdev_clean"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert cells(extra)[0]["metadata"] == {"tags": ["hide-input"]}
    for path in NOTEBOOKS:
        after = tmp_path / path.relative_to(ROOT)
        assert after.read_bytes() == path.read_bytes(), path.name


def test_cleaning_strips_outputs_and_keeps_tags():
    output = {"output_type": "stream", "name": "stdout", "text": "secret"}
    cell = {
        "cell_type": "code", "id": "a", "source": "1", "outputs": [output],
        "execution_count": 7,
        "metadata": {"tags": ["remove-cell"], "scrolled": True},
    }  # fmt: skip
    dirty = {"cells": [cell], "metadata": {"language_info": {}}}
    result = cleaned(json.dumps(dirty))
    assert "secret" not in result and "scrolled" not in result
    assert json.loads(result)["cells"][0]["metadata"] == {
        "tags": ["remove-cell"]
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_reads_well(path):
    """One title, a summary under it, ASCII headings, links that exist."""
    text = [source(c) for c in cells(path) if c["cell_type"] == "markdown"]
    joined = "\n\n".join(text)
    outside_code = re.sub(r"```.*?```", "", joined, flags=re.S)
    titles = re.findall(r"^# .+$", outside_code, re.M)
    assert len(titles) == 1 and text[0].startswith(titles[0]), titles
    assert re.search(r"^> .+", text[0], re.M), "no summary under the title"
    for heading in re.findall(r"^#+ .+$", outside_code, re.M):
        assert heading.isascii(), heading
    for target in re.findall(r"\]\(([^)#\s]+\.ipynb)[^)]*\)", joined):
        assert (path.parent / target).exists(), f"link to {target} is broken"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_nothing_is_skipped(path):
    """A cell that is not run is a cell that rots."""
    for cell in cells(path):
        assert not re.search(r"^#\| *eval: *false", source(cell), re.M)
        tags = cell["metadata"].get("tags", [])
        assert "skip-execution" not in tags and "raises-exception" not in tags


def is_import(node):
    """Tell whether a statement imports, for type checkers only included."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return all(map(is_import, node.body))
    return isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_exported_cells(path):
    """Exported code is documented, and imports stand in their own cells."""
    for cell in cells(path):
        text = source(cell)
        if not re.search(r"^#\| *exports?\b", text, re.M):
            continue
        tree = ast.parse(text)
        imports = [is_import(node) for node in tree.body]
        assert all(imports) or not any(imports), text[:200]
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name}: no docstring"


# Requirements are what is written down, no more.


def closure(names):
    """The names of all distributions that a list of requirements brings."""
    from packaging.requirements import Requirement

    seen, todo = set(), [Requirement(n) for n in names]
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.marker and not requirement.marker.evaluate(
            {"extra": ""}
        ):
            continue
        if name in seen:
            continue
        seen.add(name)
        try:
            more = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [Requirement(m) for m in more]
    return seen


FRESH = """
import importlib, importlib.abc, json, sys
others = set(json.loads(sys.argv[1]))

class OnlyRuntime(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in others:
            raise ModuleNotFoundError(f"{name} is no run-time requirement")

sys.meta_path.insert(0, OnlyRuntime())
importlib.import_module(sys.argv[2])
late = [m for m in ("datasets", "tiktoken", "IPython") if m in sys.modules]
assert not late, f"imported where it is not used: {late}"
"""


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_with_run_time_requirements_alone(module):
    requirements = settings()["requirements"].split()
    distributions = closure(requirements)
    others = set()
    for top, owners in importlib.metadata.packages_distributions().items():
        names = {re.sub(r"[-_.]+", "-", o).lower() for o in owners}
        if not names & (distributions | {"minillm"}):
            others.add(top)
    assert {"nbdev", "IPython", "pytest", "ruff"} & others
    name = "minillm" if module == "__init__" else f"minillm.{module}"
    if module == "__main__":
        pytest.skip("it runs the command line; test_cli.py runs it")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(sorted(others)), name],
        capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_requirement_has_its_reason():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    for key in ("requirements", "dev_requirements"):
        block = text.split(f"\n{key} =\n")[1].split("\n\n")[0].splitlines()
        assert block[0].lstrip().startswith("#"), "a reason comes first"
        assert sum(not s.lstrip().startswith("#") for s in block) >= 5


def test_constraints_agree_with_the_ranges():
    from packaging.requirements import Requirement

    pins = {}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            name = re.sub(r"[-_.]+", "-", pin.name).lower()
            pins.setdefault(name, []).append(pin)
    cfg = settings()
    wanted = cfg["requirements"].split() + cfg["dev_requirements"].split()
    for line in wanted:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not pinned: run make constraints"
        for pin in pins[name]:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version, True), pin
    assert [p.specifier for p in pins["torch"]] == ["==2.13.0"]


# One place for the name, the version and the address.


def test_the_address_is_one_setting():
    """The address is not decided: OWNER stands in settings.ini, once."""
    cfg = settings()
    assert cfg["user"] == PLACEHOLDER, (
        "the address is known now: remove this line of the test"
    )
    assert cfg["git_url"] == f"https://github.com/{cfg['user']}/{cfg['repo']}"
    address = re.compile(rf"(github\.com/|//){PLACEHOLDER}\b")
    for path in tracked_files():
        if path.name == "_modidx.py":  # nbdev writes it from the setting
            continue
        if path.suffix in {".ipynb", ".py", ".md", ".yml", ".cff", ".toml"}:
            if path == Path(__file__):
                continue
            text = path.read_text(encoding="utf-8")
            assert not address.search(text), f"{path.name} repeats the address"


def test_the_version_is_one_setting():
    version = settings()["version"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == version, done.stderr
    import minillm

    assert minillm.__version__ == version
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in cff


def test_no_stray_files_are_tracked():
    suffixes = {
        ".safetensors", ".pt", ".pth", ".bin", ".pkl", ".npy", ".pyc",
        ".png", ".pdf", ".aux",
    }  # fmt: skip
    for path in tracked_files():
        assert path.suffix not in suffixes, path
        if path.exists():
            assert path.stat().st_size < 1_000_000, f"{path} is over 1 MB"


def test_notebook_times_are_of_these_notebooks():
    path = ROOT / "nbs" / "results" / "notebook_times.json"
    times = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    there = {n.removeprefix("nbs/").removesuffix(".ipynb") for n in NAMES}
    assert times.keys() == there, "run tools/measure_notebooks.py again"
    assert all(0 < t < 90 for t in times.values())


def test_toc_lists_every_notebook():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:root|file): *(\S+)", toc))
    there = {n.removesuffix(".ipynb") for n in NAMES}
    assert listed == there
