"""The scripts share functions by copying them. This file keeps the copies equal, and carries a fix from one script into the others:

    python tests/test_copies.py --sync sft.py     every other script gets sft.py's version of each function that it shares with sft.py

A definition is a top-level function or class with its decorators, the comment lines directly above it and every comment inside it. `Args`, other
classes whose name ends in Args, and `main` are each script's own. Statements between the definitions are not compared.
"""

import ast
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def scripts(folder: Path) -> list:
    return sorted(folder.glob("*.py"))


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # not read_text, which would change line endings


def definitions(text: str) -> dict:
    """name -> (first line, one past the last line), counted from 0, of each definition that copies share, in the order of the file."""
    lines, found = text.split("\n"), {}
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name == "main" or node.name.endswith("Args"):
            continue
        first, end = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1, node.end_lineno
        while first and lines[first - 1].startswith("#"):
            first -= 1
        for i in range(end, len(lines)):  # the parser does not see comments after the last statement
            if lines[i].strip() and not lines[i].lstrip().startswith("#") or lines[i].startswith("#"):
                break
            end = i + 1 if lines[i].strip() else end
        assert node.name not in found, f"{node.name} is defined twice in one script"
        found[node.name] = first, end
    return found


def sources(text: str) -> dict:
    """name -> source of each definition."""
    lines = text.split("\n")
    return {name: "\n".join(lines[first:end]) for name, (first, end) in definitions(text).items()}


def drift(folder: Path) -> list:
    """One sentence for each definition that differs between two scripts, and for each pair of scripts that orders them differently."""
    all_sources, found = {path.name: sources(read(path)) for path in scripts(folder)}, []
    for name in sorted({name for s in all_sources.values() for name in s}):
        versions = {}
        for script, s in all_sources.items():
            if name in s:
                versions.setdefault(s[name], []).append(script)
        if len(versions) > 1:
            found.append(f"{name} differs: {' | '.join(', '.join(v) for v in versions.values())}")
    names = list(all_sources)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            in_a, in_b = [n for n in all_sources[a] if n in all_sources[b]], [n for n in all_sources[b] if n in all_sources[a]]
            first = next(((x, y) for x, y in zip(in_a, in_b) if x != y), None)
            if first:
                found.append(f"order differs: where {a} has {first[0]}, {b} has {first[1]} (of the definitions that both have)")
    return found


def sync(source: Path) -> list:
    """Carry source's version of each definition into the scripts beside it; returns what changed, as (script, name)."""
    theirs, changed = sources(read(source)), []
    for path in scripts(source.parent):
        lines, spans = read(path).split("\n"), definitions(read(path))
        for name, (first, end) in reversed(spans.items()):  # from the bottom, so that the lines above keep their numbers
            if path != source and name in theirs and "\n".join(lines[first:end]) != theirs[name]:
                lines[first:end] = theirs[name].split("\n")
                changed.append((path.name, name))
        text = "\n".join(lines)
        if text != read(path):
            ast.parse(text)
            path.write_bytes(text.encode("utf-8"))
    return sorted(changed)


# --------------------------------------------------------------------------------------------------------------------- tests


def test_copies_are_equal_and_in_the_same_order():
    found = drift(REPO)
    assert not found, "\n  ".join(["python tests/test_copies.py --sync FILE carries FILE's version into the others", *found])


A = '''"""a.py"""
import os


class Args:
    own: int = 1


if __name__ == "__main__":
    args = Args()

# ---- a ruler, no part of what follows


# why it is one
@staticmethod
def one(x):
    """The first."""
    return x  # as it came


def only_a():
    return "a"


def two():
    text = """
    # no comment
def one(x): no function
    """
    return text
    # a last word

register = one


class Three(dict):
    def go(self):
        return 3


def main():
    return "a"
'''
EDITS = {  # name: (text of A, what another version says there)
    "a comment above": ("# why it is one", "# why it is 1"),
    "a decorator": ("@staticmethod\n", ""),
    "a docstring": ("The first.", "The 1st."),
    "a comment at the end of a line": ("  # as it came", ""),
    "a comment at the end of a function": ("    # a last word", "    # a last word\n\n    # or two"),
    "a comment at the end of a function, gone": ("    # a last word\n", ""),
    "a method": ("return 3", "return 4"),
    "a string": ("# no comment", "# no  comment"),
}
OWN = {
    "Args": ("own: int = 1", "own: int = 2"),
    "main": ('def main():\n    return "a"', 'def main():\n    return "b"'),
    "statements": ("register = one", "register = two"),
    "a ruler": ("# ---- a ruler", "# ---- another ruler"),
    "a function that the other has not": ('def only_a():\n    return "a"\n\n\n', ""),
}


