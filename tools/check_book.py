"""Check the built book: one line per failure, exit code 1 if there is one.

    python tools/check_book.py [--no-pdf] [--no-browser] [--pictures FOLDER]

Looks at _build/html, _build/minillm.pdf, the LaTeX log and the executed
notebooks. Pages are loaded in headless Chromium from a local server, at the
widths of a desk and a phone. --pictures saves what the browser shows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
HTML = BUILD / "html"
PDF = BUILD / "minillm.pdf"
LATEX_LOG = BUILD / "latex" / "minillm.log"
sys.path.insert(0, str(ROOT / "_ext"))

MIN_PAGE_BYTES = 6000  # the theme alone takes some 20 kB; an error page less
MIN_ARTICLE_CHARS = 300
MIN_PDF_PAGES = 50
MAX_OVERFULL = 10.0  # points
MAX_COLUMNS = 80  # of printed output: the width of the PDF
DIRECTIVE = re.compile(r"# ?\|")
WIDTHS = {"desk": 1280, "phone": 375}


# ------------------------------------------------------------------ the book
def documents() -> list[str]:
    """List the table of contents: nbs/index, nbs/tokenization, ..."""
    text = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    return re.findall(r"^\s*(?:- file|root):\s*(\S+)", text, re.MULTILINE)


def notebook_cells(name: str) -> list[dict]:
    """Read a document's cells."""
    text = (ROOT / f"{name}.ipynb").read_text(encoding="utf-8")
    return json.loads(text)["cells"]


def title_of(name: str) -> str:
    """Return a notebook's first heading as plain text."""
    for cell in notebook_cells(name):
        if cell["cell_type"] == "markdown":
            found = re.search(
                r"^# (.+)$", "".join(cell["source"]), re.MULTILINE
            )
            if found:
                return re.sub(r"[`*_]", "", found[1]).strip()
    return ""


def plain(text: str) -> str:
    """Keep the letters and digits, case folded, to compare texts."""
    return re.sub(r"\W+", "", unicodedata.normalize("NFKC", text)).casefold()


# --------------------------------------------------------------------- pages
class Page:
    """One page's links, anchors, images and text."""

    def __init__(self, path: Path) -> None:
        from bs4 import BeautifulSoup

        self.path = path
        self.soup = BeautifulSoup(
            path.read_text(encoding="utf-8"), "html.parser"
        )
        self.anchors = {
            value
            for tag in self.soup.find_all(True)
            for value in (tag.get("id"), tag.get("name"))
            if value
        }
        self.article = self.soup.find("article") or self.soup

    def loads(self) -> Iterator[str]:
        """Yield every address that the browser fetches by itself."""
        for tag, key in (
            ("script", "src"), ("img", "src"), ("iframe", "src"),
            ("source", "src"), ("object", "data"), ("embed", "src"),
            ("video", "src"), ("audio", "src"),
        ):  # fmt: skip
            yield from (t[key] for t in self.soup.find_all(tag) if t.get(key))
        for tag in self.soup.find_all("link"):
            rel = set(tag.get("rel") or [])
            fetched = {"stylesheet", "preload", "icon", "modulepreload"}
            if rel & (fetched | {"preconnect", "dns-prefetch", "prefetch"}):
                yield tag.get("href") or ""
        for tag in self.soup.find_all("style"):
            yield from re.findall(r"url\(['\"]?([^)'\"]+)", tag.get_text())

    def links(self) -> Iterator[str]:
        """Yield every link's address."""
        yield from (a["href"] for a in self.soup.find_all("a", href=True))


def external(address: str) -> bool:
    return bool(re.match(r"(?:[a-z][a-z0-9+.-]*:)?//", address, re.IGNORECASE))


