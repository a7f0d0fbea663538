"""Sphinx extension that turns nbdev notebooks into pages of the book.

- nbdev's directive lines leave the page, hidden cells vanish, an exported cell
  says which module it lands in, and `eval: false` cells are not executed.
- A figure and the caption printed below it become one numbered figure.
- Version, authors and the repository's address come from settings.ini.
- The execution cache lives in a folder named after the package's code.
- Chapters are numbered 1, 2, ..., other parts as book_numbering says, alike in
  HTML and PDF. MathJax is copied from a wheel, so pages need no network.

It does not execute notebooks; MyST-NB or tools/build_book.py does.
"""

from __future__ import annotations

import configparser
import hashlib
import html
import importlib.util
import json
import platform
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.writers.latex import LaTeXTranslator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|.*(?:\n|\Z)", re.MULTILINE)
ALT_COMMENT = re.compile(r"<!--\s*figure-alt:\s*(.*?)\s*-->", re.DOTALL)
logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- notebooks
def read_settings(root: Path = ROOT) -> dict[str, str]:
    """Return settings.ini's section, the one place for project facts."""
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def code_hash(root: Path = ROOT) -> str:
    """Hash all that outputs depend on besides the notebooks' own cells."""
    digest = hashlib.sha256(platform.python_version().encode())
    lib = root / read_settings(root)["lib_path"]
    for path in [*sorted(lib.rglob("*.py")), root / "constraints.txt"]:
        if path.exists():
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_path(root: Path = ROOT) -> Path:
    """Return the execution cache's folder for the code as it is now."""
    return root / "_build" / ".jupyter_cache" / code_hash(root)


def directives(source: str) -> dict[str, str]:
    """Return a cell's directives: {"export": "", "eval": "false"}."""
    found = {}
    for line in DIRECTIVE.findall(source):
        name, _, value = (
            line.strip().lstrip("#").strip()[1:].strip().partition(" ")
        )
        found[name.rstrip(":")] = value.strip()
    return found


def strip_directives(source: str) -> str:
    """Return a cell's source without its directive lines."""
    return DIRECTIVE.sub("", source).strip("\n")


def prepare(notebook: dict) -> dict:
    """Translate nbdev's directives into tags that Jupyter tools know.

    Changes metadata alone, never the code that runs, and returns its argument.
    The cache's keys cover tags: whoever executes must prepare the same way.
    """
    module, lib = "", read_settings()["lib_path"]
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        found = directives("".join(cell["source"]))
        module = found.get("default_exp", module)
        tags = list(cell["metadata"].get("tags", []))
        code = strip_directives("".join(cell["source"]))
        if "hide" in found or (found and not code.strip()):
            tags.append("remove-cell")
        if found.get("echo") == "false":
            tags.append("remove-input")
        if found.get("eval") == "false":
            tags.append("skip-execution")
        if tags:
            cell["metadata"]["tags"] = sorted(set(tags))
        for name in ("export", "exporti", "exports"):
            if name in found and (found[name] or module):
                target = f"{lib}.{found[name] or module}"
                cell["metadata"]["exported_to"] = target
    return notebook


def clean_copy(notebook: dict) -> dict:
    """Return a notebook for readers: the same cells, no directives."""
    cells = []
    for cell in notebook["cells"]:
        cell = dict(cell)
        if cell["cell_type"] == "code":
            source = strip_directives("".join(cell["source"]))
            if not source.strip():
                continue
            cell["source"] = source.splitlines(keepends=True)
            tags = cell["metadata"].get("tags")
            cell["metadata"] = {"tags": tags} if tags else {}
        cells.append(cell)
    return {**notebook, "cells": cells}


# ------------------------------------------------------------ configuration
def configure(app: Sphinx, config) -> None:
    """Take what settings.ini knows, and point MyST-NB at its cache."""
    facts = read_settings()
    config.author = facts["author"]
    config.copyright = facts["copyright"]
    config.version = config.release = facts["version"]
    config.nb_execution_cache_path = str(cache_path())
    theme = dict(config.html_theme_options or {})
    theme["repository_url"] = facts["git_url"]
    theme["repository_branch"] = facts["branch"]
    config.html_theme_options = theme
    if facts["user"] != "OWNER":  # no canonical links to a placeholder
        config.html_baseurl = facts["doc_host"] + facts["doc_baseurl"] + "/"
    config.html_static_path = [str(HERE / "static")]
    config.mathjax_path = "mathjax/tex-chtml.js"
    elements = dict(config.latex_elements or {})
    for name in ("fontenc", "fontpkg", "preamble", "maketitle"):
        text = (HERE / "latex" / f"{name}.tex").read_text(encoding="utf-8")
        for key in ("author", "copyright", "version", "git_url"):
            value = facts[key].replace("_", r"\_")
            text = text.replace(f"@{key}@", value)
        elements[name] = text
    config.latex_elements = elements


