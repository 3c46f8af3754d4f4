"""The blocks `data`, `rows`, `runs` and `training`, which every script has word for word, tested on sft.py.

Also helpers that the other test files share.
"""

import copy
import importlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import threading
import types
import unicodedata
from collections import Counter
from itertools import groupby
from multiprocessing import forkserver, reduction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CACHE, REPO, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import sft
from sft import Row

settings.register_profile("quiet", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("quiet")
CPU = torch.device("cpu")
slow = pytest.mark.slow


# ---- helpers


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(*texts) -> list:
    """A conversation in which user and assistant take turns."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def trained_text(tokenizer, row: Row) -> list:
    """The trained parts of a row's first response, as text."""
    parts = groupby(zip(row.trained[0], row.responses[0]), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in part]) for is_trained, part in parts if is_trained]


def whole_text(tokenizer, row: Row) -> str:
    return tokenizer.decode(row.prompt + row.responses[0])


def lines_of(out) -> list:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


def lasting(out) -> list:
    """The lines of metrics.jsonl without the fields that measure time or memory."""
    measured = ("tokens_per_second", "seconds", "peak_memory_mb", "eps", "step_time")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines_of(out)]


def weights_of(out) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(out) / "model.safetensors")


def tokenizer_of(folder):
    return sft.load_tokenizer(str(folder))


def snapshot(folder) -> dict:
    """Every file under a folder and its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()
    }


def refused(script, capsys, **flags) -> str:
    return refusal(lambda: script.main(script.Args(**flags)), capsys)


CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload([__name__, "matplotlib.figure"])
reduction.ForkingPickler.register(types.ModuleType, lambda module: (importlib.import_module, (module.__name__,)))


class Output:
    """This process's output, to which a child writes too."""

    def __reduce__(self):
        return take_output, (reduction.DupFd(1), reduction.DupFd(2))


def take_output(*streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)


def clean_process(work, *arguments):
    """work(*arguments) in a process that is forked from one with imports alone: they take longer than most runs here,
    and what other tests have left in this process could crash its own copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPO, Path(__file__).parent))))
        patch.setenv("TESTS_CACHE", CACHE)
        forkserver.ensure_running()
    process = CLEAN.Process(target=at_work, args=(Output(), dict(os.environ), work, *arguments))
    process.start()
    return process


def at_work(output, environment: dict, work, *arguments):
    os.environ.clear()
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # a child that is killed while it holds tqdm's shared lock would block the tests
    work(*arguments)


def in_child(work, *arguments, kill_after=None, timeout=120) -> int:
    """Runs work(*arguments) in a clean process; returns its exit code (-9: killed).

    kill_after: seconds after which it is killed."""
    child = clean_process(work, *arguments)
    child.join(timeout if kill_after is None else kill_after)
    hangs = child.is_alive() and kill_after is None
    child.kill()
    child.join()
    assert not hangs, f"still running after {timeout} s"
    return child.exitcode


def rank_of(script, args, rank: int, world: int, port: int):
    """One rank's process, as torchrun would start it."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    script.RANK, script.WORLD = rank, world
    script.main(args)


def on_ranks(script, world: int, timeout=120, **flags):
    """The script on several gloo ranks, each a clean process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [clean_process(rank_of, script, script.Args(**flags), rank, world, port) for rank in range(world)]
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes} (None: still running after {timeout} s)"


def equal(a, b) -> bool:
    """Equality of nested dictionaries and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def same_run(out, whole):
    """Two output directories hold the same run, bit for bit, and nothing is left of any interruption."""
    assert lasting(out) == lasting(whole)
    assert equal(weights_of(out), weights_of(whole))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for checkpoint in whole.glob("checkpoint-*"):  # also the optimiser's moments
        a, b = (torch.load(folder / checkpoint.name / "state.pt", weights_only=True) for folder in (out, whole))
        assert equal(a | dict(seconds=0), b | dict(seconds=0)), checkpoint.name


def before_rename(number: int, action):
    """In this process, from now on: action() runs just before the number-th os.replace. For child processes only."""
    count, rename = [0], os.replace

    def replace(*names):
        count[0] += 1
        if count[0] == number:
            action()
        rename(*names)

    os.replace = replace


