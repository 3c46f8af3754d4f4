"""What every script's plumbing must do, tested on sft.py's copy of it (test_copies.py keeps the copies equal): data formats, chat templates, rows,
batches, the optimiser's step, and the rules of an output directory.

A test named after a bug (test_bug06_…) fails when a script has that classic bug of language-model training."""

import copy
import gzip
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import socket
import sys
import threading
import unicodedata
from itertools import groupby
from pathlib import Path

import pytest
import sft
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from sft import Row
from tqdm import tqdm

settings.register_profile("quiet", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("quiet")
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------------- helpers


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(*texts) -> list:
    """A conversation in which user and assistant take turns."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def trained_text(tokenizer, row: Row) -> list:
    """The trained parts of a row's (first) response, as text."""
    marks = row.trained[0] if row.trained else [True] * len(row.responses[0])
    return [tokenizer.decode([t for _, t in part]) for mark, part in groupby(zip(marks, row.responses[0]), key=lambda pair: pair[0]) if mark]


def whole_text(tokenizer, row: Row) -> str:
    return tokenizer.decode(row.prompt + row.responses[0])


def lines_of(out) -> list:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


def lasting(out) -> list:
    """The lines of metrics.jsonl without the fields that measure time or memory."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds", "peak_memory_mb")} for line in lines_of(out)]


def weights_of(out) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(out) / "model.safetensors")


def snapshot(folder) -> dict:
    """Every file under a folder and its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}


def refused(script, capsys, **flags) -> str:
    """Runs a script that must refuse its input: exit code 2 and one line that says why, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main(script.Args(**flags))
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(said) == 1 and "Traceback" not in err, err
    return said[0]


def forked(work, *arguments):
    """A copy of this process at work: torch need not be imported again, which takes longer than most runs here."""
    if torch.cuda.is_available():
        pytest.skip("a forked process cannot use CUDA")
    process = multiprocessing.get_context("fork").Process(target=at_work, args=(work, *arguments))
    process.start()
    return process


def at_work(work, *arguments):
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with this process: killed with it in hand, the child would stop the tests for ever
    work(*arguments)


def in_child(work, *arguments, kill_after=None, timeout=120) -> int:
    """work(*arguments) in a copy of this process, killed after so many seconds if said; its exit code (-9: killed)."""
    child = forked(work, *arguments)
    child.join(timeout if kill_after is None else kill_after)
    hangs = child.is_alive() and kill_after is None
    child.kill()
    child.join()
    assert not hangs, f"still running after {timeout} s"
    return child.exitcode


def rank_of(script, args, rank: int, world: int, port: int):
    """One rank's process, as torchrun would start it."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    script.RANK, script.WORLD = rank, world
    script.main(args)


