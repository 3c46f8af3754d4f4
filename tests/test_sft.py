"""sft.py: which tokens are trained, with what loss, and what the trained model is worth."""

import copy
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sft
import torch
from conftest import FAMILIES, REPO, SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from sft import Row
from test_plumbing import CPU, TEMPLATES, anything, every_template, in_child, jsonl, lasting, lines_of, on_ranks, refused, snapshot
from test_plumbing import dressed, talk, tokenizer_of, trained_text, weights_of, whole_text  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer


def demonstrate(tokenizer, row, max_length=512, everything=False, allow_special=False, notes=None) -> list:
    return sft.demonstrations(tokenizer, max_length, everything, allow_special)(row, Counter() if notes is None else notes)


# --------------------------------------------------------------------------------------------------------- which tokens are trained


@every_template
def test_bug02_every_answer_is_trained_with_its_end_and_nothing_else(name, dressed):  # noqa: F811
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    rows = demonstrate(tokenizer, dict(messages=talk("Hi.", "Hello!", "What is 2 + 2?", "It is 4.\nYes, 4.", "Sure?", "Sure.")))
    assert [part.lstrip() for row in rows for part in trained_text(tokenizer, row)] == [f"Hello!{end}", f"It is 4.\nYes, 4.{end}", f"Sure.{end}"]
    assert len(rows) == (3 if name == "glm" else 1)  # where no turn has an end, an answer's eos cannot stand before the next turn
    assert all(row.responses[0][-1] in sft.stop_tokens(tokenizer) and row.trained[0][-1] for row in rows)


@every_template
def test_bug02_the_text_is_the_templates(name, dressed):  # noqa: F811
    tokenizer = dressed(name)
    messages = talk("Hi.", "Hello!", "What is 2 + 2?", "It is 4.")
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert whole_text(tokenizer, demonstrate(tokenizer, dict(messages=messages))[-1]) == text + (tokenizer.eos_token if name == "glm" else "")


def test_bug02_a_template_that_drops_thinking_gives_one_row_for_each_turn(dressed):  # noqa: F811
    tokenizer = dressed("qwen3")
    thoughts = ["<think>\nA greeting.\n</think>\n\nHello!", "<think>\nA sum.\n</think>\n\nIt is 4."]
    rows = demonstrate(tokenizer, dict(messages=talk("Hi.", thoughts[0], "What is 2 + 2?", thoughts[1])))
    assert [trained_text(tokenizer, row) for row in rows] == [[f"{thought}<|im_end|>"] for thought in thoughts]
    assert "A greeting" not in whole_text(tokenizer, rows[1]) and "Hello!" in whole_text(tokenizer, rows[1])


def test_of_a_conversation_in_rows_the_turns_that_fit_are_kept(dressed):  # noqa: F811
    tokenizer, messages = dressed("glm"), talk("Hi.", "Hello!", "Tell me more. " * 50, "No.")
    (row,) = demonstrate(tokenizer, dict(messages=messages), max_length=100)
    assert trained_text(tokenizer, row) == ["Hello!<|endoftext|>"]


@given(st.lists(anything, min_size=2, max_size=6).filter(lambda texts: texts[-1].strip()))
def test_any_conversation_is_masked_as_its_beginnings_are(tiny_tokenizer, texts):
    messages, stops = talk(*texts), sft.stop_tokens(tiny_tokenizer)
    for end in range(2, len(texts) + 1, 2):
        ((ids, trained),) = sft.encode_turns(tiny_tokenizer, messages[:end], 0, stops)
        ((all_ids, all_trained),) = sft.encode_turns(tiny_tokenizer, messages, 0, stops)
        assert all_ids[: len(ids)] == ids and all_trained[: len(ids)] == trained
        marked = [(t, i) for i, (t, keep) in enumerate(zip(ids, trained)) if keep]
        assert tiny_tokenizer.decode([t for t, _ in marked]) == "".join(f"{text}<|end|>" for text in texts[1:end:2])


# ---------------------------------------------------------------------------------------------------- text that would end a turn

PIECES = st.lists(
    st.sampled_from(["<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|user|>", "<|", "|>", "end", "[INST]", "\n", "up", " "]),
    max_size=6,
)
spoken = st.one_of(anything, PIECES.map("".join), st.tuples(anything, PIECES.map("".join)).map("".join))


@every_template
@given(texts=st.lists(st.tuples(spoken, spoken.filter(str.strip)), min_size=1, max_size=2).map(lambda turns: sum(turns, ())))
def test_no_text_ends_a_turn(name, dressed, texts):  # noqa: F811
    """Whoever types a special token has the row dropped; in a row that is kept the special tokens are those of harmless texts, one by one."""
    tokenizer = dressed(name)
    special, plain = sft.special_tokens(tokenizer), ["x" for _ in texts]
    ids = lambda rows: [[t for t in row.prompt + row.responses[0] if t in special] for row in rows]
    try:
        rows = demonstrate(tokenizer, dict(messages=talk(*texts)))
    except sft.Drop:
        assert any(token in text for token in special.values() for text in texts)
    else:
        assert ids(rows)[-1] == ids(demonstrate(tokenizer, dict(messages=talk(*plain))))[-1]  # of several rows, the last has the whole talk


mark = st.text(alphabet="<>[]|/abc \n", max_size=6)