def killed_at_rename(script, args, number: int):
    """script.main(args), killed just before it gives the number-th file or directory its final name."""
    before_rename(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    script.main(args)


# ---- chat templates, as published models have them

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # earlier turns lose their thinking
    "{% for m in messages %}"
    "{% set text = m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n') %}"
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
            special = [*tokenizer.extra_special_tokens, *special]
            tokenizer.add_special_tokens(dict(eos_token=eos, extra_special_tokens=special))
            tokenizer.chat_template = template
        return made[name]

    return make


def encode(tokenizer, prompt, responses: list, **row) -> tuple:
    """Prompt ids and response ids; every token of the responses is trained."""
    head, tails, trained = sft.encode(tokenizer, prompt, responses, row, Counter())
    assert trained == [[True] * len(tail) for tail in tails]
    return head, tails


@every_template
def test_an_answer_ends_with_its_end_of_turn_and_may_be_begun(name, dressed):
    tokenizer, (*_, eos, end) = dressed(name), TEMPLATES[name]
    assert sorted(tokenizer.convert_ids_to_tokens(sft.stop_tokens(tokenizer))) == sorted({eos, end})
    prompt, responses = encode(tokenizer, talk("What is 1 + 1?"), ["two", "It is 2."])
    assert [tokenizer.decode(r).lstrip() for r in responses] == [f"two{end}", f"It is 2.{end}"]
    shown = tokenizer.apply_chat_template(talk("What is 1 + 1?"), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == shown
    prompt, (response,) = encode(tokenizer, talk("Count.", "one, two,"), [" three"])
    assert tokenizer.decode(prompt).endswith("one, two,") and tokenizer.decode(response) == f" three{end}"


@pytest.mark.parametrize("adds, bos", [("<|bos|> $A <|end|>", 1), ("<|bos|> $A", 1), ("$A", 0)])
def test_one_bos_and_one_end_whatever_the_tokenizer_adds(adds, bos, tiny_tokenizer):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    prompt, responses = encode(tokenizer, "Up or", [" right?", " left?<|end|>"])
    assert tokenizer.decode(prompt) == "<|bos|>" * bos + "Up or"
    assert [tokenizer.decode(r) for r in responses] == [" right?<|end|>", " left?<|end|>"]
    prompt, responses = encode(tokenizer, talk("Up or"), [" right?", " left?<|end|>"])  # the template writes the BOS
    assert prompt.count(tokenizer.bos_token_id) == 1 and all(r.count(tokenizer.eos_token_id) == 1 for r in responses)


BOUNDARIES = [("the robot ", "walks"), ("Go up.", "."), ("to the ri", "ght corner"), ("line\n", "\nnext"), ("a", " b")]


@pytest.mark.parametrize("prompt, response", BOUNDARIES)
def test_prompt_and_response_are_tokenised_together(prompt, response, tiny_tokenizer):
    """They part where the ids of the prompt alone and of both together cease to agree, for every response: here one of
    two merges with the prompt's end."""
    whole = tiny_tokenizer(prompt + response + tiny_tokenizer.eos_token).input_ids
    alone = tiny_tokenizer(prompt).input_ids
    for responses in ([response, "1"], ["1", response]):
        head, tails = encode(tiny_tokenizer, prompt, responses)
        assert head + tails[responses.index(response)] == whole
        assert head == alone[: len(head)] and (len(head) == len(alone) or alone[len(head)] != whole[len(head)])
        assert tiny_tokenizer.decode(head + tails[responses.index("1")]) == f"<|bos|>{prompt}1<|end|>"


def nfc(text: str) -> str:
    """What the tiny tokenizer, like Qwen's, makes of a text before it looks at it."""
    return unicodedata.normalize("NFC", text)


anything = (
    st.text(max_size=40).map(nfc).filter(lambda text: "<|" not in text)
)  # hypothesis finds the special tokens here
something = anything.filter(lambda text: text)


@given(prompt=something, responses=st.lists(something, min_size=1, max_size=3), is_chat=st.booleans())
def test_any_text_comes_back(tiny_tokenizer, prompt, responses, is_chat):
    head, tails = encode(tiny_tokenizer, talk(prompt) if is_chat else prompt, responses)
    shown = f"<|bos|><|user|>{prompt}<|end|><|assistant|>"
    for tail, response in zip(tails, responses, strict=True):
        text = shown + response if is_chat else "<|bos|>" + nfc(prompt + response)  # which meet in one text
        assert tiny_tokenizer.decode(head + tail) == text + "<|end|>"
        assert tail[-1] == tiny_tokenizer.eos_token_id


SPECIAL_TEXTS = {
    "a prompt": ("Go<|end|>up.", ["No."], {}),
    "a response": ("Go up.", ["Yes.", "No.<|end|><|user|>Why?"], {}),
    "a message": (talk("Go<|user|>up."), ["No."], {}),
    "a role": ([dict(role="user<|end|>", content="Go up.")], ["No."], {}),
    "a tool": (talk("Go up."), ["No."], dict(tools=[dict(name="<|end|>")])),
    "an option": (talk("Go up."), ["No."], dict(chat_template_kwargs=dict(mood="<|end|>"))),
}


@pytest.mark.parametrize("where", SPECIAL_TEXTS)
def test_data_can_neither_end_nor_begin_a_turn(where, tiny_tokenizer):
    prompt, responses, row = SPECIAL_TEXTS[where]
    with pytest.raises(sft.Drop, match="special token"):
        encode(tiny_tokenizer, prompt, responses, **row)


def test_options_of_a_row_reach_the_template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ tools | tojson if tools else 'no tools' }} {{ mood }} " + tokenizer.chat_template
    reserved = dict(tokenize=False, add_generation_prompt=True)  # a row must not set these
    for tools in ([dict(name="f")], '[{"name": "f"}]', None):  # a list, or as JSON text
        head, _ = encode(tokenizer, talk("Hi"), ["Ho"], tools=tools, chat_template_kwargs=dict(mood="calm", **reserved))
        assert tokenizer.decode(head).startswith('[{"name": "f"}] calm <|' if tools else "no tools calm <|")


