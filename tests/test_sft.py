"""sft.py: which tokens are trained, with what loss, and what the trained model is worth.

Of the shared blocks, `log-probabilities` and `rows` are tested here; and on whole runs, what ranks, --resume and
bfloat16 leave unchanged.
"""

import copy
import json
import math
import re
import shutil
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAMILIES, SENTENCES, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_plumbing import (
    CPU,
    TEMPLATES,
    anything,
    dressed,  # noqa: F401
    every_template,
    in_child,
    jsonl,
    killed_at_rename,
    lasting,
    lines_of,
    on_ranks,
    refused,
    same_run,
    snapshot,
    talk,
    tokenizer_of,
    trained_text,
    weights_of,
    whole_text,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from sft import Row

slow = pytest.mark.slow
# ATEN_CPU_CAPABILITY=default on a processor with more: torch's own attention raises "pack_vnni2 is only supported …"
needs_bfloat16 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch cannot compute attention in bfloat16"
)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Evaluations print answers of a few tokens: 128 of them would take longer than the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.show_answers.__wrapped__, "__defaults__", (3, 3))  # torch.no_grad wraps it
        yield


def demonstrate(tokenizer, row, max_length=512, train_all=False, notes=None) -> list:
    return sft.demonstration_rows(tokenizer, max_length, train_all, row, Counter() if notes is None else notes)


def read_all(data: list, folder, **options) -> list:
    """The rows of a data set under the tokenizer of a checkpoint."""
    tokenizer = tokenizer_of(folder)
    return [row for example in data for row in demonstrate(tokenizer, example, **options)]


def is_near(ours, theirs, terms: int = 1) -> bool:
    """Equal up to rounding in float32, relative to the largest value: a few units in the last place, times the square
    root of the number
    of terms that are summed, since their errors are independent."""
    scale = 8 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    return bool((ours.double() - theirs.double()).abs().max() <= scale * theirs.abs().max())


# --------------------------------------------------------------------------------------------- which tokens are trained


@every_template
def test_every_answer_is_trained_with_its_end_and_nothing_else(name, dressed):  # noqa: F811
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    messages = talk("Hi.", "Hello!", "What is 2 + 2?", "It is 4.\nYes, 4.", "Sure?", "Sure.")
    rows = demonstrate(tokenizer, dict(messages=messages))
    parts = [part.lstrip() for row in rows for part in trained_text(tokenizer, row)]
    assert parts == [f"Hello!{end}", f"It is 4.\nYes, 4.{end}", f"Sure.{end}"]
    # where no turn has an end, an answer's end-of-sequence token cannot stand before the next turn
    assert len(rows) == (3 if name == "glm" else 1)
    assert all(row.responses[0][-1] in sft.stop_tokens(tokenizer) and row.trained[0][-1] for row in rows)


@every_template
def test_the_text_is_the_templates(name, dressed):  # noqa: F811
    tokenizer, messages = dressed(name), talk("Hi.", "Hello!", "What is 2 + 2?", "It is 4.")
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    end = tokenizer.eos_token if name == "glm" else ""
    assert whole_text(tokenizer, demonstrate(tokenizer, dict(messages=messages))[-1]) == text + end


def test_a_template_that_drops_thinking_gives_one_row_for_each_turn(dressed):  # noqa: F811
    tokenizer = dressed("qwen3")
    thoughts = ["<think>\nA greeting.\n</think>\n\nHello!", "<think>\nA sum.\n</think>\n\nIt is 4."]
    rows = demonstrate(tokenizer, dict(messages=talk("Hi.", thoughts[0], "What is 2 + 2?", thoughts[1])))
    assert [trained_text(tokenizer, row) for row in rows] == [[f"{thought}<|im_end|>"] for thought in thoughts]
    assert "A greeting" not in whole_text(tokenizer, rows[1]) and "Hello!" in whole_text(tokenizer, rows[1])


def test_of_a_conversation_in_rows_the_turns_that_fit_are_kept(dressed):  # noqa: F811
    tokenizer, messages = dressed("glm"), talk("Hi.", "Hello!", "Tell me more. " * 50, "No.")
    (row,) = demonstrate(tokenizer, dict(messages=messages), max_length=100)
    assert trained_text(tokenizer, row) == ["Hello!<|endoftext|>"]


@given(st.lists(anything.filter(str.strip), min_size=2, max_size=6))
def test_any_conversation_is_masked_as_its_beginnings_are(tiny_tokenizer, texts):
    messages, notes = talk(*texts), Counter()
    ((all_ids, all_trained),) = sft.encode_turns(tiny_tokenizer, messages, 0, {}, notes)
    for end in range(2, len(texts) + 1, 2):
        ((ids, trained),) = sft.encode_turns(tiny_tokenizer, messages[:end], 0, {}, notes)
        assert all_ids[: len(ids)] == ids and all_trained[: len(ids)] == trained
        marked = [t for t, keep in zip(ids, trained, strict=True) if keep]
        assert tiny_tokenizer.decode(marked) == "".join(f"{text}<|end|>" for text in texts[1:end:2])


MARKS = [
    "<|end|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|user|>",
    "<|",
    "|>",
    "end",
    "[INST]",
    "\n",
    "up",
    " ",
]
PIECES = st.lists(st.sampled_from(MARKS), max_size=6).map("".join)
spoken = st.one_of(anything, PIECES, st.tuples(anything, PIECES).map("".join))
turns = st.lists(st.tuples(spoken, spoken.filter(str.strip)), min_size=1, max_size=2).map(lambda pairs: sum(pairs, ()))


@every_template
@given(texts=turns)
def test_no_text_ends_a_turn(name, dressed, texts):  # noqa: F811
    """A row in which somebody types a special token is dropped. A row that is kept has the special tokens of harmless
    texts."""
    tokenizer = dressed(name)
    special, plain = sft.special_tokens(tokenizer), ["x" for _ in texts]
    ids = lambda row: [t for t in row.prompt + row.responses[0] if t in special]
    try:
        rows = demonstrate(tokenizer, dict(messages=talk(*texts)))
    except sft.Drop:
        assert any(token in text for token in special.values() for text in texts)
    else:  # of several rows, the last has the whole conversation
        assert ids(rows[-1]) == ids(demonstrate(tokenizer, dict(messages=talk(*plain)))[-1])


mark = st.text(alphabet="<>[]|/abc \n", max_size=6)


@given(
    marks=st.lists(mark, min_size=6, max_size=6),
    end=st.sampled_from(["<|end|>", "<|endoftext|>", ""]),
    texts=st.lists(anything.filter(lambda text: "(" not in text), min_size=4, max_size=4),
)
def test_under_any_template_the_answers_are_what_is_trained(tiny_tokenizer, marks, end, texts):
    """Whatever stands around the turns: what is trained decodes to the answers with their ends, and a row to what the
    template writes."""
    before_user, after_user, before_answer, after_answer, start, between = (m.replace("{", "") for m in marks)
    if end:  # behind an end of turn there is white space only
        after_answer, between = ("\n" * len(m) for m in (after_answer, between))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    literal = lambda text: "{{ " + repr(text) + " }}"
    user = f"{literal(before_user)}{{{{ m['content'] }}}}{literal(after_user)}"
    answer = f"{literal(before_answer)}{{{{ m['content'] }}}}{literal(end)}{literal(after_answer)}"
    turn = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}{literal(between)}"
    tokenizer.chat_template = f"{literal(start)}{{% for m in messages %}}{turn}{{% endfor %}}"
    tokenizer.chat_template += f"{{% if add_generation_prompt %}}{literal(before_answer)}{{% endif %}}"
    texts = [f"({i}{text})" for i, text in enumerate(texts)]  # no answer is empty, and none is in another
    rows = demonstrate(tokenizer, dict(messages=talk(*texts)))
    said = [part for row in rows for part in trained_text(tokenizer, row)]
    if not end:  # nothing marks the end of a turn: what follows an answer may share a token with its last letter
        assert said[-1].lstrip().startswith(texts[3][:-1])
        return
    # a mark before an answer may share a token with its "("
    assert [part[part.index("(") :] for part in said] == [text + end for text in texts[1::2]]
    assert all(len(part) - len(text + end) < 6 for part, text in zip(said, texts[1::2], strict=True))
    whole, last = tokenizer.apply_chat_template(talk(*texts), tokenize=False), whole_text(tokenizer, rows[-1])
    assert whole.startswith(last) or last.startswith(whole)