def on_ranks(script, world: int, timeout=120, **flags):
    """The script on several gloo ranks, each a copy of this process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [forked(rank_of, script, script.Args(**flags), rank, world, port) for rank in range(world)]
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes} (None: still running after {timeout} s)"


# --------------------------------------------------------------------------------------- chat templates, as published models have them

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # earlier turns lose their thinking
    "{% for m in messages %}{% set text = m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM = (  # nothing marks the end of a turn but the start of the next
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {  # name -> (template, special tokens, end-of-sequence token, what ends an answer)
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"),
    "chatml on a base model": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|endoftext|>", "<|eot_id|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<|endoftext|>", "<end_of_turn>"),
    "mistral": (MISTRAL, [], "<|end|>", "<|end|>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"),
    "glm": (GLM, ["[gMASK]", "<sop>"], "<|endoftext|>", "<|endoftext|>"),
    "none of its own": (sft.CHAT_TEMPLATE, [], "<|endoftext|>", "<|endoftext|>"),
}
every_template = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="session")
def dressed(tiny_tokenizer):
    """dressed(name): the tiny tokenizer with one of TEMPLATES and the special tokens that go with it."""
    made = {}

    def make(name):
        if name not in made:
            template, special, eos, _ = TEMPLATES[name]
            made[name] = tokenizer = copy.deepcopy(tiny_tokenizer)
            tokenizer.add_special_tokens(dict(eos_token=eos, extra_special_tokens=[*tokenizer.extra_special_tokens, *special]))
            tokenizer.chat_template = template
        return made[name]

    return make


@every_template
def test_bug02_stop_tokens_are_the_templates_and_the_tokenizers(name, dressed):
    tokenizer, (*_, eos, end) = dressed(name), TEMPLATES[name]
    assert sorted(tokenizer.convert_ids_to_tokens(sft.stop_tokens(tokenizer))) == sorted({eos, end})


@every_template
def test_bug02_an_answer_ends_with_its_end_of_turn(name, dressed):
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    prompt, responses = sft.encode(tokenizer, talk("What is 1 + 1?"), ["two", "It is 2."], sft.stop_tokens(tokenizer))
    assert [tokenizer.decode(r).lstrip() for r in responses] == [f"two{end}", f"It is 2.{end}"]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(talk("What is 1 + 1?"), tokenize=False, add_generation_prompt=True)


@every_template
def test_an_answer_already_begun_is_continued(name, dressed):
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    prompt, (response,) = sft.encode(tokenizer, talk("Count.", "one, two,"), [" three"], sft.stop_tokens(tokenizer))
    assert tokenizer.decode(prompt).endswith("one, two,") and tokenizer.decode(response) == f" three{end}"


def test_bug01_a_tokenizer_that_adds_its_own_eos_gets_no_second(tiny_tokenizer):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    ids = [("<|bos|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=ids)
    prompt, (response,) = sft.encode(tokenizer, "Up or", [" right?"], sft.stop_tokens(tokenizer))
    assert tokenizer.decode(prompt) == "<|bos|>Up or" and tokenizer.decode(response) == " right?<|end|>"


def test_a_text_that_brings_its_eos_gets_no_second(tiny_tokenizer):
    _, responses = sft.encode(tiny_tokenizer, "Up or", [" right?<|end|>", " left?"], sft.stop_tokens(tiny_tokenizer))
    assert [r.count(tiny_tokenizer.eos_token_id) for r in responses] == [1, 1]


@pytest.mark.parametrize("prompt", ["Go up.", "<|bos|>Go up.", "", talk("Go up.")])
def test_bug03_one_bos_never_two(prompt, tiny_tokenizer):
    head, responses = sft.encode(tiny_tokenizer, prompt, [" No.", " Yes."], sft.stop_tokens(tiny_tokenizer))
    bos = tiny_tokenizer.bos_token_id
    assert head[0] == bos and [(head + r).count(bos) for r in responses] == [1, 1]


def test_bug03_no_bos_where_the_tokenizer_has_none(dressed):
    tokenizer = copy.deepcopy(dressed("chatml"))
    tokenizer.backend_tokenizer.post_processor = None
    head, (response,) = sft.encode(tokenizer, "Go up.", [" No."], sft.stop_tokens(tokenizer))
    assert tokenizer.decode(head + response) == "Go up. No.<|im_end|>"


BOUNDARIES = [("the robot ", "walks"), ("Go up.", "."), ("to the ri", "ght corner"), ("line\n", "\nnext"), ("a", " b")]


@pytest.mark.parametrize("prompt, response", BOUNDARIES)
def test_bug10_prompt_and_response_are_tokenised_together(prompt, response, tiny_tokenizer):
    stops = sft.stop_tokens(tiny_tokenizer)
    head, (tail,) = sft.encode(tiny_tokenizer, prompt, [response], stops)
    whole = tiny_tokenizer(prompt + response + tiny_tokenizer.eos_token).input_ids
    alone = tiny_tokenizer(prompt).input_ids
    assert head + tail == whole
    assert head == alone[: len(head)] and (len(head) == len(alone) or alone[len(head)] != whole[len(head)])  # as far as they agree


@pytest.mark.parametrize("responses", [["walks", "1"], ["1", "walks"]])
def test_bug10_the_boundary_suits_every_response(responses, tiny_tokenizer):
    """Of two responses one merges with the prompt's last space: both start before it."""
    head, tails = sft.encode(tiny_tokenizer, "the robot ", responses, sft.stop_tokens(tiny_tokenizer))
    alone, _ = sft.encode(tiny_tokenizer, "the robot ", ["1"], sft.stop_tokens(tiny_tokenizer))
    assert tiny_tokenizer.decode(head) == "<|bos|>the robot" and tiny_tokenizer.decode(alone) == "<|bos|>the robot "
    assert [tiny_tokenizer.decode(t) for t in tails] == [f" {response}<|end|>" for response in responses]


