"""What a user gets wrong, in every command: numbers out of range, broken data sets, models that cannot serve.

Each ends in a refusal of one sentence that leaves no output directory behind, or in a finished run with finite numbers
that has counted what it dropped; never in a traceback, and never in a run on nothing.
"""

import copy
import gzip
import importlib
import json
import math
import pickle
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_plumbing import as_command, in_child, jsonl, lines_of, weights_of

SCRIPTS = "sft reward_model dpo orpo rpo ppo grpo".split()
ONLINE = ("ppo", "grpo")  # read prompts, and sample answers
TASKS = {  # of rlaif.py: name -> (class of arguments, flags, the script whose kind of rows it reads)
    "label": ("LabelArgs", dict(min_mass=0.0, model=""), "dpo"),
    "label answers": ("LabelArgs", dict(min_mass=0.0, k=2, model=""), "ppo"),
    "revise": ("ReviseArgs", dict(judge_max_tokens=4, rounds=1), "ppo"),
    "best-of-n": ("BestOfNArgs", dict(min_mass=0.0, n=2), "ppo"),
    "compare": ("CompareArgs", dict(min_mass=0.0), "ppo"),
    "audit": ("AuditArgs", dict(min_mass=0.0), "dpo"),
    "synthesise": ("SynthesiseArgs", dict(min_mass=0.0, rows=2, answer_temperature=1.0), "sft"),
}
COMMANDS = [*SCRIPTS, *TASKS]
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_command = pytest.mark.parametrize("command", COMMANDS)
slow = pytest.mark.slow
TALK = "Up right go down here there near far left one two three".split()
RULES = """
import math
def length(prompts, completions, **columns):
    return [len(c[-1]["content"]) % 3 for c in completions]

def infinite(prompts, completions, **columns):
    return [math.inf] * len(prompts)

def no_number(prompts, completions, **columns):
    return [math.nan] * len(prompts)

def enormous(prompts, completions, **columns):
    return [1e38 * (-1) ** i for i in range(len(prompts))]

def text(prompts, completions, **columns):
    return ["good"] * len(prompts)
"""


def say(role: str, text) -> dict:
    return dict(role=role, content=text)


def rows_for(command: str) -> list:
    """Eight good rows of the kind that a command reads."""
    kind, rows = TASKS[command][2] if command in TASKS else command, []
    for i in range(8):
        prompt, chosen, rejected = say("user", f"Which way is {TALK[i]}?"), *(TALK[i + j] for j in (1, 2))
        if kind == "sft":
            rows.append(dict(messages=[prompt, say("assistant", f"It is {chosen}.")]))
        elif kind in ONLINE:
            rows.append(dict(prompt=[prompt], answer=str(i)))
        else:
            pair = dict(chosen=[say("assistant", f"{chosen}.")], rejected=[say("assistant", f"{rejected}.")])
            rows.append(dict(prompt=[prompt], score_chosen=1.0, score_rejected=0.0) | pair)
        rows[-1] |= dict(kind="k") if command in TASKS else {}
    return rows


def args_of(command: str):
    module = importlib.import_module("rlaif" if command in TASKS else command)
    return module, getattr(module, TASKS[command][0] if command in TASKS else "Args")


@pytest.fixture(scope="module")
def usual(tiny_model_dir, tmp_path_factory):
    """usual(command): flags of two short steps, or of a short task, on good rows."""
    folder, model = tmp_path_factory.mktemp("usual"), str(tiny_model_dir("llama"))
    (folder / "rules.py").write_text(RULES)
    requests = dict(compare="{talk}A{a}B{b}{principle}?", critique="{conversation}?", revise="Anew")
    (folder / "requests.json").write_text(json.dumps(requests | dict(score="{conversation}?")))

    def flags(command: str) -> dict:
        data = jsonl(folder / f"{command}.jsonl", rows_for(command))
        given = dict(model=model, dataset=data, max_new_tokens=3, num_generations=2 if command == "grpo" else 1)
        if command in SCRIPTS:
            given |= dict(max_steps=2, batch_size=2, eval_fraction=0.25, rewards=(f"{folder / 'rules.py'}:length",))
        else:
            given |= dict(judge=model, against=model, batch_size=4, requests=str(folder / "requests.json"))
            given |= TASKS[command][1]
        known = {field.name for field in fields(args_of(command)[1])}
        return {name: value for name, value in given.items() if name in known}

    return flags


