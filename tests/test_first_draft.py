"""The scripts that have not been rewritten share functions by copying them. The copies are equal and in the same order.

A definition is a top-level function or class with its decorators and comments. Classes whose name ends in Args, and
`main`, are each script's own. This file goes when the last of these scripts has blocks; test_copies.py compares those.
"""

import ast

import pytest
from test_copies import FIRST_DRAFT, REPO


def definitions(text: str) -> dict:
    """name -> source of each definition that copies share, in the order of the file."""
    lines, found = text.split("\n"), {}
    for node in ast.parse(text).body:
        shared = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name != "main"
        if not shared or node.name.endswith("Args"):
            continue
        first, end = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1, node.end_lineno
        while first and lines[first - 1].startswith("#"):
            first -= 1
        for i in range(end, len(lines)):  # the parser does not see comments after the last statement
            if lines[i].strip() and not lines[i].startswith((" ", "\t")):
                break
            end = i + 1 if lines[i].strip() else end
        assert node.name not in found, f"{node.name} is defined twice in one script"
        found[node.name] = "\n".join(lines[first:end])
    return found


def drift(texts: dict) -> list:
    """One sentence for each definition that differs between two scripts, and for each pair with different orders."""
    scripts, found = {script: definitions(text) for script, text in texts.items()}, []
    for a in scripts:
        for b in scripts:
            in_a, in_b = [name for name in scripts[a] if name in scripts[b]], [n for n in scripts[b] if n in scripts[a]]
            if a < b and in_a != in_b:
                found.append(f"{a} and {b} have their common definitions in different orders: {in_a}, {in_b}")
            found += [
                f"{name} differs in {a} and {b}" for name in in_a if a < b and scripts[a][name] != scripts[b][name]
            ]
    return found


def test_copies_are_equal_and_in_the_same_order():
    assert drift({script: (REPO / script).read_bytes().decode() for script in FIRST_DRAFT}) == []


TEXT = '''class Args:
    own: int = 1


# why
@staticmethod
def one(x):
    """The first."""
    return x  # as it came
    # a last word

register = one


class Two(dict):
    def go(self):
        return 3


def main():
    return "a"
'''


@pytest.mark.parametrize(
    "text", ["# why\n", "@staticmethod\n", "The first.", "  # as it came", "    # a last word\n", "3"]
)
def test_a_difference_is_found(text):
    assert TEXT.count(text) == 1 and len(drift(dict(a=TEXT, b=TEXT.replace(text, "")))) == 1


@pytest.mark.parametrize("text", ["    own: int = 1\n", "register = one\n", ' "a"'])
def test_what_is_a_scripts_own_may_differ(text):
    assert TEXT.count(text) == 1
    other = TEXT.replace(text, "    pass\n" if "own" in text else "")
    assert other != TEXT and drift(dict(a=TEXT, b=other + "\n\ndef more():\n    pass\n")) == []


def test_another_order_is_found():
    assert len(drift(dict(a="def f(): 0\ndef g(): 0\ndef own(): 0\n", b="def g(): 0\n\n\ndef f(): 0\n"))) == 1