def check_pages() -> Iterator[str]:
    """Check what can be seen in the HTML files."""
    if not (HTML / "index.html").exists():
        yield "html: _build/html/index.html is not there; run make html first"
        return
    pages = {}
    for path in sorted(HTML.rglob("*.html")):
        if "_static" not in path.parts:
            pages[path.resolve()] = Page(path)
    for name in documents():
        path = (HTML / f"{name}.html").resolve()
        if path not in pages:
            yield f"html: {name} is in _toc.yml and has no page"
            continue
        page, title = pages[path], title_of(name)
        text = page.article.get_text()
        heading = page.article.find("h1")
        if not title:
            yield f"html: {name}.ipynb has no '# Title' line"
        elif heading is None or plain(title) not in plain(heading.get_text()):
            yield f"html: {name}.html lacks its title {title!r}"
        if (
            path.stat().st_size < MIN_PAGE_BYTES
            or len(text) < MIN_ARTICLE_CHARS
        ):
            yield f"html: {name}.html has only {len(text)} characters of text"
        for block in page.article.find_all(class_=["traceback", "stderr"]):
            yield f"html: {name}.html shows {block.get_text()[:60]!r}"
        if page.article.find_all(class_=["problematic", "system-message"]):
            yield f"html: {name}.html shows an error of the markup"
    for path, page in pages.items():
        yield from check_page(path, page, pages)
    yield from check_other_files()


def check_page(
    path: Path, page: Page, pages: dict[Path, Page]
) -> Iterator[str]:
    """Check one page's text, images, resources and links."""
    name = path.relative_to(HTML.resolve()).as_posix()
    if found := DIRECTIVE.search(page.soup.get_text()):
        yield f"html: {name} shows a directive: {context(page.soup, found)!r}"
    for image in page.soup.find_all("img"):
        if not (image.get("alt") or "").strip():
            yield f"html: {name}: no alt text for {image.get('src')}"
        elif re.fullmatch(r"\S+\.(svg|png|jpg)", image["alt"]):
            yield f"html: {name}: the alt text is a file name: {image['alt']}"
    for address in page.loads():
        if external(address):
            yield f"html: {name} loads {address} from the network"
        elif not address.startswith("data:"):
            target = (
                HTML / unquote(urlsplit(urljoin(f"/{name}", address)).path)[1:]
            )
            if not target.exists():
                yield f"html: {name} needs {address}, which is not there"
    seen = set()
    for address in page.links():
        parts = urlsplit(address)
        if address in seen or parts.scheme or parts.netloc or not address:
            continue
        seen.add(address)
        target = path
        if parts.path:
            target = (
                HTML
                / unquote(urlsplit(urljoin(f"/{name}", parts.path)).path)[1:]
            )
            target = (
                target / "index.html" if target.is_dir() else target
            ).resolve()
        if not target.exists():
            yield f"html: {name}: broken link {address}"
        elif parts.fragment and target in pages:
            anchor = unquote(parts.fragment)
            if anchor not in pages[target].anchors:
                yield f"html: {name}: no anchor for the link {address}"


def context(soup, found: re.Match) -> str:
    text = soup.get_text()
    return text[max(0, found.start() - 20) : found.end() + 30]


def check_other_files() -> Iterator[str]:
    """Look into the search index, downloads and style sheets."""
    index = HTML / "searchindex.js"
    if not index.exists():
        yield "html: there is no search index"
    elif DIRECTIVE.search(index.read_text(encoding="utf-8")):
        yield "html: the search index holds a directive"
    for path in sorted((HTML / "_sources").rglob("*")):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if DIRECTIVE.search(text):
                yield f"html: the download {path.name} holds a directive"
    for path in sorted((HTML / "_static").rglob("*.css")):
        for address in re.findall(
            r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^)'\"]+)",
            path.read_text(encoding="utf-8"),
        ):
            yield f"html: {path.name} loads {address} from the network"


# ----------------------------------------------------------------- notebooks
def executed(name: str) -> list[dict] | None:
    """Return a document's executed code cells from the cache, if there."""
    import nbformat
    from jupyter_cache import get_cache
    from minillm_book import cache_path, prepare

    notebook = prepare(nbformat.read(ROOT / f"{name}.ipynb", as_version=4))
    cache = get_cache(str(cache_path()))
    try:
        record = cache.match_cache_notebook(notebook)
    except KeyError:
        return None
    return cache.get_cache_bundle(record.pk).nb.cells