def nfc(text: str) -> str:
    """What the tiny tokenizer, like Qwen's, makes of a text before it looks at it."""
    return unicodedata.normalize("NFC", text)


anything = st.text(max_size=40).map(nfc).filter(lambda text: "<|" not in text)  # hypothesis would find the special tokens in this file


@given(prompt=anything, responses=st.lists(anything, min_size=1, max_size=3))
def test_any_text_comes_back(tiny_tokenizer, prompt, responses):
    stops = sft.stop_tokens(tiny_tokenizer)
    head, tails = sft.encode(tiny_tokenizer, prompt, responses, stops)
    for tail, response in zip(tails, responses, strict=True):
        assert tiny_tokenizer.decode(head + tail) == "<|bos|>" + nfc(prompt + response) + "<|end|>"
        assert tail[-1] in stops


@given(prompt=anything, responses=st.lists(anything, min_size=1, max_size=3))
def test_any_chat_comes_back(tiny_tokenizer, prompt, responses):
    head, tails = sft.encode(tiny_tokenizer, talk(prompt), responses, sft.stop_tokens(tiny_tokenizer))
    assert tiny_tokenizer.decode(head) == f"<|bos|><|user|>{prompt}<|end|><|assistant|>"
    assert [tiny_tokenizer.decode(t) for t in tails] == [f"{r}<|end|>" for r in responses]


def test_options_of_a_row_reach_the_template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ tools | tojson if tools else 'no tools' }} {{ mood }} " + tokenizer.chat_template
    for tools in ([dict(name="f")], '[{"name": "f"}]'):  # a list, or as JSON text
        row = dict(tools=tools, chat_template_kwargs=dict(mood="calm", other=None))
        ids = sft.render(tokenizer, talk("Hi"), **sft.template_options(row))
        assert tokenizer.decode(ids).startswith('[{"name": "f"}] calm ')
    assert sft.template_options(dict(tools=None, chat_template_kwargs=None)) == sft.template_options({}) == {}
    assert sft.template_options(dict(chat_template_kwargs=dict(tokenize=False, add_generation_prompt=True))) == {}  # these are ours to say