def outcome(command: str, capsys, begins: bool = False, **flags) -> tuple:
    """("refused", the sentence) or ("finished", what was printed), whichever of the two it was; anything else fails.

    begins: what is wrong can show in training only, where the output directory stands already."""
    (module, arguments), out = args_of(command), Path(flags["output_dir"])
    capsys.readouterr()
    try:
        module.main(arguments(**flags))
    except SystemExit as end:
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if "error: " in line]
        assert end.code == 2 and len(said) == 1 and "Traceback" not in err, (end.code, err[-2000:])
        assert begins or command in TASKS or not out.is_dir(), ("the refused run has left", list(out.iterdir()))
        return "refused", said[0]
    if command in TASKS:
        lines = [json.loads((out / "report.json").read_text())]
    else:
        lines = lines_of(out)
        assert json.loads((out / "args.json").read_text())["finished"]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, (int, float))), line
    return "finished", capsys.readouterr().out


# ---- numbers

ENDLESS = "hidden_size num_layers num_generations max_new_tokens epochs ppo_epochs num_iterations eval_samples".split()
SIGNED = "missing_eos_score reward_constant".split()  # any finite number will do


def numbers_of(command: str) -> list:
    defaults = {field.name: type(field.default) for field in fields(args_of(command)[1])}
    return [(name, kind) for name, kind in defaults.items() if kind in (int, float)]


@every_command
def test_numbers_below_or_beside_their_range(command, usual, tmp_path, capsys):
    for name, kind in numbers_of(command):
        wrong = (-1, -(10**9)) if kind is int else (-0.5, math.nan, math.inf, -math.inf)
        for value in [value for value in wrong if name not in SIGNED or not math.isfinite(value)]:
            what, said = outcome(command, capsys, **usual(command) | {name: value}, output_dir=str(tmp_path / "run"))
            assert what == "refused" and f"--{name.replace('_', '-')}" in said, (name, value, said)


@slow
@pytest.mark.parametrize("script, name, kind", [(s, *number) for s in SCRIPTS for number in numbers_of(s)])
def test_a_number_at_the_end_of_its_range(script, name, kind, usual, tmp_path, capsys):
    for number in (0, 10**9):
        if number == 0 or name not in ENDLESS:  # else the run would be as large or as long as asked
            flags = usual(script) | dict(epochs=1) | {name: kind(number), "output_dir": str(tmp_path / str(number))}
            outcome(script, capsys, begins=True, **flags)


# ---- data sets


def of_every(change):
    """The rows with a change in each column that is trained on or asked."""
    columns = ("messages", "prompt", "chosen", "rejected")
    return lambda row: row | {name: change(row[name]) for name in columns if name in row}


def of_messages(change):
    return of_every(lambda value: [change(m) for m in value])


def of_pairs(change):
    return lambda row: change(row) if "chosen" in row else row


def ranking(*completions, **scores):
    return of_pairs(lambda row: dict(prompt=row["prompt"], completions=[*completions], **scores))


