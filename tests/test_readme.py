"""The commands and code of README and docs, run from top to bottom in one empty folder as a new user would, with tiny
models and data sets in place of the real ones. The options, model families, line numbers and links that the pages name.
Whether the commands in the headers of the scripts can be parsed."""

import ast
import dataclasses
import http.server
import importlib
import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import tyro
from conftest import REPO
from test_contract import import_as_module

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
CHINESE = [REPO / "README.zh.md", *sorted((REPO / "docs" / "zh").glob("*.md"))]
SCRIPTS = sorted(path.stem for path in REPO.glob("*.py"))
TINY = {  # what makes a command short; given last, so that it wins
    "sft": "--max-steps 1 --batch-size 4",
    "reward_model": "--max-steps 1 --batch-size 2",
    "ppo": "--max-steps 1 --batch-size 2 --max-new-tokens 4",
    "grpo": "--max-steps 1 --batch-size 2 --num-generations 2 --max-new-tokens 4",
    "dpo": "--max-steps 1 --batch-size 2",
    "orpo": "--max-steps 1 --batch-size 2",
    "rpo": "--max-steps 1 --batch-size 2",
    "rlaif audit": "--rows 8",
    "rlaif label": "--rows 40 --max-new-tokens 64 --orders average --tie-margin 0 --min-mass 0",
    "rlaif best-of-n": "--rows 8 --max-new-tokens 64",
    "rlaif compare": "--rows 8 --max-new-tokens 4",
}


def commands(text: str) -> list:
    """The commands of a text, as words: lines that begin with `python` or `torchrun`, up to two spaces, after which an
    explanation may follow."""
    found = re.findall(r"(?m)^ *((?:python|torchrun) (?:.*\\\n)*.*)$", text)
    words = [shlex.split(re.split(r" {2,}", re.sub(r"\\\n *", "", command).strip())[0]) for command in found]
    return [command for command in words if any(word.endswith(".py") for word in command)]


