"""What a user gives: options, data sets in every form, columns of published layouts, and what is said before anything is computed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from conftest import REPO
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dpo
import orpo
import reward_model
import rpo
import sft

SCRIPTS = dict(sft=sft, reward_model=reward_model, dpo=dpo, orpo=orpo, rpo=rpo)
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    """model(positions, template=True): the directory of a small Llama."""
    made = {}

    def make(positions=128, template=True):
        if (positions, template) not in made:
            folder = tmp_path_factory.mktemp("model")
            shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
            config = LlamaConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=positions, **shape)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                LlamaForCausalLM(config).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            if not template:
                (folder / "chat_template.jinja").unlink()
            made[positions, template] = str(folder)
        return made[positions, template]

    return make


def rows_for(script: str, count: int = 12) -> list:
    if script == "sft":
        return [dict(prompt=f"What is {i}?", completion=f" It is {i}.") for i in range(count)]
    if script == "rpo":  # needs rewards
        return [
            dict(prompt=f"What is {i}?", completions=[f" It is {i}.", " No."], scores=[1.0, 0.0]) for i in range(count)
        ]
    return [dict(prompt=f"What is {i}?", chosen=f" It is {i}.", rejected=" No.") for i in range(count)]


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_main(script: str, capsys, **flags) -> tuple:
    """(exit code, what is printed) of a script's main in this process; 0 where it comes to its end."""
    module, code = SCRIPTS[script], 0
    try:
        module.main(module.Args(**flags))
    except SystemExit as e:
        code = e.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


# -------------------------------------------------------------------------------------------------------------- options


GIVEN = [[], ["--dataset", "rows.jsonl"], ["--model", "some/model"]]