def mathjax_folder() -> Path:
    """Find MathJax in the wheel that ships it."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or not spec.origin:
        raise ExtensionError(
            "the package sphinx-mathjax-offline is missing; "
            "install it with: pip install -e '.[dev]'"
        )
    return Path(spec.origin).parent / "static" / "mathjax"


# ------------------------------------------------------------------ reading
def prepare_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """Prepare a notebook's text before MyST-NB parses it."""
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = json.dumps(
            prepare(json.loads(source[0])), ensure_ascii=False
        )


def elements_named(tree: nodes.Element, name: str) -> list[nodes.container]:
    """List MyST-NB's containers of one kind."""
    found = tree.findall(nodes.container)
    return [n for n in found if n.get("nb_element") == name]


class CleanCells(SphinxTransform):
    """Take directive lines out of shown code and mark exported cells."""

    default_priority = 200

    def apply(self, **kwargs: object) -> None:
        for cell in elements_named(self.document, "cell_code"):
            for part in elements_named(cell, "cell_code_source"):
                for block in list(part.findall(nodes.literal_block)):
                    text = strip_directives(block.astext())
                    block.rawsource = text
                    block.children = [nodes.Text(text)]
                target = cell["cell_metadata"].get("exported_to")
                if target:
                    part.insert(0, export_mark(target))
                    part["classes"].append("exported")


def export_mark(target: str) -> list[nodes.raw]:
    """Return the quiet line that names an exported cell's module."""
    shown = html.escape(target)
    latex = target.replace("_", r"\_")
    return [
        nodes.raw(
            "",
            f'<div class="exported-to">exported to <code>{shown}</code></div>',
            format="html",
        ),
        nodes.raw("", rf"\bookexported{{{latex}}}", format="latex"),
    ]


class CaptionFigures(SphinxTransform):
    """Join a drawing and the caption printed after it into one figure."""

    default_priority = 205

    def apply(self, **kwargs: object) -> None:
        count = 0
        slug = re.sub(r"[^a-z0-9]+", "-", self.env.docname.lower())
        for output in elements_named(self.document, "cell_code_output"):
            bundles = elements_named(output, "mime_bundle")
            for drawing, words in zip(bundles, bundles[1:]):
                caption, alt = self.caption_of(words)
                images = list(drawing.findall(nodes.image))
                if caption is None or not images:
                    continue
                count += 1
                for image in images:
                    image["alt"] = alt
                drawing.children = [
                    part
                    for part in drawing.children
                    if part["mime_type"] != "text/plain"
                ]
                figure = nodes.figure(ids=[f"{slug}-figure-{count}"])
                figure.source, figure.line = drawing.source, drawing.line
                drawing.replace_self(figure)
                figure += [drawing, caption]
                words.parent.remove(words)

    @staticmethod
    def caption_of(
        bundle: nodes.container,
    ) -> tuple[nodes.caption | None, str]:
        """Return a caption node and the alternative text, if this is one."""
        for part in bundle.children:
            if part["mime_type"] != "text/markdown":
                continue
            found = ALT_COMMENT.search(
                "\n".join(child.astext() for child in part.findall(nodes.raw))
            )
            paragraphs = list(part.findall(nodes.paragraph))
            if found and paragraphs:
                children = paragraphs[0].children
                if len(children) == 1 and isinstance(
                    children[0], nodes.emphasis
                ):
                    children = children[0].children
                caption = nodes.caption("", "", *children)
                return caption, html.unescape(found[1])
        return None, ""


# ---------------------------------------------------------------- numbering
def numbered_parts(app: Sphinx) -> list[tuple[str, dict[str, str]]]:
    """List the parts: caption, and each document's number as text."""
    site_map = app.config.external_site_map
    parts = []
    for tree in site_map.root.subtrees:
        form = app.config.book_numbering.get(tree.caption, "{n}")
        names = [re.sub(r"\.(ipynb|md)$", "", doc) for doc in tree.files()]
        numbers = {
            name: form.format(n=i, letter=chr(ord("A") + i - 1))
            for i, name in enumerate(names, first_number(names))
        }
        parts.append((tree.caption or "", numbers))
    return parts


def first_number(names: list[str]) -> int:
    """Number a part from 0 when it opens with a page named index."""
    return 0 if names[0].endswith("/index") else 1


def assign_section_numbers(
    self: TocTreeCollector, env: BuildEnvironment
) -> list[str]:
    """Number chapters and their sections; return the documents that changed.

    Takes the place of Sphinx's method, which knows whole numbers alone.
    """
    old, env.toc_secnumbers = env.toc_secnumbers, {}

    def walk(items: nodes.Element, prefix: tuple, numbers: dict) -> None:
        for i, item in enumerate(items.children, 1):
            number = (*prefix, i) if len(prefix) < 2 else ()
            reference = next(item[0].findall(nodes.reference))
            reference["secnumber"] = number or None
            numbers[reference["anchorname"]] = number
            for nested in item.children[1:]:
                if isinstance(nested, nodes.bullet_list):
                    walk(nested, number or prefix, numbers)

    for _, labels in numbered_parts(env.app):
        for docname, label in labels.items():
            if docname not in env.tocs:
                continue
            numbers = env.toc_secnumbers.setdefault(docname, {})
            top = env.tocs[docname][0]
            reference = next(top[0].findall(nodes.reference))
            reference["secnumber"] = (label,)
            numbers[reference["anchorname"]] = (label,)
            env.titles[docname]["secnumber"] = (label,)
            for nested in top.children[1:]:
                if isinstance(nested, nodes.bullet_list):
                    walk(nested, (label,), numbers)
    return [d for d, n in env.toc_secnumbers.items() if n != old.get(d)]