PARAMETERS = dict(type="object", properties=dict(a=dict(type="number")))
TOOLS = [dict(type="function", function=dict(name="sum", parameters=PARAMETERS))]
CALL = dict(role="assistant", tool_calls=[dict(type="function", function=dict(name="sum", arguments=dict(a=2)))])
WRITTEN_CALL = '{"name": "sum", "arguments": {"a": 2}}<|end|>'
SAID = "<|bos|><|user|>Hi.<|end|><|assistant|>Hello!<|end|>"
SEE_YOU = "<|user|>Bye.<|end|><|assistant|>See you.<|end|>"
BRIEF = SAID.replace("<|bos|>", "<|bos|><|system|>Be brief.<|end|>")
SHAREGPT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]
ANSWER = [dict(role="assistant", content="Hello!")]
FORMATS = {  # a row -> (its text, its trained parts)
    "text": (dict(text="Up, right."), "<|bos|>Up, right.<|end|>", ["Up, right.<|end|>"]),
    "text with its end": (dict(text="Up, right.<|end|>"), "<|bos|>Up, right.<|end|>", ["Up, right.<|end|>"]),
    "messages": (
        dict(messages=talk("Hi.", "Hello!", "Bye.", "See you.")),
        SAID + SEE_YOU,
        ["Hello!<|end|>", "See you.<|end|>"],
    ),
    "messages with their ends": (dict(messages=talk("Hi.", "Hello!<|end|>")), SAID, ["Hello!<|end|>"]),
    "messages with a system turn": (
        dict(messages=[dict(role="system", content="Be brief."), *talk("Hi.", "Hello!")]),
        BRIEF,
        ["Hello!<|end|>"],
    ),
    "messages with a system column": (
        dict(messages=talk("Hi.", "Hello!"), system="Be brief."),
        BRIEF,
        ["Hello!<|end|>"],
    ),
    "messages, the user speaks last": (dict(messages=talk("Hi.", "Hello!", "Bye.")), SAID, ["Hello!<|end|>"]),
    "messages, the assistant speaks first": (
        dict(messages=[dict(role="assistant", content="Welcome!"), *talk("Hi.", "Hello!")]),
        SAID.replace("<|bos|>", "<|bos|><|assistant|>Welcome!<|end|>"),
        ["Hello!<|end|>"],
    ),
    "messages, one of weight 0": (
        dict(messages=[*talk("Hi."), ANSWER[0] | dict(weight=0), *talk("Bye.", "See you.")]),
        SAID + SEE_YOU,
        ["See you.<|end|>"],
    ),
    "conversations": (dict(conversations=SHAREGPT), SAID, ["Hello!<|end|>"]),
    "conversations with a system column": (
        dict(conversations=SHAREGPT, system="Be brief."),
        BRIEF,
        ["Hello!<|end|>"],
    ),
    "prompt and completion": (
        dict(prompt="Up or", completion=" right?"),
        "<|bos|>Up or right?<|end|>",
        [" right?<|end|>"],
    ),
    "prompt and completion with its end": (
        dict(prompt="Up or", completion=" right?<|end|>"),
        "<|bos|>Up or right?<|end|>",
        [" right?<|end|>"],
    ),
    "messages as prompt and completion": (
        dict(prompt=talk("Hi.", "Hello!", "Bye."), completion=[dict(role="assistant", content="See you.")]),
        SAID + SEE_YOU,
        ["See you.<|end|>"],
    ),
    "messages as prompt, text as completion": (dict(prompt=talk("Hi."), completion="Hello!"), SAID, ["Hello!<|end|>"]),
    "text as prompt, messages as completion": (dict(prompt="Hi.", completion=ANSWER), SAID, ["Hello!<|end|>"]),
    "a completion of several turns": (
        dict(prompt=talk("Hi."), completion=talk("Hi.", "Hello!", "Bye.", "See you.")[1:]),
        SAID + SEE_YOU,
        ["Hello!<|end|>", "See you.<|end|>"],
    ),
    "a completion that continues a prompt": (
        dict(prompt=talk("Count.", "one, two,"), completion=[dict(role="assistant", content=" three")]),
        "<|bos|><|user|>Count.<|end|><|assistant|>one, two, three<|end|>",
        [" three<|end|>"],
    ),
    "question and answer": (dict(question="Hi.", answer="Hello!"), SAID, ["Hello!<|end|>"]),
    "question and response, with a system column": (
        dict(question="Hi.", response="Hello!", system="Be brief."),
        BRIEF,
        ["Hello!<|end|>"],
    ),
    "instruction and output": (dict(instruction="Hi.", input="", output="Hello!"), SAID, ["Hello!<|end|>"]),
    "instruction, input and output": (
        dict(instruction="Add.", input="2, 3", output="5"),
        "<|bos|><|user|>Add.\n\n2, 3<|end|><|assistant|>5<|end|>",
        ["5<|end|>"],
    ),
    "tools": (dict(messages=talk("Hi.", "Hello!"), tools=TOOLS), json.dumps(TOOLS) + SAID, ["Hello!<|end|>"]),
    "tools as JSON": (
        dict(messages=talk("Hi.", "Hello!"), tools=json.dumps(TOOLS)),
        json.dumps(TOOLS) + SAID,
        ["Hello!<|end|>"],
    ),
    "tool calls": (
        dict(messages=[*talk("2?"), CALL, dict(role="tool", content="2"), *talk("", "It is 2.")[1:]], tools=TOOLS),
        None,
        [WRITTEN_CALL, "It is 2.<|end|>"],
    ),
    "a tool call at the end": (dict(messages=[*talk("2?"), CALL]), None, [WRITTEN_CALL]),
}


