"""What every script keeps, checked on every script at the root of the repository, new ones included.

Each static check is a function from a script's text to a list of complaints; a test breaks a small script in each way.
What runs keep when they are killed, on several ranks and in bfloat16 is in test_storms.py; what users get wrong is in
test_faults.py.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO
from test_faults import rows_for
from test_plumbing import jsonl, refused, snapshot

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

SCRIPTS = sorted(path.name for path in REPO.glob("*.py"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
RECIPES = sorted(path.name for path in REPO.glob("recipes/*.sh") if path.name != "common.sh")
TRAINING = [script for script in SCRIPTS if script not in ("gridworld.py", "rlaif.py")]  # they train and save a model
every_script = pytest.mark.parametrize("script", SCRIPTS)


def wrong_fields(text: str) -> list:
    """Every field of Args has a docstring of its own under it, and is read somewhere, as args.NAME."""
    complaints = []
    for args in ast.parse(text).body:
        if isinstance(args, ast.ClassDef) and args.name.endswith("Args"):
            for node, below in zip(args.body, [*args.body[1:], None]):
                if isinstance(node, ast.AnnAssign):
                    name, doc = node.target.id, ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
                    if not doc.strip():
                        complaints.append(f"{args.name}.{name} has no docstring")
                    if not re.search(rf"\bargs\.{name}\b(?! =[^=])", text):
                        complaints.append(f"{args.name}.{name} is never read")
    return complaints


def wrong_header(text: str) -> list:
    """The PEP 723 block is valid and equal to pyproject.toml. A docstring follows. The oldest Python can parse it."""
    blocks = re.findall(r"(?m)^# /// ([a-zA-Z0-9-]+)$\s((?:^#(?:| .*)$\s)+)^# ///$", text)  # the expression of PEP 723
    if [kind for kind, _ in blocks] != ["script"]:
        return [f"needs one PEP 723 block `# /// script`, has {[kind for kind, _ in blocks]}"]
    try:
        header = tomllib.loads(re.sub(r"(?m)^# ?", "", blocks[0][1]))
        tree = ast.parse(text, feature_version=tuple(map(int, re.findall(r"\d+", PROJECT["requires-python"]))))
    except (tomllib.TOMLDecodeError, SyntaxError) as e:
        return [str(e)]
    keys = [key for key in ("requires-python", "dependencies") if header.get(key) != PROJECT[key]]
    complaints = [f"PEP 723 {key}: {header.get(key)}, pyproject.toml: {PROJECT[key]}" for key in keys]
    return complaints + ([] if ast.get_docstring(tree) else ["has no docstring"])


def unsafe_code(text: str) -> list:
    """No script imports another, or what would unpickle a file; torch.load gets weights_only=True, without which it
    runs what it reads; and no code comes with a checkpoint."""
    foreign = "|".join(["pickle", "dill", "cloudpickle", "joblib", "shelve", *(name[:-3] for name in SCRIPTS)])
    imports = rf"(?m)^ *(?:import .*\b(?:{foreign})\b|from (?:\.|(?:{foreign})\b).*|from torch import .*\bload\b)"
    loads = r"torch\.load\((?![^\n]*weights_only=True)"
    risky = r"\b(?:trust_remote_code|allow_pickle)\b ?=(?! ?False)"
    found = [match for pattern in (imports, loads, risky) for match in re.finditer(pattern, text)]
    return [f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in found]


def long_lines(text: str) -> list:
    """At most 120 columns, in comments and docstrings too, which `ruff format` leaves as they are."""
    return [f"line {i} has {len(line)} characters" for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]


def ruff(text: str) -> list:
    """`ruff check` and `ruff format --check`, with the settings of pyproject.toml."""
    found = []
    for command in (["check", "--quiet", "--output-format=concise"], ["format", "--check", "--quiet"]):
        words = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "script.py", "-"]
        done = subprocess.run(words, cwd=REPO, input=text, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode in (0, 1), done.stderr
        if done.returncode:
            found.append(f"ruff {command[0]} {done.stdout.replace(str(REPO), '')}")
    return found


CHECKS = [wrong_fields, wrong_header, unsafe_code, long_lines]

HEAVY = {"torch", "transformers", "datasets", "matplotlib", "wandb", "numpy"}


def help_page(path, folder, *subcommand):
    """What `--help` prints, from a folder that must stay empty; the heavy modules loaded on the way there."""
    command = [sys.executable, "-X", "importtime", str(path), *subcommand, "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.iterdir()), "--help wrote files"
    return done.stdout, HEAVY & {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}


def subcommands(page) -> list:
    """The names in braces of a usage like: gridworld.py [-h] [--seed INT] [--size {3,4}] {learn,data}"""
    usage = " ".join(page[: page.index("\n\n")].split())
    usage = re.sub(r"--[\w-]+ \{.*?\}", "", usage)  # the choices of a flag
    return [name for names in re.findall(r"\{(.*?)\}", usage) for name in re.findall(r"[\w-]+", names)]


def import_as_module(path, monkeypatch):
    """Import a script under another name, as a test or a notebook would, with a command line that is not its own."""
    name = f"imported_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["somebody", "--nonsense", "else"])
    spec.loader.exec_module(module)
    return module


# ---- tests


@every_script
@pytest.mark.parametrize("check", CHECKS)
def test_contract(script, check):
    complaints = check((REPO / script).read_text(encoding="utf-8"))
    assert not complaints, "\n  ".join([f"{script}: {check.__doc__ or check.__name__}", *complaints])


@pytest.fixture(scope="session")
def needs_ruff():
    wanted = next(name for name in PROJECT["optional-dependencies"]["test"] if name.startswith("ruff=="))
    if not importlib.util.find_spec("ruff") or f"ruff=={importlib.metadata.version('ruff')}" != wanted:
        pytest.skip(f"needs {wanted}, of the extra `test`")


@every_script
def test_layout(script, needs_ruff):
    complaints = ruff((REPO / script).read_text(encoding="utf-8"))
    assert not complaints, "\n".join(complaints)


@every_script
def test_help_answers_before_the_heavy_imports(script, tmp_path):
    page, heavy = help_page(REPO / script, tmp_path)
    assert "usage:" in page and not heavy
    for subcommand in subcommands(page):
        page, heavy = help_page(REPO / script, tmp_path, subcommand)
        assert f"{script} {subcommand}" in page and not heavy, subcommand


@every_script
def test_imported_a_script_parses_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = import_as_module(REPO / script, monkeypatch)
    assert callable(module.main) and not hasattr(module, "args")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


REQUIRED = {  # command -> the options without which it does not start; nothing acts that was not named
    **{script: ["--model", "--dataset"] for script in ("dpo", "orpo", "rpo", "reward_model")},
    **{script: ["--model", "--dataset", "--rewards"] for script in ("ppo", "grpo")},
    "sft": ["--dataset"],
    "rlaif label": ["--judge", "--dataset"],
    "rlaif revise": ["--model", "--dataset"],
    "rlaif best-of-n": ["--dataset"],
    "rlaif synthesise": ["--model"],
    "rlaif compare": ["--judge", "--dataset"],
    "rlaif audit": ["--judge", "--dataset"],
}


@pytest.mark.parametrize("command", REQUIRED)
def test_what_a_command_reads_must_be_named(command, run_script, tmp_path):
    done = run_script(*command.split(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    missing = done.stderr.partition("For full helptext")[0]
    assert sorted(re.findall(r"│ +(--[\w-]+) \[?STR\b", missing)) == sorted(REQUIRED[command])
    assert len(re.findall(r"│ +STR", missing)) == (2 if command == "rlaif compare" else 0)  # its two policies
    if " " not in command:  # they stand first in --help
        page, _ = help_page(REPO / f"{command}.py", tmp_path)
        options = re.findall(r"(?m)^│ (--[\w-]+)", page)
        assert options[: len(REQUIRED[command])] == REQUIRED[command]
        if command == "sft":
            assert options[:3] == ["--dataset", "--model", "--from-scratch"]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_without_a_reward_nothing_is_trained(name, tiny_model_dir, tmp_path, capsys):
    """--rewards without a source: no reward model of an earlier run takes its place."""
    rows = jsonl(tmp_path / "rows.jsonl", rows_for(name))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=rows, rewards=(), output_dir=str(tmp_path / "run"))
    assert "--rewards" in refused(importlib.import_module(name), capsys, **flags) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [{}, dict(model="runs/sft", from_scratch=True)])
def test_sft_starts_from_a_model_or_from_scratch(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = import_as_module(REPO / "sft.py", monkeypatch)
    with pytest.raises(SystemExit) as end:
        module.main(module.Args(dataset="rows.jsonl", **flags))
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert re.search(r"(?m)^error: .*--model\b.*--from-scratch\b", capsys.readouterr().err)


def run_alone(script: str, folder: Path, *flags) -> str:
    folder.mkdir()
    shutil.copy(REPO / script, folder)
    words = [sys.executable, "-I", script, *map(str, flags)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", TRAINING)
def test_a_copied_script_runs_alone_in_an_empty_folder(script, tiny_model_dir, tmp_path):
    """From one file, one model and one data set to a model that transformers loads. Nothing else is read or written."""
    folder, data = tmp_path / "empty", jsonl(tmp_path / "rows.jsonl", rows_for(script.removesuffix(".py")))
    flags = ["--model", tiny_model_dir("llama"), "--dataset", data, "--max-steps", 2, "--batch-size", 2]
    if script in ("ppo.py", "grpo.py"):
        flags += ["--rewards", "match:number", "--max-new-tokens", 4]
    printed = run_alone(script, folder, *flags, "--save-every", 1)
    name = script.removesuffix(".py")
    out = folder / "runs" / name
    assert sorted(path.name for path in folder.iterdir()) == sorted([script, "runs"])
    assert [path.name for path in (folder / "runs").iterdir()] == [name] and f"done: runs/{name}" in printed
    wanted = {"args.json", "metrics.jsonl", "curves.png", "config.json", "model.safetensors", "checkpoint-1"}
    assert wanted <= {path.name for path in out.iterdir()}
    args = json.loads((out / "args.json").read_text())
    assert args["script"] == script and args["finished"] and args["args"]["batch_size"] == 2
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for path in (out, out / "checkpoint-1", *([out / "value"] if name == "ppo" else [])):
        gives_scores = name == "reward_model" or path.name == "value"
        auto = AutoModelForSequenceClassification if gives_scores else AutoModelForCausalLM
        _, loading = auto.from_pretrained(path, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(path).chat_template


ALONE = {  # command -> what it leaves beside the script
    "rlaif.py label --judge MODEL --dataset ROWS --orders average --tie-margin 0 --min-mass 0": {
        "data/label/pairs.jsonl"
    },
    "gridworld.py learn --episodes 20": {"runs/gridworld/learn.png"},
    "gridworld.py data --rows 20 --test-rows 4": {"data/grid/sft.jsonl", "data/grid/test.jsonl"},
}


@pytest.mark.parametrize("command", ALONE)
def test_what_trains_no_language_model_runs_alone_too(command, tiny_model_dir, tmp_path):
    script, *flags = command.split()
    inputs = dict(
        MODEL=tiny_model_dir("llama"), ROWS=jsonl(tmp_path / "rows.jsonl", rows_for(script.removesuffix(".py")))
    )
    run_alone(script, tmp_path / "empty", *(inputs.get(flag, flag) for flag in flags))
    left = snapshot(tmp_path / "empty")
    directories = {str(Path(name).parent) for name in ALONE[command]}
    assert ALONE[command] <= {*left} and {str(Path(name).parent) for name in left} == {".", *directories}


PLACES = {  # option that names an input -> its place in the output directory
    **dict.fromkeys("model against judge reference merge_base value_model reward_model".split(), "."),
    **dict.fromkeys("dataset eval_dataset ptx_dataset".split(), "rows.jsonl"),
    **dict.fromkeys("rubric condition requests principles".split(), "any.json"),
}
ARGS = [(script.removesuffix(".py"), "Args") for script in TRAINING]
ARGS += [("rlaif", f"{name}Args") for name in "Label Revise BestOfN Synthesise Compare Audit".split()]


def inputs_in(out: Path, args) -> list:
    """(option, value) for all that a command may read from its own output directory. args: its class of arguments."""
    found = [(field.name, str(out / PLACES[field.name])) for field in fields(args) if field.name in PLACES]
    if "rewards" in args.__annotations__:
        found += [("rewards", source) for source in (str(out), f"{out}/rule.py:one=2", f"judge:{out}")]
    return found


@pytest.mark.parametrize("name, args", ARGS)
def test_what_is_read_is_not_overwritten(name, args, tiny_model_dir, tmp_path, capsys):
    """Whichever option names something in the output directory, --overwrite is refused before anything is removed."""
    script, out, model = importlib.import_module(name), tmp_path / "run", str(tiny_model_dir("llama"))
    shutil.copytree(model, out)
    (out / "rule.py").write_text("def one(prompts, **columns):\n    return [1] * len(prompts)\n")
    (out / "any.json").write_text("{}")
    jsonl(out / "rows.jsonl", rows_for(name))
    rows = jsonl(tmp_path / "rows.jsonl", rows_for(name))
    usual = dict(model=model, against=model, judge=model, dataset=rows, rewards="match:number")
    beside = dict(merge_base=dict(optimizer="ondare"), ptx_dataset=dict(ptx_coef=0.5))  # what an option needs
    beside |= dict(reward_model=dict(judge=""), condition=dict(judge="", reward_model=model))
    command = SimpleNamespace(main=script.main, Args=getattr(script, args))
    before, types = snapshot(out), {field.name: str(field.type) for field in fields(command.Args)}
    for option, value in inputs_in(out, command.Args):
        flags = usual | beside.get(option, {}) | {option: value, "output_dir": str(out), "overwrite": True}
        flags = {k: (v,) if types[k].startswith("tuple") else v for k, v in flags.items() if k in types}
        said = refused(command, capsys, **flags)
        assert "--output-dir" in said and str(out) in said, (option, said)
        assert snapshot(out) == before, option


# ---- recipes and documents


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kitchen")
    (folder / "recipes").mkdir()
    for file in [*REPO.glob("*.py"), *REPO.glob("recipes/*.sh"), *REPO.glob("recipes/*.py")]:
        shutil.copy(file, folder / file.relative_to(REPO))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_at_its_smallest(recipe, kitchen):
    env = os.environ | dict(STEPS="tiny", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(["bash", f"recipes/{recipe}"], cwd=kitchen, env=env, **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("claim: ") and "not judged (tiny)" in last


def test_a_claim_of_several_runs_has_means_ranges_and_a_count(monkeypatch):
    claim = import_as_module(REPO / "recipes" / "claim.py", monkeypatch)
    runs = [
        dict(name="seed 0", parts={"score 0.79, SFT 0.61": True, "tax -3.1": True}),
        dict(name="seed 1 avx2", parts={"score 0.82, SFT 0.61": True, "tax -2.9": False}),
    ]
    text = "score 0.80 (0.79 to 0.82), SFT 0.61; tax -3.0 (-3.1 to -2.9)"
    assert claim.spread(runs) == f"over 2 runs (seed 0; seed 1 avx2): {text}: holds in 1 of 2"
    assert "no mean" in claim.spread([runs[0], dict(name="seed 1", parts={"score 0.82": True})])


def test_what_recipes_readme_writes_is_up_to_date(monkeypatch):
    """No number of a table is written by hand, and the index of equations points at the lines where they stand."""
    script = import_as_module(REPO / "recipes" / "readme.py", monkeypatch)
    for page, name, write in script.WRITTEN:
        begin, end = script.marks(name)
        assert page.read_text().count(begin) == page.read_text().count(end) == 1, (page, name)
        there = page.read_text().partition(begin)[2].partition(end)[0].strip()
        assert there == write(), f"{page} is out of date: run python recipes/readme.py"


def test_every_recipe_has_its_row():
    """In the table of docs/recipes.md, by name, with what it showed; and a table of results, if it was measured."""
    page = (REPO / "docs/recipes.md").read_text()
    rows = dict(re.findall(r"(?m)^\| \[([\w-]+)\.sh\]\(\.\./recipes/\1\.sh\) \|.*\| (.*) \|$", page))
    assert set(rows) == {recipe.removesuffix(".sh") for recipe in RECIPES}
    scored = (REPO / "recipes/results/policies.csv").read_text().splitlines()[1:]
    measured = {line.split(",")[0] for line in scored} | {path.stem for path in REPO.glob("recipes/results/*.csv")}
    assert {name for name, holds in rows.items() if "not measured" not in holds} == measured & set(rows)


def test_both_pages_say_the_same():
    """The same sections, the same code, the same tables by the number of their rows, the same links."""
    english, chinese = ((REPO / name).read_text() for name in ("README.md", "README.zh.md"))
    for pattern in (r"(?ms)^```.*?^```$", r"(?m)^!\[.*\]\((.*)\)$", r"\]\(([\w/.-]+\.(?:py|sh))\)"):
        assert re.findall(pattern, english) == re.findall(pattern, chinese)
    for pattern in (r"(?m)^## ", r"(?m)^\|"):
        assert len(re.findall(pattern, english)) == len(re.findall(pattern, chinese))


# ---- the checks, checked

GOOD = f'''# /// script
# requires-python = "{PROJECT["requires-python"]}"
# dependencies = [
#   {json.dumps(PROJECT["dependencies"])[1:-1]}
# ]
# ///
"""A script that keeps the contract."""

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1
    """strength"""


@dataclass
class MoreArgs(Args):
    seed: int = 0
    """of everything"""


if __name__ == "__main__":
    args = tyro.cli(Args | MoreArgs, description=__doc__)

import torch


def main(args: MoreArgs):
    print(args.seed, args.beta, torch.load("x", weights_only=True))


if __name__ == "__main__":
    main(args)
'''
BREAKS = [  # (check, what the good script says, what the broken one says)
    (wrong_fields, '    """of everything"""\n', ""),
    (wrong_fields, '"""strength"""', '""" """'),
    (wrong_fields, "args.beta", "args"),
    (wrong_header, "# /// script", "# // script"),
    (wrong_header, "# dependencies = [", "# dependencies = "),
    (wrong_header, '"tyro>=1.0"', '"tyro"'),
    (wrong_header, PROJECT["requires-python"], ">=3.9"),
    (wrong_header, '"""A script that keeps the contract."""', ""),
    (wrong_header, "    print(", "    try:\n        pass\n    except* ValueError:\n        pass\n    print("),
    (unsafe_code, "import torch\n", "import sft\n"),
    (unsafe_code, "import torch\n", "from .sft import load_rows\n"),
    (unsafe_code, "import torch\n", "import torch, pickle\n"),
    (unsafe_code, ", weights_only=True", ""),
    (unsafe_code, "weights_only=True", "weights_only=True, trust_remote_code=True"),
    (unsafe_code, "import torch\n", "from torch import load\n"),
    (long_lines, "import torch\n", f"import torch  # {'x' * 110}\n"),
]


@pytest.mark.parametrize("check, old, new", BREAKS)
def test_a_broken_script_is_caught(check, old, new):
    assert GOOD.count(old) == 1 and len(SCRIPTS) == 9
    assert check(GOOD) == [] and len(check(GOOD.replace(old, new))) == 1


def test_what_ruff_catches(needs_ruff):
    clean = GOOD.replace("from typing import Literal\n", "")
    assert ruff(clean) == []
    for old, new in (("print(", f"print({'args.seed, ' * 12}"), ("import torch\n", "import torch\nimport numpy\n")):
        assert clean.count(old) == 1 and len(ruff(clean.replace(old, new))) == 1, new


def test_a_broken_script_is_caught_running(tmp_path, monkeypatch):
    folder, path = tmp_path / "empty", tmp_path / "good.py"
    folder.mkdir()
    path.write_text(GOOD.replace("beta: float = 0.1", 'beta: Literal["a", "b"] = "a"'))
    page, heavy = help_page(path, folder)
    assert not heavy and subcommands(page) == ["args", "more-args"]
    assert "--beta {a,b}" in help_page(path, folder, "more-args")[0]
    path.write_text(GOOD.replace("from dataclasses", "import torch\nfrom dataclasses"))
    assert "torch" in help_page(path, folder)[1]
    path.write_text(GOOD.replace('if __name__ == "__main__":\n    args', "if True:\n    args"))
    with pytest.raises(SystemExit):
        import_as_module(path, monkeypatch)