def number_my_way(app: Sphinx) -> None:
    """Install the numbering, after every other extension has patched it."""
    for kind in (TocTreeCollector, *TocTreeCollector.__subclasses__()):
        kind.assign_section_numbers = assign_section_numbers


# -------------------------------------------------------------------- LaTeX
class FoldedCode(SphinxPostTransform):
    """Leave code that HTML folds away out of the PDF; outputs stay."""

    default_priority = 3
    formats = ("latex",)

    def run(self, **kwargs: object) -> None:
        for cell in elements_named(self.document, "cell_code"):
            if (
                "input" in cell.get("hide_mode", "")
                or cell.get("hide_mode") == "all"
            ):
                for part in elements_named(cell, "cell_code_source"):
                    part.parent.remove(part)


class FrontMatter(SphinxPostTransform):
    """Make the front page an unnumbered chapter of the PDF.

    Sphinx drops the root's title in favour of the book's and promotes its
    sections to chapters; here they stay sections, in a chapter of their own.
    """

    default_priority = 2
    formats = ("latex",)

    def run(self, **kwargs: object) -> None:
        root = next(self.document.findall(nodes.section), None)
        if root is None or not any(
            isinstance(n, nodes.compound) and "toctree-wrapper" in n["classes"]
            for n in root.findall(nodes.compound)
        ):
            return
        front = nodes.section(ids=["front-matter"])
        front += root[0].deepcopy()
        for child in list(root.children[1:]):
            if isinstance(child, nodes.compound):
                continue
            root.remove(child)
            front += child
        # the toctrees may sit in the last section: chapters go to the top
        for tree in list(front.findall(nodes.compound)):
            if "toctree-wrapper" in tree["classes"]:
                tree.parent.remove(tree)
                root += tree
        root.insert(1, front)
        root.insert(1, nodes.raw("", r"\bookfrontmatter", format="latex"))
        root.insert(3, nodes.raw("", r"\bookmainmatter", format="latex"))


class BookLaTeXTranslator(LaTeXTranslator):
    """LaTeX with a part page before the first chapter of each part."""

    def __init__(self, document: nodes.document, *args: object) -> None:
        document["contentsname"] = None  # else the first part's caption
        super().__init__(document, *args)

    def visit_start_of_file(self, node: nodes.Element) -> None:
        app = self.builder.app
        for caption, labels in numbered_parts(app):
            if caption and node["docname"] == next(iter(labels), None):
                form = app.config.book_numbering.get(caption, "{n}")
                number = form.format(
                    n=r"\arabic{chapter}", letter=r"\Alph{chapter}"
                )
                before = first_number(list(labels)) - 1
                self.body.append(
                    f"\n\\bookpart{{{self.escape(caption)}}}{{{number}}}{{{before}}}\n"
                )
                if (
                    caption in app.config.book_numbering
                ):  # contents: titles alone
                    self.body.append(
                        "\\addtocontents{toc}{\\protect"
                        "\\setcounter{tocdepth}{0}}\n"
                    )
        super().visit_start_of_file(node)

    def astext(self) -> str:
        return super().astext().replace("\ufffd", r"\bookfffd{}")


# --------------------------------------------------------------------- HTML
def finish_html(app: Sphinx, error: Exception | None) -> None:
    """Copy MathJax, and clean the notebooks that readers can download."""
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    source, target = mathjax_folder(), out / "_static" / "mathjax"
    for part in (
        "tex-chtml.js",
        "output/chtml/fonts/woff-v2",
        "input/tex/extensions",
    ):
        if (target / part).exists():
            continue
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        else:
            shutil.copyfile(source / part, target / part)
    for path in (out / "_sources").rglob("*.ipynb"):
        notebook = clean_copy(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("book_numbering", {}, "env", [dict])
    app.connect("config-inited", configure, priority=100)
    app.connect("builder-inited", number_my_way)
    app.connect("source-read", prepare_source)
    app.connect("build-finished", finish_html, priority=900)
    app.add_transform(CleanCells)
    app.add_transform(CaptionFigures)
    app.add_post_transform(FoldedCode)
    app.add_post_transform(FrontMatter)
    app.set_translator("latex", BookLaTeXTranslator, override=True)
    app.add_css_file("custom.css", priority=900)
    return {"version": "1", "parallel_read_safe": True}