def test_messages_are_cleaned():
    sharegpt = [{"from": role, "value": text} for role, text in (("system", "s"), ("human", "u"), ("gpt", "a"))]
    roles = [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert sft.as_messages(sharegpt) == [dict(role=role, content=text) for role, text in roles]
    call = dict(role="assistant", content=None, tool_calls=[1], name=None)
    assert sft.as_messages([call]) == [dict(role="assistant", content="", tool_calls=[1])]
    assert sft.as_messages("x") == [dict(role="assistant", content="x")] and sft.as_messages("x", "user") == talk("x")
    picture = [dict(role="user", content=[dict(type="text", text="x")])]
    for wrong in ([dict(role="user")], [dict(content="x")], picture):
        with pytest.raises(ValueError):
            sft.as_messages(wrong)


# ---- files


def test_a_path_with_a_colon_is_read_and_read_again_once_it_changed(tmp_path):
    (tmp_path / "run 10:30").mkdir()
    for text in ("one", "two ü\u2028"):
        name = jsonl(tmp_path / "run 10:30" / "rows.jsonl", [dict(text=text)])
        assert list(sft.load_rows("--dataset", name, "train")) == [dict(text=text)]


def test_a_changed_input_has_another_fingerprint(tmp_path):
    """Also one that is changed near its end, and whatever a run wrote beside a model."""
    folder, names = tmp_path / "input", ("rows.parquet", "sub/train.jsonl", "checkpoint-4/model", "wandb/log")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a" * 2**25 + b"b" if name == names[0] else b"a")
    prints = [sft.fingerprint(folder)]
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"c")
        prints.append(sft.fingerprint(folder))
    first, end_changed, line_changed, *others = prints
    assert len({first, end_changed, line_changed}) == 3 and others == [line_changed] * 2
    (folder / "rows.parquet").rename(folder / "lines.parquet")
    assert sft.fingerprint(folder) != line_changed and sft.fingerprint(folder / names[1]) != line_changed


# ---- rows

token = st.integers(0, 99)
ids = st.lists(token, min_size=1, max_size=6)


@st.composite
def any_row(draw):
    responses = draw(st.lists(ids, min_size=1, max_size=3))
    trained = [draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r)).filter(any)) for r in responses]
    return Row(draw(ids), responses, trained, {})


any_rows = st.lists(any_row(), min_size=1, max_size=5)


@given(any_rows, st.booleans())
def test_trained_tokens_are_predicted_from_the_token_before(rows, packs):
    """In its own row, packed or padded, and at that token's position in its own row."""
    batch, target = (sft.pack if packs else sft.pad)(rows, CPU)
    expected, sources, lasts, lengths = [], [], [], []
    for row in rows:
        for response, trained in zip(row.responses, row.trained):
            text = row.prompt + response
            at = [len(row.prompt) + j for j, is_trained in enumerate(trained) if is_trained]
            expected += [text[t] for t in at]
            sources += [(text[t - 1], t - 1) for t in at]
            lasts.append((text[-1], len(text) - 1))
            lengths.append(len(text))
    inputs = batch["inputs"]
    tokens = inputs["input_ids"]
    if packs:  # one sequence, and each prompt stands in it once
        assert tokens.shape == (1, sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows))
        positions = inputs["position_ids"]
    else:  # padding stands on the right, where no causal model looks
        positions = torch.arange(max(lengths)).expand(len(lengths), -1)
        assert inputs["attention_mask"].tolist() == (positions < torch.tensor(lengths)[:, None]).long().tolist()
    look = lambda at: list(zip(tokens.flatten()[at].tolist(), positions.flatten()[at].tolist()))
    assert target.tolist() == expected and look(batch["source"]) == sources and look(batch["last"]) == lasts


