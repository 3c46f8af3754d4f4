"""sft.py: which tokens are trained, with what loss, and what the trained model is worth.

Of the shared blocks, `log-probabilities` and the attention of `rows` are tested here.
"""

import copy
import json
import math
import shutil
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES
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


def demonstrate(tokenizer, row, max_length=512, train_all=False, notes=None) -> list:
    return sft.demonstration_rows(tokenizer, max_length, train_all, row, Counter() if notes is None else notes)


def read_all(data: list, folder, **options) -> list:
    tokenizer = tokenizer_of(folder)
    return [row for example in data for row in demonstrate(tokenizer, example, **options)]


def is_near(ours, theirs, terms: int = 1) -> bool:
    """Equal up to rounding in float32 of a sum of so many terms, relative to the largest value."""
    scale = 8 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    return bool((ours.double() - theirs.double()).abs().max() <= scale * theirs.abs().max())


# ---- which tokens are trained


@every_template
def test_every_answer_is_trained_with_its_end_and_nothing_else(name, dressed):  # noqa: F811
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    messages = talk("Hi.", "Hello!", "What is 2 + 2?", "It is 4.\nYes, 4.", "Sure?", "Sure.")
    rows = demonstrate(tokenizer, dict(messages=messages))
    parts = [part.lstrip() for row in rows for part in trained_text(tokenizer, row)]
    assert parts == [f"Hello!{end}", f"It is 4.\nYes, 4.{end}", f"Sure.{end}"]
    # where no turn has an end, an answer's end-of-sequence token cannot stand before the next turn
    assert len(rows) == (3 if name == "glm" else 1)
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert whole_text(tokenizer, rows[-1]) == text + (tokenizer.eos_token if name == "glm" else "")


def test_of_a_conversation_in_rows_the_turns_that_fit_are_kept(dressed):  # noqa: F811
    tokenizer, messages = dressed("glm"), talk("Hi.", "Hello!", "Tell me more. " * 50, "No.")
    (row,) = demonstrate(tokenizer, dict(messages=messages), max_length=100)
    assert trained_text(tokenizer, row) == ["Hello!<|endoftext|>"]


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
    "messages, the user speaks last": (dict(messages=talk("Hi.", "Hello!", "Bye.")), SAID, ["Hello!<|end|>"]),
    "messages, the assistant speaks first": (
        dict(messages=[dict(role="assistant", content="Welcome!"), *talk("Hi.", "Hello!")]),
        SAID.replace("<|bos|>", "<|bos|><|assistant|>Welcome!<|end|>"),
        ["Hello!<|end|>"],
    ),
    "conversations": (dict(conversations=SHAREGPT), SAID, ["Hello!<|end|>"]),
    "prompt and completion": (
        dict(prompt="Up or", completion=" right?"),
        "<|bos|>Up or right?<|end|>",
        [" right?<|end|>"],
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


@pytest.mark.parametrize("row, text, parts", FORMATS.values(), ids=FORMATS)
def test_every_format(row, text, parts, with_tools, tmp_path):
    """As a reader gives the row back beside one of another shape: absent columns are None."""
    row = sft.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, {}]), "train")[0]
    (row,) = demonstrate(with_tools, row)
    assert trained_text(with_tools, row) == parts
    assert text is None or whole_text(with_tools, row) == text


def test_prompts_are_trained_when_asked(tiny_tokenizer):
    (row,) = demonstrate(tiny_tokenizer, dict(messages=talk("Hi.", "Hello!")), train_all=True)
    assert tiny_tokenizer.decode(row.prompt) == "<|bos|>"
    assert trained_text(tiny_tokenizer, row) == ["<|user|>Hi.<|end|><|assistant|>Hello!<|end|>"]