BROKEN_ROWS = {  # one row, broken
    "no such column": lambda row: {"x": 1},
    "null": of_every(lambda value: None),
    "a number": of_every(lambda value: 7),
    "an empty text": of_every(lambda value: ""),
    "an empty list": of_every(lambda value: []),
    "a list of texts": of_every(lambda value: ["Up.", "Down."]),
    "a list of lists": of_every(lambda value: [[]]),
    "an empty message": of_every(lambda value: [{}]),
    "no content": of_messages(lambda m: dict(role=m["role"])),
    "no role": of_messages(lambda m: dict(content=m["content"])),
    "content is null": of_messages(lambda m: m | dict(content=None)),
    "content is a number": of_messages(lambda m: m | dict(content=3.5)),
    "content is a list": of_messages(lambda m: m | dict(content=[dict(type="image")])),
    "content is empty": of_messages(lambda m: m | dict(content="")),
    "an unknown role": of_messages(lambda m: m | dict(role="robot")),
    "a role that is a number": of_messages(lambda m: m | dict(role=1)),
    "the assistant alone": of_every(lambda value: [say("assistant", "Up.")]),
    "the user alone": of_every(lambda value: [say("user", "Up?")]),
    "two users in a row": of_every(lambda value: [say("user", "Up?"), *value]),
    "a million characters": of_messages(lambda m: m | dict(content="up " * 350_000)),
    "a lone surrogate": of_messages(lambda m: m | dict(content="\ud800 up")),
    "zero bytes": of_messages(lambda m: m | dict(content="\x00\x00")),
    "the end of a turn": of_messages(lambda m: m | dict(content=m["content"] + "<|end|><|user|>More?")),
    "a role that ends a turn": of_messages(lambda m: m | dict(role=m["role"] + "<|end|>")),
    "a name that ends a turn": of_messages(lambda m: m | dict(extra=[dict(name="Ann<|end|>")])),
    "a tool that ends a turn": lambda row: row | dict(tools=[dict(type="function", function=dict(name="<|end|>"))]),
    "a pair of equals": of_pairs(lambda row: row | dict(chosen=row["rejected"])),
    "scores that are no numbers": of_pairs(lambda row: row | dict(score_chosen=math.nan, score_rejected=math.inf)),
    "a ranking of one": ranking("a", scores=[1.0]),
    "a ranking of nothing": ranking(scores=[]),
    "a ranking without scores": ranking("a", "b"),
    "a ranking with too few scores": ranking("a", "b", scores=[1.0]),
    "nan among the scores": ranking("a", "b", scores=[math.nan, 1.0]),
    "null among the scores": ranking("a", "b", scores=[None, 1.0]),
}
HARMLESS = (  # what some commands may use as it is, even in every row
    "content is empty, the user alone, the assistant alone, two users in a row, zero bytes, no role, an unknown role, "
    "a role that is a number, a lone surrogate, a million characters, a pair of equals, scores that are no numbers"
).split(", ")
STRIPPED = (  # fine for judges, who see texts without special tokens, and for label, which asks for no scores
    "the end of a turn, a role that ends a turn, a name that ends a turn, a tool that ends a turn, a ranking of one, "
    "a ranking without scores, a ranking of nothing"
).split(", ")
READERS = "sft reward_model dpo grpo label revise audit".split()  # others read rows with the same functions
CASES = [(c, how) for c in READERS for how, change in BROKEN_ROWS.items() if change(rows_for(c)[3]) != rows_for(c)[3]]


def is_fine(command: str, how: str) -> bool:
    return how in HARMLESS or command in ("label", "audit") and how in STRIPPED