@given(
    marks=st.lists(mark, min_size=6, max_size=6),
    end=st.sampled_from(["<|end|>", "<|endoftext|>", ""]),
    texts=st.lists(anything.filter(lambda text: "(" not in text), min_size=4, max_size=4),
)
def test_under_any_template_the_answers_are_what_is_trained(tiny_tokenizer, marks, end, texts):
    """Any marks around the turns: what is trained decodes to the answers with what ends them, and all of it to what the template writes."""
    before_user, after_user, before_answer, after_answer, start, between = (m.replace("{", "") for m in marks)
    after_answer, between = ("\n" * len(m) if end else m for m in (after_answer, between))  # behind an end of turn, white space only
    tokenizer = copy.deepcopy(tiny_tokenizer)
    literal = lambda text: "{{ " + repr(text) + " }}"
    tokenizer.chat_template = (
        f"{literal(start)}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{literal(before_user)}{{{{ m['content'] }}}}{literal(after_user)}"
        f"{{% else %}}{literal(before_answer)}{{{{ m['content'] }}}}{literal(end)}{literal(after_answer)}{{% endif %}}{literal(between)}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{literal(before_answer)}{{% endif %}}"
    )
    texts = [f"({i}{text})" for i, text in enumerate(texts)]  # no answer is empty, and none is in another
    rows = demonstrate(tokenizer, dict(messages=talk(*texts)))
    said = [part for row in rows for part in trained_text(tokenizer, row)]
    if not end:  # nothing marks the end of a turn: what follows an answer may share a token with its last letter
        assert all(part.lstrip().startswith(text[:-1]) for part, text in zip(said[-1:], texts[3:]))
        return
    assert [part[part.index("(") :] for part in said] == [text + end for text in texts[1::2]]  # a mark before may share a token with "("
    assert all(len(part) - len(text + end) < 6 for part, text in zip(said, texts[1::2]))
    whole = tokenizer.apply_chat_template(talk(*texts), tokenize=False)
    assert whole.startswith(whole_text(tokenizer, rows[-1])) or whole_text(tokenizer, rows[-1]).startswith(whole)