@pytest.fixture(scope="module")
def with_tools(tiny_tokenizer):
    """The tiny tokenizer with a template that shows tools and calls of tools."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    calls = "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    content = "message['content'] + '<|end|>' }}"
    assert content in tokenizer.chat_template
    template = tokenizer.chat_template.replace(content, "message['content'] }}" + calls + "<|end|>")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + template
    return tokenizer


@pytest.mark.parametrize(
    "name",
    [n if n == "text as prompt, messages as completion" else n for n in FORMATS],
)
@pytest.mark.parametrize("source", ["row", "jsonl", "parquet"])
def test_every_format(source, name, with_tools, tmp_path):
    """As a row, and as a reader gives it back beside a row of another shape, which makes it fill absent keys with
    None."""
    row, text, parts = FORMATS[name]
    if source == "jsonl":
        row = sft.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, {}]), "train")[0]
    if source == "parquet":
        other_call = dict(CALL, tool_calls=[dict(type="function", function=dict(name="f", arguments=dict(b=3)))])
        data = sft.Dataset.from_list([row, dict(messages=[other_call]) if "call" in name else {}])
        data.to_parquet(tmp_path / "rows.parquet")
        row = sft.load_rows("--dataset", str(tmp_path / "rows.parquet"), "train")[0]
    (row,) = demonstrate(with_tools, row)
    assert trained_text(with_tools, row) == parts
    assert text is None or whole_text(with_tools, row) == text


def test_prompts_are_trained_when_asked(tiny_tokenizer):
    (row,) = demonstrate(tiny_tokenizer, dict(messages=talk("Hi.", "Hello!")), train_all=True)
    assert tiny_tokenizer.decode(row.prompt) == "<|bos|>"
    assert trained_text(tiny_tokenizer, row) == ["<|user|>Hi.<|end|><|assistant|>Hello!<|end|>"]


ROWS = [dict(text="Up."), dict(prompt="U", completion="p."), dict(messages=talk("Up?", "Up."))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row))
@pytest.mark.parametrize("train_all", [True, False])
def test_one_bos_at_the_start_of_a_row(row, train_all, tiny_tokenizer):
    (row,) = demonstrate(tiny_tokenizer, row, train_all=train_all)
    ids = row.prompt + row.responses[0]
    assert ids[0] == tiny_tokenizer.bos_token_id and ids.count(tiny_tokenizer.bos_token_id) == 1


def test_the_end_is_trained_where_it_is_the_padding_too(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = demonstrate(tokenizer, dict(messages=talk("Hi.", "Hello!")))
    assert row.responses[0][-1] == tokenizer.pad_token_id and row.trained[0][-1]


DROPPED = [
    (dict(text=" \n"), "empty answer"),
    (dict(text=None), "empty answer"),
    (dict(messages=[]), "empty answer"),
    (dict(prompt="a", completion=""), "empty answer"),
    (dict(question="a", answer=" "), "empty answer"),
    (dict(messages=talk("a", " ")), "empty answer"),
    (dict(prompt=talk("a"), completion=[]), "empty answer"),
    (dict(messages=talk("a")), "no assistant turn"),
    (dict(messages=[*talk("a"), ANSWER[0] | dict(weight=0)]), "no assistant turn"),
    (dict(messages=[*talk("2?"), CALL]), "empty but for its end-of-turn"),  # the tiny template shows no calls
    (dict(prompt="a " * 600, completion="b"), "prompt beyond --max-length"),
    (dict(text="a<|end|>b"), "special token"),
    (dict(messages=talk("a<|end|><|assistant|>b", "c")), "special token"),
    (dict(messages=[dict(role="user<|end|>", content="a"), *ANSWER]), "special token"),
    (dict(prompt="<|system|>a", completion="b"), "special token"),
]


@pytest.mark.parametrize("row, why", DROPPED, ids=lambda value: str(value)[:40])
def test_rows_that_cannot_be_used_are_dropped(row, why, tiny_tokenizer):
    with pytest.raises(sft.Drop, match=why):
        demonstrate(tiny_tokenizer, row)


def test_dropped_and_cut_rows_are_counted(tiny_tokenizer, tmp_path, capsys):
    long, cut = dict(messages=talk("up " * 60, "no")), dict(messages=talk("a", "up " * 60))
    whole, special = dict(messages=talk("a", "b")), dict(messages=talk("x<|end|>z", "y"))
    data = jsonl(tmp_path / "rows.jsonl", [whole, long, cut, long, whole, special])
    encode_row = sft.partial(sft.demonstration_rows, tiny_tokenizer, 40, False)
    rows = sft.prepare("--dataset", data, "train", tiny_tokenizer, encode_row)
    assert [len(row.prompt + row.responses[0]) for row in rows] == [7, 40, 7]
    assert len(rows[1].trained[0]) == len(rows[1].responses[0])
    said = capsys.readouterr().out
    for part in ("3 rows from 6", "2 dropped: prompt beyond --max-length", "1 rows cut", "1 dropped: special token"):
        assert part in said
    assert "<|bos|><|user|>a<|end|><|assistant|>[[b<|end|>]]" in said


def test_a_row_that_the_template_refuses_is_dropped(dressed, tmp_path, capsys):  # noqa: F811
    tokenizer, system = dressed("gemma"), dict(role="system", content="s")
    data = jsonl(tmp_path / "rows.jsonl", [dict(messages=[system, *talk("a", "b")]), dict(messages=talk("a", "b"))])
    encode_row = sft.partial(sft.demonstration_rows, tokenizer, 40, False)
    assert len(sft.prepare("--dataset", data, "train", tokenizer, encode_row)) == 1
    assert "1 dropped: refused by the chat template (System role not supported)" in capsys.readouterr().out


def test_tools_from_parquet_have_no_parameters_of_other_rows(tmp_path):
    """Arrow gives every struct the keys of all, as nulls."""

    def tool(name):
        return [dict(type="function", function=dict(name="go", parameters=dict(properties={name: dict(type="int")})))]

    sft.Dataset.from_list([dict(tools=tool("x")), dict(tools=tool("y"))]).to_parquet(tmp_path / "rows.parquet")
    rows = sft.load_rows("--dataset", str(tmp_path / "rows.parquet"), "train")
    assert [sft.template_options(row)["tools"] for row in rows] == [tool("x"), tool("y")]


# -------------------------------------------------------------------------------------------------------- from scratch

WALKS = [f"right {i % 9} up -{i % 7} up 0 = {i % 9 - i % 7}" for i in range(200)]


def scratch_args(data, **flags) -> sft.Args:
    return sft.Args(**dict(dataset=str(data), from_scratch=True) | flags)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A new tokenizer and a new model of the walks."""
    texts = [dict(text=text) for text in WALKS + SENTENCES.splitlines()]
    args = scratch_args(jsonl(tmp_path_factory.mktemp("walks") / "walks.jsonl", texts), vocab_size=512)
    tokenizer = sft.new_tokenizer(args)
    with torch.random.fork_rng():
        return sft.new_model(args, tokenizer), tokenizer, args


def test_a_number_with_its_sign_is_one_token(scratch):
    _, tokenizer, _ = scratch
    words = "right 7 up -3 up 0 = 4".split(" ")
    tokens = [tokenizer.decode(i) for i in tokenizer(" ".join(words)).input_ids]
    assert tokens == ["<|bos|>", words[0], *(f" {word}" for word in words[1:])]


@given(st.text(max_size=60))
def test_a_new_tokenizer_gives_any_text_back(scratch, text):
    _, tokenizer, _ = scratch
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text


@given(st.lists(anything, min_size=2, max_size=4))
def test_a_new_tokenizer_gives_any_chat_back(scratch, texts):
    _, tokenizer, _ = scratch
    written = [f"<|{('user', 'assistant')[i % 2]}|>{text}<|end|>" for i, text in enumerate(texts)]
    assert tokenizer.decode(sft.render(tokenizer, talk(*texts))) == "<|bos|>" + "".join(written)


def test_a_new_model_has_the_size_that_was_asked(scratch):
    model, tokenizer, args = scratch
    assert 300 < len(tokenizer) <= 512
    assert model.config.vocab_size % 64 == 0 and len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 64
    wide = sft.new_model(replace(args, hidden_size=64, num_layers=1, num_heads=2, max_length=2048), tokenizer)
    assert (wide.config.hidden_size, len(wide.model.layers), wide.config.num_attention_heads) == (64, 1, 2)
    assert wide.config.max_position_embeddings == 2048
    assert wide.get_output_embeddings().weight is wide.get_input_embeddings().weight