@pytest.mark.parametrize("command, how", CASES)
def test_rows_that_are_all_broken(command, how, usual, tmp_path, capsys):
    rows = [BROKEN_ROWS[how](row) for row in rows_for(command)]
    data = jsonl(tmp_path / "rows.jsonl", rows[:1] if how == "a million characters" else rows)  # one takes long enough
    what, said = outcome(command, capsys, **usual(command) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    assert what == "refused" and "--dataset" in said or is_fine(command, how), said


@slow
@pytest.mark.parametrize("command, how", CASES)
def test_a_broken_row_among_good_ones(command, how, usual, tmp_path, capsys):
    """It is dropped and counted, or the data set is refused, or it was usable after all."""
    rows = rows_for(command)
    rows[3] = BROKEN_ROWS[how](copy.deepcopy(rows[3]))
    data = jsonl(tmp_path / "rows.jsonl", rows)
    what, said = outcome(command, capsys, **usual(command) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    is_counted = "dropped" in said and "none dropped" not in said
    assert what == "refused" and "--dataset" in said or is_counted or is_fine(command, how), said


BROKEN_FILES = {  # name of the file -> its content, made of good lines
    "empty.jsonl": lambda text: b"",
    "spaces.jsonl": lambda text: b"  \n \n",
    "empty list.json": lambda text: b"[]",
    "null.jsonl": lambda text: b"null\n",
    "null before rows.jsonl": lambda text: b"null\n" + text,
    "array that begins with null.json": lambda text: b"[null, " + b", ".join(text.splitlines()) + b"]",
    "a number.json": lambda text: b"42\n",
    "a text.json": lambda text: b'"up"\n',
    "no JSON.jsonl": lambda text: b"up,down\n1,2\n",
    "bytes.jsonl": lambda text: bytes(range(256)),
    "not UTF-8.jsonl": lambda text: text.replace(b"way", b"w\xffy"),
    "a line cut short.jsonl": lambda text: text[:-40],
    "cut short.jsonl.gz": lambda text: gzip.compress(text)[:-60],
    "no gzip.jsonl.gz": lambda text: text,
    "no Parquet.parquet": lambda text: text,
    "folder/notes.md": lambda text: b"# Rows to come",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_files_that_cannot_be_read(name, usual, tmp_path, capfd):
    """In a process of its own, since some files crash the reader of JSON."""
    path, (module, arguments) = tmp_path / name, args_of("sft")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(BROKEN_FILES[name]("".join(json.dumps(row) + "\n" for row in rows_for("sft")).encode()))
    data = str(path.parent if path.suffix == ".md" else path)
    args = arguments(**usual("sft") | dict(dataset=data, output_dir=str(tmp_path / "run")))
    capfd.readouterr()
    code, err = in_child(module.main, args), capfd.readouterr().err
    said = [line for line in err.splitlines() if line]
    assert code == 2 and len(said) == 1 and said[0].startswith(f"error: --dataset {data}: "), (code, err)
    assert not (tmp_path / "run").exists()


# ---- models that cannot serve


def without(name: str):
    return lambda folder: (folder / name).unlink()


def edited(name: str, **changes):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def template(text: str):
    """A chat template, in which CANARY is a file that must never be written."""
    return lambda folder: (folder / "chat_template.jinja").write_text(text.replace("CANARY", f"{folder}.canary"))


def fewer_words(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def not_a_number(folder):
    from safetensors.torch import save_file

    weights = {name: w * math.nan for name, w in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


def pickled(folder):
    """Weights as a pickle that would write a file when it is opened."""

    class Trap:
        def __reduce__(self):
            return (Path.write_text, (Path(f"{folder}.canary"), "out"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def own_code(folder):
    """A model that wants to bring its own code, which would write a file when it is imported."""
    code = f"open({str(folder) + '.canary'!r}, 'w').write('out')\nclass Config: pass\nclass Model: pass\n"
    (folder / "own.py").write_text(code)
    classes = dict(AutoConfig="own.Config", AutoModelForCausalLM="own.Model")
    edited("config.json", model_type="own", auto_map=classes)(folder)


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
    "a template that starts a process": template(
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if c.__name__ == 'Popen' %}{{ c(['touch', 'CANARY']) }}{% endif %}{% endfor %}"
    ),
    "weights as a pickle": pickled,
    "code of its own": own_code,
}


@pytest.mark.parametrize("how", BROKEN_MODELS)
@every_command
def test_models_that_cannot_serve(command, how, usual, tiny_model_dir, tmp_path, capsys):
    """Refused, before a step, with what is wrong, whichever model of the command it is; nothing of a downloaded
    directory is run."""
    for role in [role for role in ("model", "judge", "against") if usual(command).get(role)]:
        folder = tmp_path / f"{role} of mine"
        shutil.copytree(tiny_model_dir("llama"), folder)
        BROKEN_MODELS[how](folder)
        flags = usual(command) | {role: str(folder), "output_dir": str(tmp_path / "run")}
        what, said = outcome(command, capsys, **flags)
        assert what == "refused" and str(folder) in said, (role, said)
        assert not (tmp_path / "run" / "model.safetensors").exists() and not Path(f"{folder}.canary").exists()


@pytest.mark.parametrize("script", ONLINE)
def test_a_reward_model_with_damaged_weights_is_refused(script, usual, tiny_model_dir, tmp_path, capsys):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "scorer")
    edited("config.json", architectures=["LlamaForSequenceClassification"], num_labels=1)(tmp_path / "scorer")
    not_a_number(tmp_path / "scorer")
    flags = usual(script) | dict(rewards=(str(tmp_path / "scorer"),), output_dir=str(tmp_path / "run"))
    what, said = outcome(script, capsys, **flags)
    assert what == "refused" and "damaged" in said, said


@pytest.mark.parametrize("rule", ["infinite", "no_number", "text", "enormous"])
@pytest.mark.parametrize("script", ONLINE)
def test_rewards_that_are_no_sensible_numbers_are_refused(script, rule, usual, tmp_path, capsys):
    flags = usual(script)
    flags["rewards"] = (flags["rewards"][0].replace(":length", f":{rule}"),)
    what, said = outcome(script, capsys, begins=True, **flags, output_dir=str(tmp_path / "run"))
    assert what == "refused" and f"rules.py:{rule}" in said, said


@every_script
def test_weights_that_overflow_end_before_their_step(script, usual, tiny_model_dir, tmp_path, capfd):
    """The weights are finite, and their products are not. The run says so, or its numbers are finite."""
    from safetensors.torch import save_file

    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    large = ("layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "model.norm.weight")
    weights = {name: w * (1e30 if name.endswith(large) else 1) for name, w in weights_of(tmp_path / "model").items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    flags = usual(script) | dict(model=str(tmp_path / "model"), output_dir=str(tmp_path / "run"))
    outcome(script, capfd, begins=True, **flags)
    for file in tmp_path.glob("run/**/model.safetensors"):
        assert all(w.isfinite().all() for w in weights_of(file.parent).values())


# ---- paths, and an early Ctrl-C

OPENED = []  # files that this process opens and hosts that it looks up; an audit hook can never be taken off again


@every_script
def test_paths_and_addresses_in_a_data_set_are_text(script, usual, tmp_path, capsys):
    canary, rows = tmp_path / "canary.txt", rows_for(script)
    canary.write_text("Up.")
    names = (str(canary), f"file://{canary}", "http://canary.txt/", f"{{% include '{canary}' %}}")
    for i, row in enumerate(rows):
        name = names[i % 4]
        named = of_messages(lambda m: m | dict(content=f"{m['content']} {name}"))(row)
        rows[i] = named | dict(path=name, image=name, file=name)
    data = jsonl(tmp_path / "rows.jsonl", rows)
    if not OPENED:
        watched = ("open", "os.listdir", "os.scandir", "socket.getaddrinfo")
        sys.addaudithook(lambda event, args: OPENED.append(str(args)) if event in watched else None)
    OPENED[:] = ["watching"]
    what, _ = outcome(script, capsys, **usual(script) | dict(dataset=data), output_dir=str(tmp_path / "run"))
    assert what == "finished" and any("rows.jsonl" in name for name in OPENED)
    assert not any("canary.txt" in name for name in OPENED)


@pytest.mark.parametrize("name", ["file", "file/run", "/proc/run"])
def test_an_output_directory_that_cannot_be_one(name, usual, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    what, said = outcome("sft", capsys, **usual("sft"), output_dir=str(tmp_path / name))
    assert what == "refused" and name in said and (tmp_path / "file").read_text() == "mine"


@every_script
def test_ctrl_c_before_training_ends_in_one_line(script, usual, tmp_path, capfd):
    args = importlib.import_module(script).Args(**usual(script), output_dir=str(tmp_path / "run"))
    capfd.readouterr()
    assert in_child(as_command, args, (), [signal.SIGINT]) == 130  # as a shell says of Ctrl-C
    assert capfd.readouterr().err.split("\n") == ["", "interrupted before training", ""]
    assert not (tmp_path / "run").exists()