def put(folder: Path, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_bytes(text.encode())


def test_every_difference_is_found_and_carried_over(tmp_path):
    for what, (old, new) in EDITS.items():
        assert A.count(old) == 1, what
        other = A.replace(old, new).replace("own: int = 1", "own: int = 2").replace('"""a.py"""', '"""b.py"""')
        put(tmp_path, a=A, b=other)
        assert len(drift(tmp_path)) == 1, what
        assert len(sync(tmp_path / "a.py")) == 1, what
        assert read(tmp_path / "a.py") == A, what
        assert read(tmp_path / "b.py") == A.replace("own: int = 1", "own: int = 2").replace('"""a.py"""', '"""b.py"""'), what
        put(tmp_path, b=other)
        sync(tmp_path / "b.py")
        assert read(tmp_path / "a.py") == A.replace(old, new), what
        assert drift(tmp_path) == [], what


def test_what_is_a_scripts_own_stays_its_own(tmp_path):
    for what, (old, new) in OWN.items():
        assert A.count(old) == 1, what
        put(tmp_path, a=A, b=A.replace(old, new))
        assert drift(tmp_path) == [] and sync(tmp_path / "a.py") == [], what
        assert read(tmp_path / "b.py") == A.replace(old, new), what


def test_sync_carries_exactly_the_shared_functions_into_all_others(tmp_path):
    put(tmp_path, a="def f():\n    return 1\n\n\ndef g():\n    return 1\n", c="def f():\r\n    return 1\r\n", d="def h():\n    pass\n")
    put(tmp_path, b="x = 0\ndef g(y):\n    pass\ndef f(): return 2; return 3\nx = 1\ndef h(): pass")
    assert sync(tmp_path / "a.py") == [("b.py", "f"), ("b.py", "g"), ("c.py", "f")]
    assert read(tmp_path / "b.py") == "x = 0\ndef g():\n    return 1\ndef f():\n    return 1\nx = 1\ndef h(): pass"
    assert read(tmp_path / "c.py") == "def f():\n    return 1\n"
    assert read(tmp_path / "d.py") == "def h():\n    pass\n"
    assert sync(tmp_path / "a.py") == []


def test_another_order_is_found(tmp_path):
    put(tmp_path, a="def f(): 0\ndef g(): 0\ndef own(): 0\n", b="def g(): 0\n\n\ndef f(): 0\n", c="def other(): 0\ndef f(): 0\n")
    assert len(drift(tmp_path)) == 1 and "where a.py has f, b.py has g" in drift(tmp_path)[0]


def test_the_command(tmp_path):
    (tmp_path / "tests").mkdir()
    put(tmp_path, a="def f():\n    return 1\n", b="def f():\n    return 2\n", c="def f():\n    return 1\n")
    (tmp_path / "tests/test_copies.py").write_bytes(Path(__file__).read_bytes())
    command = lambda *flags: subprocess.run([sys.executable, "tests/test_copies.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert command().returncode == 1 and "f differs: a.py, c.py | b.py" in command().stdout
    assert command("--sync", "no.py").returncode == 2 and read(tmp_path / "b.py") == "def f():\n    return 2\n"
    assert command("--sync", "a.py").stdout.splitlines() == ["b.py: f", "all copies are equal"]
    assert command("--sync", "a.py").stdout.splitlines() == ["nothing to carry over", "all copies are equal"]


def command(argv: list) -> int:
    """Exit code 0: all copies are equal; 1: they are not; 2: a wrong command."""
    if argv:
        source = next((s for s in scripts(REPO) if argv[1:] and (argv[1] == s.name or Path(argv[1]).resolve() == s)), None)
        if argv[0] != "--sync" or len(argv) != 2 or source is None:
            names = ", ".join(script.name for script in scripts(REPO))
            print(f"usage: python tests/test_copies.py [--sync FILE], where FILE is one of {names}", file=sys.stderr)
            return 2
        changed = [f"{script}: {name}" for script, name in sync(source)]
        print("\n".join(changed or ["nothing to carry over"]))
    found = drift(REPO)
    print("\n".join(found or ["all copies are equal"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