def test_a_new_model_depends_on_the_seed_only(tmp_path):
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:20]])
    flags = dict(hidden_size=16, num_layers=1, num_heads=2, max_steps=1, eval_fraction=0, learning_rate=0.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        sft.main(scratch_args(data, **flags, seed=seed, output_dir=str(tmp_path / name)))
    a, b, c = (weights_of(tmp_path / name)["model.embed_tokens.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


SCRATCH_ROWS = [
    dict(text=WALKS[0]),
    dict(messages=talk("Walk!", WALKS[0])),
    dict(prompt="Walk! ", completion=WALKS[0]),
    dict(prompt=talk("Walk!"), completion=[dict(role="assistant", content=WALKS[0])]),
    dict(conversations=[{"from": "human", "value": "Walk!"}, {"from": "gpt", "value": WALKS[0]}]),
    dict(question="Walk!", answer=WALKS[0]),
    dict(instruction="Walk!", output=WALKS[0]),
    dict(instruction="Walk!", response=WALKS[0]),
]


@pytest.mark.parametrize("row", SCRATCH_ROWS, ids=lambda row: "+".join(row))
def test_from_scratch_on_every_format(row, tmp_path, capsys):
    """The tokenizer has seen all of the text, the answers too: a common word in them is one token. All tokens are
    trained."""
    data, out = jsonl(tmp_path / "rows.jsonl", [row] * 8 + [dict.fromkeys(row)]), tmp_path / "run"
    flags = dict(hidden_size=16, num_layers=1, num_heads=2, max_steps=1, eval_fraction=0)
    sft.main(scratch_args(data, **flags, output_dir=str(out)))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer(WALKS[0]).input_ids) == 1 + len(WALKS[0].split(" "))
    shown = capsys.readouterr().out.partition("example, [[trained]]: ")[2]
    assert shown.startswith("<|bos|>[[") and f"{WALKS[0]}<|end|>]]" in shown


SIZES = [(130, 4), (36, 4), (100, 3)]


@pytest.mark.parametrize("size, heads", SIZES)
def test_a_width_that_heads_cannot_share_is_refused(size, heads, tmp_path, capsys):
    flags = dict(dataset="rows.jsonl", from_scratch=True, hidden_size=size, num_heads=heads)
    assert f"--hidden-size {size}" in refused(sft, capsys, **flags, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("flags", [dict(), dict(model="somewhere", from_scratch=True)], ids=["neither", "both"])
def test_a_run_starts_from_a_model_or_from_scratch(flags, tmp_path, capsys):
    said = refused(sft, capsys, dataset="rows.jsonl", **flags, output_dir=str(tmp_path / "run"))
    assert "--model" in said and "--from-scratch" in said and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_of_a_batch_is_a_sum_over_trained_tokens():
    """Each with the same weight, whatever the row it stands in; and so are the metrics beside it."""
    logps = torch.tensor([-0.5, -1.25, -3.0], dtype=torch.float64, requires_grad=True)
    entropy, is_argmax = torch.tensor([0.25, 1.0, 2.0]), torch.tensor([True, False, True])
    logged = sft.sft_batch([None], logps, entropy, is_argmax)
    found = {name: value.item() for name, value in logged.items()}
    assert found == dict(loss=4.75, mean_token_accuracy=2, entropy=3.25)
    assert torch.autograd.grad(logged["loss"], logps)[0].tolist() == [-1, -1, -1]


def test_tokens_that_are_trained_are_counted():
    rows = [Row([1], [[2, 3, 4]], [[True, False, True]], {}), Row([1, 2], [[3]], [[True]], {})]
    assert sft.count_trained(rows) == 3


# --------------------------------------------------------------------------------------------------- log-probabilities


def scored(hidden, head, target, temperature=1.0, **config):
    """token_logps of a model that is a head and nothing else: its hidden states [N, d] are given."""
    model = SimpleNamespace(
        base_model=lambda **inputs: SimpleNamespace(last_hidden_state=hidden[None]),
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config)),
    )
    return sft.token_logps(model, {}, torch.arange(len(target)), target, temperature=temperature)


HEADS = {  # name -> (what the configuration says, what it makes of the logits)
    "plain": ({}, lambda x: x),
    "bias": ({}, lambda x: x),
    "soft cap": (dict(final_logit_softcapping=2.0), lambda x: 2 * torch.tanh(x / 2)),
    "scale": (dict(logit_scale=0.25), lambda x: x * 0.25),  # Cohere
    "divisor": (dict(logits_scaling=8.0), lambda x: x / 8),  # Granite
    "divisor and soft cap": (
        dict(logits_scaling=0.5, final_logit_softcapping=1.5),
        lambda x: 1.5 * torch.tanh(x * 2 / 1.5),
    ),
}


@pytest.mark.parametrize("kind, n", [("plain", 1), ("plain", 256), ("plain", 513), *((kind, 257) for kind in HEADS)])
def test_log_probabilities_by_chunks(kind, n):
    """A vocabulary of 32,768 makes chunks of 256 tokens. Values and gradients are those of float64 without chunks."""
    config, transform = HEADS[kind]
    vocabulary = 2**15
    torch.manual_seed(n)
    head = torch.nn.Linear(4, vocabulary, bias="bias" in kind)
    hidden, target, weight = torch.randn(n, 4, requires_grad=True), torch.randint(vocabulary, (n,)), torch.randn(n)
    weight[: n // 2] = 0  # a chunk that counts for nothing
    temperature = 0.7 if n == 257 else 1.0
    logps, entropy, is_argmax = scored(hidden, head, target, temperature, **config)
    logits = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    expected = (transform(logits) / temperature).log_softmax(-1)
    assert is_near(logps, expected[range(n), target], vocabulary)
    assert is_near(entropy, -(expected.exp() * expected).sum(-1), vocabulary)
    best, second = expected.detach().topk(2).values.T
    clear = best - second > 1e-4  # beyond the rounding of float32
    with torch.no_grad():
        likeliest = scored(hidden, head, expected.argmax(-1), temperature, **config)[2]
    assert likeliest.all() and clear.float().mean() > 0.8
    assert is_argmax[clear].tolist() == (expected.argmax(-1) == target)[clear].tolist()
    ours, theirs = (
        torch.autograd.grad((values * weight).sum(), (hidden, *head.parameters()))
        for values in (logps, expected[range(n), target])
    )
    for a, b, terms in zip(ours, theirs, (vocabulary, n, n)):
        assert b.abs().max() > 1e-4 and is_near(a, b, terms)
    assert len(ours) == (3 if head.bias is not None else 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("config", [config for config, _ in HEADS.values()], ids=HEADS)
def test_the_gradient_is_that_of_finite_differences(config, temperature):
    torch.manual_seed(0)
    hidden, target = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 6, 3])
    head = torch.nn.Linear(4, 7).double()
    scale = config.get("logit_scale") or 1 / config.get("logits_scaling", 1)
    cap, inputs = config.get("final_logit_softcapping"), (hidden, head.weight, head.bias)

    def logps(*inputs):
        with pytest.MonkeyPatch.context() as patch:  # logits are float32 otherwise, which is too coarse for differences
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch, "float32", torch.float64)
            return sft.TargetLogps.apply(*inputs, target, scale, cap, temperature)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        assert torch.autograd.gradcheck(logps, inputs)


