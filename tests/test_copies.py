"""Scripts share blocks of code, copied word for word. This file compares the copies.

    python tests/test_copies.py --sync dpo.py           carries dpo.py's blocks into the other scripts that have them

A script has the method, `main`, its own helpers, the ruler line, blocks, and the call of `main`. A block reaches from
its marker line, `# ---- NAME: ...`, to the next one. Blocks stand in a fixed order. A script has each block whole or
not at all. The ruler line, with comments below it, and the call of `main` are compared and carried as blocks too.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ORDER = "preferences reference demonstrations rewards rollouts judges scores sampling answers log-probabilities evaluation".split()
ORDER += "data rows models runs training".split()
CALL = '\n\n\nif __name__ == "__main__":\n'


def scripts(folder: Path) -> list:
    return sorted(folder.glob("*.py"))


def split(script: Path) -> tuple:
    """A script's text above the ruler line, and the blocks from there on, {name: text}. ValueError: other structure."""
    text = script.read_bytes().decode("utf-8")  # read_text would change line endings
    above, *below = re.split(r"(?m)^(?=# ====)", text)
    if len(below) != 1:
        raise ValueError(f"{script.name}: needs one ruler line, # ====")
    below, call, body = below[0].rpartition(CALL)
    if not re.fullmatch(r"(    .*\n)+", body) or " main(args)\n" not in body:
        raise ValueError(f"{script.name}: must end with the call of main, below two empty lines")
    ruler, *blocks = re.split(r"(?m)^(?=# ---- )", below)
    names = [re.sub(r"# ---- ([\w-]+): \S.*", r"\1", block.split("\n")[0]) for block in blocks]
    if not blocks or names != [name for name in ORDER if name in names]:
        found, order = ", ".join(names), ", ".join(ORDER)
        raise ValueError(f"{script.name}: has the blocks {found}; allowed, in this order: {order}")
    if not re.fullmatch(r"(# .*\n)+", ruler):
        raise ValueError(f"{script.name}: has something else than comments between the ruler line and the first block")
    blocks = [block.removesuffix("\n\n\n") for block in blocks]
    return above, {"ruler": ruler, **dict(zip(names, blocks)), "call of main": call + body}


def drift(folder: Path) -> list:
    """One sentence for each block whose copies differ, and for each script that has another structure."""
    copies, found = {}, []  # copies: name -> text -> the scripts that have it
    for script in scripts(folder):
        try:
            for name, block in split(script)[1].items():
                copies.setdefault(name, {}).setdefault(block, []).append(script.name)
        except ValueError as error:
            found.append(str(error))
    for name, versions in copies.items():
        if len(versions) > 1:
            found.append(f"{name} differs: {' | '.join(map(', '.join, versions.values()))}")
    return found


def sync(source: Path) -> list:
    """Writes the blocks of source into the scripts beside it that have them. Returns each change as "SCRIPT: BLOCK"."""
    parts, changed = {script: split(script) for script in scripts(source.parent)}, []
    for script, (above, blocks) in parts.items():
        theirs = {name: parts[source][1].get(name, block) for name, block in blocks.items()}
        if theirs != blocks:
            ruler, *middle, call = theirs.values()
            script.write_bytes((above + ruler + "\n\n\n".join(middle) + call).encode("utf-8"))
            changed += [f"{script.name}: {name}" for name in blocks if theirs[name] != blocks[name]]
    return changed


def command(argv: list) -> int:
    """Exit code 0: all copies are equal; 1: they are not, or a script has another structure; 2: a wrong command."""
    names = [script.name for script in scripts(REPO)]
    if argv and not (len(argv) == 2 and argv[0] == "--sync" and Path(argv[1]).name in names):
        usage = "usage: python tests/test_copies.py [--sync FILE], where FILE is one of"
        print(usage, ", ".join(names), file=sys.stderr)
        return 2
    if argv:
        try:
            print("\n".join(sync(REPO / Path(argv[1]).name) or ["nothing to carry over"]))
        except ValueError:
            print("nothing was written")
    found = drift(REPO)
    print("\n".join(found or ["all copies are equal"]))
    return 1 if found else 0


# ----------------------------------------------------------------------------------------------- tests of the scripts


def test_blocks_are_equal_and_in_order():
    found = drift(REPO)
    assert not found, "\n  ".join(
        ["python tests/test_copies.py --sync FILE carries FILE's blocks into the others", *found]
    )


def test_every_planted_bug_still_has_its_place():
    from mutations import MUTATIONS

    places = [(script, text) for script, text, bug, _ in MUTATIONS if (REPO / script).read_text().count(text) != 1]
    assert not places, "the text of a bug in tests/mutations.py must stand once in its script"


ONE_METHOD = [script for script in scripts(REPO) if script.name != "gridworld.py"]  # which has three