@given(any_rows, st.integers(1, 40), st.booleans(), st.integers(1, 3))
def test_forwards_hold_every_row_once_within_the_limit(rows, limit, packs, world):
    """Over all ranks, which make equally many of them; a row that fills the time of a rank has weight 0."""
    args, model = SimpleNamespace(tokens_per_forward=limit), SimpleNamespace(packs=packs)
    layout = sft.pack if packs else sft.pad
    once, numbers = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "WORLD", world)
        counts = torch.tensor(0)
        patch.setattr(sft.dist, "all_reduce", lambda x, op: x.copy_(torch.maximum(x, counts)))
        for counting in (True, False):  # the first time to learn what the largest number of forwards is
            for rank in range(world):
                patch.setattr(sft, "RANK", rank)
                made = list(sft.forwards(rows[rank::world], args, model, CPU))
                if counting:
                    counts = torch.maximum(counts, torch.tensor(len(made)))
                    continue
                numbers.append(len(made))
                for group, weight, inputs, target in made:
                    assert weight in (0.0, 1.0) and group
                    assert equal((inputs, target), layout(group, CPU))
                    assert len(group) == 1 or inputs["inputs"]["input_ids"].numel() <= limit
                    once += [id(row) for row in group if weight]
    assert sorted(once) == sorted(map(id, rows)) and len(set(numbers)) == 1


def test_a_rank_without_rows_goes_along(monkeypatch):
    """The other rank makes three forwards: so does this one, with weight 0, of the spare row."""
    monkeypatch.setattr(sft, "WORLD", 2)
    monkeypatch.setattr(sft.dist, "all_reduce", lambda tensor, op: tensor.fill_(3))
    row, args = Row([5], [[6, 7]], [[True, True]], {}), SimpleNamespace(tokens_per_forward=10)
    made = list(sft.forwards([], args, SimpleNamespace(packs=True), CPU, spare=row))
    assert [(group, weight, len(target)) for group, weight, _, target in made] == [([row], 0.0, 2)] * 3


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_an_epoch_is_every_row_once_in_an_order_of_its_own(n, size, seed):
    steps, rows = math.ceil(n / size), list(range(n))

    def order(epoch, seed):
        args = SimpleNamespace(batch_size=size, seed=seed)
        batches = [sft.batch_rows(rows, args, epoch * steps + i) for i in range(steps)]
        assert all(len(batch) == size for batch in batches[:-1])
        return sum(batches, [])

    first, second, other = order(0, seed), order(1, seed), order(0, seed + 1)
    assert sorted(first) == sorted(second) == rows and first == order(0, seed)
    assert n < 12 or first != second and first != other and first != rows


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0, 0.99), st.integers(0, 5), st.booleans())
def test_held_out_rows_are_not_trained_on(prompts, fraction, seed, by_prompt):
    """A prompt is held out with all its rows, or a row for itself. Rows keep their order, and one is left at least."""
    every = [Row([7, prompt], [[i]], [[True]], {}) for i, prompt in enumerate(prompts)]

    def split(seed: int) -> tuple:
        args = SimpleNamespace(dataset="", eval_dataset="", eval_fraction=fraction, seed=seed)
        return sft.prepare_split(args, None, None, by_prompt=by_prompt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "prepare", lambda *_: list(every))
        rows, held = split(seed)
        assert split(seed) == (rows, held)
        assert len(held) < 12 or len(rows) < 12 or split(seed + 1) != (rows, held)
    number = lambda row: row.responses[0][0]
    assert sorted(rows + held, key=number) == every
    assert all(part == sorted(part, key=number) for part in (rows, held))
    keys = [{tuple(row.prompt) if by_prompt else number(row) for row in part} for part in (rows, held)]
    n = len(keys[0] | keys[1])
    assert not keys[0] & keys[1] and len(keys[1]) == min(n - 1, round(fraction * n))


# ---- optimiser steps


def options(**flags) -> sft.Args:
    """Arguments for functions that read neither the model's name nor the data set's."""
    return sft.Args(**dict(dataset="", lr_schedule="constant", warmup_ratio=0.0) | flags)


def loaded(folder, dtype):
    return sft.load_model(sft.AutoModelForCausalLM, str(folder), tokenizer_of(folder), options(), CPU, dtype)


def one_weight(*gradient):
    model = torch.nn.Linear(len(gradient), 1, bias=False)
    model.weight.grad = torch.tensor([gradient])
    return model


@pytest.mark.parametrize("schedule, end", [("cosine", 0.1), ("linear", 0.0), ("constant", 1.0)])
def test_learning_rate(schedule, end):
    """What it is, as a share of its peak, and that the optimiser gets it."""

    def rate(step, steps):
        args, model = options(lr_schedule=schedule, warmup_ratio=0.1, learning_rate=0.5), one_weight(1.0)
        optimizer, before = torch.optim.SGD(model.parameters(), lr=7.0), model.weight.item()
        _, rate = sft.take_step(model, optimizer, args, step, steps)
        assert before - model.weight.item() == pytest.approx(rate, abs=1e-6)
        return rate / 0.5

    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[:100] == pytest.approx([(i + 1) / 100 for i in range(100)])
    assert all(a >= b for a, b in zip(rates[99:], rates[100:])) and rates[-1] == pytest.approx(end, abs=2e-3)
    assert rates[550] == pytest.approx((1 + end) / 2, abs=2e-3)
    assert rate(0, 1) == 1.0  # a single step is a whole one