def test_messages_are_cleaned():
    assert sft.as_messages([{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]) == [
        dict(role="system", content="s"), dict(role="user", content="u"), dict(role="assistant", content="a")
    ]  # fmt: skip
    assert sft.as_messages([dict(role="user", content="u", name=None)]) == [dict(role="user", content="u")]
    assert sft.as_messages([dict(role="assistant", content=None, tool_calls=[1])]) == [dict(role="assistant", content="", tool_calls=[1])]
    assert sft.as_messages("x") == [dict(role="assistant", content="x")] and sft.as_messages("x", "user") == talk("x")
    for wrong in ([dict(role="user")], [dict(content="x")], [dict(role="user", content=[dict(type="text", text="x")])]):
        with pytest.raises(ValueError):
            sft.as_messages(wrong)


# --------------------------------------------------------------------------------------------------------------------- files

ROWS = [dict(text="one"), dict(text="two ü\u2028")]


def as_jsonl(path):
    return jsonl(path / "rows.jsonl", ROWS)


def as_gzip(path):
    with gzip.open(path / "rows.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path / "rows.jsonl.gz")


def as_array(path):
    (path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return str(path / "rows.json")


def as_parquet(path):
    Dataset.from_list(ROWS).to_parquet(path / "rows.parquet")
    return str(path / "rows.parquet")


def as_saved(path):
    Dataset.from_list(ROWS).save_to_disk(path / "saved")
    return str(path / "saved")


def as_splits(path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(path / "splits")
    return str(path / "splits")


def as_odd_name(path):
    (path / "run [1] *").mkdir()
    return as_jsonl(path / "run [1] *")


@pytest.mark.parametrize("save", [as_jsonl, as_gzip, as_array, as_parquet, as_saved, as_splits, as_odd_name])
def test_every_kind_of_file_is_read(save, tmp_path):
    assert list(sft.load_rows("--dataset", save(tmp_path))) == ROWS


@pytest.mark.parametrize("content, why", [("", "empty file"), ('{"x": 1}\n', "columns are x")])
def test_a_file_without_rows_to_train_is_named_with_the_reason(content, why, short_run, tmp_path, capsys):
    path = tmp_path / "nothing.jsonl"
    path.write_text(content)
    said = refused(sft, capsys, **short_run | dict(dataset=str(path)), output_dir=str(tmp_path / "run"))
    assert str(path) in said and why in said


def test_a_split_is_read(tmp_path):
    assert list(sft.load_rows("--dataset", as_splits(tmp_path), "test")) == ROWS[:1]


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert [row["text"] for row in sft.load_rows("--dataset", jsonl(path, ROWS[:1]))] == ["one"]
    assert [row["text"] for row in sft.load_rows("--dataset", jsonl(path, [dict(text="new")]))] == ["new"]


@pytest.mark.parametrize("save", [as_jsonl, as_parquet, as_saved, as_splits])
def test_bug28_a_changed_data_set_is_noticed(save, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    before, again = sft.fingerprint(save(tmp_path / "a")), sft.fingerprint(save(tmp_path / "a"))
    ROWS.append(dict(text="three"))
    try:
        assert before == again != sft.fingerprint(save(tmp_path / "b"))
    finally:
        ROWS.pop()


# ---------------------------------------------------------------------------------------------------------------------- rows

token = st.integers(0, 99)
ids = st.lists(token, min_size=1, max_size=6)


@st.composite
def any_row(draw):
    responses = draw(st.lists(ids, min_size=1, max_size=3))
    trained = [draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in responses]
    return Row(draw(ids), responses, draw(st.sampled_from([None, trained])))


any_rows = st.lists(any_row(), min_size=1, max_size=5)


@given(any_rows, st.booleans())
def test_bug06_rows_lie_end_to_end_with_positions_of_their_own(rows, together):
    """Every trained token is predicted from the token before it in its own row, at that token's position in its own row."""
    forwards, target = sft.pack(rows, CPU, together)
    expected, sources, lasts = [], [], []
    for row in rows:
        for i, response in enumerate(row.responses):
            text = row.prompt + response
            trained = [len(row.prompt) + j for j in range(len(response)) if not row.trained or row.trained[i][j]]
            expected += [text[t] for t in trained]
            sources += [(text[t - 1], t - 1) for t in trained]
            lasts.append((text[-1], len(text) - 1))
    assert target.tolist() == expected
    tokens = [(inputs["input_ids"][0], inputs["position_ids"][0]) for inputs, _, _ in forwards]
    look = lambda at: [(int(i[p]), int(j[p])) for (i, j), positions in zip(tokens, at) for p in positions]
    assert look(source for _, source, _ in forwards) == sources
    assert look(last for _, _, last in forwards) == lasts
    if together:  # one sequence, and the prompt stands in it once
        assert len(tokens) == 1 and len(tokens[0][0]) == sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows)


@given(any_rows, st.integers(1, 40), st.booleans())
def test_bug04_forwards_hold_every_row_once_within_the_limit(rows, limit, together):
    size = lambda i: len(rows[i].prompt) + sum(map(len, rows[i].responses))
    groups = sft.micro_batches(rows, limit, CPU, together)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(group) == 1 or together and sum(map(size, group)) <= limit for group in groups)


def test_a_rank_without_rows_goes_along(monkeypatch):
    """Of two ranks, one has three forwards to make and the other no rows at all: it makes three as well, with no row numbers."""
    most = lambda tensor, op: tensor.fill_(3)
    monkeypatch.setattr(sft, "WORLD", 2)
    monkeypatch.setattr(sft.dist, "all_reduce", most)
    forwards = list(sft.packed([], 10, CPU))
    assert [group for group, *_ in forwards] == [[], [], []] and all(len(target) for _, _, target in forwards)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_an_epoch_is_every_row_once_in_an_order_of_its_own(n, size, seed):
    steps = math.ceil(n / size)
    order = lambda epoch, seed: [i for step in range(steps) for i in sft.pick(n, size, epoch * steps + step, seed)]
    first, second, other = order(0, seed), order(1, seed), order(0, seed + 1)
    assert sorted(first) == sorted(second) == list(range(n)) and all(len(sft.pick(n, size, step, seed)) == size for step in range(steps - 1))
    assert n < 12 or first != second and first != other and first != list(range(n))


@given(st.integers(2, 60), st.floats(0, 0.9), st.integers(0, 5))
def test_held_out_rows_are_not_trained_on(n, fraction, seed):
    rows = list(range(n))
    held = sft.hold_out(rows, fraction, seed, by_prompt=False)
    assert sorted(rows + held) == list(range(n)) and len(held) == min(n - 1, round(fraction * n))
    again = list(range(n))
    assert sft.hold_out(again, fraction, seed, by_prompt=False) == held and again == rows


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_a_prompt_is_held_out_with_all_its_rows(prompts, fraction, seed):
    """In their order; and a prompt at least is left to train on."""
    every = [Row([7, prompt], [[i]]) for i, prompt in enumerate(prompts)]
    rows, n = list(every), len(set(prompts))
    held = sft.hold_out(rows, fraction, seed)
    ours, theirs = ({row.prompt[1] for row in part} for part in (rows, held))
    assert not ours & theirs and len(theirs) == min(n - 1, round(fraction * n)) and sorted(rows + held, key=lambda row: row.responses) == every
    assert all(part == sorted(part, key=lambda row: row.responses) for part in (rows, held))


def test_of_plain_text_rows_are_held_out(short_run, tmp_path):
    """They all have one prompt, the BOS token: by prompts nothing would be held out."""
    data = jsonl(tmp_path / "texts.jsonl", [dict(text="up " * (i + 1)) for i in range(8)])
    sft.main(sft.Args(**short_run | dict(dataset=data, eval_fraction=0.25, max_steps=1, batch_size=1), output_dir=str(tmp_path / "run")))
    (line,) = lines_of(tmp_path / "run")
    assert line["epoch"] == pytest.approx(1 / 6) and math.isfinite(line["eval_loss"])


# ------------------------------------------------------------------------------------------------------- steps of the optimiser


@pytest.mark.parametrize("schedule, end", [("cosine", 0.1), ("linear", 0.0), ("constant", 1.0)])
def test_learning_rate(schedule, end):
    """As a share of its peak."""
    args = sft.Args(lr_schedule=schedule, warmup_ratio=0.1)
    rates = [sft.scheduled(args, step, 1000) for step in range(1000)]
    assert rates[:100] == pytest.approx([(i + 1) / 100 for i in range(100)])
    assert all(a >= b for a, b in zip(rates[99:], rates[100:])) and rates[-1] == pytest.approx(end, abs=2e-3)
    assert rates[550] == pytest.approx((1 + end) / 2, abs=2e-3)
    assert sft.scheduled(args, 0, 1) == 1.0  # a single step is a whole one


def test_bug30_a_tiny_learning_rate_moves_every_weight(tiny_model_dir):
    """A norm's weight stands at 1.0, where bfloat16 could not add 1e-6; float32 master weights can. The first step of AdamW is lr x sign(g)."""
    model = sft.load_model(sft.AutoModelForCausalLM, str(tiny_model_dir("llama")), tokenizer_of(tiny_model_dir("llama")), CPU, torch.bfloat16)
    optimizer = sft.make_optimizer(model, 1e-6, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sft.take_step(model, optimizer, 1e-6, 1e9)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.allclose(before[name] - p, torch.tensor(1e-6), rtol=0.15), name


def test_weight_decay_is_for_matrices_only(tiny_model_dir):
    model = sft.load_model(sft.AutoModelForCausalLM, str(tiny_model_dir("qwen2")), tokenizer_of(tiny_model_dir("qwen2")), CPU, torch.float32)
    optimizer = sft.make_optimizer(model, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sft.take_step(model, optimizer, 0.1, 1.0)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim > 1 else 1.0)), name


def test_gradients_are_clipped_on_their_joint_norm():
    model = torch.nn.Linear(2, 1, bias=False)
    model.together, seen = True, []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    for gradient, clipped in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        model.weight.grad = torch.tensor([gradient])
        assert sft.take_step(model, optimizer, 1.0, 1.0) == pytest.approx(math.hypot(*gradient))
        assert torch.allclose(seen.pop(), torch.tensor([clipped]), atol=1e-4)
        assert model.weight.grad is None or not model.weight.grad.any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(value, capsys):
    model = torch.nn.Linear(2, 1, bias=False)
    model.together, optimizer, before = True, torch.optim.AdamW(model.parameters()), model.weight.detach().clone()
    model.weight.grad = torch.tensor([[1.0, value]])
    with pytest.raises(SystemExit) as end:
        sft.take_step(model, optimizer, 0.1, 1.0)
    assert end.value.code == 2 and f"the norm of the gradients is {abs(value)}" in capsys.readouterr().err
    assert torch.equal(model.weight, before) and not optimizer.state


def tokenizer_of(folder):
    return sft.load_tokenizer(str(folder))


def test_dropout_is_off_unless_asked(tiny_model_dir):
    folder = str(tiny_model_dir("gpt2"))
    on, off = (sft.load_model(sft.AutoModelForCausalLM, folder, tokenizer_of(folder), CPU, torch.float32, dropout=d) for d in (True, False))
    ((inputs, *_),), *_ = sft.pack([Row([5, 6, 7], [[8, 9], [10, 11]])], CPU)
    same = lambda model: torch.equal(model.base_model(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state)
    assert on.training and not same(on) and same(off)


@given(st.lists(st.sampled_from("ab"), max_size=6), st.lists(st.sampled_from("ab"), max_size=6))
def test_shared_prefix(a, b):
    n = sft.shared(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


# ------------------------------------------------------------------------------------------------------------ output directories

CONVERSATIONS = [dict(messages=talk("Go " + "up " * (i % 7 + 1), "I go " + "right " * (i * 5 % 11 + 1), "Why?", f"It is {i}.")) for i in range(22)]


@pytest.fixture(scope="session")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run of 15 steps with dropout (GPT-2) that saves every 4, and holds out 2 rows."""
    data = jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", CONVERSATIONS)
    flags = dict(model=str(tiny_model_dir("gpt2")), dataset=data, eval_fraction=0.1, epochs=3, batch_size=4, learning_rate=1e-2)
    return flags | dict(save_every=4, eval_every=6, tokens_per_forward=100)


@pytest.fixture(scope="session")
def finished(short_run, tmp_path_factory):
    """The output directory of short_run, never interrupted. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert in_child(sft.main, sft.Args(**short_run, output_dir=str(out))) == 0
    assert len(lines_of(out)) == 15
    return out


def same_run(out, whole):
    """Two output directories hold the same run, bit for bit, and nothing is left of any interruption."""
    assert lasting(out) == lasting(whole)
    ours, theirs = weights_of(out), weights_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for checkpoint in whole.glob("checkpoint-*"):  # the optimiser's moments and the random numbers too
        a, b = (torch.load(folder / checkpoint.name / "state.pt", weights_only=True) for folder in (out, whole))
        assert equal(a | dict(seconds=0), b | dict(seconds=0)), checkpoint.name


def equal(a, b) -> bool:
    """Equality of nested dictionaries and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def whole_checkpoints(out, whole):
    """What has a checkpoint's name, at any moment, has all of its files."""
    for checkpoint in out.glob("checkpoint-*"):
        assert {file.name for file in checkpoint.iterdir()} == {file.name for file in (whole / "checkpoint-4").iterdir()}
        torch.load(checkpoint / "state.pt", weights_only=True)


def killed_at_rename(script, args, number: int):
    """script.main(args), killed just before it gives the number-th file or directory its final name."""
    count, rename = [0], os.replace

    def replace(*names):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), 9)
        rename(*names)

    os.replace = replace  # in a child process: nobody else sees it
    script.main(args)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_bug28_killed_at_random_moments_and_resumed(seed, short_run, finished, tmp_path):
    moments, out = random.Random(seed), tmp_path / "run"
    args = sft.Args(**short_run, output_dir=str(out), resume=True)
    for _ in range(3):
        in_child(sft.main, args, kill_after=moments.uniform(0.3, 1.2) * lines_of(finished)[-1]["seconds"])
        whole_checkpoints(out, finished)
    assert in_child(sft.main, args) == 0
    same_run(out, finished)


@pytest.mark.parametrize("number", [1, 2, 4, 8, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 5, 6, 7, 9, 10, 11, 12))])
def test_bug28_killed_before_a_rename_and_resumed(number, short_run, finished, tmp_path):
    """The renames of this run: args.json, three checkpoints, the finished model's six files, args.json again, curves.png."""
    args = sft.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, sft, args, number) == -9
    whole_checkpoints(tmp_path / "run", finished)
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "run", finished)