def check_outputs() -> Iterator[str]:
    """Check what the notebooks printed, and that nothing is stale."""
    for name in documents():
        cells = executed(name)
        if cells is None:
            yield f"outputs: {name} was not executed with this code"
            continue
        if len(cells) > 3 and not any(c.get("outputs") for c in cells):
            yield f"outputs: {name} shows no output at all"
        for cell in cells:
            for output in cell.get("outputs", []):
                kind = output["output_type"]
                if kind == "error":
                    yield f"outputs: {name} raised {output['ename']}"
                elif kind == "stream" and output["name"] == "stderr":
                    if re.search(
                        r"\w+(Warning|Error)\b|Traceback", output["text"]
                    ):
                        yield f"outputs: {name}: said {output['text'][:80]!r}"
                elif "text/plain" in output.get("data", {}):
                    lines = output["data"]["text/plain"].splitlines()
                    if set(output["data"]) == {"text/plain"}:
                        yield from check_lines(name, lines)
                if kind == "stream" and output["name"] == "stdout":
                    yield from check_lines(name, output["text"].splitlines())


def check_lines(name: str, lines: list[str]) -> Iterator[str]:
    for line in lines:
        if len(line) > MAX_COLUMNS:
            yield f"outputs: {name} prints {len(line)} columns: {line[:40]!r}"


def figures_in(name: str) -> int:
    """Count the figures that a document's cells drew."""
    return sum(
        "figure-alt:" in str(output.get("data", {}).get("text/markdown", ""))
        for cell in executed(name) or []
        if not {"remove-cell", "remove-output"}
        & set(cell["metadata"].get("tags", []))
        for output in cell.get("outputs", [])
    )


# ----------------------------------------------------------------------- PDF
def check_pdf() -> Iterator[str]:
    """Check the PDF's text and the log of the run that made it."""
    if not PDF.exists():
        yield "pdf: _build/minillm.pdf does not exist; run make pdf first"
        return
    for program in ("pdftotext", "pdfinfo"):
        if shutil.which(program) is None:
            yield f"pdf: {program} is missing; install poppler-utils"
            return
    info = subprocess.run(
        ["pdfinfo", PDF], capture_output=True, text=True
    ).stdout
    pages = int(re.search(r"^Pages:\s+(\d+)", info, re.MULTILINE)[1])
    if pages <= MIN_PDF_PAGES:
        yield f"pdf: {pages} pages, fewer than {MIN_PDF_PAGES}"
    text = subprocess.run(
        ["pdftotext", "-enc", "UTF-8", PDF, "-"], capture_output=True
    ).stdout.decode("utf-8")
    if found := DIRECTIVE.search(text):
        around = text[max(0, found.start() - 20) : found.end() + 30]
        yield f"pdf: shows a directive: {around!r}"
    body = plain(text)
    for name in documents():
        title = title_of(name)
        if body.count(plain(title)) < (1 if name.endswith("/index") else 2):
            yield f"pdf: the title {title!r} is not in contents and text"
    yield from check_pdf_figures(text)
    if not LATEX_LOG.exists():
        yield "pdf: there is no LaTeX log"
        return
    log = LATEX_LOG.read_text(encoding="utf-8", errors="replace")
    missing = sorted(set(re.findall(r"Missing character: (.+)", log)))
    for line in missing[:10]:
        yield f"pdf: missing character: {line}"
    for points, where in re.findall(
        r"Overfull \\hbox \(([\d.]+)pt too wide\)(.*)", log
    ):
        if float(points) > MAX_OVERFULL:
            yield f"pdf: a line is {points} pt too wide{where}"
    undefined = r"LaTeX Warning: (?:Hyper r|R)eference `([^']+)'[^.]*undefined"
    for label in sorted(set(re.findall(undefined, log.replace("\n", "")))):
        yield f"pdf: undefined reference {label}"
    if "There were multiply-defined labels" in log:
        yield "pdf: a label is defined twice"
    for error in re.findall(r"^! .*", log, re.MULTILINE)[:5]:
        yield f"pdf: LaTeX error {error}"


def figure_numbers(name: str) -> list[str]:
    """List the numbers below a page's figures: ["1.1", "1.2"]."""
    path = HTML / f"{name}.html"
    if not path.exists():
        return []
    labels = Page(path).article.select("figcaption .caption-number")
    return [
        re.sub(r"^\D*\s", "", label.get_text()).strip() for label in labels
    ]