def test_a_head_tied_to_the_embedding():
    """Its gradient has the embedding's part and the head's."""
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(2**17, 4), torch.nn.Linear(4, 2**17, bias=False)
    head.weight = embedding.weight
    ids, target = torch.randint(2**17, (2, 70))
    (ours,) = torch.autograd.grad(scored(embedding(ids), head, target)[0].sum(), head.weight)
    logps = (embedding(ids).double() @ embedding.weight.double().T).log_softmax(-1)
    (theirs,) = torch.autograd.grad(logps[range(70), target].sum(), head.weight)
    assert is_near(ours, theirs, 2**17) and theirs[ids].abs().max() > 0.1


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        tensors = made if isinstance(made, (tuple, list)) else [made]
        self.size = max([self.size, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return made


def test_logits_exist_for_one_chunk_at_a_time():
    head, hidden, kept = torch.nn.Linear(4, 2**15, bias=False), torch.randn(1200, 4, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t)
    with Largest() as largest, hooks:
        scored(hidden, head, torch.randint(2**15, (1200,)))[0].sum().backward()
    assert largest.size == 256 * 2**15 < 1200 * 2**15
    assert kept and max(kept) <= head.weight.numel()  # nothing of the width of the vocabulary waits for the backward


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    """A chunk of 256 tokens, then eight that each add less than half a unit in the last place of that sum."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 2**15, bias=False).bfloat16(), (1 + torch.rand(9 * 256, 4)).bfloat16()
    torch.nn.init.zeros_(head.weight)  # all tokens are equally likely
    weight = torch.full((9 * 256,), 0.9 * 2**-9).bfloat16()
    weight[:256] = 1
    exact = (1 - 2**-15) * (weight[:, None].double() * hidden.double()).sum(0)
    logps, *_ = scored(hidden, head, torch.zeros(9 * 256, dtype=torch.long))
    (ours,) = torch.autograd.grad((logps * weight).sum(), head.weight)
    assert ours.dtype == torch.bfloat16
    assert torch.allclose(ours[0].double(), exact, rtol=2**-7, atol=0)  # a sum in bfloat16 is 1.4 % too small


def test_a_frozen_head_gets_no_gradient():
    head, hidden = torch.nn.Linear(4, 50).requires_grad_(False), torch.randn(9, 4, requires_grad=True)
    target = torch.randint(50, (9,))
    (ours,) = torch.autograd.grad(scored(hidden, head, target)[0].sum(), hidden)
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    (theirs,) = torch.autograd.grad(logits.log_softmax(-1)[range(9), target].sum(), hidden)
    assert is_near(ours, theirs, 50) and head.weight.grad is None


def test_sums_of_responses_have_their_trained_tokens():
    trained = [[True, False, True], [True], [False, True, True, True]]
    rows = [Row([1], [[2] * 3, [2]], trained[:2], {}), Row([1], [[2] * 4], trained[2:], {})]
    values = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64, requires_grad=True)
    sums = sft.response_sums(values, rows)
    assert sums.tolist() == [3, 4, 56]
    assert torch.autograd.grad(sums[1:].sum(), values)[0].tolist() == [0, 0, 1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- rows

WIDTH = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ROPE = dict(rope_type="default", rope_theta=10000.0)
OTHERS = {  # families beside those of conftest.py -> (class of the configuration, its options)
    "capped": ("Gemma2Config", dict(sliding_window=9, attn_logit_softcapping=0.5, final_logit_softcapping=2.0)),
    "gpt_oss": ("GptOssConfig", dict(sliding_window=9, num_local_experts=4, head_dim=8, rope_parameters=ROPE)),
    "qwen2 in windows": ("Qwen2Config", dict(sliding_window=9, use_sliding_window=True, max_window_layers=0)),
    "cohere": ("CohereConfig", dict()),
    "granite": ("GraniteConfig", dict(logits_scaling=8.0)),
    "opt": ("OPTConfig", dict(ffn_dim=64, word_embed_proj_dim=32)),
    "bloom": ("BloomConfig", dict(n_layer=2, n_head=4)),  # ALiBi
    "lfm2": ("Lfm2Config", dict(layer_types=["conv", "full_attention"])),
    "mamba2": ("Mamba2Config", dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8)),
}
PADDED = ("nemotron", "bloom", "lfm2", "mamba2")


def new_model_of(family: str, tokenizer):
    """A random model of a family, under its own attention."""
    config = tiny_config(family, tokenizer) if family in FAMILIES else None
    if config is None:
        name, options = OTHERS[family]
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        common = dict(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1)
        width = {k: v for k, v in WIDTH.items() if name != "BloomConfig" or k == "hidden_size"}
        config = getattr(transformers, name)(**common | special | width | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prepared(model, **flags):
    """A copy of a model as a run prepares it."""
    model, args = copy.deepcopy(model), sft.Args(**dict(model="", dataset="") | flags)
    model.stored_dtype = torch.float32
    return sft.prepare_model(model, "the model", args, CPU, torch.float32, sft.token_logps).eval()


def some_rows(seed=0) -> list:
    """Rows of very different shapes, two of them equal, most longer than the sliding window of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(7, 300, (n,), generator=generator).tolist()
    shapes = [(5, [3, 17, 1]), (1, [2]), (20, [8, 8]), (20, [8, 8]), (12, [30])]
    rows = [Row(ids(n), [ids(m) for m in lengths], [[True] * m for m in lengths], {}) for n, lengths in shapes]
    rows[0].trained[1][:2] = [False] * 2
    rows[4].trained[0][3:9] = [False] * 6  # a user's turn
    return rows


def logps_by_hand(model, rows: list):
    """Log-probabilities of the trained tokens of every response, by Hugging Face's model alone: a sequence at a
    time."""
    found = []
    for row in rows:
        for response, trained in zip(row.responses, row.trained, strict=True):
            logits = model(torch.tensor([row.prompt + response])).logits[0, len(row.prompt) - 1 : -1]
            logps = logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            found.append(logps[torch.tensor(trained)])
    return torch.cat(found)


def gradients_of(model, loss) -> dict:
    """The gradient of every parameter that the loss depends on."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def near_gradients(ours: dict, theirs: dict, tolerance: float):
    """Equal up to a share of the largest value of each parameter's gradient, or of a thousandth of the largest of
    all."""
    assert ours.keys() == theirs.keys()
    largest = max(b.abs().max() for b in theirs.values())
    for name, b in theirs.items():
        assert (ours[name] - b).abs().max() <= tolerance * max(b.abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_log_probabilities_are_those_of_each_response_alone(family, tiny_tokenizer, capsys):
    """Packed, where the model can follow packed rows, and padded; and so are their gradients."""
    plain, rows = new_model_of(family, tiny_tokenizer), some_rows()
    model = prepared(plain)
    assert model.packs == (family not in PADDED)
    assert ("cannot follow packed rows" in capsys.readouterr().out) == (not model.packs)
    expected = logps_by_hand(plain, rows)
    weight = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    theirs = gradients_of(plain, (expected * weight).sum())
    for layout, attention in ((sft.pack, "packed_rows"), (sft.pad, "eager")):
        if layout is sft.pad or model.packs:
            model.set_attn_implementation(attention)
            inputs, target = layout(rows, CPU)
            logps = model.token_logps(**inputs, target=target)[0]
            # two layers deep, rounding adds up; what is wrong differs in the first digits
            assert (logps - expected).abs().max() < 1e-4 * expected.abs().max(), layout.__name__
            near_gradients(gradients_of(model, (logps * weight).sum()), theirs, 1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gpt2", "capped", "gpt_oss"])
@torch.no_grad()
def test_no_row_or_response_sees_another(family, tiny_tokenizer):
    model = prepared(new_model_of(family, tiny_tokenizer))
    assert model.packs

    def score(rows):
        inputs, target = sft.pack(rows, CPU)
        counts = [sum(trained) for row in rows for trained in row.trained]
        return model.token_logps(**inputs, target=target)[0].split(counts)

    before = score(some_rows())
    for row, number, changed in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (2, 0, 4)):  # changed: its number among all responses
        rows = some_rows()
        rows[row].responses[number][:] = [9] * len(rows[row].responses[number])
        same = [is_near(a, b, 32) for a, b in zip(before, score(rows), strict=True)]
        assert [i for i, ok in enumerate(same) if not ok] == [changed]
    rows = some_rows()
    rows[0].prompt[:] = [9] * len(rows[0].prompt)  # it is the prompt of three responses
    same = [is_near(a, b, 32) for a, b in zip(before, score(rows), strict=True)]
    assert [i for i, ok in enumerate(same) if not ok] == [0, 1, 2]


def visible(rows: list, window: int | None):
    """By definition: a token sees its own row's prompt and its own response, backwards, within the window. [T, T]"""
    owner, position = [], []
    for i, row in enumerate(rows):
        for part, ids in ((None, row.prompt), *enumerate(row.responses)):
            start = 0 if part is None else len(row.prompt)
            owner += [(i, part)] * len(ids)
            position += range(start, start + len(ids))
    sees = lambda a, b: a[0] == b[0] and b[1] in (None, a[1])
    q, k = torch.tensor(position)[:, None], torch.tensor(position)[None]
    related = torch.tensor([[sees(a, b) for b in owner] for a in owner])
    return related & (k <= q) & (q - k < (window or len(owner)))


ATTENTIONS = {
    "plain": dict(),
    "one group": dict(groups=1),
    "window": dict(sliding_window=3),
    "window of one": dict(sliding_window=1),
    "wide window": dict(sliding_window=99),
    "soft cap": dict(softcap=0.5),
    "sinks": dict(sinks=True),
    "all of them": dict(sliding_window=4, softcap=0.5, sinks=True),
    "narrow values": dict(value_width=4),  # DeepSeek's
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_over_packed_rows_is_that_of_a_mask(options):
    """Values and gradients, in float64, against one softmax over all tokens with everything unseen left out."""
    options, heads, width = dict(options), 4, 8
    groups, value_width = options.pop("groups", 2), options.pop("value_width", width)
    rows, generator = some_rows(), torch.Generator().manual_seed(0)
    inputs = sft.pack(rows, CPU)[0]["inputs"]
    length = inputs["input_ids"].shape[1]
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    sizes = ((heads, width), (groups, width), (groups, value_width))
    q, k, v = (random(1, h, length, w).requires_grad_() for h, w in sizes)
    sinks = random(heads).requires_grad_() if options.pop("sinks", False) else None
    out, _ = sft.rows_attention(None, q, k, v, None, scaling=0.3, rows=inputs["rows"], s_aux=sinks, **options)
    scores = q @ k.repeat_interleave(heads // groups, 1).transpose(2, 3) * 0.3
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~visible(rows, options.get("sliding_window")), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, heads, length, 1)], -1)
    theirs = scores.softmax(-1)[..., :length] @ v.repeat_interleave(heads // groups, 1)
    assert torch.allclose(out, theirs.transpose(1, 2), rtol=1e-10, atol=1e-10)
    weight, leaves = random(*out.shape), [q, k, v] if sinks is None else [q, k, v, sinks]
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((theirs.transpose(1, 2) * weight).sum(), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("limit", [1, 60, 9999])
def test_an_evaluation_is_a_sum_over_rows_by_a_total(limit, tiny_tokenizer):
    """However the rows are split into forwards. Afterwards the model is in training mode again."""
    plain, rows = new_model_of("llama", tiny_tokenizer), some_rows()
    model = prepared(plain)

    def batch_loss(group, logps, entropy, is_argmax):
        assert not model.training
        return dict(logps=sft.response_sums(logps, group).sum(), rows=torch.tensor(float(len(group))))

    args = sft.Args(model="", dataset="", tokens_per_forward=limit)
    found = sft.evaluate(batch_loss, model, rows, 7, args, CPU)
    total = logps_by_hand(plain, rows).sum().item()
    assert found == pytest.approx(dict(eval_logps=total / 7, eval_rows=len(rows) / 7), rel=1e-4) and model.training


GENERATING = ["llama", "gpt2", "nemotron", "lfm2"]
GENERATING += [f for f in ("mistral", "gemma3", "qwen2 in windows", "capped", "gpt_oss")]


@pytest.mark.parametrize("family", GENERATING)
def test_answers_are_shown_as_the_models_own_attention_gives_them(family, tiny_tokenizer, capsys):
    plain, rows = new_model_of(family, tiny_tokenizer), some_rows()
    prompt = torch.tensor([rows[2].prompt])
    stops = sft.stop_tokens(tiny_tokenizer)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=stops[0])
    expected = plain.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0, 20:]
    sft.show_answers(prepared(plain), tiny_tokenizer, rows[2:3], 1, 12)
    assert f"-> {tiny_tokenizer.decode(expected)!r}" in capsys.readouterr().out


def test_answers_are_shown_within_the_models_positions(tiny_tokenizer, capsys):
    """GPT-2 has no position beyond its last, 512."""
    model = prepared(new_model_of("gpt2", tiny_tokenizer))
    sft.show_answers(model, tiny_tokenizer, [Row([5] * 505, [[6]], [[True]], {})], 1, 128)
    assert "    -> " in capsys.readouterr().out and model.training


# ---------------------------------------------------------------------------------------------------------- whole runs

UNEVEN = [dict(messages=talk("Go " * (1 + 13 * i % 40), "up " * (1 + 17 * i % 60), "Why?", "So.")) for i in range(9)]


@pytest.fixture(scope="module")
def uneven(tiny_model_dir, tmp_path_factory):
    """Flags of a run of 3 steps on 9 rows of very different length: 4, 4 and 1 a step."""
    data = jsonl(tmp_path_factory.mktemp("uneven") / "chats.jsonl", UNEVEN)
    return dict(
        model=str(tiny_model_dir("llama")),
        dataset=data,
        eval_dataset=data,
        eval_fraction=0.0,
        batch_size=4,
        learning_rate=1e-3,
    )


def first_gradient(monkeypatch, **flags) -> dict:
    """The gradient of a run's first step, as the optimiser gets it."""
    seen, real = {}, sft.take_step

    def spy(model, *rest):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return real(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "take_step", spy)
        sft.main(sft.Args(**flags, max_steps=1))
    return seen


def by_hand(folder, rows: list) -> tuple:
    """Negative log-likelihood per trained token, entropy and accuracy, by Hugging Face's model alone; and the model."""
    model, logps, entropies, right = AutoModelForCausalLM.from_pretrained(folder), [], [], []
    for row in rows:
        response, trained = torch.tensor(row.responses[0]), torch.tensor(row.trained[0])
        logits = model(torch.tensor([row.prompt + row.responses[0]])).logits[0, len(row.prompt) - 1 : -1]
        every = logits.log_softmax(-1)[trained]
        logps.append(every.gather(-1, response[trained][:, None])[:, 0])
        entropies.append(-(every.exp() * every).sum(-1).detach())
        right.append((every.argmax(-1) == response[trained]).float())
    mean = lambda parts: torch.cat(parts).mean()
    return -mean(logps), mean(entropies), mean(right), model


SPLITS = [("llama", False), ("llama", True), ("gemma2", False), ("nemotron", False)]  # nemotron is padded


@pytest.mark.parametrize("family, train_prompts", SPLITS)
def test_the_split_into_forwards_changes_no_gradient(
    family, train_prompts, uneven, tiny_model_dir, monkeypatch, tmp_path
):
    """Nor does gradient checkpointing. It is the gradient of the mean over all trained tokens of the step."""
    folder = tiny_model_dir(family)
    flags = uneven | dict(model=str(folder), batch_size=9, train_prompts=train_prompts, eval_dataset="")
    loss, _, _, model = by_hand(folder, read_all(UNEVEN, folder, train_all=train_prompts))
    theirs = gradients_of(model, loss)
    changes = [dict(), dict(tokens_per_forward=1), dict(tokens_per_forward=130), dict(gradient_checkpointing=True)]
    for i, change in enumerate(changes if family == "llama" else changes[2:]):
        ours = first_gradient(monkeypatch, **flags | change, output_dir=str(tmp_path / str(i)))
        near_gradients(ours, theirs, 1e-3)
        (line,) = lines_of(tmp_path / str(i))
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.cat([g.flatten() for g in theirs.values()]).norm().item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_metrics_are_those_of_the_rows(uneven, tmp_path):
    """Of the batch before its step; of the held-out rows after it."""
    sft.main(sft.Args(**uneven | dict(batch_size=9, max_steps=1), output_dir=str(tmp_path / "run")))
    rows = read_all(UNEVEN, uneven["model"])
    (line,) = lines_of(tmp_path / "run")
    for prefix, folder in (("", uneven["model"]), ("eval_", tmp_path / "run")):
        loss, entropy, right, _ = (x.item() if isinstance(x, torch.Tensor) else x for x in by_hand(folder, rows))
        expected = dict(loss=loss, entropy=entropy, mean_token_accuracy=right)
        assert {name: line[prefix + name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]), rel=1e-5)
    assert line["num_tokens"] == sum(len(row.prompt + row.responses[0]) for row in rows) and line["epoch"] == 1.0