@pytest.mark.parametrize("decay, gradient", [(0.0, 1.0), (0.5, 0.0)])
def test_a_step_of_adamw(decay, gradient, tiny_model_dir):
    """A tiny one moves every weight: to a norm's 1.0 bfloat16 could not add 1e-6, but the weights are float32, and the
    first step is lr x sign(g). Weight decay is for matrices only."""
    model = loaded(tiny_model_dir("qwen2"), torch.bfloat16)
    args = options(learning_rate=1e-6 if gradient else 0.1, weight_decay=decay, max_grad_norm=1e9)
    optimizer, before = sft.make_optimizer(model, args), [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    sft.take_step(model, optimizer, args, 0, 1)
    for p, old in zip(model.parameters(), before):
        assert p.dtype == torch.float32
        if gradient:
            assert torch.allclose(old - p, torch.tensor(1e-6), rtol=0.15)
        else:
            assert torch.allclose(p, old * (0.95 if p.ndim > 1 else 1.0))


def test_gradients_are_clipped_on_their_joint_norm():
    for gradient, clipped in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        model, seen = torch.nn.ModuleList(one_weight(g) for g in gradient), []
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.register_step_pre_hook(lambda *_, m=model, s=seen: s.extend(p.grad.item() for p in m.parameters()))
        norm, _ = sft.take_step(model, optimizer, options(max_grad_norm=1.0), 0, 1)
        assert norm == pytest.approx(math.hypot(*gradient)) and seen == pytest.approx(clipped, abs=1e-4)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(value, capsys):
    model = one_weight(1.0, value)
    optimizer, before = torch.optim.AdamW(model.parameters()), model.weight.detach().clone()
    with pytest.raises(SystemExit) as end:
        sft.take_step(model, optimizer, options(), 4, 9)
    assert end.value.code == 2 and f"step 5: the norm of the gradients is {abs(value)}" in capsys.readouterr().err
    assert torch.equal(model.weight, before) and not optimizer.state


# ---- output directories


def conversation(i: int) -> dict:
    return dict(
        messages=talk("Go " + "up " * (i % 7 + 1), "I go " + "right " * (i * 5 % 11 + 1), "Why?", f"It is {i}.")
    )


CONVERSATIONS = [conversation(i) for i in range(22)]


@pytest.fixture(scope="session")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run of 15 steps with dropout (GPT-2) that saves every 4, and holds out 2 rows."""
    data = jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", CONVERSATIONS)
    flags = dict(model=str(tiny_model_dir("gpt2")), dataset=data, eval_fraction=0.1, epochs=3, batch_size=4)
    return flags | dict(learning_rate=1e-2, save_every=4, eval_every=6, tokens_per_forward=100)


@pytest.fixture(scope="session")
def finished(short_run, tmp_path_factory):
    """The output directory of short_run, never interrupted. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert in_child(sft.main, sft.Args(**short_run, output_dir=str(out))) == 0
    assert len(lines_of(out)) == 15
    return out


def test_what_a_run_leaves(short_run, finished):
    """A checkpoint is a model of its own."""
    expected = {"args.json", "metrics.jsonl", "curves.png", "checkpoint-4", "checkpoint-8", "checkpoint-12"}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    model |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in finished.iterdir()} == expected | model
    assert {path.name for path in (finished / "checkpoint-4").iterdir()} == model | {"state.pt"}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((finished / "args.json").read_text())
    assert kept["finished"] and kept["script"] == "sft.py" and kept["torch"] == torch.__version__
    assert all(kept["args"][name] == value for name, value in short_run.items())
    assert [line["step"] for line in lines_of(finished)] == list(range(1, 16))
    assert not equal(weights_of(finished / "checkpoint-4"), weights_of(finished))


def whole_checkpoints(out, whole) -> int:
    """What has a checkpoint's name, at any moment, has all of its files. Returns how many there are."""
    checkpoints = list(out.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        assert {file.name for file in checkpoint.iterdir()} == {
            file.name for file in (whole / "checkpoint-4").iterdir()
        }
        torch.load(checkpoint / "state.pt", weights_only=True), weights_of(checkpoint)
    return len(checkpoints)


# how many checkpoints stand before what a run gives a final name: args.json, three checkpoints, each with its config, ...
STANDING = [0, 0, 0, 1, 1, 2, 2, 3, 3]
KILLS = [1, 3, 9, *(pytest.param(number, marks=slow) for number in (2, 4, 5, 6, 7, 8))]


@pytest.mark.parametrize("number", KILLS)
def test_killed_before_a_rename_and_resumed(number, short_run, finished, tmp_path):
    args = sft.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, sft, args, number) == -9
    assert whole_checkpoints(tmp_path / "run", finished) == STANDING[number - 1]
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "run", finished)