def check_pdf_figures(text: str) -> Iterator[str]:
    """Compare the figures drawn, shown in HTML and printed, per chapter."""
    printed = set(
        re.findall(r"^Figure ([A-Z]?\d*\.?\d+)\b", text, re.MULTILINE)
    )
    for name in documents():
        drawn, numbers = figures_in(name), figure_numbers(name)
        if drawn != len(numbers):
            yield f"figures: {name} drew {drawn}, shows {len(numbers)}"
        for number in numbers:
            if number not in printed:
                yield f"figures: {name}: figure {number} is not in the PDF"
    tex = (BUILD / "latex" / "minillm.tex").read_text(encoding="utf-8")
    graphics = re.findall(
        r"\\sphinxincludegraphics(?:\[[^]]*\])?\{\{([^}]+)\}", tex
    )
    total = sum(figures_in(name) for name in documents())
    if len(graphics) != total:
        yield f"figures: the notebooks drew {total}, LaTeX has {len(graphics)}"
    if any(name for name in re.findall(r"\{([^{}]+)\}\.(?:png|jpg)\}", tex)):
        yield "figures: the PDF holds a bitmap, not a vector drawing"


# ------------------------------------------------------------------- browser
class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *args: object) -> None:
        pass


class Browser:
    """Headless Chromium, spoken to by its debugging protocol."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-extensions",
        "--disable-default-apps", "--hide-scrollbars", "--mute-audio",
        "--disable-dev-shm-usage", "--remote-debugging-port=0",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    )  # fmt: skip

    def __init__(self, program: str, home: str) -> None:
        self.home = Path(home)
        self.process = subprocess.Popen(
            [program, *self.FLAGS, f"--user-data-dir={home}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.count, self.events = 0, []

    async def connect(self) -> None:
        from tornado.httpclient import AsyncHTTPClient
        from tornado.websocket import websocket_connect

        note = self.home / "DevToolsActivePort"
        for _ in range(300):
            if note.exists() and len(note.read_text().split()) == 2:
                break
            if self.process.poll() is not None:
                raise RuntimeError("Chromium ended while starting")
            await asyncio.sleep(0.1)
        port = note.read_text().split()[0]
        reply = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json")
        target = next(t for t in json.loads(reply.body) if t["type"] == "page")
        self.socket = await websocket_connect(
            target["webSocketDebuggerUrl"], max_message_size=1 << 28
        )
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")

    async def send(self, method: str, **params: object) -> dict:
        """Send a command; keep the events that arrive before its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        await self.socket.write_message(json.dumps(message))
        while True:
            reply = json.loads(await self.next_message())
            if reply.get("id") == message["id"]:
                return reply.get("result", {})
            self.events.append(reply)

    async def next_message(self, timeout: float = 30) -> str:
        text = await asyncio.wait_for(self.socket.read_message(), timeout)
        if text is None:
            raise RuntimeError("Chromium closed the connection")
        return text

    async def evaluate(self, expression: str) -> object:
        reply = await self.send(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        return reply.get("result", {}).get("value")

    async def open(self, address: str) -> None:
        """Load a page and wait until MathJax and the pictures are done."""
        self.events = []
        await self.send("Page.navigate", url=address)
        while not any(
            e.get("method") == "Page.loadEventFired" for e in self.events
        ):
            self.events.append(json.loads(await self.next_message()))
        await self.evaluate(
            "(async () => { await window.MathJax?.startup?.promise;"
            " await document.fonts.ready; })()"
        )

    def complaints(self) -> Iterator[str]:
        """Yield console errors, exceptions and requests to the network."""
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if (
                method == "Log.entryAdded"
                and params["entry"]["level"] == "error"
            ):
                entry = params["entry"]
                yield f"{entry['text']} {entry.get('url', '')}".strip()
            elif (
                method == "Runtime.consoleAPICalled"
                and params["type"] == "error"
            ):
                words = [
                    str(a.get("value", a.get("description")))
                    for a in params["args"]
                ]
                yield " ".join(words)
            elif method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield details.get("exception", details).get(
                    "description", "exception"
                )
            elif method == "Network.requestWillBeSent":
                address = params["request"]["url"]
                if urlsplit(address).hostname not in {"127.0.0.1", None}:
                    yield f"asks the network for {address}"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


MEASURE = """(() => {
  const wide = document.documentElement.scrollWidth;
  const limit = document.documentElement.clientWidth;
  const bad = [...document.querySelectorAll("article *")].filter(e => {
    if (e.getBoundingClientRect().right <= limit + 1) return false;
    for (let p = e; p && p.tagName !== "ARTICLE"; p = p.parentElement) {
      const s = getComputedStyle(p);
      if (/auto|scroll|hidden|clip/.test(s.overflowX)
          || s.position === "absolute" || s.clip !== "auto") return false;
    }
    return true;
  }).map(e => e.tagName.toLowerCase() + "." + e.className).slice(0, 3);
  const count = what => document.querySelectorAll("article " + what).length;
  const math = count(".math");
  const drawn = count(".math mjx-container");
  const broken = count("mjx-merror");
  const blank = [...document.images].filter(i => i.complete && !i.naturalWidth)
    .map(i => i.src);
  return {wide, limit, bad, math, drawn, broken, blank};
})()"""


async def check_browser(program: str, pictures: Path | None) -> list[str]:
    """Load every page at both widths, and report what the browser says."""
    handler = functools.partial(Quiet, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    failures = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        browser = Browser(program, home)
        try:
            await browser.connect()
            for name in [*documents(), "search", "genindex"]:
                if not (HTML / f"{name}.html").exists():
                    continue
                for kind, width in WIDTHS.items():
                    problems = await visit(
                        browser, base, name, kind, width, pictures
                    )
                    failures += [
                        f"browser: {name} ({kind}): {p}" for p in problems
                    ]
        finally:
            browser.close()
            server.shutdown()
    return failures


async def visit(
    browser: Browser,
    base: str,
    name: str,
    kind: str,
    width: int,
    pictures: Path | None,
) -> list[str]:
    """Load one page at one width; return the problems."""
    await browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=kind == "phone",
    )  # fmt: skip
    await browser.open(f"{base}/{name}.html")
    seen = await browser.evaluate(MEASURE)
    problems = list(dict.fromkeys(browser.complaints()))
    if seen["wide"] > seen["limit"]:
        wide = f"{seen['wide']} pixels wide on a screen of {seen['limit']}"
        problems.append(
            f"{wide}: {', '.join(seen['bad']) or 'unknown element'}"
        )
    elif seen["bad"]:
        problems.append(f"cut off at the right: {', '.join(seen['bad'])}")
    if seen["drawn"] < seen["math"] or seen["broken"]:
        problems.append(
            f"{seen['drawn']} of {seen['math']} formulas drawn, "
            f"{seen['broken']} with errors"
        )
    problems += [f"picture not shown: {address}" for address in seen["blank"]]
    if pictures:
        await picture(browser, name, kind, width, pictures)
    return problems


async def picture(
    browser: Browser, name: str, kind: str, width: int, folder: Path
) -> None:
    """Save the page as the browser shows it, light and dark."""
    height = await browser.evaluate("document.documentElement.scrollHeight")
    await browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=min(int(height), 12000), deviceScaleFactor=1,
        mobile=kind == "phone",
    )  # fmt: skip
    for mode in ("light", "dark"):
        await browser.evaluate(
            f"document.documentElement.dataset.theme = '{mode}'"
        )
        await asyncio.sleep(0.6)  # side bars slide in after a change of width
        reply = await browser.send("Page.captureScreenshot")
        target = folder / f"{name.replace('/', '-')}-{kind}-{mode}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(base64.b64decode(reply["data"]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check the built book.")
    parser.add_argument("--no-pdf", action="store_true", help="skip the PDF")
    parser.add_argument(
        "--no-browser", action="store_true", help="skip Chromium"
    )
    parser.add_argument("--pictures", type=Path, help="save screenshots here")
    options = parser.parse_args(argv)
    failures = [*check_pages(), *check_outputs()]
    if not options.no_pdf:
        failures += check_pdf()
    if not options.no_browser and HTML.exists():
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        program = os.environ.get("CHROMIUM") or next(
            filter(shutil.which, names), ""
        )
        if program:
            failures += asyncio.run(check_browser(program, options.pictures))
        else:
            failures.append("browser: no Chromium; install it or set CHROMIUM")
    for failure in dict.fromkeys(failures):
        print(html.unescape(failure))
    if failures:
        print(f"{len(dict.fromkeys(failures))} checks of the book failed")
        return 1
    print(f"the book is in order: {len(documents())} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