def test_the_epoch_counts_batches(uneven, tmp_path):
    """The last batch of an epoch has fewer rows; --max-steps stops within an epoch."""
    sft.main(sft.Args(**uneven | dict(epochs=2, max_steps=4), output_dir=str(tmp_path / "run")))
    lines, rows = lines_of(tmp_path / "run"), read_all(UNEVEN, uneven["model"])
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert lines[2]["num_tokens"] == sum(map(sft.count_tokens, rows)) < lines[3]["num_tokens"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4]


def test_the_split_to_evaluate_on(uneven, tmp_path, capsys):
    """Of a directory with splits, the rows to train on are its train, the held-out rows its test. The report names what
    it read."""
    where = tmp_path / "splits"
    sft.DatasetDict(train=sft.Dataset.from_list(UNEVEN), test=sft.Dataset.from_list(UNEVEN[:2])).save_to_disk(where)
    flags = uneven | dict(dataset=str(where), eval_dataset=str(where), max_steps=1)
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert f"--dataset {where}: 9 rows from 9" in said and f"--eval-dataset {where}: 2 rows from 2" in said


def test_only_a_tracked_run_touches_wandb(uneven, tmp_path, monkeypatch):
    said = []
    fake = SimpleNamespace(run=None, log=lambda metrics, step: said.append((step, metrics)))
    fake.init = lambda **options: (setattr(fake, "run", options), said.append(options))
    fake.__spec__ = object()  # what importlib.util.find_spec looks at
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    flags = uneven | dict(max_steps=2, eval_dataset="")
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "untracked")))
    assert said == []
    for name in ("", "mine"):
        said.clear()
        fake.run, out = None, tmp_path / f"run{name}"
        if name:
            monkeypatch.setenv("WANDB_NAME", name)
        sft.main(sft.Args(**flags, output_dir=str(out), track=True))
        assert said[0]["name"] == (name or str(out)) and said[0]["config"]["max_steps"] == 2
        assert [step for step, _ in said[1:]] == [1, 2]
        assert said[1][1] == {k: v for k, v in lines_of(out)[0].items() if k != "step"}


# ---------------------------------------------------------------------------------------- ranks, resuming and bfloat16


def near_curves(ours, theirs, tolerance: float):
    """Two runs log the same, up to a share of each number; of thousands of tokens a few may change sides."""
    for a, b in zip(lasting(ours), lasting(theirs), strict=True):
        b |= {k: pytest.approx(v, abs=0.01) for k, v in b.items() if "accuracy" in k}
        assert a.keys() == b.keys()
        for name, value in a.items():
            wanted = b[name] if "accuracy" in name else pytest.approx(b[name], rel=tolerance)
            assert value == wanted, name


def near_changes(ours, theirs, start, tolerance: float):
    """Two runs have moved every tensor alike: what parts them is a small share of the way. AdamW's step for a gradient
    of nearly 0 is of
    full size and its sign a matter of rounding, so that single entries say nothing."""
    a, b = weights_of(ours), weights_of(theirs)
    start = weights_of(start) if start else {name: torch.zeros(()) for name in b}
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * (b[name] - start[name]).norm(), name


RANKS = [("llama", 2), ("nemotron", 2), pytest.param("llama", 4, marks=slow), pytest.param("gpt_oss", 2, marks=slow)]


@pytest.mark.parametrize("family, world", RANKS)
def test_ranks_change_nothing(family, world, uneven, tiny_tokenizer, tmp_path):
    """The last batch has one row, so that the other ranks have none. The forwards are small, so that ranks have
    unequally many."""
    new_model_of(family, tiny_tokenizer).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    flags = uneven | dict(model=str(tmp_path / "model"), tokens_per_forward=70, save_every=2, eval_every=2)
    many, one = tmp_path / "many", tmp_path / "one"
    on_ranks(sft, world, **flags, output_dir=str(many))
    sft.main(sft.Args(**flags, output_dir=str(one)))
    near_curves(many, one, 1e-4)
    for folder in ("", "checkpoint-2"):  # the checkpoint is saved just after an evaluation
        near_changes(many / folder, one / folder, tmp_path / "model", 0.01)
    assert snapshot(many).keys() == snapshot(one).keys()  # a checkpoint has the same files, too


def as_words(flags: dict) -> list:
    """Options as a user types them."""
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    return words