def full_at_rename(script, args, number: int, limit: int):
    """script.main(args) on a disk that, just before the number-th file or directory gets its final name, takes no file beyond so many bytes."""
    count, rename = [0], os.replace

    def replace(*names):
        count[0] += 1
        if count[0] == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        rename(*names)

    os.replace = replace
    script.main(args)


@pytest.mark.parametrize("number, limit, what, stands", [(2, 20_000, "saving-8", 1), (3, 300_000, "saving-12", 2), (4, 20_000, "saving", 3)])
def test_a_full_disk_costs_no_checkpoint(number, limit, what, stands, short_run, finished, tmp_path, capfd):
    """Full for weights, for the optimiser's moments, for the finished model."""
    args = sft.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    capfd.readouterr()
    assert in_child(full_at_rename, sft, args, number, limit) == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {tmp_path / 'run' / what}: cannot be written (") and said.endswith("with --resume")
    whole_checkpoints(tmp_path / "run", finished)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == stands and not (tmp_path / "run" / "model.safetensors").exists()
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "run", finished)


def test_bug28_what_a_killed_save_left_behind_is_not_kept(short_run, finished, tmp_path):
    """Safetensors writes a temporary file as large as the weights; killed just then, it must not end up in a checkpoint or beside the model."""
    args = sft.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, sft, args, 3) == -9
    for folder in ("saving-8", "saving"):
        (tmp_path / "run" / folder).mkdir(exist_ok=True)
        (tmp_path / "run" / folder / ".tmp123").write_text("half the weights")
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "run", finished)
    whole_checkpoints(tmp_path / "run", finished)