@pytest.mark.parametrize(
    "script, given", [(s, g) for s in SCRIPTS for g in GIVEN if s != "sft" or "--dataset" not in g]
)
def test_what_a_run_starts_from_and_reads_has_no_default(script, given, tmp_path):
    command = [sys.executable, str(REPO / f"{script}.py"), *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    missing = {"--model", "--dataset"} - {*given} - ({"--model"} if script == "sft" else set())  # sft.py: see below
    assert done.returncode == 2 and all(option in done.stderr + done.stdout for option in missing)
    assert not list(tmp_path.iterdir())


def test_sft_starts_from_a_model_or_from_scratch_and_never_from_a_guess(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = jsonl(tmp_path / "rows.jsonl", rows_for("sft"))
    for flags in (dict(), dict(model=model(), from_scratch=True)):
        code, said = run_main("sft", capsys, dataset=data, **flags)
        assert code == 2 and "--model" in said and "--from-scratch" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    options = dict(dataset=data, output_dir="out", max_steps=1, eval_fraction=0.0)
    scratch = dict(from_scratch=True, hidden_size=16, num_layers=1, num_heads=2, vocab_size=300)
    assert run_main("sft", capsys, **options, **scratch)[0] == 0
    assert run_main("sft", capsys, **options, model=model(), overwrite=True)[0] == 0


# ---------------------------------------------------------------------------------------------------------------- files

ROWS = [dict(number=i, text=f"Zürich {i}") for i in range(20)]
PARTS = {
    "train[:10%]": range(2),
    "train[5:8]": range(5, 8),
    "train[-3:]": range(17, 20),
    "train[:3]+train[18:]": [0, 1, 2, 18, 19],
}


def numbers(name, split="train") -> list:
    return [*dpo.load_rows("--dataset", str(name), split)["number"]]


def refusal(name, capsys, split="train") -> str:
    with pytest.raises(SystemExit) as e:
        dpo.load_rows("--dataset", str(name), split)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("\nerror: --dataset") and len(said.strip().splitlines()) == 1
    return said


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The rows in every kind of file."""
    folder, text = tmp_path_factory.mktemp("files"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    bom = b"\xef\xbb\xbf"
    array = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    plain = {"a.jsonl": text.encode(), "bom.jsonl": bom + text.encode(), "a.json": array, "bom.json": bom + array}
    plain |= {"windows.jsonl": bom + text.replace("\n", "\r\n").encode(), "blank.jsonl": text.encode() + b"\n\n"}
    for name, content in plain.items():
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return folder


KINDS = ["a.jsonl", "bom.jsonl", "a.json", "bom.json", "windows.jsonl", "blank.jsonl"]


@pytest.mark.parametrize("name", [*KINDS, *(f"{name}.gz" for name in KINDS), "a.parquet"])
def test_a_file_is_read_with_or_without_a_byte_order_mark(name, files):
    data = dpo.load_rows("--dataset", str(files / name), "train")
    assert data.column_names == ["number", "text"] and [*data] == ROWS
    assert [*dpo.load_rows("--eval-dataset", str(files / name), "test")] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "bom.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_is_sliced_as_datasets_slices(name, files, capsys):
    for part, expected in PARTS.items():
        assert numbers(f"{files / name}::{part}") == [*expected]
    assert "train" in refusal(f"{files / name}::validation", capsys)
    assert "no data" in refusal(f"{files / name}::train[:0]", capsys)
    refusal(f"{files / name}::train[", capsys)


def test_a_file_has_no_configurations(files, capsys):
    refusal(f"{files / 'a.jsonl'}:french:train", capsys)


def test_files_that_are_not_there_or_hold_nothing_are_refused(tmp_path, capsys):
    assert "does not exist" in refusal(tmp_path / "no.jsonl", capsys)
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in refusal(tmp_path / "empty.jsonl", capsys)
    (tmp_path / "torn.jsonl").write_text('{"a": 1}\n{"a": ')
    refusal(tmp_path / "torn.jsonl", capsys)
    jsonl(tmp_path / "odd[1]*.jsonl", ROWS[:3])  # not a pattern
    jsonl(tmp_path / "odd1.jsonl", ROWS[:5])
    assert numbers(tmp_path / "odd[1]*.jsonl") == [0, 1, 2]


CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: small
  data_files:
  - {split: train, path: data/test-*}
---
# A data set
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Folders as downloaded from the hub, with and without a card that names their configurations."""
    folder, data = tmp_path_factory.mktemp("hub"), datasets.Dataset.from_list(ROWS)
    for name, card, kind in (
        ("card", CARD, "parquet"),
        ("bare", "# A data set\n", "parquet"),
        ("lines", None, "jsonl"),
    ):
        (folder / name / "data").mkdir(parents=True)
        (folder / name / ".cache" / "huggingface").mkdir(parents=True)
        (folder / name / ".cache" / "huggingface" / "x.metadata").write_text("1\n")
        (folder / name / ".gitattributes").write_text("*.parquet filter=lfs\n")
        if card:
            (folder / name / "README.md").write_text(card)
        for split, part in (("train", data), ("test", data.select(range(5)))):
            path = folder / name / "data" / f"{split}-00000-of-00001.{kind}"
            part.to_parquet(path) if kind == "parquet" else jsonl(path, [*part])
    return folder


@pytest.mark.parametrize("name", ["card", "bare", "lines"])
def test_a_folder_as_downloaded_from_the_hub_is_read(name, downloads, capsys):
    folder = downloads / name
    assert numbers(folder) == [*range(20)] and numbers(folder, "test") == [*range(5)] == numbers(f"{folder}::test")
    assert numbers(f"{folder}/") == numbers(folder / "data") == [*range(20)]
    for part, expected in PARTS.items():
        assert numbers(f"{folder}::{part}") == [*expected]
    said = refusal(f"{folder}::validation", capsys)
    assert "train" in said and "test" in said
    if name == "card":
        assert numbers(f"{folder}:small") == [*range(5)] and numbers(f"{folder}:small:train[:2]") == [0, 1]
        assert "default" in (said := refusal(f"{folder}:large", capsys)) and "small" in said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DatasetDict and a Dataset, written by save_to_disk."""
    folder, data = tmp_path_factory.mktemp("saved"), datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train_sft=data, dev=data.select(range(4))).save_to_disk(folder / "dict")
    datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(folder / "usual")
    data.save_to_disk(folder / "one")
    return folder


def test_a_saved_data_set_is_read(saved, capsys):
    assert numbers(saved / "usual") == numbers(saved / "one") == numbers(f"{saved / 'dict'}::train_sft") == [*range(20)]
    assert numbers(saved / "usual", "test") == [*range(5)] and numbers(f"{saved / 'dict'}::dev") == [*range(4)]
    assert "without splits" in refusal(f"{saved / 'one'}::train", capsys)
    for part in PARTS:  # sliced or refused, never ignored
        refusal(f"{saved / 'one'}::{part}", capsys)


@pytest.mark.parametrize("name", ["dict", "dict::validation"])
def test_the_splits_that_a_saved_data_set_has_are_named(name, saved, capsys):
    said = refusal(saved / name, capsys)
    assert "train_sft" in said and "dev" in said


@pytest.mark.parametrize("part", PARTS)
def test_a_saved_data_set_is_sliced_or_refused(part, saved, capsys):
    try:
        found = numbers(f"{saved / 'usual'}::{part}")
    except SystemExit:
        found = None
    assert found in (None, [*PARTS[part]])


# -------------------------------------------------------------------------------------------------------------- columns


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, model):
    return AutoTokenizer.from_pretrained(model())


def user(text):
    return dict(role="user", content=text)


def assistant(text, **more):
    return dict(role="assistant", content=text, **more)


def encoded(tokenizer, row, script="dpo") -> tuple:
    """(prompt, responses) of a row in words, or of a demonstration (whole text, trained parts)."""
    if script != "sft":
        (made,) = dpo.preference_rows(tokenizer, 500, row, Counter())
        return tokenizer.decode(made.prompt), *map(tokenizer.decode, made.responses)
    (made,) = sft.demonstration_rows(tokenizer, 500, False, row, Counter())
    trained = [token for token, keep in zip(made.responses[0], made.trained[0]) if keep]
    return tokenizer.decode(made.prompt + made.responses[0]), tokenizer.decode(trained)


QUESTION = "<|bos|><|user|>What?<|end|><|assistant|>"
RULES = "<|bos|><|system|>Rules.<|end|><|user|>What?<|end|><|assistant|>"
GOOD, BAD = "The capital is Paris.", "The capital is a city."
TALKS = dict(chosen=[user("What?"), assistant(GOOD)], rejected=[user("What?"), assistant(BAD)])


@pytest.mark.parametrize(
    "columns, prompt",
    [
        (dict(question="What?"), QUESTION),
        (dict(question="What?", system=""), QUESTION),
        (dict(question="What?", system=None), QUESTION),
        (dict(question="What?", system="Rules."), RULES),
        (dict(prompt="What?", system="Rules."), RULES),
        (dict(prompt=None, question="What?"), QUESTION),
        (dict(prompt=[user("What?")], system="Rules."), RULES),
        (dict(prompt=[dict(role="system", content="Rules."), user("What?")], system="Others."), RULES),
        (dict(instruction="What?"), QUESTION),
        (dict(instruction="What?", input=""), QUESTION),
        (dict(instruction="What?", input="", system="Rules."), RULES),
        (dict(instruction="What?", input="Paris"), QUESTION.replace("What?", "What?\n\nParis")),
    ],
)
def test_columns_that_hold_a_prompt_are_read_by_every_script(columns, prompt, tokenizer):
    end = "<|end|>"
    assert encoded(tokenizer, columns | dict(chosen=GOOD, rejected=BAD)) == (prompt, GOOD + end, BAD + end)
    ranking = columns | dict(completions=[GOOD, BAD], scores=[1.0, 0.0])
    assert encoded(tokenizer, ranking) == (prompt, GOOD + end, BAD + end)
    for answer in ("completion", "answer", "output", "response"):
        assert encoded(tokenizer, columns | {answer: GOOD}, "sft") == (prompt + GOOD + end, GOOD + end)


@pytest.mark.parametrize(
    "columns, prompt",
    [
        (dict(), QUESTION),
        (dict(question="What?"), QUESTION),
        (dict(prompt="What?"), QUESTION),
        (dict(prompt=[user("What?")]), QUESTION),
        (dict(system=""), QUESTION),
        (dict(system="Rules."), RULES),
        (dict(system="Rules.", prompt="What?"), RULES),
        (dict(system="Rules.", question="What?"), RULES),
        (dict(system="Rules.", prompt=[user("What?")]), RULES),
    ],
)
def test_a_prompt_that_stands_in_both_conversations_is_read_once(columns, prompt, tokenizer):
    assert encoded(tokenizer, columns | TALKS) == (prompt, GOOD + "<|end|>", BAD + "<|end|>")


@pytest.mark.parametrize("script", ["dpo", "orpo", "rpo", "reward_model"])
@pytest.mark.parametrize(
    "columns", [dict(), dict(query="What?"), dict(text="What?", system=""), dict(prompt=None, question="")]
)
def test_answers_in_words_without_a_prompt_are_refused_by_the_names_of_the_columns(
    script, columns, model, tmp_path, capsys
):
    data = jsonl(tmp_path / "rows.jsonl", [columns | dict(chosen=GOOD, rejected=BAD)] * 3)
    code, said = run_main(script, capsys, model=model(), dataset=data, output_dir=str(tmp_path / "out"))
    assert code == 2 and "error: --dataset" in said and "prompt" in said.split("error:")[1]
    assert all(name in said.split("error:")[1] for name in [*columns, "chosen", "rejected"])
    assert not (tmp_path / "out").exists()


def test_a_message_of_weight_zero_is_not_trained(tokenizer):
    talk = [
        user("One?"),
        assistant("Uno.", weight=0),
        user("Two?"),
        assistant("Dos.", weight=1),
        user("Three?"),
        assistant("Tres."),
    ]
    whole, trained = encoded(tokenizer, dict(messages=talk), "sft")
    assert trained == "Dos.<|end|>Tres.<|end|>" and "Uno." in whole and "weight" not in whole
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Uno.", "weight": 0.0}]
    turns += [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Dos."}]
    assert encoded(tokenizer, dict(conversations=turns), "sft")[1] == "Dos.<|end|>"
    with pytest.raises(sft.Drop, match="no assistant turn to train on"):
        encoded(tokenizer, dict(messages=talk[:2]), "sft")


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_a_column_system_stands_before_the_conversation(column, tokenizer):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": GOOD}]
    messages = [user("What?"), assistant(GOOD)]
    for talk in (turns, messages):
        for system, head in (("Rules.", RULES), ("", QUESTION), (None, QUESTION)):
            row = {column: talk, "system": system}
            assert encoded(tokenizer, row, "sft") == (head + GOOD + "<|end|>", GOOD + "<|end|>")
    own = [dict(role="system", content="Rules."), *messages]
    assert encoded(tokenizer, {column: own, "system": "Others."}, "sft")[0].startswith(RULES)


# ---------------------------------------------------------------------------------------------------------------- notes


@every_script
def test_a_length_beyond_the_models_positions_is_said_with_the_number(script, model, tmp_path, capsys):
    data, flags = jsonl(tmp_path / "rows.jsonl", rows_for(script)), dict(output_dir=str(tmp_path / "out"), max_steps=1)
    flags |= dict(model=model(96), dataset=data, max_length=1024, eval_fraction=0.0)
    code, said = run_main(script, capsys, **flags)
    (note,) = [line for line in said.splitlines() if "--max-length" in line and "1024" in line]
    assert code == 0 and "96" in note and note.startswith("note:")
    code, said = run_main(script, capsys, **flags | dict(max_length=96, overwrite=True))
    assert code == 0 and not [line for line in said.splitlines() if line.startswith("note:") and "--max-length" in line]


@every_script
def test_a_template_that_the_script_makes_is_said(script, model, tmp_path, capsys):
    good, bad = [assistant(GOOD)], [assistant(BAD)]
    answers = dict(sft=dict(completion=good), rpo=dict(completions=[good, bad], scores=[1.0, 0.0]))
    row = dict(prompt=[user("What?")]) | answers.get(script, dict(chosen=good, rejected=bad))
    data = jsonl(tmp_path / "rows.jsonl", [row] * 3)
    flags = dict(dataset=data, output_dir=str(tmp_path / "out"), max_length=64, max_steps=1, eval_fraction=0.0)
    code, said = run_main(script, capsys, model=model(template=False), **flags)
    assert code == 0 and [line for line in said.splitlines() if line.startswith("note:") and "no chat template" in line]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template  # and the next stage has it
    code, said = run_main(script, capsys, model=model(), **flags, overwrite=True)
    assert code == 0 and "no chat template" not in said


# ---------------------------------------------------------------------------------------------------------- interruption


REFUSED = [
    dict(dataset="nowhere.jsonl"),
    dict(model="./nowhere"),
    dict(eval_dataset="nowhere.jsonl"),
    dict(max_length=2),
    dict(epochs=0),
    dict(eval_dataset="odd.jsonl"),
]


@every_script
def test_a_refused_run_leaves_nothing(script, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", rows_for(script))
    jsonl(tmp_path / "odd.jsonl", [dict(colour="red")])
    before = sorted(tmp_path.rglob("*"))
    for wrong in REFUSED:
        flags = dict(model=model(), dataset="rows.jsonl", output_dir="deep/out") | wrong
        code, said = run_main(script, capsys, **flags)
        assert code == 2 and said.count("error: ") == 1, (wrong, said)
        assert sorted(tmp_path.rglob("*")) == before, wrong
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    assert run_main(script, capsys, model=model(), dataset="rows.jsonl", output_dir="used")[0] == 2
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs to see what a process has loaded")
@pytest.mark.parametrize("moment", ["libraries", "data"])
@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_ctrl_c_before_training_says_one_line_and_leaves_nothing(script, moment, model, tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", rows_for(script, 20_000))
    command = [
        sys.executable,
        str(REPO / f"{script}.py"),
        "--model",
        model(96),
        "--dataset",
        data,
        "--output-dir",
        "out",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    try:
        if moment == "libraries":
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
                time.sleep(0.01)
        else:
            for line in process.stdout:  # after the note on --max-length the rows are read
                if line.startswith("note: "):
                    break
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGINT) and "Traceback" not in err
    assert [line for line in err.splitlines() if line.strip() and "tokenise" not in line] == [
        "interrupted before training"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