@pytest.mark.parametrize("script", ONE_METHOD, ids=lambda script: script.name)
def test_main_stands_directly_below_the_method(script):
    above, _ = split(script)
    head, method, own = re.split(r"(?m)^# -{20,} .*\n", above)
    assert re.findall(r"(?m)^# -{20,} (.*)", above) == ["the method", f"{script.name} alone"]
    assert "\ndef " not in head and "\ndef main(" not in own
    lines = method.rstrip().split("\n")
    (start,) = (i for i, line in enumerate(lines) if line.startswith("def main(args"))
    assert all(line.startswith("    ") or not line for line in lines[start + 1 :]), "something stands below main"
    assert head.count("\n") + 1 + len(lines) <= (560 if script.name in ("ppo.py", "grpo.py") else 420)


# ------------------------------------------------------------------------------------------------- tests of this tool

TOP = '"""A script."""\n\n\ndef main(args):\n    print(f(args))\n\n'
RULER = "# ======== every block below is the same\n# in all scripts\n"
END = f"{CALL}    main(args)\n"
BLOCKS = {
    "data": "# ---- data: of a run\n\n\n# why\n@cache\ndef f(x):\n    return x  # as it is\n\n\n",
    "rows": "# ---- rows: of it\n\n\nROWS = []\n\n\n",
    "runs": "# ---- runs: of all\n\n\ndef g():\n    pass",
}


@pytest.fixture
def folder(tmp_path):
    """A copy of this tool beside two scripts with three blocks each, and one with two of them."""
    text = TOP + RULER + "".join(BLOCKS.values()) + END
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "b.py").write_text(text.replace("A script", "Another"))
    (tmp_path / "c.py").write_text(text.replace(BLOCKS["rows"], ""))
    (tmp_path / "tests").mkdir()
    shutil.copy(__file__, tmp_path / "tests/test_copies.py")
    return tmp_path


def change(script: Path, old: str, new: str):
    """Replaces a text of the script, with the line endings as given."""
    text = script.read_bytes().decode()
    assert old in text
    script.write_bytes(text.replace(old, new).encode())


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


@pytest.mark.parametrize(
    "part, old, new",
    [
        ("data", "# why\n", ""),
        ("data", "  # as it is", ""),
        ("data", "return x", "return  x"),
        ("data", "it is\n", "it is\r\n"),
        ("ruler", RULER, "# ======== every block below is the same\n"),
        ("call of main", "    main(args)", "    if args:\n        main(args)"),
    ],
)
def test_a_copy_that_differs_is_found_and_mended(part, old, new, folder):
    assert drift(folder) == [] and sync(folder / "a.py") == []
    before = contents(folder)
    change(folder / "b.py", old, new)
    changed = contents(folder)
    assert drift(folder) == [f"{part} differs: a.py, c.py | b.py"]
    assert sync(folder / "a.py") == [f"b.py: {part}"] and contents(folder) == before
    (folder / "b.py").write_bytes(changed["b.py"])
    assert sync(folder / "b.py") == [f"a.py: {part}", f"c.py: {part}"] and drift(folder) == []
    assert contents(folder)["a.py"] == changed["b.py"].replace(b"Another", b"A script")


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        (BLOCKS["data"] + BLOCKS["rows"], BLOCKS["rows"] + BLOCKS["data"], "has the blocks rows, data, runs"),
        (BLOCKS["rows"], 2 * BLOCKS["rows"], "has the blocks data, rows, rows, runs"),
        ("# ---- rows: of it", "# ---- rows", "has the blocks data, # ---- rows, runs"),
        (RULER, f"{RULER}x = 1\n", "has something else than comments"),
        (RULER, 2 * RULER, "needs one ruler line"),
        (END, END + "x = 1\n", "must end with the call of main"),
        (END, END.replace("    main(args)", "    run(args)"), "must end with the call of main"),
    ],
)
def test_another_structure_is_found_and_not_overwritten(old, new, complaint, folder):
    change(folder / "b.py", old, new)
    change(folder / "a.py", "# why", "# because")
    before = contents(folder)
    assert any(sentence.startswith(f"b.py: {complaint}") for sentence in drift(folder)), drift(folder)
    for source in ("a.py", "b.py"):
        with pytest.raises(ValueError, match="b.py"):
            sync(folder / source)
    assert contents(folder) == before


def test_the_command(folder):
    change(folder / "b.py", "# why", "# because")

    def run(*flags):
        words = [sys.executable, "tests/test_copies.py", *flags]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    assert run() == (1, ["data differs: a.py, c.py | b.py"])
    assert run("--sync", "d.py")[0] == run("--sync")[0] == run("a.py")[0] == 2 and drift(folder)
    assert run("--sync", "./a.py") == (0, ["b.py: data", "all copies are equal"])
    assert run("--sync", "a.py") == (0, ["nothing to carry over", "all copies are equal"])
    (folder / "b.py").write_text("x = 1\n")
    code, lines = run("--sync", "a.py")
    assert code == 1 and lines[0] == "nothing was written" and lines[1].startswith("b.py: needs one ruler line")


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