def test_bug28_a_checkpoint_is_a_model_of_its_own(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    early, last = (AutoModelForCausalLM.from_pretrained(finished / name) for name in ("checkpoint-4", ""))
    ids = AutoTokenizer.from_pretrained(finished / "checkpoint-4").apply_chat_template(talk("Go up"), return_tensors="pt", return_dict=False)
    assert not torch.equal(early(ids).logits, last(ids).logits)
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_bug28_a_resumed_run_ends_in_the_dtype_of_its_parent(short_run, tiny_model_dir, tmp_path):
    """Its checkpoints are float32."""
    source = tmp_path / "half"
    sft.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.bfloat16).save_pretrained(source)
    tokenizer_of(tiny_model_dir("llama")).save_pretrained(source)
    flags = short_run | dict(model=str(source), max_steps=4, save_every=2)
    assert in_child(sft.main, sft.Args(**flags, output_dir=str(tmp_path / "whole"))) == 0
    args = sft.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, sft, args, 3) == -9  # the first file of the finished model
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert {w.dtype for w in weights_of(tmp_path / "run").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bug28_a_finished_run_is_left_as_it_is(short_run, finished, capsys):
    before = snapshot(finished)
    with pytest.raises(SystemExit) as end:
        sft.main(sft.Args(**short_run, output_dir=str(finished), resume=True))
    assert end.value.code == 0 and "finished already" in capsys.readouterr().out and snapshot(finished) == before


def test_bug28_what_does_not_change_the_result_may_change(short_run, finished):
    free = dict(tokens_per_forward=7, save_every=1, run_name="other", gradient_checkpointing=True)
    with pytest.raises(SystemExit) as end:
        sft.main(sft.Args(**short_run | free, output_dir=str(finished), resume=True))
    assert end.value.code == 0


@pytest.mark.parametrize("change", [dict(learning_rate=0.02), dict(seed=1), dict(epochs=4), dict(dtype="float32")])
def test_bug28_resuming_with_other_arguments_is_refused(change, short_run, finished, capsys):
    before, (name,) = snapshot(finished), change
    said = refused(sft, capsys, **short_run | change, output_dir=str(finished), resume=True)
    assert f"{name} was {short_run.get(name, getattr(sft.Args, name))!r} and is {change[name]!r}" in said and snapshot(finished) == before


@pytest.mark.parametrize("what", ["dataset", "model"])
def test_bug28_resuming_with_other_data_is_refused(what, short_run, tmp_path, capsys):
    """The file or directory keeps its name and changes its content."""
    flags, out = dict(short_run, max_steps=1, dataset=jsonl(tmp_path / "chats.jsonl", CONVERSATIONS), model=str(tmp_path / "model")), tmp_path / "run"
    shutil.copytree(short_run["model"], tmp_path / "model")
    sft.main(sft.Args(**flags, output_dir=str(out)))
    before = snapshot(out)
    if what == "dataset":
        jsonl(tmp_path / "chats.jsonl", CONVERSATIONS[:-1] + [dict(messages=talk("Go", "No."))])
    else:
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert f"content of {what} was" in refused(sft, capsys, **flags, output_dir=str(out), resume=True) and snapshot(out) == before


def test_weights_that_could_run_something_are_not_loaded(short_run, tmp_path, capsys):
    """A pickle that leaves a file when it is opened, under the name under which torch's own weights would be looked for."""

    class Mine:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    shutil.copytree(short_run["model"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Mine()))
    said = refused(sft, capsys, **dict(short_run, model=str(tmp_path / "model")), output_dir=str(tmp_path / "run"))
    assert "no file named model.safetensors" in said and not (tmp_path / "opened").exists()
    pickle.loads(pickle.dumps(Mine()))
    assert (tmp_path / "opened").exists()  # it would have


def test_a_directory_in_use_is_refused_and_overwritten_only_when_asked(short_run, finished, tmp_path, capsys):
    out = tmp_path / "run"
    flags = dict(short_run, max_steps=3, save_every=2, output_dir=str(out))
    out.mkdir()
    (out / "letter.txt").write_text("do not lose me")
    before = snapshot(out)
    for resume in (False, True):  # there is nothing to resume
        assert "not empty" in refused(sft, capsys, **flags, resume=resume) and snapshot(out) == before
    sft.main(sft.Args(**flags, overwrite=True))
    (out / "model.safetensors.index.json").write_text("{}")  # as a larger model leaves it: its parts must not stay beside the new weights
    (out / "args.json").write_text("{")
    sft.main(sft.Args(**flags | dict(seed=1, save_every=0), overwrite=True))
    assert len(lines_of(out)) == 3 and not list(out.glob("checkpoint-*")) and (out / "letter.txt").exists()
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_bad_input_does_not_touch_the_directory_to_overwrite(short_run, tmp_path, capsys):
    out = tmp_path / "run"
    sft.main(sft.Args(**short_run | dict(max_steps=3, save_every=2), output_dir=str(out)))
    before = snapshot(out)
    for mistake in (dict(dataset="nowhere.jsonl"), dict(model="no/such/model")):
        refused(sft, capsys, **short_run | mistake, output_dir=str(out), overwrite=True)
        assert sorted(snapshot(out)) == sorted(before) and snapshot(out) == before


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_what_is_read_is_not_overwritten(what, short_run, finished, tmp_path, capsys):
    """A run whose output directory is, or holds, its own input."""
    shutil.copytree(finished, tmp_path / "run")
    data = jsonl(tmp_path / "run" / "chats.jsonl", CONVERSATIONS)
    inputs = [dict(model=str(tmp_path / "run")), dict(model=str(tmp_path / "run" / "checkpoint-8"))] if what == "model" else [dict(dataset=data)]
    before = snapshot(tmp_path / "run")
    for change in inputs:
        assert "--output-dir" in refused(sft, capsys, **short_run | change, output_dir=str(tmp_path / "run"), overwrite=True)
        assert snapshot(tmp_path / "run") == before


def test_tracking_without_wandb_is_refused_at_the_start(short_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    said = refused(sft, capsys, **short_run, track=True, output_dir=str(tmp_path / "run"))
    assert "--track" in said and "wandb" in said and not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_model(short_run, finished, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(sft, "draw", fails)
    with pytest.raises(RuntimeError, match="no fonts"):
        sft.main(sft.Args(**short_run | dict(save_every=0), output_dir=str(tmp_path / "run")))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(finished)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_after_bad_input_the_same_command_works_once_it_is_corrected(short_run, tmp_path, capsys):
    flags = dict(short_run, max_steps=1, output_dir=str(tmp_path / "run"))
    refused(sft, capsys, **flags | dict(dataset=str(tmp_path / "typo.jsonl")))
    sft.main(sft.Args(**flags))


def test_what_a_run_leaves(short_run, finished):
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert names >= {"args.json", "metrics.jsonl", "curves.png", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((finished / "args.json").read_text())
    assert kept["finished"] and kept["script"] == "sft.py" and kept["torch"] == torch.__version__
    assert all(kept["args"][name] == value for name, value in short_run.items())
    assert [line["step"] for line in lines_of(finished)] == list(range(1, 16))