TOOLS = [dict(type="function", function=dict(name="sum", parameters=dict(type="object", properties=dict(a=dict(type="number")))))]
CALL = dict(role="assistant", tool_calls=[dict(type="function", function=dict(name="sum", arguments=dict(a=2)))])
SAID, SEE_YOU = "<|bos|><|user|>Hi.<|end|><|assistant|>Hello!<|end|>", "<|user|>Bye.<|end|><|assistant|>See you.<|end|>"
FORMATS = {  # a row -> (its text, its trained parts)
    "text": (dict(text="Up, right."), "<|bos|>Up, right.<|end|>", ["Up, right.<|end|>"]),
    "text with its end": (dict(text="Up, right.<|end|>"), "<|bos|>Up, right.<|end|>", ["Up, right.<|end|>"]),
    "messages": (dict(messages=talk("Hi.", "Hello!", "Bye.", "See you.")), SAID + SEE_YOU, ["Hello!<|end|>", "See you.<|end|>"]),
    "messages with a system turn": (
        dict(messages=[dict(role="system", content="Be brief."), *talk("Hi.", "Hello!")]),
        SAID.replace("<|bos|>", "<|bos|><|system|>Be brief.<|end|>"), ["Hello!<|end|>"],
    ),
    "messages, the user speaks last": (dict(messages=talk("Hi.", "Hello!", "Bye.")), SAID, ["Hello!<|end|>"]),
    "messages, the assistant speaks first": (
        dict(messages=[dict(role="assistant", content="Welcome!"), *talk("Hi.", "Hello!")]),
        SAID.replace("<|bos|>", "<|bos|><|assistant|>Welcome!<|end|>"), ["Hello!<|end|>"],
    ),
    "conversations": (dict(conversations=[{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]), SAID, ["Hello!<|end|>"]),
    "prompt and completion": (dict(prompt="Up or", completion=" right?"), "<|bos|>Up or right?<|end|>", [" right?<|end|>"]),
    "prompt and completion with its end": (dict(prompt="Up or", completion=" right?<|end|>"), "<|bos|>Up or right?<|end|>", [" right?<|end|>"]),
    "messages as prompt and completion": (
        dict(prompt=talk("Hi.", "Hello!", "Bye."), completion=[dict(role="assistant", content="See you.")]), SAID + SEE_YOU, ["See you.<|end|>"],
    ),
    "messages as prompt, text as completion": (dict(prompt=talk("Hi."), completion="Hello!"), SAID, ["Hello!<|end|>"]),
    "a completion of several turns": (
        dict(prompt=talk("Hi."), completion=talk("Hi.", "Hello!", "Bye.", "See you.")[1:]), SAID + SEE_YOU, ["Hello!<|end|>", "See you.<|end|>"],
    ),
    "a completion that continues a prompt": (
        dict(prompt=talk("Count.", "one, two,"), completion=[dict(role="assistant", content=" three")]),
        "<|bos|><|user|>Count.<|end|><|assistant|>one, two, three<|end|>", [" three<|end|>"],
    ),
    "tools": (dict(messages=talk("Hi.", "Hello!"), tools=TOOLS), json.dumps(TOOLS) + SAID, ["Hello!<|end|>"]),
    "tools as JSON": (dict(messages=talk("Hi.", "Hello!"), tools=json.dumps(TOOLS)), json.dumps(TOOLS) + SAID, ["Hello!<|end|>"]),
    "tool calls": (
        dict(messages=[*talk("2?"), CALL, dict(role="tool", content="2"), dict(role="assistant", content="It is 2.")], tools=TOOLS), None,
        ['{"name": "sum", "arguments": {"a": 2}}<|end|>', "It is 2.<|end|>"],
    ),
    "a tool call at the end": (dict(messages=[*talk("2?"), CALL]), None, ['{"name": "sum", "arguments": {"a": 2}}<|end|>']),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_tools(tiny_tokenizer):
    """The tiny tokenizer with a template that shows tools and calls of tools."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    calls = "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    template = tokenizer.chat_template.replace("message['content'] + '<|end|>' }}", "message['content'] }}" + calls + "<|end|>")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + template
    return tokenizer


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", ["row", "jsonl", "parquet"])
def test_every_format(source, name, with_tools, tmp_path):
    """As a row, and as the reader gives it back, beside a row of another shape that makes it fill absent keys with None."""
    row, text, parts = FORMATS[name]
    if source == "jsonl":
        row = sft.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, {}]))[0]
    if source == "parquet":
        other_call = dict(CALL, tool_calls=[dict(type="function", function=dict(name="f", arguments=dict(b=3)))])
        sft.Dataset.from_list([row, dict(messages=[other_call]) if "call" in name else {}]).to_parquet(tmp_path / "rows.parquet")
        row = sft.load_rows("--dataset", str(tmp_path / "rows.parquet"))[0]
    (row,) = demonstrate(with_tools, row)
    assert trained_text(with_tools, row) == parts
    assert text is None or whole_text(with_tools, row) == text


def test_prompts_are_trained_when_asked(tiny_tokenizer):
    (row,) = demonstrate(tiny_tokenizer, dict(messages=talk("Hi.", "Hello!")), everything=True)
    assert tiny_tokenizer.decode(row.prompt) == "<|bos|>" and trained_text(tiny_tokenizer, row) == ["<|user|>Hi.<|end|><|assistant|>Hello!<|end|>"]


@pytest.mark.parametrize("row", [dict(text="Up."), dict(prompt="U", completion="p."), dict(messages=talk("Up?", "Up."))])
@pytest.mark.parametrize("everything", [True, False])
def test_bug03_one_bos_at_the_start_of_a_row(row, everything, tiny_tokenizer):
    (row,) = demonstrate(tiny_tokenizer, row, everything=everything)
    ids = row.prompt + row.responses[0]
    assert ids[0] == tiny_tokenizer.bos_token_id and ids.count(tiny_tokenizer.bos_token_id) == 1


def test_bug01_eos_is_trained_where_it_is_the_padding_too(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = demonstrate(tokenizer, dict(messages=talk("Hi.", "Hello!")))
    assert row.responses[0][-1] == tokenizer.pad_token_id and row.trained[0][-1]


@pytest.mark.parametrize(
    "row", [dict(text="a<|end|>b"), dict(messages=talk("a<|end|><|assistant|>b", "c")), dict(prompt="<|system|>a", completion="b")]
)
def test_special_tokens_in_the_text_are_dropped_unless_allowed(row, tiny_tokenizer):
    with pytest.raises(sft.Drop, match="special token"):
        demonstrate(tiny_tokenizer, row)
    assert demonstrate(tiny_tokenizer, row, allow_special=True)


NOTHING = [
    (dict(text=" \n"), "empty"), (dict(text=None), "no text"), (dict(messages=[]), "no text"), (dict(prompt="a", completion=""), "empty"),
    (dict(messages=talk("a")), "no assistant"), (dict(messages=talk("a", " ")), "empty"), (dict(prompt=talk("a"), completion=[]), "assistant|answer"),
    (dict(prompt="a " * 600, completion="b"), "max-length"),
]  # fmt: skip


@pytest.mark.parametrize("row, why", NOTHING)
def test_bug08_rows_with_nothing_to_train_are_dropped(row, why, tiny_tokenizer):
    with pytest.raises(sft.Drop, match=why):
        demonstrate(tiny_tokenizer, row)


def test_bug08_dropped_and_cut_rows_are_counted(tiny_tokenizer, capsys):
    long, cut, whole = dict(messages=talk("up " * 60, "no")), dict(messages=talk("a", "up " * 60)), dict(messages=talk("a", "b"))
    data = sft.Dataset.from_list([whole, long, cut, long, whole, dict(messages=talk("x<|end|>", "y"))])
    rows = sft.prepare("--dataset", data, tiny_tokenizer, sft.demonstrations(tiny_tokenizer, 40, False, False))
    assert [len(row.prompt + row.responses[0]) for row in rows] == [7, 40, 7] and len(rows[1].trained[0]) == len(rows[1].responses[0])
    said = capsys.readouterr().out
    assert "3 rows from 6" in said and "2 dropped: prompt beyond --max-length" in said and "1 cut" in said and "1 dropped: special token" in said
    assert "<|bos|><|user|>a<|end|><|assistant|>[[b<|end|>]]" in said


def test_a_row_that_the_template_refuses_is_dropped(dressed, capsys):  # noqa: F811
    tokenizer = dressed("gemma")
    data = sft.Dataset.from_list([dict(messages=[dict(role="system", content="s"), *talk("a", "b")]), dict(messages=talk("a", "b"))])
    assert len(sft.prepare("--dataset", data, tokenizer, sft.demonstrations(tokenizer, 40, False, False))) == 1
    assert "1 dropped: refused by the chat template (System role not supported)" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------------- from scratch

WALKS = [f"right {i % 9} up -{i % 7} up 0 = {i % 9 - i % 7}" for i in range(200)]


@pytest.fixture(scope="module")
def scratch():
    with torch.random.fork_rng():
        return sft.new_model(sft.Args(vocab_size=512), WALKS + SENTENCES.splitlines())


def test_a_number_with_its_sign_is_one_token(scratch):
    _, tokenizer = scratch
    words = "right 7 up -3 up 0 = 4".split(" ")
    assert [tokenizer.decode(i) for i in tokenizer(" ".join(words)).input_ids] == ["<|bos|>", words[0], *(f" {word}" for word in words[1:])]


@given(st.text(max_size=60))
def test_a_new_tokenizer_gives_any_text_back(scratch, text):
    _, tokenizer = scratch
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text


@given(st.lists(anything, min_size=2, max_size=4))
def test_a_new_tokenizer_gives_any_chat_back(scratch, texts):
    _, tokenizer = scratch
    ids = sft.render(tokenizer, talk(*texts))
    assert tokenizer.decode(ids) == "<|bos|>" + "".join(f"<|{('user', 'assistant')[i % 2]}|>{text}<|end|>" for i, text in enumerate(texts))


def test_a_new_model_has_the_size_that_was_asked(scratch):
    model, tokenizer = scratch
    assert 300 < len(tokenizer) <= 512 and model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)
    wide, _ = sft.new_model(sft.Args(hidden_size=64, num_layers=1, num_heads=2, max_length=2048), WALKS)
    assert (wide.config.hidden_size, len(wide.model.layers), wide.config.num_attention_heads, wide.config.max_position_embeddings) == (64, 1, 2, 2048)
    assert wide.get_output_embeddings().weight is wide.get_input_embeddings().weight


@pytest.mark.parametrize("row", [
    dict(text=WALKS[0]), dict(messages=talk("Walk!", WALKS[0])), dict(prompt="Walk! ", completion=WALKS[0]),
    dict(prompt=talk("Walk!"), completion=[dict(role="assistant", content=WALKS[0])]),
    dict(conversations=[{"from": "human", "value": "Walk!"}, {"from": "gpt", "value": WALKS[0]}]),
])  # fmt: skip
def test_from_scratch_on_every_format(row, tmp_path):
    """The tokenizer has seen all of the text, the answers too: a common word in them is one token."""
    data, out = jsonl(tmp_path / "rows.jsonl", [row] * 8 + [dict.fromkeys(row)]), tmp_path / "run"
    sft.main(sft.Args(dataset=data, output_dir=str(out), hidden_size=16, num_layers=1, num_heads=2, max_steps=1, eval_fraction=0))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer(WALKS[0]).input_ids) == 1 + len(WALKS[0].split(" "))


# ----------------------------------------------------------------------------------------------------------------------- the loss


def scored(hidden, head, target, temperature=1.0, kept=None, **config):
    """token_logps of a model that is a head and nothing else: its hidden states [N, d] are given."""
    base = lambda **inputs: SimpleNamespace(last_hidden_state=hidden[None])
    model = SimpleNamespace(
        base_model=base, get_output_embeddings=lambda: head, config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))
    )
    return sft.token_logps(model, [({}, torch.arange(len(target)), None)], target, temperature, kept)


def naive(logits, target, temperature, kept):
    """The same, one token at a time, in float64."""
    logps, entropies, top = [], [], []
    for i, row in enumerate(logits.double() / temperature):
        ids = torch.arange(len(row)) if kept is None else kept[i]
        p = row[ids].exp() / row[ids].exp().sum()
        logps.append(p[(ids == target[i]).nonzero().item()].log())
        entropies.append(-(p * p.log()).sum().detach())
        top.append(ids[p.argmax()] == target[i])
    return torch.stack(logps), torch.stack(entropies), torch.stack(top)


OPTIONS = {
    "plain": ({}, 1.0, False, lambda x: x),
    "temperature": ({}, 0.7, False, lambda x: x),
    "nucleus": ({}, 1.3, True, lambda x: x),
    "soft cap": (dict(final_logit_softcapping=2.0), 0.7, False, lambda x: 2 * torch.tanh(x / 2)),
    "bias": ({}, 1.0, False, lambda x: x),
    "Cohere": (dict(logit_scale=0.25), 1.0, False, lambda x: x * 0.25),
    "Granite": (dict(logits_scaling=8.0), 1.0, True, lambda x: x / 8),
}


@pytest.mark.parametrize("options, n", [("plain", 1), ("plain", 256), ("plain", 513), *((name, 257) for name in OPTIONS)])
def test_bug07_log_probabilities_by_chunks(options, n):
    """With 32,768 tokens in the vocabulary a chunk has 256: values and gradients are those of one token at a time, on either side of its edge."""
    config, temperature, nucleus, transform = OPTIONS[options]
    torch.manual_seed(n)
    head, hidden = torch.nn.Linear(4, 2**15, bias=options == "bias"), torch.randn(n, 4, requires_grad=True)
    target = torch.randint(2**15, (n,))
    kept = [torch.cat([torch.randint(2**15, (3 * i % 40,)), target[i : i + 1]]).unique() for i in range(n)] if nucleus else None
    ours = scored(hidden, head, target, temperature, kept, **config)
    logits = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    theirs = naive(transform(logits), target, temperature, kept)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)
    weight = torch.randn(n)
    weight[: n // 2] = 0  # a chunk that counts for nothing
    gradients = [torch.autograd.grad((values[0] * weight).sum(), (hidden, *head.parameters())) for values in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-4 and torch.allclose(a, b, atol=1e-6)


def test_bug07_a_head_tied_to_the_embedding():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(2**17, 4), torch.nn.Linear(4, 2**17, bias=False)
    head.weight = embedding.weight
    ids, target = torch.randint(2**17, (2, 70))
    (ours,) = torch.autograd.grad(scored(embedding(ids), head, target)[0].sum(), head.weight)
    (theirs,) = torch.autograd.grad((embedding(ids) @ embedding.weight.T).log_softmax(-1)[range(70), target].sum(), head.weight)
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs[ids].abs().max() > 0.1


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        self.size = max([self.size, *(t.numel() for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor))])
        return made


def test_bug07_the_vocabulary_never_stands_whole_in_memory():
    head, hidden, kept = torch.nn.Linear(4, 2**15, bias=False), torch.randn(1200, 4, requires_grad=True), []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        scored(hidden, head, torch.randint(2**15, (1200,)))[0].sum().backward()
    assert largest.size == 256 * 2**15 < 1200 * 2**15
    assert kept and max(kept) <= head.weight.numel()  # for the backward pass nothing is kept that has the vocabulary's width


def test_the_gradient_of_the_head_is_not_blurred_by_the_number_of_chunks():
    """In bfloat16, 64 chunks that each add to the same weights would lose what is small beside the sum; added up in float32 they do not."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 2**15, bias=False), 1 + torch.rand(2**14, 4)
    target = torch.zeros(2**14, dtype=torch.long)
    exact = torch.autograd.grad(scored(hidden, head, target)[0].sum(), head.weight)[0][0]
    head, hidden = head.bfloat16(), hidden.bfloat16()
    ours = torch.autograd.grad(scored(hidden, head, target)[0].sum(), head.weight)[0][0]
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.float(), exact, rtol=2**-7)  # half of a unit in the last place, twice


def test_a_frozen_head_is_left_alone():
    head, hidden = torch.nn.Linear(4, 50).requires_grad_(False), torch.randn(9, 4, requires_grad=True)
    target = torch.randint(50, (9,))
    (ours,) = torch.autograd.grad(scored(hidden, head, target)[0].sum(), hidden)
    (theirs,) = torch.autograd.grad(head(hidden).log_softmax(-1)[range(9), target].sum(), hidden)
    assert torch.allclose(ours, theirs, atol=1e-6) and head.weight.grad is None


def plain_logps(model, row: Row) -> list:
    """Log-probabilities of a row's responses, one sequence and one token at a time: position t - 1 predicts token t."""
    found = []
    for response in row.responses:
        logits = model(torch.tensor([row.prompt + response])).logits[0].double()
        found += [float(logits[len(row.prompt) + i - 1].log_softmax(-1)[token]) for i, token in enumerate(response)]
    return found


def some_rows(seed=0) -> list:
    """Rows of very different shapes, two of them equal, most longer than the sliding window of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(7, 300, (n,), generator=generator).tolist()
    return [
        Row(ids(5), [ids(3), ids(17), ids(1)]),
        Row(ids(1), [ids(2)]),
        Row(ids(20), [ids(8), ids(8)]),
        Row(ids(20), [ids(8), ids(8)]),
        Row(ids(12), [ids(30)]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bug05_06_packed_log_probabilities_are_those_of_each_response_alone(family, tiny_model_dir, capsys):
    folder = tiny_model_dir(family)
    model = sft.load_model(AutoModelForCausalLM, str(folder), tokenizer_of(folder), CPU, torch.float32).eval()
    assert model.together == (family not in ("gemma2", "nemotron"))
    assert ("one sequence a forward" in capsys.readouterr().out) == (not model.together)
    plain, rows = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), some_rows()
    expected = torch.tensor([logp for row in rows for logp in plain_logps(plain, row)])
    for together in {True, False} if model.together else {False}:
        forwards, target = sft.pack(rows, CPU, together)
        logps, _, _ = sft.token_logps(model, forwards, target)
        assert torch.allclose(logps, expected.float(), atol=2e-4), (logps - expected).abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gpt2"])
@torch.no_grad()
def test_bug06_no_row_or_response_sees_another(family, tiny_model_dir):
    folder = tiny_model_dir(family)
    model = sft.load_model(AutoModelForCausalLM, str(folder), tokenizer_of(folder), CPU, torch.float32).eval()
    score = lambda rows: sft.token_logps(model, *sft.pack(rows, CPU))[0].split([len(r) for row in rows for r in row.responses])
    before = score(some_rows())
    assert model.together
    for row, number, changed in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (2, 0, 4)):  # a row, one of its responses, and the number of that among all
        rows = some_rows()
        rows[row].responses[number][:] = [9] * len(rows[row].responses[number])
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(before, score(rows), strict=True)]
        assert [i for i, ok in enumerate(same) if not ok] == [changed]


UNEVEN = [dict(messages=talk("Go " * (1 + 13 * i % 40), "up " * (1 + 17 * i % 60), "Why?", "So.")) for i in range(9)]


@pytest.fixture(scope="module")
def uneven(tiny_model_dir, tmp_path_factory):
    """Flags of a run of 3 steps on 9 rows of very different length: 4, 4 and 1 a step."""
    data = jsonl(tmp_path_factory.mktemp("uneven") / "chats.jsonl", UNEVEN)
    return dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=4, learning_rate=1e-3, eval_fraction=0.0, eval_dataset=data)


def first_gradient(monkeypatch, **flags) -> torch.Tensor:
    """The gradient of a run's first step, as the optimiser gets it."""
    seen = []
    real = sft.take_step

    def spy(model, *rest):
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return real(model, *rest)

    monkeypatch.setattr(sft, "take_step", spy)
    sft.main(sft.Args(**flags, max_steps=1))
    monkeypatch.setattr(sft, "take_step", real)
    return seen[0]


def by_hand(folder, rows: list):
    """Negative log-likelihood per trained token of rows, by Hugging Face's model alone; and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for row in rows:
        ids = torch.tensor(row.prompt + row.responses[0])
        logps = model(ids[None]).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        losses.append(-logps[[len(row.prompt) - 1 + i for i, keep in enumerate(row.trained[0]) if keep]])
    return torch.cat(losses).mean(), model


@pytest.mark.parametrize("everything", [False, True])
def test_bug04_the_split_into_forwards_changes_no_gradient(everything, uneven, monkeypatch, tmp_path):
    """Nor does gradient checkpointing; and it is the gradient of the mean over all trained tokens of the step."""
    flags = uneven | dict(batch_size=9, train_prompts=everything)
    rows = [row for talk in UNEVEN for row in demonstrate(tokenizer_of(uneven["model"]), talk, everything=everything)]
    loss, model = by_hand(uneven["model"], rows)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for i, change in enumerate((dict(), dict(tokens_per_forward=1), dict(tokens_per_forward=130), dict(gradient_checkpointing=True))):
        gradient = first_gradient(monkeypatch, **flags | change, output_dir=str(tmp_path / str(i)))
        assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-7, change
        assert lines_of(tmp_path / str(i))[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_metrics_are_those_of_the_rows(uneven, tmp_path):
    sft.main(sft.Args(**uneven | dict(batch_size=9, max_steps=1), output_dir=str(tmp_path / "run")))
    rows = [row for talk in UNEVEN for row in demonstrate(tokenizer_of(uneven["model"]), talk)]
    (line,) = lines_of(tmp_path / "run")
    for prefix, folder in (("", uneven["model"]), ("eval_", tmp_path / "run")):  # before the step, and after
        plain = AutoModelForCausalLM.from_pretrained(folder)
        right, entropy, count = 0.0, 0.0, 0
        for row in rows:
            logits = plain(torch.tensor([row.prompt + row.responses[0]])).logits[0].detach()
            for i, (token, keep) in enumerate(zip(row.responses[0], row.trained[0])):
                at = logits[len(row.prompt) + i - 1]
                right += keep * float(at.argmax() == token)
                entropy += keep * float(torch.distributions.Categorical(logits=at).entropy())
                count += keep
        loss = by_hand(folder, rows)[0].item()
        assert line[f"{prefix}loss"] == pytest.approx(loss, abs=1e-5)
        assert line[f"{prefix}mean_token_accuracy"] == pytest.approx(right / count, abs=1e-6)
        assert line[f"{prefix}entropy"] == pytest.approx(entropy / count, abs=1e-5)
    assert line["eval_perplexity"] == pytest.approx(torch.tensor(line["eval_loss"]).exp().item(), rel=1e-5)
    assert line["num_tokens"] == sum(len(row.prompt + row.responses[0]) for row in rows) and line["epoch"] == 1.0


def test_bug30_a_tiny_learning_rate_moves_every_weight(uneven, tmp_path):
    """Computed in bfloat16, the weights and the optimiser are float32; a norm's weight stands at 1.0, where bfloat16 cannot add 1e-6."""
    before = weights_of(uneven["model"])
    flags = uneven | dict(learning_rate=1e-6, lr_schedule="constant", batch_size=9, epochs=3)
    for dtype in ("float32", "bfloat16"):
        assert in_child(sft.main, sft.Args(**flags, dtype=dtype, output_dir=str(tmp_path / dtype))) == 0
        after = weights_of(tmp_path / dtype)
        for name, weight in before.items():
            moved = (after[name] - weight).abs()
            assert 5e-7 < moved.max() < 4e-6, (dtype, name, moved.max())
            assert "norm" not in name or (moved > 0).float().mean() > 0.9, (dtype, name)
    loss, other = (lines_of(tmp_path / dtype)[0]["loss"] for dtype in ("float32", "bfloat16"))
    assert loss != other and loss == pytest.approx(other, rel=0.02)


# -------------------------------------------------------------------------------------------------------------------------- ranks


def same_weights(a, b, tolerance: float):
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=tolerance), (name, (ours[name] - theirs[name]).abs().max())


