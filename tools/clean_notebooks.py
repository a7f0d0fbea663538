"""Strip outputs and stray metadata from notebooks; tags stay.

    python tools/clean_notebooks.py            clean every notebook in nbs/
    python tools/clean_notebooks.py --check    say which are not clean, exit 1

nbdev_clean alone keeps outputs, or with `clear_all` drops the tags that the
book's build reads. This keeps what the project wants: sources, cell ids, tags.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notebooks() -> list[Path]:
    """List every notebook of the book, the solutions included."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in found if ".ipynb_checkpoints" not in p.parts]


def cleaned(text: str) -> str:
    """Return a notebook's JSON as it is committed."""
    nb = json.loads(text)
    for cell in nb["cells"]:
        tags = cell.get("metadata", {}).get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
    nb["metadata"] = {
        "kernelspec": {
            "display_name": "python3",
            "language": "python",
            "name": "python3",
        }
    }
    nb["nbformat"], nb["nbformat_minor"] = 4, 5
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    dirty = []
    for path in notebooks():
        text = path.read_text(encoding="utf-8")
        if (clean := cleaned(text)) != text:
            dirty.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(clean, encoding="utf-8", newline="\n")
    for name in dirty:
        print(("not clean: " if "--check" in sys.argv else "cleaned ") + name)
    return 1 if dirty and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