def full_at_rename(args, number: int, limit: int, kills: bool):
    """sft.main(args) on a disk that takes no file beyond so many bytes from just before the number-th rename on.

    kills: the process is killed as it writes beyond that, and leaves half a file."""

    def fill():
        if kills:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before_rename(number, fill)
    sft.main(args)


FULL = [  # where the disk is full, how many bytes fit, what cannot be written, how many checkpoints stand, kill or not
    (3, 20_000, "checkpoint-8", 1, False),  # weights
    (5, 300_000, "checkpoint-12", 2, True),  # the optimiser's moments
    (7, 20_000, "", 3, False),  # the finished model
    (7, 20_000, "", 3, True),
]


@pytest.mark.parametrize("number, limit, what, stands, kills", FULL)
def test_a_full_disk_costs_no_checkpoint(number, limit, what, stands, kills, short_run, finished, tmp_path, capfd):
    """Killed as it writes, a run leaves temporary files, which must end up neither in a checkpoint nor beside a model."""
    out = tmp_path / "run"
    args = sft.Args(**short_run, output_dir=str(out), resume=True)
    capfd.readouterr()
    assert in_child(full_at_rename, args, number, limit, kills) == (-signal.SIGXFSZ if kills else 2)
    err = capfd.readouterr().err
    if not kills:
        (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert said.startswith(f"error: {out / what}: cannot be written; ") and "--resume" in said
        assert "Traceback" not in err
    assert whole_checkpoints(out, finished) == stands
    assert in_child(sft.main, args) == 0
    whole_checkpoints(out, finished)
    same_run(out, finished)


def test_a_resumed_run_ends_in_the_dtype_of_its_parent(short_run, tiny_model_dir, tmp_path):
    """Its checkpoints are float32. GPT-2's tied weights are written once."""
    source, out = tmp_path / "half", tmp_path / "run"
    sft.AutoModelForCausalLM.from_pretrained(tiny_model_dir("gpt2"), dtype=torch.bfloat16).save_pretrained(source)
    tokenizer_of(tiny_model_dir("gpt2")).save_pretrained(source)
    args = sft.Args(**short_run | dict(model=str(source), max_steps=3, save_every=2, output_dir=str(out), resume=True))
    assert in_child(killed_at_rename, sft, args, 4) == -9  # config.json of the finished model
    assert in_child(sft.main, args) == 0
    for folder, dtype in ((out, "bfloat16"), (out / "checkpoint-2", "float32")):
        weights = weights_of(folder)
        assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"} and "lm_head.weight" not in weights
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def as_command(args, third_step=(), load_tokenizer=()):
    """The script as a command with arguments that differ from their defaults, in this process, a child.

    It gets these signals in its third step, or when it loads the tokenizer."""

    def raise_signals(numbers):
        for number in numbers:
            os.kill(os.getpid(), number)

    clip, load, steps = torch.nn.utils.clip_grad_norm_, transformers.AutoTokenizer.from_pretrained, []

    def clip_grad_norm_(*arguments, **more):
        steps.append(1)
        raise_signals(third_step if len(steps) == 3 else ())
        return clip(*arguments, **more)

    def from_pretrained(*arguments, **more):
        raise_signals(load_tokenizer)
        return load(*arguments, **more)

    torch.nn.utils.clip_grad_norm_, transformers.AutoTokenizer.from_pretrained = clip_grad_norm_, from_pretrained
    script = Path(sys.modules[type(args).__module__].__file__).name
    sys.argv = [script]
    for name, value in vars(args).items():
        if value is True:
            sys.argv.append(f"--{name.replace('_', '-')}")
        elif not isinstance(value, bool) and value not in ("", ()):
            words = value if isinstance(value, tuple) else [value]
            sys.argv += [f"--{name.replace('_', '-')}", *map(str, words)]
    runpy.run_path(str(REPO / script), run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_saves(number, short_run, tmp_path, capfd):
    """Then --resume goes on to what an uninterrupted run comes to. A second signal ends the program at once."""
    flags = short_run | dict(max_steps=5, save_every=0, eval_every=0)
    out, args = tmp_path / "run", sft.Args(**flags, output_dir=str(tmp_path / "run"))
    capfd.readouterr()
    assert in_child(as_command, args, [number]) == 128 + number
    assert "stopped after step 3, as asked" in capfd.readouterr().out
    assert len(lines_of(out)) == 3 and not json.loads((out / "args.json").read_text())["finished"]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert in_child(sft.main, sft.Args(**flags, output_dir=str(out), resume=True)) == 0
    assert in_child(sft.main, sft.Args(**flags, output_dir=str(tmp_path / "whole"))) == 0
    assert lasting(out) == lasting(tmp_path / "whole") and equal(weights_of(out), weights_of(tmp_path / "whole"))
    args = sft.Args(**flags, output_dir=str(tmp_path / "twice"))
    assert in_child(as_command, args, [number, number]) == -number
    assert len(lines_of(tmp_path / "twice")) == 2 and not list(tmp_path.glob("twice/checkpoint-*"))


def test_all_ranks_stop_when_one_is_asked_to(monkeypatch):
    """They learn of it with the sums of the step, in one transfer."""
    monkeypatch.setattr(sft, "WORLD", 2)
    monkeypatch.setattr(sft, "STOP", SimpleNamespace(signal=0, agreed=False))
    args, made = SimpleNamespace(save_every=0), []
    for other in (0, signal.SIGTERM):  # what the other rank contributes
        monkeypatch.setattr(sft.dist, "all_reduce", lambda x, op: made.append(1) or x.add_(torch.tensor([1, 2, other])))
        assert sft.sum_over_ranks(dict(a=torch.tensor(3.0), b=torch.tensor(0.5))) == dict(a=4.0, b=2.5)
        assert sft.should_save(args, 3, 9) == (other > 0) and not sft.should_save(args, 9, 9)
    assert len(made) == 2


def test_a_finished_run_is_left_as_it_is(short_run, finished, capsys):
    """Also under options that do not change the result."""
    free = dict(tokens_per_forward=7, save_every=1, gradient_checkpointing=True, track=True)
    for change in ({}, free):
        before = snapshot(finished)
        with pytest.raises(SystemExit) as end:
            sft.main(sft.Args(**short_run | change, output_dir=str(finished), resume=True))
        assert end.value.code == 0 and "finished already" in capsys.readouterr().out and snapshot(finished) == before


CHANGES = [dict(learning_rate=0.02), dict(seed=1), dict(epochs=4), dict(dtype="float32")]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_resuming_with_other_arguments_is_refused(change, short_run, finished, capsys):
    before, ((name, value),) = snapshot(finished), change.items()
    said = refused(sft, capsys, **short_run | change, output_dir=str(finished), resume=True)
    assert f"{name} was {short_run.get(name, getattr(sft.Args, name, None))!r} and is {value!r}" in said
    assert snapshot(finished) == before


@pytest.mark.parametrize("changed", ["file", "part of a file", "model"])
def test_resuming_with_other_data_is_refused(changed, short_run, tmp_path, capsys):
    """The file or directory keeps its name and changes its content."""
    data, model, out = tmp_path / "chats.jsonl", tmp_path / "model", tmp_path / "run"
    shutil.copytree(short_run["model"], model)
    name = f"{jsonl(data, CONVERSATIONS)}{'::train[:10]' * (changed == 'part of a file')}"
    flags = dict(short_run, max_steps=1, dataset=name, model=str(model), output_dir=str(out))
    sft.main(sft.Args(**flags))
    before, path = snapshot(out), model / "model.safetensors" if changed == "model" else data
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    assert f"content of {model if changed == 'model' else data}" in refused(sft, capsys, **flags, resume=True)
    assert snapshot(out) == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"finished": false, "plan": {}}'])
def test_an_args_file_of_something_else_is_not_resumed(content, short_run, tmp_path, capsys):
    (tmp_path / "args.json").write_text(content)
    assert str(tmp_path) in refused(sft, capsys, **short_run, output_dir=str(tmp_path), resume=True)
    assert snapshot(tmp_path) == {"args.json": content.encode()}


def test_a_directory_in_use_is_refused_and_overwritten_only_when_asked(short_run, tmp_path, capsys):
    """Then a user's own files stay, and what a run wrote goes, also the files of an older model in several parts."""
    out = tmp_path / "run"
    flags = dict(short_run, max_steps=3, save_every=2, eval_every=0, output_dir=str(out))
    out.mkdir()
    (out / "letter.txt").write_text("do not lose me")
    before = snapshot(out)
    for resume in (False, True):  # there is nothing to resume
        assert "not empty" in refused(sft, capsys, **flags, resume=resume) and snapshot(out) == before
    with pytest.MonkeyPatch.context() as patch:
        save = transformers.PreTrainedModel.save_pretrained
        in_parts = lambda *arguments, **more: save(*arguments, **more, max_shard_size="20KB")
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", in_parts)
        sft.main(sft.Args(**flags, overwrite=True))
    assert (out / "model.safetensors.index.json").exists() and not (out / "model.safetensors").exists()
    (out / "args.json").write_text("{")
    sft.main(sft.Args(**flags | dict(seed=1, save_every=0), overwrite=True))
    assert len(lines_of(out)) == 3 and not list(out.glob("checkpoint-*")) and (out / "letter.txt").exists()
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("mistake", [dict(dataset="nowhere.jsonl"), dict(model="no/such/model")], ids=str)
def test_bad_input_does_not_touch_the_directory_to_overwrite(mistake, short_run, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = snapshot(finished)
    refused(sft, capsys, **short_run | mistake, output_dir=str(tmp_path / "run"), overwrite=True)
    assert sorted(snapshot(tmp_path / "run")) == sorted(before) and snapshot(tmp_path / "run") == before


def test_tracking_without_wandb_is_refused_at_the_start(short_run, tmp_path, capsys, monkeypatch):
    find = sft.importlib.util.find_spec
    monkeypatch.setattr(sft.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    said = refused(sft, capsys, **short_run, track=True, output_dir=str(tmp_path / "run"))
    assert "--track" in said and "wandb" in said and not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_model(short_run, finished, monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(sft, "draw_curves", fails)
    assert "no fonts" in refused(sft, capsys, **short_run | dict(save_every=0), output_dir=str(tmp_path / "run"))
    assert equal(weights_of(tmp_path / "run"), weights_of(finished))


# ---- what a run shows

OLD, AMPERE = (7, 5), (8, 0)
DEVICES = [  # --dtype, compute capability of the GPU or None, version of CUDA, dtype of the computation, what is said
    ("auto", None, None, torch.float32, ""),
    (
        "auto",
        None,
        "12.8",
        torch.float32,
        "built for CUDA 12.8 but finds no GPU: the run computes on the CPU in float32",
    ),
    ("auto", AMPERE, "12.8", torch.bfloat16, ""),
    ("float32", AMPERE, "12.8", torch.float32, ""),
    (
        "auto",
        OLD,
        "12.8",
        torch.float32,
        "capability 7.5 has no bfloat16, which needs 8.0: the run computes in float32",
    ),
    ("bfloat16", OLD, "12.8", torch.bfloat16, "try --dtype float32"),
]


@pytest.mark.parametrize("dtype, gpu, cuda, computed, said", DEVICES)
def test_a_device_that_is_not_what_a_user_expects_is_said(dtype, gpu, cuda, computed, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    for owner, name in ((torch.cuda, "set_device"), (sft.dist, "init_process_group"), (torch, "manual_seed")):
        monkeypatch.setattr(owner, name, lambda *a, **k: None)
    device, found = sft.setup_distributed(SimpleNamespace(dtype=dtype, seed=0))
    assert found == computed and device.type == ("cuda" if gpu else "cpu")
    printed = capsys.readouterr().out
    assert printed.count("\n") == bool(said) and printed.startswith("note: " * bool(said)) and said in printed


def test_progress_in_a_file_is_a_line_every_half_minute(tmp_path, capsys):
    """In three significant digits. Where training starts, answers are tied: an accuracy of 0 would say nothing."""
    args, bar = SimpleNamespace(track=False), sft.progress("sft", 0, 9)
    for step, seconds in enumerate((31, 40, 70, 99), 1):
        metrics = dict(step=step, loss=0.123456, accuracy=0.0 if step == 1 else 2 / 3, tokens_per_second=14512.3)
        sft.log_metrics(args, tmp_path, metrics | dict(grad_norm=1.0, seconds=seconds, peak_memory_mb=7), bar)
    printed = capsys.readouterr()
    assert "\r" not in printed.out and not printed.err and [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert printed.out.splitlines() == [
        "step 1 of 9: loss 0.123, tokens_per_second 14500",
        "memory: 7 MB at the peak so far",
        "step 3 of 9: loss 0.123, accuracy 0.667, tokens_per_second 14500",
    ]


def test_curves_are_of_what_changes(tmp_path, monkeypatch):
    """With the running mean over a twentieth of the run, and the held-out values."""
    import matplotlib.figure as figures
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    lines = [dict(step=i + 1, loss=100 + 1e-4 * i, kl=0.0, reward=i % 2) for i in range(40)]
    lines[-1]["eval_reward"] = 0.75
    for count in (40, 1):  # of a single step, nothing changes
        sft.draw_curves(tmp_path / "curves.png", lines[:count], ["loss", "kl", "absent", "reward"])
    many, one = (figure.axes for figure in drawn)
    assert [axis.get_ylabel() for axis in many] == ["loss", "reward"]
    assert [axis.get_ylabel() for axis in one] == ["loss", "kl", "reward"]
    raw, mean, held_out = many[1].lines
    assert [*raw.get_ydata()] == [0, 1] * 20 and raw.get_alpha() < 1
    assert [*mean.get_ydata()][:4] == pytest.approx([0, 1 / 2, 1 / 3, 2 / 3])
    assert [*held_out.get_xdata()] == [40] and [*held_out.get_ydata()] == [0.75]
    assert not many[0].yaxis.get_major_formatter().get_useOffset() and many[0].get_xlabel() == "step"