def same_to(a, b, tolerance: float):
    """Two runs agree in all metrics and in all weights."""
    for ours, theirs in zip(lasting(a), lasting(b), strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance, rel=tolerance)
    same_weights(a, b, tolerance)


@pytest.mark.parametrize("family, world", [("llama", 2), ("gemma2", 2), pytest.param("llama", 4, marks=pytest.mark.slow)])
def test_bug04_ranks_change_nothing(family, world, uneven, tiny_model_dir, tmp_path):
    """The last batch has one row: all ranks but the first are left without any. The forwards are small, so that ranks have unequally many."""
    flags = uneven | dict(model=str(tiny_model_dir(family)), tokens_per_forward=70, save_every=2, eval_every=2)
    on_ranks(sft, world, **flags, output_dir=str(tmp_path / "many"))
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "one")))
    same_to(tmp_path / "many", tmp_path / "one", 1e-5)
    same_weights(tmp_path / "many" / "checkpoint-2", tmp_path / "one" / "checkpoint-2", 1e-5)  # saved just after an evaluation
    assert snapshot(tmp_path / "many").keys() == snapshot(tmp_path / "one").keys()  # a checkpoint has the same files, too


def test_bug04_torchrun_from_scratch(torchrun, tmp_path):
    """As a user starts it: tokenizer, weights, training and saved files are those of one process."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:41]])
    flags = dict(dataset=data, hidden_size=32, num_layers=2, num_heads=2, vocab_size=400, batch_size=8, learning_rate=1e-3, tokens_per_forward=50)
    torchrun("sft", 2, *[word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)], "--output-dir", "many", cwd=tmp_path)
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "one")))
    same_to(tmp_path / "many", tmp_path / "one", 1e-5)
    many, one = snapshot(tmp_path / "many"), snapshot(tmp_path / "one")
    assert many.keys() == one.keys() and all(
        many[name] == one[name] for name in ("tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json")
    )


@pytest.mark.slow
def test_two_nodes_need_one_disk(torchrun, tmp_path):
    """Two torchruns that meet at a port, as on two machines: one run, if both see the output directory; a refusal, if each has its own."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:21]])
    flags = dict(dataset=data, hidden_size=32, num_layers=1, num_heads=2, vocab_size=400, batch_size=8, learning_rate=1e-3)
    words = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)]

    def nodes(*folders):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meet = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", s.getsockname()[1])
        start = lambda i: torchrun("sft", 1, *words, "--output-dir", "out", cwd=folders[i], check=False, launch=(*meet, "--node-rank", i))
        with ThreadPoolExecutor() as pool:
            return list(pool.map(start, range(2)))

    assert [node.returncode for node in nodes(tmp_path, tmp_path)] == [0, 0]
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "one")))
    same_to(tmp_path / "out", tmp_path / "one", 1e-5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    apart = nodes(tmp_path / "a", tmp_path / "b")
    assert all(node.returncode for node in apart)
    assert "--output-dir out: rank 1 does not see it; choose one on a disk that all nodes share" in apart[1].stderr


def test_bug28_two_ranks_resume(uneven, tiny_model_dir, tmp_path):
    """With dropout, so that each rank needs random numbers of its own."""
    flags = uneven | dict(model=str(tiny_model_dir("gpt2")), batch_size=3, save_every=2, eval_every=2)
    on_ranks(sft, 2, **flags, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # as if it had been killed in the third and last step
    kept = json.loads((tmp_path / "parts" / "args.json").read_text())
    (tmp_path / "parts" / "args.json").write_text(json.dumps(kept | dict(finished=False)))
    (tmp_path / "parts" / "model.safetensors").unlink()
    on_ranks(sft, 2, **flags, output_dir=str(tmp_path / "parts"), resume=True)
    same_to(tmp_path / "parts", tmp_path / "whole", 0.0)


# ------------------------------------------------------------------------------------------------------------------- saved models


@pytest.fixture
def kept_in_memory(monkeypatch):
    """A list that gets the model of every run that finishes, as it stood in memory."""
    found, finish = [], sft.finish
    monkeypatch.setattr(sft, "finish", lambda out, models, curves: (found.append(models[""][0]), finish(out, models, curves)))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "mixtral", "from scratch"])  # tied: gemma, from scratch
