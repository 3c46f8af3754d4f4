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
from conftest import REPO, assistant, refusal, user
from test_plumbing import jsonl
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


def run_main(script: str, capsys, **flags) -> tuple:
    """(exit code, what is printed) of a script's main in this process; 0 where it comes to its end."""
    module, code = SCRIPTS[script], 0
    try:
        module.main(module.Args(**flags))
    except SystemExit as e:
        code = e.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


# ---- files

ROWS = [dict(number=i, text=f"Zürich {i}") for i in range(20)]
PARTS = {
    "train[:10%]": range(2),
    "train[5:8]": range(5, 8),
    "train[-3:]": range(17, 20),
    "train[:3]+train[18:]": [0, 1, 2, 18, 19],
}


def numbers(name, split="train") -> list:
    return [*dpo.load_rows("--dataset", str(name), split)["number"]]


def refused(name, capsys, split="train") -> str:
    return refusal(lambda: dpo.load_rows("--dataset", str(name), split), capsys)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The rows in every kind of file."""
    folder, text = tmp_path_factory.mktemp("files"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    bom, array = b"\xef\xbb\xbf", json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    plain = {"a.jsonl": text.encode() + b"\n\n", "a.json": array, "bom.json": bom + array}
    plain |= {"windows.jsonl": bom + text.replace("\n", "\r\n").encode()}
    for name, content in plain.items():
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    (folder / "odd [1] *.jsonl").write_bytes(text.encode())
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return folder


KINDS = ["a.jsonl", "a.json", "bom.json", "windows.jsonl"]


@pytest.mark.parametrize("name", [*KINDS, *(f"{name}.gz" for name in KINDS), "odd [1] *.jsonl", "a.parquet"])
def test_a_file_is_read_whole_or_sliced_as_datasets_slices(name, files, capsys):
    assert [*dpo.load_rows("--eval-dataset", str(files / name), "test")] == ROWS
    for part, expected in PARTS.items():
        assert numbers(f"{files / name}::{part}") == [*expected]
    assert "train" in refused(f"{files / name}::validation", capsys)


def test_files_that_hold_no_rows_are_refused(files, tmp_path, capsys):
    assert "no data" in refused(f"{files / 'a.jsonl'}::train[:0]", capsys)
    assert "no configuration french" in refused(f"{files / 'a.jsonl'}:french:train", capsys)
    contents = {
        "does not exist": None,
        "is empty": "",
        "begins with null": "[null, {}]",
        "cannot be read": '{"a": 1}\n{"a": ',
    }
    for reason, content in contents.items():
        if content is not None:
            (tmp_path / "rows.jsonl").write_text(content)
        assert reason in refused(tmp_path / "rows.jsonl", capsys)


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
def folders(tmp_path_factory):
    """Folders as downloaded from the hub, with and without a card that names their configurations, and saved ones."""
    folder, data = tmp_path_factory.mktemp("folders"), datasets.Dataset.from_list(ROWS)
    for name, card, kind in (("card", CARD, "parquet"), ("bare", "# A data set\n", "parquet"), ("lines", "", "jsonl")):
        (folder / name / "data").mkdir(parents=True)
        (folder / name / ".gitattributes").write_text("*.parquet filter=lfs\n")
        if card:
            (folder / name / "README.md").write_text(card)
        for split, part in (("train", data), ("test", data.select(range(5)))):
            path = folder / name / "data" / f"{split}-00000-of-00001.{kind}"
            part.to_parquet(path) if kind == "parquet" else jsonl(path, [*part])
    datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(folder / "saved")
    data.save_to_disk(folder / "one")
    return folder


@pytest.mark.parametrize("name", ["card", "bare", "lines", "saved"])
def test_a_folder_is_read_by_splits_and_an_unknown_one_names_those_there_are(name, folders, capsys):
    folder = folders / name
    assert numbers(folder) == [*range(20)] and numbers(folder, "test") == [*range(5)] == numbers(f"{folder}::test")
    said = refused(f"{folder}::validation", capsys)
    assert "train" in said and "test" in said
    for part, expected in PARTS.items():
        if name == "saved":  # of which whole splits are read
            refused(f"{folder}::{part}", capsys)
        else:
            assert numbers(f"{folder}::{part}") == [*expected]


def test_a_folder_has_the_configurations_that_its_card_names(folders, capsys):
    card = folders / "card"
    assert numbers(f"{card}:small") == [*range(5)] and numbers(f"{card}:small:train[:2]") == [0, 1]
    assert "default" in (said := refused(f"{card}:large", capsys)) and "small" in said


def test_a_data_set_saved_without_splits_has_none(folders, capsys):
    assert numbers(folders / "one") == numbers(folders / "one", "test") == [*range(20)]
    for part in ("train", *PARTS):  # never ignored
        assert "without splits" in refused(f"{folders / 'one'}::{part}", capsys)


# ---- columns


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, model):
    return AutoTokenizer.from_pretrained(model())


def encoded(tokenizer, row, script="dpo") -> tuple:
    """(prompt, responses) of a row in words, or of a demonstration (whole text, trained parts)."""
    if script != "sft":
        (made,) = dpo.preference_rows(tokenizer, 500, row, Counter())
        assert made.extra["pairs"] == [(0, 1)]
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
        (dict(prompt="What?"), "<|bos|>What?"),
        (dict(question="What?"), QUESTION),
        (dict(question="What?", system=""), QUESTION),
        (dict(question="What?", system="Rules."), RULES),
        (dict(prompt="What?", system="Rules."), RULES),
        (dict(prompt=None, question="What?"), QUESTION),
        (dict(prompt=[user("What?")], system="Rules."), RULES),
        (dict(prompt=[dict(role="system", content="Rules."), user("What?")], system="Others."), RULES),
        (dict(question=None, instruction="What?"), QUESTION),
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
        (dict(system="Rules."), RULES),
        (dict(system="Rules.", question="What?"), RULES),
        (dict(system="Rules.", prompt=[user("What?")]), RULES),
    ],
)
def test_a_prompt_that_stands_in_both_conversations_is_read_once(columns, prompt, tokenizer):
    assert encoded(tokenizer, columns | TALKS) == (prompt, GOOD + "<|end|>", BAD + "<|end|>")


@pytest.mark.parametrize("script", ["dpo", "reward_model"])
@pytest.mark.parametrize("columns", [dict(), dict(query="What?"), dict(prompt=None, question=""), dict(prompt="")])
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


# ---- notes


@every_script
def test_a_shorter_length_and_a_template_that_the_script_makes_are_said(script, model, tmp_path, capsys):
    good, bad = [assistant(GOOD)], [assistant(BAD)]
    answers = dict(sft=dict(completion=good), rpo=dict(completions=[good, bad], scores=[1.0, 0.0]))
    row = dict(prompt=[user("What?")]) | answers.get(script, dict(chosen=good, rejected=bad))
    flags = dict(dataset=jsonl(tmp_path / "rows.jsonl", [row] * 3), output_dir=str(tmp_path / "out"))
    flags |= dict(max_steps=1, eval_fraction=0.0)
    code, said = run_main(script, capsys, model=model(96, template=False), max_length=1024, **flags)
    notes = [line for line in said.splitlines() if line.startswith("note:")]
    assert code == 0 and any("no chat template" in note for note in notes)
    assert any("--max-length 1024" in note and "96" in note for note in notes)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template  # and the next stage has it
    code, said = run_main(script, capsys, model=model(96), max_length=96, overwrite=True, **flags)
    assert code == 0 and "no chat template" not in said and "note: --max-length" not in said


# ---- interruption


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
def test_ctrl_c_while_the_libraries_load_says_one_line_and_leaves_nothing(model, tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", rows_for("dpo"))
    command = [sys.executable, str(REPO / "dpo.py"), "--model", model(96), "--dataset", data, "--output-dir", "out"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGINT) and "Traceback" not in err
    assert err.split() == "interrupted before training".split()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