def script_and_flags(words: list) -> tuple:
    """("sft", [flags]) of a command, whoever launches it."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py").split("/")[-1], words[at + 1 :]


def blocks(pages: list, language: str = "") -> list:
    """The code blocks of the pages in one language; those of the shell name none."""
    found = [block for page in pages for block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text())]
    return [text for kind, text in found if kind == language]


def saved_files(pages: list) -> dict:
    """What the pages tell the reader to save: file name -> content, all blocks of one name together."""
    files = {}
    for page in pages:
        save = r"Save\s+this\s+as\s+`([\w.]+)`(?:(?!```).)*\n```\w+\n(.*?)^```$"
        for name, text in re.findall(rf"(?ms){save}", page.read_text()):
            files[name] = files.get(name, "") + text
    return files


def local(word: str, names: dict) -> str:
    """A word of a command with what stands for a name on the hub, also as a source of --rewards: judge:NAME=WEIGHT."""
    before, name, after = re.fullmatch(r"(judge:|)(.*?)(=-?[\d.]+|)", word).groups()
    return before + names.get(name, name) + after


@pytest.fixture
def shop(tiny_model_dir, tmp_path, monkeypatch):
    """A folder with nothing in it but what stands for the hub; name on the hub -> what stands for it."""
    say = lambda role, text: dict(role=role, content=text)
    words = "right up left down four five no yes".split()
    talk = lambda i: [say("user", f"Which way is {words[i % 8]}?"), say("assistant", f"It is {words[(i + 1) % 8]}.")]
    data = {
        "capybara": [dict(messages=talk(i)) for i in range(100)],
        "binarized": [
            dict(chosen=talk(i), rejected=[talk(i)[0], say("assistant", "No.")], score_chosen=1.0, score_rejected=0.0)
            for i in range(16)
        ],
        "prompt": [dict(prompt=talk(i)[:1]) for i in range(40)],
        "gsm8k": [dict(question=f"What is {i} and {i}?", answer=f"Add them. #### {2 * i}") for i in range(16)],
    }
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    names = {
        "trl-lib/Capybara": "capybara",
        "trl-lib/ultrafeedback_binarized": "binarized",
        "trl-lib/ultrafeedback-prompt": "prompt",
    }
    hub = {name: str(tmp_path / f"{file}.jsonl") for name, file in (names | {"openai/gsm8k:main": "gsm8k"}).items()}
    return hub | {
        name: str(tiny_model_dir("qwen3"))
        for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base")
    }


@pytest.fixture
def server():
    """A judge behind OpenAI's protocol that likes the first answer; its address."""

    class Always(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(dict(choices=[dict(message=dict(content="A"), finish_reason="stop")])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_the_pages_can_be_followed_from_top_to_bottom(shop, server, monkeypatch):
    """Runs every command of a script, and the program in README. The runs log the metrics that docs/metrics.md
    describes."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ran = []
    for name, text in saved_files(PAGES).items():
        Path(name).write_text(text)
    for words in dict.fromkeys(map(tuple, commands("\n".join(blocks(PAGES))))):  # some stand on two pages
        name, flags = script_and_flags(words)
        if name not in SCRIPTS:
            continue
        flags = [local(flag, shop) for flag in flags]
        unknown = [flag for flag in flags if re.match(r"(judge:)?(Qwen|trl-lib|openai)/", flag)]
        assert not unknown, "names that nothing here stands for"
        flags = [server if flag.startswith("https://api.") else flag for flag in flags]
        key = f"{name} {flags[0]}" if name == "rlaif" else name
        script = importlib.import_module(name)
        script.main(tyro.cli(script.Args, args=[*flags, *shlex.split(TINY[key])]))
        ran.append(key)
    assert sorted(set(ran)) == sorted(TINY)
    (program,) = [code for code in blocks(PAGES, "python") if not code.startswith("def ")]
    exec(program, {})
    tables = import_as_module(REPO / "recipes" / "readme.py", monkeypatch)
    for name in tables.METRICS:
        logged = {key for line in open(f"runs/{name}/metrics.jsonl") for key in json.loads(line)}
        described = {row["metric"] for row in tables.described_metrics() if row["script"] == name}
        assert not described - logged, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_a_header_have_the_options_that_they_use(name):
    script = importlib.import_module(name)
    found = [script_and_flags(words) for words in commands(script.__doc__)]
    assert len(found) >= 3
    for other, flags in found:
        assert other == name
        options = dict(default=script.LearnArgs()) if name == "gridworld" else {}
        assert tyro.cli(script.Args, args=flags, **options)


@pytest.mark.parametrize("page", [*PAGES, *CHINESE], ids=lambda page: page.stem)
def test_every_option_that_a_page_names_exists(page):
    known = {"help", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "shutdown-timeout", "sync"}
    for script in map(importlib.import_module, SCRIPTS):
        for args in filter(dataclasses.is_dataclass, vars(script).values()):
            known |= {field.name.replace("_", "-") for field in dataclasses.fields(args)}
    named = re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]*\w)", page.read_text())
    assert not set(named) - known


def test_the_families_of_models_that_a_page_names_are_tested():
    import test_sampling

    page = (REPO / "docs" / "scaling.md").read_text()
    for label, tested in {"Tested": test_sampling.FAMILIES, "Refused": test_sampling.REFUSED}.items():
        (named,) = re.findall(rf"(?s)^{label} for sampling: (.*?)\.\n", page, re.MULTILINE)
        assert {re.sub(r"\W", "", name).lower() for name in named.split(",")} == {x.replace("_", "") for x in tested}


@pytest.mark.parametrize("page", [*PAGES, *CHINESE], ids=lambda page: page.stem)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert links or page.parent.name == "docs"
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_chinese_pages_have_the_commands_of_the_english_ones():
    known = commands("\n".join(blocks(PAGES)))
    assert all(command in known for command in commands("\n".join(blocks(CHINESE))))


def test_readme_says_where_the_training_loops_end():
    pattern = r"first (\d+) to (\d+) lines of a training script \((\d+) in ppo.py and grpo.py\)"
    ((first, last, online),) = re.findall(pattern, (REPO / "README.md").read_text().replace("\n", " "))
    ends = {}
    for name in sorted({*SCRIPTS} - {"gridworld", "rlaif"}):
        (main,) = [
            node for node in ast.parse((REPO / f"{name}.py").read_text()).body if getattr(node, "name", "") == "main"
        ]
        ends[name] = main.end_lineno
    sampled = [ends.pop("ppo"), ends.pop("grpo")]
    said = {first: min(ends.values()), last: max(ends.values()), online: max(sampled)}
    assert all(abs(int(number) - line) < 10 for number, line in said.items()), said


def test_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150