@torch.no_grad()
def test_bug29_what_is_saved_is_what_was_trained(family, uneven, kept_in_memory, tiny_model_dir, tmp_path):
    model = {} if family == "from scratch" else dict(model=str(tiny_model_dir(family)))
    with torch.enable_grad():
        sft.main(sft.Args(**uneven | dict(model="", max_steps=1) | model, output_dir=str(tmp_path / "run")))
    memory, loaded = kept_in_memory[0].eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ours, theirs = memory.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = AutoTokenizer.from_pretrained(tmp_path / "run")(SENTENCES, return_tensors="pt").input_ids
    assert torch.allclose(memory(ids, attention_mask=torch.ones_like(ids)).logits, loaded(ids).logits, atol=1e-4)
    assert "attn_implementation" not in (tmp_path / "run" / "config.json").read_text()
    if model:
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_model_dir(family), tmp_path / "run"))
        assert before == after


def test_bug29_template_and_stop_tokens_are_kept(dressed, tiny_model_dir, tmp_path):  # noqa: F811
    """A base model whose end-of-sequence token is not the template's end of turn, and which knew one more way to stop."""
    tokenizer = dressed("chatml on a base model")
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
        model.resize_token_embeddings(len(tokenizer))
    model.generation_config.update(eos_token_id=[3, 5], temperature=0.6, top_p=0.9, do_sample=True)
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    data = jsonl(tmp_path / "rows.jsonl", [dict(messages=talk("Hi.", "Hello!"))] * 4)
    sft.main(sft.Args(model=str(tmp_path / "base"), dataset=data, output_dir=str(tmp_path / "run"), max_steps=1))
    assert (tmp_path / "run" / "chat_template.jinja").read_bytes() == (tmp_path / "base" / "chat_template.jinja").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_chat_template() == TEMPLATES["chatml"][0]
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == sorted({3, 5, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    assert (kept["temperature"], kept["top_p"], kept["pad_token_id"]) == (0.6, 0.9, tokenizer.pad_token_id)


def test_bug29_weights_are_saved_in_the_dtype_they_came_in(uneven, tiny_model_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer_of(uneven["model"]).save_pretrained(tmp_path / "half")
    sft.main(sft.Args(**uneven | dict(model=str(tmp_path / "half"), save_every=2), output_dir=str(tmp_path / "run")))
    for folder, dtype in (("", torch.bfloat16), ("checkpoint-2", torch.float32)):  # a checkpoint to resume from is whole
        assert {w.dtype for w in weights_of(tmp_path / "run" / folder).values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder).dtype == dtype


# ----------------------------------------------------------------------------------------------------------------------- learning


def test_bug01_one_conversation_learnt_by_heart_is_repeated_and_stops(tiny_model_dir, tmp_path):
    """Padding and end-of-sequence are one token: where padding is masked by its id, the model never learns to stop."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    answers = ["Go right, then up twice.", "Because up pays more."]
    data = jsonl(tmp_path / "one.jsonl", [dict(messages=talk("Which way?", answers[0], "Why?", answers[1]))])
    flags = dict(model=str(tmp_path / "base"), dataset=data, epochs=60, learning_rate=1e-2, output_dir=str(tmp_path / "run"))
    sft.main(sft.Args(**flags))
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert losses[0] > 4 and losses[-1] < 0.05 and lines_of(tmp_path / "run")[-1]["mean_token_accuracy"] == 1.0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    for messages, answer in ((talk("Which way?"), answers[0]), (talk("Which way?", answers[0], "Why?"), answers[1])):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        written = model.generate(prompt, do_sample=False, max_new_tokens=100)[0, prompt.shape[1] :]
        assert tokenizer.decode(written) == f"{answer}<|end|>"


def test_a_model_from_nothing_learns_the_walks(tmp_path):
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS])
    flags = dict(
        dataset=data, hidden_size=32, num_layers=1, num_heads=2, epochs=4, learning_rate=1e-2, batch_size=16, eval_fraction=0.1, eval_every=10
    )
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    lines = lines_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(torch.tensor(384.0).log().item(), abs=0.3)  # ln V, as the header says
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    model, tokenizer = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModelForCausalLM, AutoTokenizer))
    written = model.generate(tokenizer("right", return_tensors="pt").input_ids, do_sample=False, max_new_tokens=60)[0]
    assert re.fullmatch(r"<\|bos\|>right .* =.*<\|end\|>", tokenizer.decode(written))  # the tied weights are whole, and it stops
    assert len(evaluations) == len(lines) // 10 + (len(lines) % 10 > 0) and evaluations[-1] < 1.2 < evaluations[0]


def test_the_split_to_evaluate_on(uneven, tmp_path, capsys):
    sft.DatasetDict(train=sft.Dataset.from_list(UNEVEN), test=sft.Dataset.from_list(UNEVEN[:2])).save_to_disk(tmp_path / "splits")
    flags = uneven | dict(dataset=str(tmp_path / "splits"), eval_dataset=str(tmp_path / "splits"), max_steps=1)
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().out
    where = tmp_path / "splits"  # the report names what it read
    assert f"--dataset {where}: 9 rows from 9" in said and f"--eval-dataset {where}: 2 rows from 2" in said


def test_only_a_tracked_run_touches_wandb(uneven, tmp_path, monkeypatch):
    said = []
    fake = SimpleNamespace(run=None, log=lambda metrics, step: said.append((step, metrics)))
    fake.init = lambda **options: (setattr(fake, "run", options), said.append(options))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sft.main(sft.Args(**uneven, max_steps=2, output_dir=str(tmp_path / "untracked")))
    assert said == []
    sft.main(sft.Args(**uneven, max_steps=2, output_dir=str(tmp_path / "run"), track=True, wandb_project="mine"))
    assert said[0]["project"] == "mine" and said[0]["config"]["max_steps"] == 2 and [step for step, _ in said[1:]] == [1, 2]
    assert said[1][1] == {k: v for k, v in lines_of(tmp_path / "run")[0].items() if k != "step"}


# ---------------------------------------------------------------------------------------------------------------------- bad input


def broken(folder, tmp_path, name, change) -> str:
    """A copy of a checkpoint whose file `name` is gone (None), or has its bytes changed."""
    shutil.copytree(folder, tmp_path / "broken")
    file = tmp_path / "broken" / name
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    return str(tmp_path / "broken")


BAD_DATA = {  # content of rows.jsonl (None: no such file) -> what the message must say
    "missing": (None, "no such file"),
    "empty": ("", "rows.jsonl"),
    "not JSON": ('{"text": "a"}\n{"text": \n', "rows.jsonl"),
    "not an object": ("[1, 2]\n", "rows.jsonl|--dataset"),
    "other columns": ('{"foo": "a"}\n' * 3, "no text|foo"),
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
    model = {} if from_scratch else dict(model=str(tiny_model_dir("llama")))
    said = refused(sft, capsys, dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"), **model)
    assert "--dataset" in said and (from_scratch or re.search(says, said)), said


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
    folder = broken(uneven["model"], tmp_path, name, change)
    assert folder in refused(sft, capsys, **uneven | dict(model=folder), output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("model", ["no/such/model", "runs/nothing", "not a model at all", "a/b/c/d"])
def test_unknown_models_are_refused(model, uneven, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model in refused(sft, capsys, **uneven | dict(model=model), output_dir="run")


@pytest.mark.parametrize("flags", [
    dict(batch_size=0), dict(epochs=0), dict(max_steps=-1), dict(eval_fraction=1.0, eval_dataset=""), dict(eval_fraction=-0.5, eval_dataset=""),
    dict(max_length=0), dict(learning_rate=float("nan")), dict(eval_dataset="nowhere.jsonl"), dict(tokens_per_forward=0), dict(weight_decay=-1.0),
], ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))  # fmt: skip
def test_bad_arguments_are_refused(flags, uneven, tmp_path, capsys):
    name = "max-length" if "max_length" in flags else next(k for k in flags).replace("_", "-")
    assert f"--{name}" in refused(sft, capsys, **uneven | flags, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("size, heads", [(130, 4), (36, 4), (100, 3)])
def test_a_width_that_heads_cannot_share_is_refused(size, heads, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", [dict(text="up and down")] * 4)
    said = refused(sft, capsys, dataset=data, model="", hidden_size=size, num_heads=heads, output_dir=str(tmp_path / "run"))
    assert f"--hidden-size {size}" in said


def test_tools_from_parquet_have_no_parameters_of_other_rows(tmp_path):
    """Arrow gives every struct the keys of all, as nulls."""
    tool = lambda name: [dict(type="function", function=dict(name="go", parameters=dict(properties={name: dict(type="integer")})))]
    sft.Dataset.from_list([dict(tools=tool("x")), dict(tools=tool("y"))]).to_parquet(tmp_path / "rows.parquet")
    rows = sft.load_rows("--dataset", str(tmp_path / "rows.parquet"))
    assert [sft.template_options(row)["tools"] for row in rows] == [tool("x"), tool("y")]


def test_a_model_whose_head_does_more_than_we_know_is_refused(uneven, tmp_path, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def louder(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", louder)
    assert "output layer" in refused(sft, capsys, **uneven, output_dir=str(tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_the_run(uneven, tmp_path, capsys):
    said = refused(sft, capsys, **uneven | dict(learning_rate=1e38, max_grad_norm=1e30, epochs=5), output_dir=str(tmp_path / "run"))
    assert re.search(r"step [2-9].*the loss is (nan|inf).*learning rate.*rows", said)


def test_a_user_sees_one_line(run_script, tmp_path):
    done = run_script("sft", "--dataset", "nowhere.jsonl", cwd=tmp_path, check=False)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: --dataset nowhere.jsonl: ")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_saves(number, tmp_path):
    """Then --resume goes on to what an uninterrupted run comes to; without the signal this run saves nothing on its way."""
    rows = jsonl(tmp_path / "texts.jsonl", [dict(text=SENTENCES[i : i + 60]) for i in range(0, 300, 5)])
    flags = ["--dataset", rows, "--max-steps", "120", "--batch-size", "2", "--hidden-size", "32", "--vocab-size", "300", "--learning-rate", "1e-3"]
    command = [sys.executable, REPO / "sft.py", *flags, "--eval-fraction", "0", "--output-dir", "run"]
    log = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, "ended before it could be asked to"
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert process.returncode == 128 + number and f"stopped after step {step}, as asked" in out
    assert len(lines_of(tmp_path / "run")) == step < 120 and not json.loads((tmp_path / "run/args.json").read_text())["finished"]
    args = sft.Args(dataset=rows, max_steps=120, batch_size=2, hidden_size=32, vocab_size=300, learning_rate=1e-3, eval_fraction=0.0)
    sft.main(replace(args, output_dir=str(tmp_path / "run"), resume=True))
    sft.main(replace(args, output_dir=str(tmp_path / "whole")))
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")
    assert all(torch.equal(x, weights_of(tmp_path / "whole")[name]) for name, x in weights_of(tmp_path / "run").items())


# ---------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["sft_multiturn.jsonl", "sft_instruct.jsonl.gz"])
def test_real_conversations(name, real_data, tmp_path, capsys):
    """A checkpoint without chat template or padding token, 512 positions, and a vocabulary of 512: many conversations are too long for it.

    A row is kept where its first answer begins within 512 tokens; the text up to there is counted here by the tokenizer alone."""
    tokenizer = tokenizer_of(real_data / "stories260K-hf")
    data = sft.load_rows("--dataset", str(real_data / name))
    kept = 0
    for row in data:
        texts = [m["content"] for m in row["messages"]]
        head = "<s>" + f"user: {texts[0]}</s>\nassistant:"
        fits = len(tokenizer(head, add_special_tokens=False).input_ids) < 512
        kept += fits and bool(texts[-1].strip()) and not any(s in text for text in texts for s in ("<s>", "</s>", "<unk>"))
    flags = dict(
        model=str(real_data / "stories260K-hf"), dataset=str(real_data / name), max_steps=3, batch_size=4, learning_rate=1e-3, eval_fraction=0.0
    )
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    assert f"{kept} rows from {len(data)}" in capsys.readouterr().out
    assert all(0 < line["loss"] < 6 for line in lines_of(tmp_path / "run"))