def test_from_scratch_under_torchrun(torchrun, tmp_path):
    """As a user starts it: tokenizer, weights, training and saved files are those of one process."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:41]])
    flags = dict(dataset=data, from_scratch=True, hidden_size=32, num_layers=2, num_heads=2, vocab_size=400)
    flags |= dict(batch_size=8, learning_rate=1e-3, tokens_per_forward=50, eval_fraction=0.0)
    torchrun("sft", 2, *as_words(flags), "--output-dir", "many", cwd=tmp_path)
    many, one = tmp_path / "many", tmp_path / "one"
    sft.main(sft.Args(**flags, output_dir=str(one)))
    near_curves(many, one, 1e-4)
    near_changes(many, one, None, 1e-3)
    assert snapshot(many).keys() == snapshot(one).keys()
    for name in ("tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"):
        assert (many / name).read_bytes() == (one / name).read_bytes(), name


@slow
def test_two_nodes_need_one_disk(torchrun, tmp_path):
    """Two torchruns that meet at a port, as on two machines: one run if both see the output directory, refused if each
    has its own."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:21]])
    flags = dict(dataset=data, from_scratch=True, hidden_size=32, num_layers=1, num_heads=2, vocab_size=400)
    flags |= dict(batch_size=8, learning_rate=1e-3)

    def nodes(*folders):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meet = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", s.getsockname()[1])

        def start(i):
            launch = (*meet, "--node-rank", i)
            return torchrun(
                "sft", 1, *as_words(flags), "--output-dir", "out", cwd=folders[i], check=False, launch=launch
            )

        with ThreadPoolExecutor() as pool:
            return list(pool.map(start, range(2)))

    assert [node.returncode for node in nodes(tmp_path, tmp_path)] == [0, 0]
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "one")))
    near_curves(tmp_path / "out", tmp_path / "one", 1e-4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    apart = nodes(tmp_path / "a", tmp_path / "b")
    assert all(node.returncode for node in apart)
    assert "--output-dir out: rank 1 does not see it; choose one on a disk that all nodes share" in apart[1].stderr


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=[slow, needs_bfloat16])])
def test_two_ranks_resume(dtype, uneven, tiny_model_dir, tmp_path):
    """With dropout, for which each rank needs random numbers of its own."""
    flags = uneven | dict(model=str(tiny_model_dir("gpt2")), batch_size=3, save_every=2, eval_every=2, dtype=dtype)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(sft, 2, **flags, output_dir=str(whole))
    shutil.copytree(whole, parts)  # as if it had been killed in the third and last step
    kept = json.loads((parts / "args.json").read_text())
    (parts / "args.json").write_text(json.dumps(kept | dict(finished=False)))
    (parts / "model.safetensors").unlink()
    on_ranks(sft, 2, **flags, output_dir=str(parts), resume=True)
    same_run(parts, whole)


@needs_bfloat16
def test_a_bfloat16_run_resumes(uneven, tiny_model_dir, tmp_path):
    """Its weights and moments are float32 in the checkpoint. Killed while the model is saved."""
    flags = uneven | dict(model=str(tiny_model_dir("gpt2")), save_every=2, dtype="bfloat16")
    assert in_child(sft.main, sft.Args(**flags, output_dir=str(tmp_path / "whole"))) == 0
    args = sft.Args(**flags, output_dir=str(tmp_path / "parts"), resume=True)
    assert in_child(killed_at_rename, sft, args, 4) == -9
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert {w.dtype for w in weights_of(checkpoint).values()} == {torch.float32}
    moments = torch.load(checkpoint / "state.pt", weights_only=True)["optimizers"][""]["state"]
    assert {x["exp_avg"].dtype for x in moments.values()} == {torch.float32}
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "parts", tmp_path / "whole")


@needs_bfloat16
def test_bfloat16_on_ranks_is_near_float32(uneven, tmp_path):
    """The computation has 8 bits, so that a loss is off by about a hundredth; the weights are whole."""
    flags = uneven | dict(eval_every=3, tokens_per_forward=70)
    on_ranks(sft, 2, **flags, dtype="bfloat16", output_dir=str(tmp_path / "half"))
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "full")))
    for ours, theirs in zip(lines_of(tmp_path / "half"), lines_of(tmp_path / "full"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["loss"] != theirs["loss"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
        assert ours["num_tokens"] == theirs["num_tokens"]
    near_changes(tmp_path / "half", tmp_path / "full", uneven["model"], 0.5)
    assert {w.dtype for w in weights_of(tmp_path / "half").values()} == {torch.float32}


@needs_bfloat16
def test_a_tiny_learning_rate_moves_every_weight(uneven, tmp_path):
    """In bfloat16 too the weights and the optimiser are float32: the weight of a norm is 1.0, to which bfloat16 cannot
    add 1e-6."""
    before = weights_of(uneven["model"])
    flags = uneven | dict(learning_rate=1e-6, lr_schedule="constant", batch_size=9, epochs=3, eval_dataset="")
    for dtype in ("float32", "bfloat16"):
        assert in_child(sft.main, sft.Args(**flags, dtype=dtype, output_dir=str(tmp_path / dtype))) == 0
        after = weights_of(tmp_path / dtype)
        for name, weight in before.items():
            moved = (after[name] - weight).abs()
            assert 5e-7 < moved.max() < 4e-6, (dtype, name, moved.max())
            assert "norm" not in name or (moved > 0).float().mean() > 0.9, (dtype, name)
    loss, other = (lines_of(tmp_path / dtype)[0]["loss"] for dtype in ("float32", "bfloat16"))
    assert loss != other and loss == pytest.approx(other, rel=0.02)


def test_a_run_from_scratch_resumes(tmp_path):
    """With the tokenizer of the checkpoint. Killed while the model is saved."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:20]])
    flags = dict(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, batch_size=4, learning_rate=1e-2)
    args = scratch_args(data, **flags, save_every=3, output_dir=str(tmp_path / "parts"), resume=True)
    assert in_child(sft.main, replace(args, output_dir=str(tmp_path / "whole"))) == 0
    assert in_child(killed_at_rename, sft, args, 4) == -9
    assert (tmp_path / "parts" / "checkpoint-3").exists()
    assert not json.loads((tmp_path / "parts" / "args.json").read_text())["finished"]
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "parts", tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------- saved models


@pytest.fixture
def kept_in_memory(monkeypatch):
    """A list that gets the model of every run that finishes, as it is in memory."""
    found, finish = [], sft.finish_run

    def spy(out, models, curves):
        found.append(models[""][0])
        finish(out, models, curves)

    monkeypatch.setattr(sft, "finish_run", spy)
    return found


SAVED = ["llama", "qwen3", "gemma3", "gemma2", "mixtral", "from scratch"]  # tied: gemma, from scratch


@pytest.mark.parametrize("family", SAVED)
def test_what_is_saved_is_what_was_trained(family, uneven, kept_in_memory, tiny_model_dir, tmp_path):
    start = dict(from_scratch=True) if family == "from scratch" else dict(model=str(tiny_model_dir(family)))
    flags = {k: v for k, v in uneven.items() if k not in ("model", "eval_dataset")}
    sft.main(sft.Args(**flags | start, max_steps=1, output_dir=str(tmp_path / "run")))
    memory, loaded = kept_in_memory[0].eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ours, theirs = memory.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = AutoTokenizer.from_pretrained(tmp_path / "run")(SENTENCES, return_tensors="pt").input_ids
    memory.set_attn_implementation("eager")  # that of packed rows knows nothing else
    with torch.no_grad():
        a, b = memory(ids, attention_mask=torch.ones_like(ids)).logits, loaded(ids).logits
    assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert "attn_implementation" not in (tmp_path / "run" / "config.json").read_text()
    if "model" in start:
        folders = (tiny_model_dir(family), tmp_path / "run")
        before, after = (json.loads((folder / "config.json").read_text()) for folder in folders)
        assert before == after


def test_template_and_stop_tokens_are_kept(dressed, tiny_model_dir, tmp_path):  # noqa: F811
    """A base model whose end-of-sequence token is not the template's end of turn, and which knew one more way to
    stop."""
    tokenizer, base, out = dressed("chatml on a base model"), tmp_path / "base", tmp_path / "run"
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
        model.resize_token_embeddings(len(tokenizer))
    model.generation_config.update(eos_token_id=[3, 5], temperature=0.6, top_p=0.9, do_sample=True)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = jsonl(tmp_path / "rows.jsonl", [dict(messages=talk("Hi.", "Hello!"))] * 4)
    sft.main(sft.Args(model=str(base), dataset=data, output_dir=str(out), max_steps=1, eval_fraction=0))
    assert (out / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert AutoTokenizer.from_pretrained(out).get_chat_template() == TEMPLATES["chatml"][0]
    kept = json.loads((out / "generation_config.json").read_text())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert kept["eos_token_id"] == sorted({3, 5, tokenizer.eos_token_id, end})
    assert (kept["temperature"], kept["top_p"], kept["pad_token_id"]) == (0.6, 0.9, tokenizer.pad_token_id)


def test_weights_are_saved_in_the_dtype_they_came_in(uneven, tiny_model_dir, tmp_path):
    half, out = tmp_path / "half", tmp_path / "run"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.bfloat16).save_pretrained(half)
    tokenizer_of(uneven["model"]).save_pretrained(half)
    sft.main(sft.Args(**uneven | dict(model=str(half), save_every=2), output_dir=str(out)))
    for folder, dtype in (
        ("", torch.bfloat16),
        ("checkpoint-2", torch.float32),
    ):  # a checkpoint to resume from is whole
        assert {w.dtype for w in weights_of(out / folder).values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(out / folder).dtype == dtype


# ------------------------------------------------------------------------------------------------------------ learning


def test_a_conversation_learnt_by_heart_is_repeated_and_stops(tiny_model_dir, tmp_path):
    """Padding and end-of-sequence are one token: where padding is masked by its id, the model never learns to stop."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    answers = ["Go right, then up twice.", "Because up pays more."]
    data = jsonl(tmp_path / "one.jsonl", [dict(messages=talk("Which way?", answers[0], "Why?", answers[1]))])
    flags = dict(model=str(tmp_path / "base"), dataset=data, epochs=60, learning_rate=1e-2)
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    lines = lines_of(tmp_path / "run")
    assert lines[0]["loss"] > 4 and lines[-1]["loss"] < 0.05 and lines[-1]["mean_token_accuracy"] == 1.0
    model, tokenizer = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModelForCausalLM, AutoTokenizer))
    begun = {answers[0]: talk("Which way?"), answers[1]: talk("Which way?", answers[0], "Why?")}
    for answer, messages in begun.items():
        options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=False)
        prompt = tokenizer.apply_chat_template(messages, **options)
        written = model.generate(prompt, do_sample=False, max_new_tokens=100)[0, prompt.shape[1] :]
        assert tokenizer.decode(written) == f"{answer}<|end|>"


