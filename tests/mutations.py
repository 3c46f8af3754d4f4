"""Planted bugs, and the tests that must catch them.

    python tests/mutations.py                 every bug, one after the other, about ten minutes
    python tests/mutations.py dpo.py ppo.py   the bugs of these scripts

A bug is (script, text, text with the bug, arguments of pytest). It is planted in a copy of the repository, and pytest
must then report failed tests. Bugs that survive are printed, and the exit code is 1. test_copies.py checks that each
text still stands exactly once in its script.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

MUTATIONS = []


def survives(folder: Path, script: str, text: str, bug: str, selection: str) -> str:
    """Why the bug was not caught by the tests of the copy in folder, or "" if it was."""
    source = (REPO / script).read_text()
    if source.count(text) != 1:
        return f"the text stands {source.count(text)} times in the script"
    (folder / script).write_text(source.replace(text, bug))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *selection.split(" -k ", 1)[0].split(),
    ]
    if " -k " in selection:
        command += ["-k", selection.split(" -k ", 1)[1]]
    code = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (folder / script).write_text(source)
    # pytest's exit codes: 0 all passed, 1 some failed, above 1 nothing was tested
    return {0: "no test failed", 1: ""}.get(code.returncode, f"pytest ended with exit code {code.returncode}")


def main(names: list) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or mutation[0] in names]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        kept = shutil.ignore_patterns(".git", "runs", "data", "results", "*.png", "__pycache__")
        copy = Path(shutil.copytree(REPO, Path(folder) / "copy", ignore=kept))
        for script, text, bug, selection in chosen:
            reason = survives(copy, script, text, bug, selection)
            survivors += bool(reason)
            print(f"{'SURVIVES' if reason else 'caught':8}  {script}: {bug.strip().splitlines()[0]}", flush=True)
            if reason:
                print(f"          {reason}: pytest {selection}", flush=True)
    print(f"{len(chosen)} bugs, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
