"""What a user gets wrong, in every script: numbers out of range, broken data sets, models that cannot serve.

Each ends in a refusal of one sentence that leaves no output directory behind, or in a finished run with finite numbers
that has counted what it dropped; never in a traceback, and never in a run on nothing.
"""

import copy
import gzip
import importlib
import json
import math
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_plumbing import as_command, in_child, jsonl, lines_of, weights_of

SCRIPTS = "sft reward_model dpo orpo rpo ppo grpo".split()
ONLINE = ("ppo", "grpo")  # read prompts, and sample answers
every_script = pytest.mark.parametrize("script", SCRIPTS)
slow = pytest.mark.slow
TALK = "Up right go down here there near far left one two three".split()


def say(role: str, text) -> dict:
    return dict(role=role, content=text)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Evaluations print answers of a few tokens: 128 of them would take longer than the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sft", "dpo", "orpo", "rpo"):
            show_answers = importlib.import_module(name).show_answers.__wrapped__  # torch.no_grad wraps it
            patch.setattr(show_answers, "__defaults__", (1, 2))
        yield


def rows_for(script: str, n: int = 8) -> list:
    """Good rows of the kind that a script reads."""
    ask = lambda i: [say("user", f"Which way is {TALK[i]}?")]
    if script == "sft":
        return [dict(messages=[*ask(i), say("assistant", f"It is {TALK[i + 1]}.")]) for i in range(n)]
    if script in ONLINE:
        return [dict(prompt=ask(i), answer=str(i)) for i in range(n)]
    answers = [[say("assistant", f"{TALK[i + j]}.")] for i in range(n) for j in range(2)]
    return [
        dict(prompt=ask(i), chosen=answers[2 * i], rejected=answers[2 * i + 1], score_chosen=1.0, score_rejected=0.0)
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def usual(tiny_model_dir, tmp_path_factory):
    """usual(script): flags of two short steps on good rows."""
    folder = tmp_path_factory.mktemp("usual")
    model = str(tiny_model_dir("llama"))

    def flags(script: str) -> dict:
        data = folder / f"{script}.jsonl"
        if not data.exists():
            jsonl(data, rows_for(script))
        common = dict(model=model, dataset=str(data), max_steps=2, batch_size=2, eval_fraction=0.25)
        rewards = (f"{folder / 'rule.py'}:length",)
        more = dict(ppo=dict(max_new_tokens=3, rewards=rewards))
        more |= dict(grpo=dict(max_new_tokens=3, num_generations=2, rewards=rewards))
        if not (folder / "rule.py").exists():
            lengths = "[len(c[-1]['content']) % 3 for c in completions]"
            (folder / "rule.py").write_text(f"def length(prompts, completions, **columns):\n    return {lengths}\n")
        return common | more.get(script, {})

    return flags


def outcome(script: str, capsys, begins: bool = False, **flags) -> tuple:
    """("refused", the sentence) or ("finished", what was printed), whichever of the two it was; anything else fails.

    begins: what is wrong can show in training only, where the output directory stands already."""
    module, out = importlib.import_module(script), Path(flags["output_dir"])
    capsys.readouterr()
    try:
        module.main(module.Args(**flags))
    except SystemExit as end:
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert end.code == 2 and len(said) == 1 and "Traceback" not in err, (end.code, err[-2000:])
        assert begins or not out.is_dir(), ("the refused run has left", list(out.iterdir()))
        return "refused", said[0]
    assert json.loads((out / "args.json").read_text())["finished"]
    for line in lines_of(out):
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, (int, float))), line
    return "finished", capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- numbers


def numbers_of(args) -> list:
    """The options that take one number, and the type."""
    return [(field.name, type(field.default)) for field in fields(args) if type(field.default) in (int, float)]


OPTIONS = [
    (script, name, kind) for script in SCRIPTS for name, kind in numbers_of(importlib.import_module(script).Args)
]
ENDLESS = "hidden_size num_layers num_generations max_new_tokens epochs ppo_epochs num_iterations eval_samples".split()
SIGNED = "missing_eos_score reward_constant".split()  # any finite number will do
kind_name = lambda x: getattr(x, "__name__", x)


def out_of_range(name: str, kind: type):
    """Numbers below 0, and what is no number."""
    wrong = (-1, -(10**9)) if kind is int else (-0.5, math.nan, math.inf, -math.inf)
    return [value for value in wrong if name not in SIGNED or not math.isfinite(value)]