DROPPED = [
    (dict(text=" \n"), "empty answer"),
    (dict(words="Up"), "neither text, nor messages"),
    (dict(messages=[]), "neither text, nor messages"),
    (dict(prompt="a", completion=""), "empty answer"),
    (dict(messages=talk("a", " ")), "empty answer"),
    (dict(prompt=talk("a"), completion=[]), "empty answer"),
    (dict(messages=talk("a")), "no assistant turn"),
    (dict(messages=[*talk("2?"), CALL]), "empty but for its end-of-turn"),  # the tiny template shows no calls
    (dict(prompt="a " * 600, completion="b"), "prompt beyond --max-length"),
    (dict(text="a<|end|>b"), "special token"),
    (dict(messages=talk("a<|end|><|assistant|>b", "c")), "special token"),
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
    assert [*rows[1].trained[0]] == [True] * 35 and rows[1].responses[0].itemsize == 4  # 5 bytes a token in memory
    said = capsys.readouterr().out
    for part in ("3 rows from 6", "2 dropped: prompt beyond --max-length", "1 rows cut", "1 dropped: special token"):
        assert part in said
    assert "<|bos|><|user|>a<|end|><|assistant|>[[b<|end|>]]" in said


def test_tools_from_parquet_have_no_parameters_of_other_rows(tmp_path):
    """Arrow gives every struct the keys of all, as nulls."""

    def tool(name):
        return [dict(type="function", function=dict(name="go", parameters=dict(properties={name: dict(type="int")})))]

    sft.Dataset.from_list([dict(tools=tool("x")), dict(tools=tool("y"))]).to_parquet(tmp_path / "rows.parquet")
    rows = sft.load_rows("--dataset", str(tmp_path / "rows.parquet"), "train")
    assert [sft.template_options(row)["tools"] for row in rows] == [tool("x"), tool("y")]


# ---- from scratch

WALKS = [f"right {i % 9} up -{i % 7} up 0 = {i % 9 - i % 7}" for i in range(200)]


def scratch_args(data, **flags) -> sft.Args:
    return sft.Args(**dict(dataset=str(data), from_scratch=True) | flags)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
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
def test_the_new_tokenizer_has_seen_all_of_the_text(row, tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", [row] * 8 + [dict.fromkeys(row)])
    assert len(sft.new_tokenizer(scratch_args(data))(WALKS[0]).input_ids) == 1 + len(WALKS[0].split(" "))


def test_a_width_that_heads_cannot_share_is_refused(tmp_path, capsys):
    flags = dict(dataset="rows.jsonl", from_scratch=True, hidden_size=36, num_heads=4)
    assert "--hidden-size 36" in refused(sft, capsys, **flags, output_dir=str(tmp_path / "run"))


# ---- the loss


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


# ---- log-probabilities


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


@pytest.mark.parametrize("kind, n", [("plain", 1), ("plain", 128), ("plain", 257), *((kind, 129) for kind in HEADS)])
def test_log_probabilities_by_chunks(kind, n):
    """A vocabulary of 32,768 makes chunks of 128 tokens. Values and gradients are those of float64 without chunks."""
    config, transform = HEADS[kind]
    vocabulary = 2**15
    torch.manual_seed(n)
    head = torch.nn.Linear(4, vocabulary, bias="bias" in kind)
    hidden, target, weight = torch.randn(n, 4, requires_grad=True), torch.randint(vocabulary, (n,)), torch.randn(n)
    weight[: n // 2] = 0  # a chunk that counts for nothing
    temperature = 0.7 if n == 129 else 1.0
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
    assert largest.size == 128 * 2**15 < 1200 * 2**15
    assert kept and max(kept) <= head.weight.numel()  # nothing of the width of the vocabulary waits for the backward


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    """A chunk of 128 tokens, then eight that each add less than half a unit in the last place of that sum."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 2**15, bias=False).bfloat16(), (1 + torch.rand(9 * 128, 4)).bfloat16()
    torch.nn.init.zeros_(head.weight)  # all tokens are equally likely
    weight = torch.full((9 * 128,), 0.9 * 2**-9).bfloat16()
    weight[:128] = 1
    exact = (1 - 2**-15) * (weight[:, None].double() * hidden.double()).sum(0)
    logps, *_ = scored(hidden, head, torch.zeros(9 * 128, dtype=torch.long))
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


# ---- rows


def some_rows() -> list:
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(7, 300, (n,), generator=generator).tolist()
    shapes = [(5, [3, 17, 1]), (1, [2]), (20, [8, 8]), (20, [8, 8]), (12, [30])]
    return [Row(ids(n), [ids(m) for m in lengths], [[True] * m for m in lengths], {}) for n, lengths in shapes]


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


def test_answers_are_shown_within_the_models_positions(tiny_tokenizer, tiny_model_dir, capsys):
    """GPT-2 has no position beyond its last, 512."""
    model = sft.read_model(AutoModelForCausalLM, str(tiny_model_dir("gpt2")), tiny_tokenizer)
    args = sft.Args(model="", dataset="")
    model = sft.prepare_model(model, "the model", args, CPU, torch.float32, sft.token_logps)
    sft.show_answers(model, tiny_tokenizer, [Row([5] * 505, [[6]], [[True]], {})], 1, 128)
    assert "    -> " in capsys.readouterr().out and model.training


# ---- whole runs

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


@pytest.mark.parametrize(
    "family, train_prompts",
    [("llama", False), ("llama", True), ("nemotron", False), ("gemma2", False), ("mixtral", False)],
)
def test_metrics_and_gradient_are_those_of_the_rows(family, train_prompts, uneven, tiny_model_dir, gradients, tmp_path):
    """The mean over all trained tokens of the step, by Hugging Face's model alone: of the batch before its step, of the
    held-out rows after it. However the rows are split into forwards, where they are padded (Nemotron), where embeddings
    are tied (Gemma 2), and where an expert had no token (Mixtral)."""
    folder, gradients = tiny_model_dir(family), gradients(sft)
    flags = uneven | dict(model=str(folder), batch_size=9, max_steps=1, train_prompts=train_prompts)
    sft.main(sft.Args(**flags, tokens_per_forward=130, output_dir=str(tmp_path / "run")))
    rows = read_all(UNEVEN, folder, train_all=train_prompts)
    (line,) = lines_of(tmp_path / "run")
    for prefix, source in (("eval_", tmp_path / "run"), ("", folder)):
        loss, entropy, right, model = by_hand(source, rows)
        expected = dict(loss=loss.item(), entropy=entropy.item(), mean_token_accuracy=right.item())
        assert {name: line[prefix + name] for name in expected} == pytest.approx(expected, rel=1e-5)
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
    (gradient,) = gradients
    assert gradient.keys() == theirs.keys()
    assert all((gradient[name] - g).abs().max() < 1e-3 * max(g.abs().max(), 0.01 * norm) for name, g in theirs.items())
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    configs = [json.loads((out / "config.json").read_text()) for out in (folder, tmp_path / "run")]
    assert configs[0] == configs[1]
    assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]), rel=1e-5)


def test_epochs_and_tokens_are_counted(uneven, tmp_path):
    """The last batch of an epoch has fewer rows; --max-steps stops within an epoch."""
    sft.main(sft.Args(**uneven | dict(epochs=2, max_steps=4), output_dir=str(tmp_path / "run")))
    lines, rows = lines_of(tmp_path / "run"), read_all(UNEVEN, uneven["model"])
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert lines[2]["num_tokens"] == sum(len(row.prompt + row.responses[0]) for row in rows) < lines[3]["num_tokens"]
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
    for track in (False, True):
        sft.main(sft.Args(**flags, track=track, output_dir=str(tmp_path / str(track))))
        assert len(said) == (3 if track else 0)
    assert said[0]["name"] == str(tmp_path / "True") and said[0]["config"]["max_steps"] == 2
    lines = lines_of(tmp_path / "True")
    assert said[1:] == [(i + 1, {k: v for k, v in lines[i].items() if k != "step"}) for i in range(2)]


# ---- ranks, resuming and bfloat16


def test_from_scratch_under_torchrun(torchrun, tmp_path):
    """As a user starts it: tokenizer, weights, training and saved files are those of one process."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:41]])
    flags = dict(dataset=data, hidden_size=32, num_layers=2, num_heads=2, vocab_size=400)
    flags |= dict(batch_size=8, learning_rate=1e-3, tokens_per_forward=50, eval_fraction=0.0)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    torchrun("sft", 2, "--from-scratch", *words, "--output-dir", "many", cwd=tmp_path)
    many, one = tmp_path / "many", tmp_path / "one"
    sft.main(sft.Args(**flags, from_scratch=True, output_dir=str(one)))
    for a, b in zip(lasting(many), lasting(one), strict=True):
        assert a == {k: pytest.approx(v, abs=0.01 if "accuracy" in k else 0, rel=1e-4) for k, v in b.items()}
    ours, theirs = weights_of(many), weights_of(one)
    assert all((ours[name] - w).norm() <= 1e-3 * w.norm() for name, w in theirs.items())
    assert snapshot(many).keys() == snapshot(one).keys()
    for name in ("tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"):
        assert (many / name).read_bytes() == (one / name).read_bytes(), name


@slow
def test_two_nodes_need_one_disk(torchrun, tmp_path):
    """Two torchruns that meet at a port, as on two machines, each with an output directory of its own."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:21]])
    words = ["--from-scratch", "--dataset", data, "--hidden-size", 32, "--num-heads", 2, "--output-dir", "out"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", s.getsockname()[1])

    def start(i):
        (tmp_path / str(i)).mkdir()
        return torchrun("sft", 1, *words, cwd=tmp_path / str(i), check=False, launch=(*meet, "--node-rank", i))

    with ThreadPoolExecutor() as pool:
        nodes = list(pool.map(start, range(2)))
    assert all(node.returncode for node in nodes)
    assert "--output-dir out: rank 1 does not see it; choose one on a disk that all nodes share" in nodes[1].stderr


def test_two_ranks_resume_bit_for_bit(uneven, tiny_model_dir, tmp_path):
    """With dropout (GPT-2), for which each rank needs random numbers of its own."""
    flags = uneven | dict(model=str(tiny_model_dir("gpt2")), batch_size=3, save_every=2, eval_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(sft, 2, **flags, output_dir=str(whole))
    shutil.copytree(whole, parts)  # as if it had been killed in the third and last step
    kept = json.loads((parts / "args.json").read_text())
    (parts / "args.json").write_text(json.dumps(kept | dict(finished=False)))
    on_ranks(sft, 2, **flags, output_dir=str(parts), resume=True)
    same_run(parts, whole)


def test_a_run_from_scratch_resumes(tmp_path):
    """With the tokenizer of the checkpoint. Killed while the model is saved."""
    data = jsonl(tmp_path / "walks.jsonl", [dict(text=text) for text in WALKS[:20]])
    flags = dict(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, batch_size=4, learning_rate=1e-2)
    args = scratch_args(data, **flags, save_every=3, output_dir=str(tmp_path / "parts"), resume=True)
    assert in_child(sft.main, replace(args, output_dir=str(tmp_path / "whole"))) == 0
    assert in_child(killed_at_rename, sft, args, 4) == -9
    assert (tmp_path / "parts" / "checkpoint-3").exists()
    assert in_child(sft.main, args) == 0
    same_run(tmp_path / "parts", tmp_path / "whole")


# ---- learning


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


# ---- a model's head, real data


@pytest.mark.parametrize("change", ["twice", "bias"])
def test_a_model_whose_head_does_more_than_we_know_is_refused(change, uneven, tmp_path, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def changed(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 2 if change == "twice" else out.logits + torch.linspace(0, 1, out.logits.shape[-1])
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    assert "output layer" in refused(sft, capsys, **uneven, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["sft_multiturn.jsonl", "sft_instruct.jsonl.gz"])
def test_real_conversations(name, real_data, tmp_path, capsys):
    """With a checkpoint without a chat template and with 512 positions, for which many conversations are too long.

    A row is kept where its first answer begins within 512 tokens, as the tokenizer alone counts them."""
    model, kept = str(real_data / "stories260K-hf"), 0
    tokenizer, rows = tokenizer_of(model), sft.load_rows("--dataset", str(real_data / name), "train").select(range(100))
    rows.to_json(tmp_path / "rows.jsonl")
    for row in rows:
        texts = [m["content"] for m in row["messages"]]
        head = f"<s>user: {texts[0]}</s>\nassistant:"
        fits = len(tokenizer(head, add_special_tokens=False).input_ids) < 512
        plain = not any(token in text for text in texts for token in ("<s>", "</s>", "<unk>"))
        kept += fits and plain and bool(texts[-1].strip())
    flags = dict(model=model, dataset=str(tmp_path / "rows.jsonl"), max_steps=3, batch_size=4, eval_fraction=0.0)
    sft.main(sft.Args(**flags, output_dir=str(tmp_path / "run")))
    assert f"{kept} rows from {len(rows)}" in capsys.readouterr().out and 10 < kept
    assert all(0 < line["loss"] < 6 for line in lines_of(tmp_path / "run"))
