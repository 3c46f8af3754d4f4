"""Scripts share code as blocks of text, copied word for word. This file compares the copies, and carries one script's blocks into the others:

    python tests/test_copies.py --sync dpo.py

A script has the method, then `main`, its own helpers, a ruler line, blocks, and the call of `main`. A block reaches from its marker line,
`# ---- NAME: ...`, to the next one. The order of blocks is fixed; a script has each block whole or not at all.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FIRST_DRAFT = {"gridworld.py", "grpo.py", "ppo.py", "rlaif.py"}  # without blocks; test_first_draft.py compares them
ORDER = "preferences reference scores log-probabilities data rows models runs".split()
RULER = f"# {'=' * 36} below this line, every block stands word for word in all scripts that have it ===="
END = '\n\n\nif __name__ == "__main__":\n    main(args)\n'


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # read_text would change line endings


def scripts(folder: Path) -> list:
    return sorted(path for path in folder.glob("*.py") if path.name not in FIRST_DRAFT)


def split(text: str) -> tuple:
    """The text up to the ruler line, and the blocks below it as {name: text}. ValueError: the file has another structure."""
    above, ruler, below = text.partition(f"\n{RULER}\n")
    if not ruler or "\n# ====" in above + below:
        raise ValueError("needs one ruler line, as in the other scripts")
    if not below.endswith(END):
        raise ValueError("must end with the call of main, after two empty lines")
    before, *parts = re.split(r"(?m)^(?=# ---- )", below.removesuffix(END))
    names = [re.match(r"# ---- ([\w-]+): \S|", part)[1] for part in parts]
    if before or not names or names != [name for name in ORDER if name in names]:
        raise ValueError(
            f"its blocks are {', '.join(map(str, names))}; they must be of, and in the order: {', '.join(ORDER)}"
        )
    return above + ruler, dict(zip(names, parts))


def drift(folder: Path) -> list:
    """One sentence for each block whose copies differ, and for each script with another structure."""
    copies, found = {name: {} for name in ORDER}, []  # name -> text -> the scripts that have it
    for path in scripts(folder):
        try:
            for name, block in split(read(path))[1].items():
                copies[name].setdefault(block, []).append(path.name)
        except ValueError as error:
            found.append(f"{path.name}: {error}")
    for name, versions in copies.items():
        if len(versions) > 1:
            found.append(f"block {name} differs: {' | '.join(map(', '.join, versions.values()))}")
    return found


def sync(source: Path) -> list:
    """Writes the blocks of source into the scripts beside it that have them. Returns what changed, as "SCRIPT: BLOCK"."""
    theirs, changed = split(read(source))[1], []
    for path in scripts(source.parent):
        above, blocks = split(read(path))
        names = [name for name in blocks if blocks[name] != theirs.get(name, blocks[name])]
        if names:
            path.write_bytes((above + "".join((blocks | {n: theirs[n] for n in names}).values()) + END).encode("utf-8"))
        changed += [f"{path.name}: {name}" for name in names]
    return changed


def command(argv: list) -> int:
    """Exit code 0: all copies are equal; 1: they are not; 2: a wrong command."""
    if argv:
        if argv[0] != "--sync" or len(argv) != 2 or Path(argv[1]).name not in [path.name for path in scripts(REPO)]:
            names = ", ".join(path.name for path in scripts(REPO))
            print(f"usage: python tests/test_copies.py [--sync FILE], where FILE is one of {names}", file=sys.stderr)
            return 2
        try:
            print("\n".join(sync(REPO / Path(argv[1]).name) or ["nothing to carry over"]))
        except ValueError as error:
            print(f"nothing more was written: a script {error}")
    found = drift(REPO)
    print("\n".join(found or ["all copies are equal"]))
    return 1 if found else 0