def test_a_model_from_scratch_learns_the_walks(tmp_path):
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS])
    flags = dict(hidden_size=32, num_layers=1, num_heads=2, epochs=4, learning_rate=1e-2, batch_size=16)
    sft.main(scratch_args(data, **flags, eval_fraction=0.1, eval_every=10, output_dir=str(tmp_path / "run")))
    lines = lines_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(384), abs=0.3)  # ln V, as the header says
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluations) == len(lines) // 10 + (len(lines) % 10 > 0) and evaluations[-1] < 1.2 < evaluations[0]
    model, tokenizer = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("right", return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=60)[0])
    assert re.fullmatch(r"<\|bos\|>right .* =.*<\|end\|>", written)  # the tied weights are whole, and it stops


# ----------------------------------------------------------------------------------------------------------- bad input


BAD_DATA = {  # content of rows.jsonl (None: no such file) -> what the message must say
    "missing": (None, "does not exist"),
    "empty": ("", "the file is empty"),
    "not JSON": ('{"text": "a"}\n{"text": \n', "rows.jsonl"),
    "not an object": ("[1, 2]\n", "rows.jsonl"),
    "other columns": ('{"foo": "a"}\n' * 3, "foo"),
    "a number for a text": ('{"text": 5}\n', "row 0"),
    "a message without a role": ('{"messages": [{"content": "a"}]}\n', "row 0"),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "row 0"),
    "nothing usable": ('{"messages": [{"role": "user", "content": "a"}]}\n' * 2, "no assistant turn"),
}


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("content, says", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_refused(content, says, from_scratch, tiny_model_dir, tmp_path, capsys):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    start = dict(from_scratch=True) if from_scratch else dict(model=str(tiny_model_dir("llama")))
    said = refused(sft, capsys, dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"), **start)
    assert "--dataset" in said and "rows.jsonl" in said and not (tmp_path / "run").exists()
    assert from_scratch or says in said, said


BAD_MODELS = {
    "no config": ("config.json", None),
    "broken config": ("config.json", lambda b: b[:-9]),
    "no weights": ("model.safetensors", None),
    "half the weights": ("model.safetensors", lambda b: b[: len(b) // 2]),
    "no tokenizer": ("tokenizer.json", None),
    "broken tokenizer": ("tokenizer.json", lambda b: b[:-9]),
}


@pytest.mark.parametrize("name, change", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_refused(name, change, uneven, tmp_path, capsys):
    """A file of the checkpoint is gone (None), or has its bytes changed."""
    shutil.copytree(uneven["model"], tmp_path / "broken")
    file = tmp_path / "broken" / name
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    said = refused(sft, capsys, **uneven | dict(model=str(tmp_path / "broken")), output_dir=str(tmp_path / "run"))
    assert str(tmp_path / "broken") in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["no/such/model", "runs/nothing", "not a model at all", "a/b/c/d"])
def test_unknown_models_are_refused(model, uneven, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model in refused(sft, capsys, **uneven | dict(model=model), output_dir="run")


BAD_ARGUMENTS = [
    dict(batch_size=0),
    dict(epochs=0),
    dict(max_steps=-1),
    dict(eval_fraction=1.0),
    dict(eval_fraction=-0.5),
    dict(max_length=0),
    dict(learning_rate=math.nan),
    dict(eval_dataset="nowhere.jsonl"),
    dict(tokens_per_forward=0),
    dict(weight_decay=-1.0),
    dict(vocab_size=0),
    dict(num_layers=0),
    dict(num_heads=0),
]


@pytest.mark.parametrize("flags", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_refused(flags, uneven, tmp_path, capsys):
    (name,) = flags
    said = refused(sft, capsys, **uneven | flags, output_dir=str(tmp_path / "run"))
    assert f"--{name.replace('_', '-')}" in said


@pytest.mark.parametrize("change", ["twice", "bias"])
def test_a_model_whose_head_does_more_than_we_know_is_refused(change, uneven, tmp_path, capsys, monkeypatch):
    """Its own logits are not those of its last hidden states under its head."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def changed(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 2 if change == "twice" else out.logits + torch.linspace(0, 1, out.logits.shape[-1])
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    assert "output layer" in refused(sft, capsys, **uneven, output_dir=str(tmp_path / "run"))


def test_a_gradient_that_is_not_finite_stops_the_run(uneven, tmp_path, capsys):
    flags = uneven | dict(learning_rate=1e38, max_grad_norm=1e30, epochs=5, eval_dataset="")
    said = refused(sft, capsys, **flags, output_dir=str(tmp_path / "run"))
    assert re.search(r"step [2-9]: the norm of the gradients is (nan|inf).*--learning-rate", said)


def test_a_user_sees_one_line(run_script, tmp_path):
    flags = ("--from-scratch", "--dataset", "nowhere.jsonl")
    done = run_script("sft", *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = done.stderr.strip().split("\n")
    assert line.startswith("error: --dataset nowhere.jsonl: ")


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["sft_multiturn.jsonl", "sft_instruct.jsonl.gz"])
def test_real_conversations(name, real_data, tmp_path, capsys):
    """A checkpoint without chat template or padding token, with 512 positions and a vocabulary of 512: many
    conversations are too long.

    A row is kept where its first answer begins within 512 tokens. The text up to there is counted here by the tokenizer
    alone."""
    model, data = str(real_data / "stories260K-hf"), str(real_data / name)
    tokenizer, kept = tokenizer_of(model), 0
    rows = sft.load_rows("--dataset", data, "train").select(range(100))
    rows.to_json(tmp_path / "rows.jsonl")
    for row in rows:
        texts = [m["content"] for m in row["messages"]]
        head = "<s>" + f"user: {texts[0]}</s>\nassistant:"
        fits = len(tokenizer(head, add_special_tokens=False).input_ids) < 512
        plain = not any(token in text for text in texts for token in ("<s>", "</s>", "<unk>"))
        kept += fits and plain and bool(texts[-1].strip())
    assert 10 < kept <= len(rows)
    flags = dict(
        model=model,
        dataset=str(tmp_path / "rows.jsonl"),
        max_steps=3,
        batch_size=4,
        learning_rate=1e-3,
        eval_fraction=0.0,
    )
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert f"{kept} rows from {len(rows)}" in said and "has no chat template" in said
    assert "--max-length 1024 is lowered to the 512 positions" in said
    assert all(0 < line["loss"] < 6 for line in lines_of(tmp_path / "run"))