@pytest.mark.parametrize("script, name, kind", OPTIONS, ids=kind_name)
def test_a_number_below_or_beside_its_range(script, name, kind, usual, tmp_path, capsys):
    for value in out_of_range(name, kind):
        flags = usual(script) | {name: value}
        what, said = outcome(script, capsys, **flags, output_dir=str(tmp_path / str(value)))
        assert what == "refused" and f"--{name.replace('_', '-')}" in said, said


@slow
@pytest.mark.parametrize("value", ["nothing", "huge"])
@pytest.mark.parametrize("script, name, kind", OPTIONS, ids=kind_name)
def test_a_number_at_the_end_of_its_range(script, name, kind, value, usual, tmp_path, capsys):
    if value == "huge" and name in ENDLESS:
        pytest.skip("the run would be as large or as long as asked")
    number = kind(0) if value == "nothing" else kind(10**9)
    flags = usual(script) | {name: number}
    if name == "max_steps" or name == "epochs":
        flags |= dict(epochs=1)
    outcome(script, capsys, begins=True, **flags, output_dir=str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------ data sets


def answers_in(row: dict) -> list:
    """The columns of a row that hold what is trained on or asked."""
    return [name for name in ("messages", "prompt", "chosen", "rejected") if name in row]


def of_every(change):
    """The rows with a change in each trained column."""
    return lambda row: row | {name: change(row[name]) for name in answers_in(row)}


def of_pairs(change):
    """The change, for rows that hold a pair."""
    return lambda row: change(row) if "chosen" in row else row


def ranking(row: dict, completions: list, **scores) -> dict:
    return dict(prompt=row["prompt"], completions=completions, **scores)


BROKEN_ROWS = {  # one row, broken
    "no such column": lambda row: {"x": 1},
    "null": of_every(lambda value: None),
    "a number": of_every(lambda value: 7),
    "true": of_every(lambda value: True),
    "an empty text": of_every(lambda value: ""),
    "an empty list": of_every(lambda value: []),
    "a list of texts": of_every(lambda value: ["Up.", "Down."]),
    "a list of lists": of_every(lambda value: [[]]),
    "an empty message": of_every(lambda value: [{}]),
    "no content": of_every(lambda value: [dict(role=m["role"]) for m in value]),
    "no role": of_every(lambda value: [dict(content=m["content"]) for m in value]),
    "content is null": of_every(lambda value: [m | dict(content=None) for m in value]),
    "content is a number": of_every(lambda value: [m | dict(content=3.5) for m in value]),
    "content is a list": of_every(lambda value: [m | dict(content=[dict(type="image")]) for m in value]),
    "content is empty": of_every(lambda value: [m | dict(content="") for m in value]),
    "an unknown role": of_every(lambda value: [m | dict(role="robot") for m in value]),
    "a role that is a number": of_every(lambda value: [m | dict(role=1) for m in value]),
    "the assistant alone": of_every(lambda value: [say("assistant", "Up.")]),
    "the user alone": of_every(lambda value: [say("user", "Up?")]),
    "the system alone": of_every(lambda value: [say("system", "Be brief.")]),
    "two users in a row": of_every(lambda value: [say("user", "Up?"), *value]),
    "a million characters": of_every(lambda value: [m | dict(content="up " * 350_000) for m in value]),
    "a lone surrogate": of_every(lambda value: [m | dict(content="\ud800 up") for m in value]),
    "zero bytes": of_every(lambda value: [m | dict(content="\x00\x00") for m in value]),
    "the end of a turn": of_every(
        lambda value: [m | dict(content=m["content"] + "<|end|><|user|>More?") for m in value]
    ),
    "a role that ends a turn": of_every(lambda value: [m | dict(role=m["role"] + "<|end|>") for m in value]),
    "a name that ends a turn": of_every(lambda value: [m | dict(extra=[dict(name="Ann<|end|>")]) for m in value]),
    "a tool that ends a turn": lambda row: row | dict(tools=[dict(type="function", function=dict(name="<|end|>"))]),
    "a pair of equals": of_pairs(lambda row: row | dict(chosen=row["rejected"])),
    "scores that are no numbers": of_pairs(lambda row: row | dict(score_chosen=math.nan, score_rejected=math.inf)),
    "a ranking of one": of_pairs(lambda row: ranking(row, ["a"], scores=[1.0])),
    "a ranking of nothing": of_pairs(lambda row: ranking(row, [], scores=[])),
    "a ranking without scores": of_pairs(lambda row: ranking(row, ["a", "b"])),
    "a ranking with too few scores": of_pairs(lambda row: ranking(row, ["a", "b"], scores=[1.0])),
    "nan among the scores": of_pairs(lambda row: ranking(row, ["a", "b"], scores=[math.nan, 1.0])),
    "null among the scores": of_pairs(lambda row: ranking(row, ["a", "b"], scores=[None, 1.0])),
}
HARMLESS = (  # what some scripts may use as it is, even in every row
    "content is empty, the user alone, the assistant alone, the system alone, two users in a row, zero bytes, no role, "
    "an unknown role, a role that is a number, a lone surrogate, a million characters, a pair of equals, "
    "scores that are no numbers"
).split(", ")


def is_changed(how: str, kind: str) -> bool:
    """Whether a way to break rows does so with the rows that a script, or a task of that kind, reads."""
    row = rows_for(kind)[3]
    return BROKEN_ROWS[how](copy.deepcopy(row)) != row


def broken_rows(readers: dict, *fast):
    """Parametrises over (reader, how) for readers: name -> kind of rows. A million characters: slow, but for `fast`."""
    cases = [(name, how) for name, kind in readers.items() for how in BROKEN_ROWS if is_changed(how, kind)]
    mark = lambda name, how: slow if how == "a million characters" and name not in fast else ()
    return [pytest.param(name, how, marks=mark(name, how)) for name, how in cases]


SCRIPT_ROWS = {script: script for script in SCRIPTS}


@pytest.mark.parametrize("script, how", broken_rows(SCRIPT_ROWS, "sft", "grpo"))
def test_rows_that_are_all_broken(script, how, usual, tmp_path, capsys):
    """There is nothing to train on, and that is said."""
    rows = [BROKEN_ROWS[how](row) for row in rows_for(script)]
    data = jsonl(tmp_path / "rows.jsonl", rows[:1] if how == "a million characters" else rows)  # one takes long enough
    what, said = outcome(script, capsys, **usual(script) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    assert (what == "refused" and "--dataset" in said) or how in HARMLESS, said


@slow
@pytest.mark.parametrize("script, how", broken_rows(SCRIPT_ROWS))
def test_a_broken_row_among_good_ones(script, how, usual, tmp_path, capsys):
    """It is dropped and counted, or the data set is refused, or it was usable after all."""
    rows = rows_for(script)
    rows[3] = BROKEN_ROWS[how](rows[3])
    data = jsonl(tmp_path / "rows.jsonl", rows)
    what, said = outcome(script, capsys, **usual(script) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    assert "--dataset" in said
    assert what == "refused" or "dropped: " in said or how in HARMLESS, said


def gzip_cut(path: Path, text: str) -> str:
    whole = gzip.compress(text.encode())
    path.with_suffix(".jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return str(path.with_suffix(".jsonl.gz"))


def written(content):
    def write(path: Path, text: str) -> str:
        path.write_bytes(content(text) if callable(content) else content)
        return str(path)

    return write


def folder_of_notes(path: Path, text: str) -> str:
    path.with_suffix("").mkdir()
    (path.with_suffix("") / "notes.md").write_text("# Rows to come")
    return str(path.with_suffix(""))


BROKEN_FILES = {
    "empty": written(b""),
    "spaces": written(b"  \n \n"),
    "an empty list": written(b"[]"),
    "null": written(b"null\n"),
    "null before rows": written(lambda text: b"null\n" + text.encode()),
    "an array that begins with null": written(lambda text: f"[null, {', '.join(text.splitlines())}]".encode()),
    "true": written(b"true\n"),
    "a number": written(b"42\n"),
    "a text": written(b'"up"\n'),
    "no JSON": written(b"up,down\n1,2\n"),
    "bytes": written(bytes(range(256))),
    "not UTF-8": written(lambda text: text.encode().replace(b"way", b"w\xffy")),
    "a line cut short": written(lambda text: text.encode()[:-40]),
    "a gzip cut short": gzip_cut,
    "no gzip": lambda path, text: written(lambda text: text.encode())(path.with_suffix(".jsonl.gz"), text),
    "a folder without data": folder_of_notes,
    "no Parquet": lambda path, text: written(lambda text: text.encode())(path.with_suffix(".parquet"), text),
}


def refused_file(work, args, data: str, capfd):
    """A run in a process of its own, since some files crash the reader of JSON, ends in one sentence."""
    out = Path(args.output_dir)
    capfd.readouterr()
    code, err = in_child(work, args), capfd.readouterr().err
    said = [line for line in err.splitlines() if line]
    assert code == 2 and len(said) == 1 and said[0].startswith(f"error: --dataset {data}: "), (code, err)
    assert not (out.is_dir() and list(out.iterdir()))


@pytest.mark.parametrize("script, how", [(script, how) for script in SCRIPTS for how in BROKEN_FILES])
def test_files_that_cannot_be_read(script, how, usual, tmp_path, capfd):
    text = "".join(json.dumps(row) + "\n" for row in rows_for(script))
    data = BROKEN_FILES[how](tmp_path / "rows.jsonl", text)
    module, out = importlib.import_module(script), tmp_path / "run"
    args = module.Args(**usual(script) | dict(dataset=data), output_dir=str(out))
    refused_file(module.main, args, data, capfd)
    assert not out.is_dir()


@every_script
def test_good_rows_in_other_layouts(script, usual, tmp_path, capsys):
    """An array in place of lines, with columns that nobody asked for: the same run. And a file that says all twice."""
    rows, logs = rows_for(script), []
    (tmp_path / "array.json").write_text(json.dumps([row | dict(id=1, note=None) for row in rows]))
    jsonl(tmp_path / "lines.jsonl", rows)
    jsonl(tmp_path / "twice.jsonl", rows + rows)
    for name in ("lines.jsonl", "array.json", "twice.jsonl"):
        out = tmp_path / name.split(".")[0]
        flags = usual(script) | dict(dataset=str(tmp_path / name), output_dir=str(out))
        assert outcome(script, capsys, **flags)[0] == "finished"
        same = ("loss", "reward", "objective/scores", "grad_norm")
        logs.append([{name: value for name, value in line.items() if name in same} for line in lines_of(out)])
    assert logs[0] == logs[1] and len(logs[0][0]) >= 2


# --------------------------------------------------------------------------------------------- models that cannot serve


def without(name: str):
    return lambda folder: (folder / name).unlink()


def edited(name: str, **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def fewer_words(folder):
    """A model with a smaller vocabulary than its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_a_number(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w * float("nan") for name, w in weights.items()},
        folder / "model.safetensors",
        metadata=dict(format="pt"),
    )


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def pickled(folder):
    """Weights as a pickle that would write a file when it is opened."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (Path.write_text, (folder.parent / "canary", "out"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def own_code(folder):
    """A model that wants to bring its own code, which would write a file when it is imported."""
    code = f"open({str(folder.parent / 'canary')!r}, 'w').write('out')\nclass Config: pass\nclass Model: pass\n"
    (folder / "own.py").write_text(code)
    edited("config.json", model_type="own", auto_map=dict(AutoConfig="own.Config", AutoModelForCausalLM="own.Model"))(
        folder
    )


ESCAPE = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
    "{% if c.__name__ == 'Popen' %}{{ c(['touch', 'CANARY']) }}{% endif %}{% endfor %}"
)
BROKEN_MODELS = {
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "no tokenizer": without("tokenizer.json"),
    "a config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a family that nobody knows": edited("config.json", model_type="nobody"),
    "weights cut short": cut_short,
    "weights that are no numbers": not_a_number,
    "another width than the weights": edited("config.json", hidden_size=64),
    "fewer words than the tokenizer": fewer_words,
    "no end of sequence": edited("tokenizer_config.json", eos_token=None),
    "a template that is none": template("{% for m in messages %}"),
    "a template that raises": template("{{ raise_exception('never') }}"),
    "a template that is not for talk": template("Hello."),
    "weights as a pickle": pickled,
    "code of its own": own_code,
}


@pytest.mark.parametrize("how", BROKEN_MODELS)
@every_script
def test_models_that_cannot_serve(script, how, usual, tiny_model_dir, tmp_path, capsys):
    """Refused, before a step, with what is wrong; and nothing of a downloaded directory is run."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    BROKEN_MODELS[how](tmp_path / "model")
    what, said = outcome(
        script, capsys, **usual(script) | dict(model=str(tmp_path / "model")), output_dir=str(tmp_path / "run")
    )
    assert what == "refused" and str(tmp_path / "model") in said, said
    assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "canary").exists()


@every_script
def test_a_template_is_kept_in_its_sandbox(script, usual, tiny_model_dir, tmp_path, capsys):
    """It can reach no class, and so no process."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(ESCAPE.replace("CANARY", str(tmp_path / "canary")))
    what, said = outcome(
        script, capsys, **usual(script) | dict(model=str(tmp_path / "model")), output_dir=str(tmp_path / "run")
    )
    assert what == "refused" and "unsafe" in said and not (tmp_path / "canary").exists()  # jinja2's own word


OPENED = []  # files that this process opens and hosts that it looks up; an audit hook can never be taken off again


def watch_files():
    if not OPENED:
        OPENED.append("")
        sys.addaudithook(
            lambda event, args: (
                OPENED.append(str(args))
                if event in ("open", "os.listdir", "os.scandir", "socket.getaddrinfo")
                else None
            )
        )
    OPENED[1:] = []


@every_script
def test_paths_and_addresses_in_a_data_set_are_text(script, usual, tmp_path, capsys):
    """Nothing that a row names is opened or fetched."""
    canary = tmp_path / "canary.txt"
    canary.write_text("Up.")
    rows = rows_for(script)
    for row, name in zip(
        rows, (str(canary), f"file://{canary}", "http://canary.txt/", f"{{% include '{canary}' %}}") * 2
    ):
        row |= {key: [m | dict(content=f"{m['content']} {name}") for m in row[key]] for key in answers_in(row)} | dict(
            path=name, image=name, file=name
        )
    data = jsonl(tmp_path / "rows.jsonl", rows)
    watch_files()
    what, said = outcome(script, capsys, **usual(script) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    assert (
        what == "finished"
        and any("rows.jsonl" in name for name in OPENED)
        and not any("canary.txt" in name for name in OPENED)
    )


@every_script
def test_an_output_directory_that_cannot_be_one(script, usual, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run", "/proc/run"):
        what, said = outcome(script, capsys, **usual(script), output_dir=str(tmp_path / name))
        assert what == "refused" and name in said, said
    assert (tmp_path / "file").read_text() == "mine"


@every_script
def test_ctrl_c_before_training_ends_in_one_line(script, usual, tmp_path, capfd):
    args = importlib.import_module(script).Args(**usual(script), output_dir=str(tmp_path / "run"))
    capfd.readouterr()
    assert in_child(as_command, args, (), [signal.SIGINT]) == 130  # as a shell says of Ctrl-C
    assert capfd.readouterr().err.split("\n") == ["", "interrupted before training", ""]
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- numbers at the edge of sense


RULES = """
import math
def same(prompts, completions, **columns):
    return [0.1] * len(prompts)

def infinite(prompts, completions, **columns):
    return [math.inf] * len(prompts)

def no_number(prompts, completions, **columns):
    return [math.nan] * len(prompts)

def enormous(prompts, completions, **columns):
    return [1e38 * (-1) ** i for i in range(len(prompts))]

def text(prompts, completions, **columns):
    return ["good"] * len(prompts)
"""


@pytest.mark.parametrize("rule", ["infinite", "no_number", "text", "enormous"])
@pytest.mark.parametrize("script", ONLINE)
def test_rewards_that_are_no_sensible_numbers_are_refused(script, rule, usual, tmp_path, capsys):
    (tmp_path / "rules.py").write_text(RULES)
    flags = usual(script) | dict(rewards=(f"{tmp_path / 'rules.py'}:{rule}",))
    what, said = outcome(script, capsys, begins=True, **flags, output_dir=str(tmp_path / "run"))
    assert what == "refused" and f"rules.py:{rule}" in said, said


@pytest.mark.parametrize("script", ONLINE)
def test_equal_rewards_one_token_and_no_end(script, usual, tmp_path, capsys):
    """Answers of one token, of which hardly any ends, all worth the same."""
    (tmp_path / "rules.py").write_text(RULES)
    flags = usual(script) | dict(rewards=(f"{tmp_path / 'rules.py'}:same",), max_new_tokens=1, batch_size=4)
    what, _ = outcome(script, capsys, **flags, output_dir=str(tmp_path / "run"))
    lines = lines_of(tmp_path / "run")
    assert what == "finished" and len(lines) == 2
    if script == "grpo":  # no spread, no gradient
        assert [line["grad_norm"] for line in lines] == [0, 0] and lines[0]["completions/mean_length"] == 1
    else:
        assert lines[0]["response_length"] == 1 and lines[0]["rewards/same/mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("script", ONLINE)
def test_a_reward_model_with_damaged_weights_is_refused(script, usual, tiny_model_dir, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for value in (math.inf, math.nan):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir("llama"), num_labels=1)
        model.score.weight.data[:] = value
        model.save_pretrained(tmp_path / "scorer")
        AutoTokenizer.from_pretrained(tiny_model_dir("llama")).save_pretrained(tmp_path / "scorer")
        flags = usual(script) | dict(rewards=(str(tmp_path / "scorer"),))
        what, said = outcome(script, capsys, **flags, output_dir=str(tmp_path / str(value)))
        assert what == "refused" and "damaged" in said, said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_script
def test_weights_that_overflow_end_before_their_step(script, dtype, usual, tiny_model_dir, tmp_path, capfd):
    """The weights are finite, and their products are not. The run says so, or its numbers are finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    for weights in (
        model.model.layers[0].mlp.up_proj.weight.data,
        model.model.layers[0].mlp.down_proj.weight.data,
        model.model.norm.weight.data,
    ):
        weights *= 1e30
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir("llama")).save_pretrained(tmp_path / "model")
    flags = usual(script) | dict(model=str(tmp_path / "model"), dtype=dtype)
    if dtype == "bfloat16":  # this process would stay part of a group of one rank
        module = importlib.import_module(script)
        code, err = (
            in_child(module.main, module.Args(**flags, output_dir=str(tmp_path / "run"))),
            capfd.readouterr().err,
        )
        assert code == 0 or code == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
    else:
        outcome(script, capfd, begins=True, **flags, output_dir=str(tmp_path / "run"))
    for file in tmp_path.glob("run/**/model.safetensors"):
        assert all(w.isfinite().all() for w in weights_of(file.parent).values())


# ------------------------------------------------------------------------------------------------ the tasks of rlaif.py

TASKS = {  # name -> (class, flags, the kind of rows it reads)
    "label": ("LabelArgs", dict(min_mass=0.0), "dpo"),
    "label answers": ("LabelArgs", dict(min_mass=0.0, k=2), "ppo"),
    "revise": ("ReviseArgs", dict(judge_max_tokens=4, rounds=1), "ppo"),
    "best-of-n": ("BestOfNArgs", dict(min_mass=0.0, n=2), "ppo"),
    "compare": ("CompareArgs", dict(min_mass=0.0), "ppo"),
    "audit": ("AuditArgs", dict(min_mass=0.0), "dpo"),
    "synthesise": ("SynthesiseArgs", dict(min_mass=0.0, rows=2, answer_temperature=1.0), ""),
}
READERS = [task for task in TASKS if TASKS[task][2]]


@pytest.fixture(scope="module")
def tasks(tiny_model_dir, tmp_path_factory):
    """tasks(task): the class of its arguments, and flags for a few rows of the usual kind."""
    folder, model = tmp_path_factory.mktemp("tasks"), str(tiny_model_dir("llama"))
    short = dict(
        compare="{talk}A{a}B{b}{principle}?", critique="{conversation}?", revise="Anew", score="{conversation}?"
    )
    (folder / "requests.json").write_text(json.dumps(short))

    def flags(task: str) -> tuple:
        name, own, kind = TASKS[task]
        arguments = importlib.import_module("rlaif").__dict__[name]
        given = (
            dict(
                model=model,
                judge=model,
                against=model,
                max_new_tokens=3,
                batch_size=4,
                requests=str(folder / "requests.json"),
            )
            | own
        )
        if kind:
            given |= dict(dataset=jsonl(folder / f"{kind}.jsonl", [row | dict(kind="k") for row in rows_for(kind)]))
        if task == "label":
            given |= dict(model="")
        return arguments, {
            key: value for key, value in given.items() if key in {field.name for field in fields(arguments)}
        }

    return flags


def ending(tasks, task: str, capsys, **more) -> tuple:
    """("refused", the sentence) or ("finished", nothing) of a task, and what it printed; anything else fails."""
    arguments, flags = tasks(task)
    capsys.readouterr()
    try:
        importlib.import_module("rlaif").main(arguments(**flags | more))
    except SystemExit as end:
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if "error: " in line]
        assert end.code == 2 and len(said) == 1 and "Traceback" not in err, (end.code, err[-2000:])
        return "refused", said[0], out
    report = json.loads((Path(more["output_dir"]) / "report.json").read_text())
    assert all(math.isfinite(value) for value in report.values() if isinstance(value, (int, float))), report
    return "finished", "", capsys.readouterr().out


TASK_ROWS = {task: TASKS[task][2] for task in READERS}
STRIPPED = (  # fine for judges, who see texts without special tokens, and for label, which asks for no scores
    "the end of a turn, a role that ends a turn, a name that ends a turn, a tool that ends a turn, a ranking of one, "
    "a ranking without scores, a ranking of nothing"
).split(", ")


def is_fine(task: str, how: str) -> bool:
    return how in HARMLESS or TASK_ROWS[task] == "dpo" and how in STRIPPED


TASK_NUMBERS = [
    (task, name, kind)
    for task, (arguments, *_) in TASKS.items()
    if task != "label answers"
    for name, kind in numbers_of(getattr(importlib.import_module("rlaif"), arguments))
]


@pytest.mark.parametrize("task, name, kind", TASK_NUMBERS, ids=kind_name)
def test_a_task_with_a_number_below_or_beside_its_range(task, name, kind, tasks, tmp_path, capsys):
    for value in out_of_range(name, kind):
        what, said, _ = ending(tasks, task, capsys, **{name: value}, output_dir=str(tmp_path / str(value)))
        assert what == "refused" and f"--{name.replace('_', '-')}" in said, (what, said)


@pytest.mark.parametrize("task, how", broken_rows(TASK_ROWS))
def test_a_task_on_rows_that_are_all_broken(task, how, tasks, tmp_path, capsys):
    rows = [BROKEN_ROWS[how](row) for row in rows_for(TASK_ROWS[task])]
    data = jsonl(tmp_path / "rows.jsonl", rows[:1] if how == "a million characters" else rows)
    what, said, _ = ending(tasks, task, capsys, dataset=data, output_dir=str(tmp_path / "run"))
    assert what == "refused" and "--dataset" in said or is_fine(task, how), said


@slow
@pytest.mark.parametrize("task, how", broken_rows(TASK_ROWS))
def test_a_task_with_a_broken_row_among_good_ones(task, how, tasks, tmp_path, capsys):
    rows = [row | dict(kind="k") for row in rows_for(TASK_ROWS[task])]
    rows[3] = BROKEN_ROWS[how](rows[3])
    data = jsonl(tmp_path / "rows.jsonl", rows)
    what, said, printed = ending(tasks, task, capsys, dataset=data, output_dir=str(tmp_path / "run"))
    is_counted = "dropped" in printed and "none dropped" not in printed
    assert what == "refused" and "--dataset" in said or is_counted or is_fine(task, how), (said, printed)


@pytest.mark.parametrize("task, how", [(task, how) for task in READERS for how in BROKEN_FILES])
def test_a_task_on_files_that_cannot_be_read(task, how, tasks, tmp_path, capfd):
    text = "".join(json.dumps(row) + "\n" for row in rows_for(TASKS[task][2]))
    data = BROKEN_FILES[how](tmp_path / "rows.jsonl", text)
    arguments, flags = tasks(task)
    args = arguments(**flags | dict(dataset=data, output_dir=str(tmp_path / "run")))
    refused_file(importlib.import_module("rlaif").main, args, data, capfd)


@pytest.mark.parametrize("how", BROKEN_MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_with_models_that_cannot_serve(task, how, tasks, tiny_model_dir, tmp_path, capsys):
    """Whichever of its models it is."""
    for role in ("model", "judge", "against"):
        if not tasks(task)[1].get(role):
            continue
        folder = tmp_path / role / "broken"
        shutil.copytree(tiny_model_dir("llama"), folder)
        BROKEN_MODELS[how](folder)
        what, said, _ = ending(tasks, task, capsys, **{role: str(folder)}, output_dir=str(tmp_path / role / "run"))
        assert what == "refused" and str(folder) in said and not (tmp_path / role / "canary").exists(), (role, said)
