"""What is trained is what generation sees: chat templates of many behaviours, and the exact text that each of them trains.

A `[[span]]` of the expected texts is trained. Templates of published models are tried too where trl is installed.
"""

import copy
import importlib.util
import json
import re
from collections import Counter
from datetime import datetime
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import dpo
import sft

SPECIAL = ["<|tool|>", "<|call|>", "<|sep|>", "<|start|>"]


@pytest.fixture(scope="module")
def tokenizer_of(tiny_tokenizer):
    """tokenizer_of(template): a copy of the tiny tokenizer with a few more special tokens; its end of sequence is <|end|>."""

    def make(template, eos="<|end|>"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens(
            dict(eos_token=eos, extra_special_tokens=[*tiny_tokenizer.extra_special_tokens, *SPECIAL])
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


def system(text):
    return dict(role="system", content=text)


def user(text):
    return dict(role="user", content=text)


def assistant(text, **more):
    return dict(role="assistant", content=text, **more)


def tool(text):
    return dict(role="tool", content=text)


def call(arguments):
    return dict(tool_calls=[dict(type="function", function=dict(name="look", arguments=arguments))])


def marked(tokenizer, ids, trained) -> str:
    """The text of the ids, with [[...]] around what is trained."""
    parts = [
        (mark, tokenizer.decode([t for _, t in part])) for mark, part in groupby(zip(trained, ids), lambda x: x[0])
    ]
    return "".join(f"[[{text}]]" if mark else text for mark, text in parts)


def turns(tokenizer, messages, first=1, notes=None, **options) -> list:
    """The texts of the rows that `encode_turns` makes, or the reason why it makes none."""
    try:
        rows = dpo.encode_turns(tokenizer, messages, first, options, Counter() if notes is None else notes)
    except dpo.Drop as drop:
        return str(drop)
    return [marked(tokenizer, *row) for row in rows]


def answers(tokenizer, prompt, responses, notes=None, **row) -> list:
    """The text of the prompt, then those of its responses, as `encode` gives them; or the reason why it gives none."""
    try:
        head, ids, trained = dpo.encode(tokenizer, prompt, responses, row, Counter() if notes is None else notes)
    except dpo.Drop as drop:
        return str(drop)
    assert all(len(i) == len(t) for i, t in zip(ids, trained))
    return [tokenizer.decode(head), *(marked(tokenizer, i, t) for i, t in zip(ids, trained))]


def prepared(tokenizer, rows, tmp_path, capsys, script=dpo):
    """(rows, what is printed) of a data set; rows is None where it is refused."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_row = (
        (lambda row, notes: dpo.preference_rows(tokenizer, 512, row, notes))
        if script is dpo
        else (lambda row, notes: sft.demonstration_rows(tokenizer, 512, False, row, notes))
    )
    try:
        made = script.prepare("--dataset", str(tmp_path / "rows.jsonl"), "train", tokenizer, encode_row)
    except SystemExit as e:
        assert e.code == 2
        made = None
    printed = capsys.readouterr()
    return made, printed.out + printed.err


# ------------------------------------------------------------------------------------------------------------ templates

TURN = "{{ '<|' + m.role + '|>' + m.content }}"
PLAIN = (
    "{% for m in messages %}"
    + TURN
    + "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NEWLINE = PLAIN.replace("'<|end|>'", "'<|end|>\n'")
LATE_EOS = (  # the end of sequence follows the last turn
    "{% for m in messages %}" + TURN + "{{ '<|sep|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
ALWAYS_OPEN = "{% for m in messages %}" + TURN + "<|sep|>{% endfor %}<|assistant|>"
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_END_OPEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TRIM = PLAIN.replace("m.content", "m.content | trim")
LAST_SYSTEM = (  # the system text stands with the last message if that is the user's
    "{% set rules = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '<|user|>' + (rules if loop.last else '') + m.content + '<|sep|>' }}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
LAST_TOOLS = (  # so do the tools
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and tools %}<|tool|>{{ tools | tojson }}{% endif %}"
    "{{ '<|user|>' + m.content + '<|sep|>' }}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
STRIPS_THINKING = (  # and opens it for generation
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
STRIPS_OLD_THINKING = (  # of all turns but the last
    "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content if loop.last else m.content.split('</think>')[-1]) + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EMPTY_THINKING = (  # written before every answer, not by the generation prompt
    "{% for m in messages %}{{ '<|' + m.role + '|>' + ('<think></think>' if m.role == 'assistant' else '') + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKS = (  # shows reasoning_content and opens the thinking for generation
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
CALLS = (  # arguments are objects; one end for calls, another for answers
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for c in m.tool_calls or () %}{{ '<|call|>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v | string }}{% endfor %}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS_JSON = CALLS.replace(
    "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v | string }}{% endfor %}",
    "{{ ' ' + c.function.arguments | tojson }}",
)
CALLS_TEXT = CALLS_JSON.replace(" | tojson", "")  # arguments are text
HEADERS = (  # a header that the generation prompt leaves to the model
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|sep|>final' if m.role == 'assistant' else '') + '<|tool|>' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TWO = [user("Hi?"), assistant("Yes."), user("Why?"), assistant("So.")]

# -------------------------------------------------------------------------------- the prompt of training and generation


@pytest.mark.parametrize("template", [LAST_SYSTEM, LAST_SYSTEM.replace("<|sep|>", "<|sep|>\n")])
def test_a_system_text_that_only_generation_sees_drops_the_row(template, tokenizer_of):
    tokenizer, reason = tokenizer_of(template), "the chat template changes the prompt once a reply follows"
    prompt = [system("Rules."), user("Hi?")]
    assert answers(tokenizer, prompt, ["Yes.", "No."]) == turns(tokenizer, [*prompt, assistant("Yes.")], 2) == reason
    assert turns(tokenizer, [system("Rules."), *TWO], 1) == reason
    gap = "\n" if "\n" in template else ""
    assert answers(tokenizer, [user("Hi?")], ["Yes.", "No."]) == [
        f"<|user|>Hi?<|sep|>{gap}",
        "[[Yes.<|end|>]]",
        "[[No.<|end|>]]",
    ]
    tools = [dict(type="function", function=dict(name="look", parameters=dict(type="object", properties={})))]
    assert turns(tokenizer_of(LAST_TOOLS), [user("Hi?"), assistant("Yes.")], tools=tools) == reason
    assert turns(tokenizer_of(LAST_TOOLS), TWO) == [
        "<|user|>Hi?<|sep|>[[Yes.<|end|>]]<|user|>Why?<|sep|>[[So.<|end|>]]"
    ]


@pytest.mark.parametrize("script", [dpo, sft])
def test_rows_without_a_prompt_for_generation_are_counted_and_named(script, tokenizer_of, tmp_path, capsys):
    talk = lambda *start: dict(
        prompt=[*start, user("Hi?")],
        chosen=[assistant("Yes.")],
        rejected=[assistant("No.")],
        completion=[assistant("Yes.")],
    )
    tokenizer, reason = tokenizer_of(LAST_SYSTEM), "dropped: the chat template changes the prompt once a reply follows"
    rows, printed = prepared(
        tokenizer, [talk(system("Rules.")), talk(), talk(system("Be nice."))], tmp_path, capsys, script
    )
    assert len(rows) == 1 and "1 rows from 3" in printed and f"2 {reason}" in printed
    rows, printed = prepared(tokenizer, [talk(system("Rules."))], tmp_path, capsys, script)
    assert rows is None and f"1 {reason}" in printed


@pytest.mark.parametrize(
    "cut",
    ["m.content.split('</think>')[-1]", "m.content[:5]", "m.content | upper", "m.content | replace('2', '')", "'Yes.'"],
)
def test_a_reply_that_the_template_does_not_show_whole_is_dropped(cut, tokenizer_of):
    tokenizer = tokenizer_of(
        STRIPS_THINKING.replace("m.content.split('</think>')[-1]", f"({cut} if m.role == 'assistant' else m.content)")
    )
    reply = "<think>\n2 and 2 make 4\n</think>\n\nIt is 4."
    reason = "the chat template leaves out part of the reply"
    assert turns(tokenizer, [user("Hi?"), assistant(reply)]) == reason
    assert answers(tokenizer, [user("Hi?")], [reply, "It is 5."]) == reason


def test_thinking_that_the_generation_prompt_opens_and_the_reply_lacks_is_noted(tokenizer_of, tmp_path, capsys):
    tokenizer, notes = tokenizer_of(STRIPS_THINKING), Counter()
    assert turns(tokenizer, TWO, notes=notes) == [
        "<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]<|user|>Why?<|end|><|assistant|>[[So.<|end|>]]"
    ]
    assert notes["replies that do not begin where the generation prompt ends"] == 2
    row = dict(prompt=[user("Hi?")], chosen="It is 4.", rejected="It is 5.")
    thinks = row | dict(chosen="<think>\n2 and 2\n</think>\n\nIt is 4.")
    rows, printed = prepared(tokenizer, [row, thinks], tmp_path, capsys)
    assert len(rows) == 1 and "2 replies that do not begin where the generation prompt ends" in printed
    assert "1 dropped: the chat template leaves out part of the reply" in printed
    rows, printed = prepared(tokenizer, [thinks], tmp_path, capsys)
    assert rows is None and "the chat template leaves out part of the reply" in printed
    notes = Counter()
    assert turns(tokenizer_of(PLAIN), TWO, notes=notes) and not +notes


def test_earlier_thinking_that_the_template_drops_gives_a_row_for_each_turn(tokenizer_of):
    tokenizer = tokenizer_of(STRIPS_OLD_THINKING)
    talk = [user("Hi?"), assistant("<think>a</think>Yes."), user("Why?"), assistant("<think>b</think>So.")]
    assert turns(tokenizer, talk) == [
        "<|user|>Hi?<|end|><|assistant|>[[<think>a</think>Yes.<|end|>]]",
        "<|user|>Hi?<|end|><|assistant|>Yes.<|end|><|user|>Why?<|end|><|assistant|>[[<think>b</think>So.<|end|>]]",
    ]
    assert answers(tokenizer, talk[:1], [talk[1:], "No."]) == "the chat template rewrites earlier turns"


def test_white_space_that_the_template_moves_is_no_loss(tokenizer_of):
    assert turns(tokenizer_of(TRIM), [user("Hi?"), assistant(" Yes. \n")]) == [
        "<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]"
    ]


# ---------------------------------------------------------------------------------------------------------------- tools

LOOK = [user("Sun?"), assistant("Let me look.", **call(dict(city="Oslo"))), tool("cloudy"), assistant("It rains.")]
HIDDEN_TOOL = PLAIN.replace(TURN, "{% if m.role != 'tool' or not loop.last %}" + TURN).replace(
    "{{ '<|end|>' }}{% endfor %}", "{{ '<|end|>' }}{% endif %}{% endfor %}"
)


def test_a_tools_result_is_context_and_each_turn_is_trained(tokenizer_of):
    expected = (
        "<|user|>Sun?<|end|><|assistant|>[[Let me look.<|call|>look city=Oslo<|end|>]]"
        "<|tool|>cloudy<|end|><|assistant|>[[It rains.<|end|>]]"
    )
    assert turns(tokenizer_of(CALLS), LOOK) == [expected]
    assert answers(tokenizer_of(CALLS), LOOK[:1], [LOOK[1:], "No."])[1] == expected.removeprefix(
        "<|user|>Sun?<|end|><|assistant|>"
    )


def test_a_template_that_rewrites_the_call_once_a_result_follows_drops_the_row(tokenizer_of):
    rewrites = CALLS.replace(
        "'<|call|>' + c.function.name", "('<|call|>' if loop.last and m == messages[-1] else '') + c.function.name"
    )
    moved = CALLS.replace("m.content }}", "(m.content if not m.tool_calls or m == messages[-1] else '') }}", 1)
    for template in (rewrites, moved):
        found = turns(tokenizer_of(template), LOOK)
        assert (
            isinstance(found, list) and len(found) == 2
        )  # a row for each turn, each with the prompt that generation has
        for row in found:
            assert re.findall(r"\[\[(.*?)\]\]", row)[0].endswith("<|end|>") and "cloudy" not in "".join(
                re.findall(r"\[\[(.*?)\]\]", row)
            )


def test_a_result_that_the_prompt_does_not_show_is_never_trained(tokenizer_of):
    """The template shows the tool's result only once an answer follows it."""
    found = turns(tokenizer_of(HIDDEN_TOOL), LOOK)
    assert isinstance(found, str) or not any(
        "cloudy" in span for row in found for span in re.findall(r"\[\[(.*?)\]\]", row)
    )


@pytest.mark.parametrize("content", ["", None, " \n"])
def test_a_turn_of_calls_that_the_template_does_not_show_is_never_trained(content, tokenizer_of, tmp_path, capsys):
    tokenizer, reason = tokenizer_of(PLAIN), "dropped: the reply is empty but for its end-of-turn token"
    silent, good = (
        assistant(content, **call(dict(city="Oslo"))),
        dict(prompt=[user("Hi?")], completion=[assistant("Yes.")]),
    )
    for talk in ([user("Sun?"), silent, tool("cloudy"), assistant("It rains.")], [user("Sun?"), silent]):
        rows, printed = prepared(tokenizer, [dict(messages=talk), good], tmp_path, capsys, sft)
        assert len(rows) == 1 and f"1 {reason}" in printed
    pairs = [
        dict(prompt=[user("Sun?")], chosen=[silent], rejected=[assistant("No.")]),
        dict(prompt=[user("Sun?")], chosen=[assistant("No.")], rejected=[silent]),
        dict(
            prompt=[user("Sun?")], chosen=[silent, tool("cloudy"), assistant("It rains.")], rejected=[assistant("No.")]
        ),
        dict(prompt=[user("Hi?")], chosen="Yes.", rejected="No."),
    ]
    rows, printed = prepared(tokenizer, pairs, tmp_path, capsys)
    assert len(rows) == 1 and f"3 {reason}" in printed


@pytest.mark.parametrize("template", [EMPTY_THINKING, THINKS, HEADERS])
def test_a_turn_that_says_nothing_is_not_trained_though_the_template_writes_something(template, tokenizer_of):
    for silent in (assistant(""), assistant("", **call(dict(city="Oslo")))):
        assert isinstance(turns(tokenizer_of(template), [user("Hi?"), silent]), str)
        found = turns(tokenizer_of(template), [user("Hi?"), silent, user("Why?"), assistant("So.")])
        assert isinstance(found, str) or all(len(re.findall(r"\[\[", row)) == 1 and "So." in row for row in found)


def test_calls_that_the_template_leaves_out_beside_words_are_counted(tokenizer_of):
    notes = Counter()
    found = turns(tokenizer_of(PLAIN), LOOK, notes=notes)
    assert isinstance(found, str) or sum(notes.values()) == 1
    notes = Counter()
    assert turns(tokenizer_of(CALLS), LOOK, notes=notes) and not sum(notes.values())


def test_reasoning_that_the_template_leaves_out_is_counted_and_the_row_stays(tokenizer_of):
    talk, notes = [user("Hi?"), assistant("It is 4.", reasoning_content="2 and 2")], Counter()
    assert turns(tokenizer_of(PLAIN), talk, notes=notes) == ["<|user|>Hi?<|end|><|assistant|>[[It is 4.<|end|>]]"]
    assert +notes == {"replies whose reasoning_content the chat template leaves out": 1}
    notes = Counter()
    shown = ["<|user|>Hi?<|end|><|assistant|><think>\n[[2 and 2\n</think>\n\nIt is 4.<|end|>]]"]
    assert turns(tokenizer_of(THINKS), talk, notes=notes) == shown and not +notes


@pytest.mark.parametrize("city", ["Oslo", 'a "b" \\ c', "Zürich", "北京", "</x> & 'y'"])
@pytest.mark.parametrize("template", ["objects", "JSON"])
def test_arguments_as_json_text_train_what_objects_train(template, city, tokenizer_of):
    tokenizer, arguments = tokenizer_of(dict(objects=CALLS, JSON=CALLS_JSON)[template]), dict(city=city, days=3)
    for text in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)):
        talks = [[user("Sun?"), assistant("Look.", **call(form))] for form in (arguments, text)]
        assert turns(tokenizer, talks[0]) == turns(tokenizer, talks[1])
    shown = city if template == "objects" else json.dumps(city, ensure_ascii=False)
    assert shown in turns(tokenizer, talks[0])[0]


def test_arguments_as_text_stay_text_where_the_template_wants_text(tokenizer_of):
    text = '{"city":  "Oslo"}'
    assert (
        f"look {text}<|end|>]]" in turns(tokenizer_of(CALLS_TEXT), [user("Sun?"), assistant("Look.", **call(text))])[0]
    )


def test_arguments_that_the_template_cannot_take_drop_their_row_alone(tokenizer_of, tmp_path, capsys):
    talk = lambda arguments: dict(
        messages=[user("Sun?"), assistant("Look.", **call(arguments)), tool("x"), assistant("So.")]
    )
    rows, printed = prepared(
        tokenizer_of(CALLS), [talk("no JSON"), talk('{"city": "Oslo"}'), talk("[1, 2]")], tmp_path, capsys, sft
    )
    assert (
        len(rows) == 1
        and "2 dropped" not in printed.replace("2 dropped: refused", "")
        and printed.count("refused by the chat template") >= 1
    )
    raises = PLAIN.replace(TURN, "{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + TURN)
    bad = dict(messages=[system("Rules."), user("Hi?"), assistant("Yes.")])
    rows, printed = prepared(tokenizer_of(raises), [bad, dict(messages=TWO)], tmp_path, capsys, sft)
    assert len(rows) == 1 and "1 dropped: refused by the chat template (No system role)" in printed


# ---------------------------------------------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    "template, eos, end, trained",
    [
        (
            PLAIN,
            "<|end|>",
            ("<|end|>", 0),
            "<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]<|user|>Why?<|end|><|assistant|>[[So.<|end|>]]",
        ),
        (
            NEWLINE,
            "<|endoftext|>",
            ("<|end|>", 1),
            "<|user|>Hi?<|end|>\n<|assistant|>[[Yes.<|end|>]]\n<|user|>Why?<|end|>\n<|assistant|>[[So.<|end|>]]",
        ),
        (
            LATE_EOS,
            "<|endoftext|>",
            ("<|sep|>", 2),
            "<|user|>Hi?<|sep|>\n<|assistant|>[[Yes.<|sep|>]]\n<|user|>Why?<|sep|>\n<|assistant|>[[So.<|sep|>]]",
        ),
        (
            ALWAYS_OPEN,
            "<|end|>",
            ("<|sep|>", 1),
            "<|user|>Hi?<|sep|><|assistant|>[[Yes.<|sep|>]]<|user|>Why?<|sep|><|assistant|>[[So.<|sep|>]]",
        ),
        (
            NO_END_OPEN,
            "<|end|>",
            ("<|end|>", -1),
            "<|user|>Hi?<|assistant|>Yes.<|user|>Why?<|assistant|>[[So.<|end|>]]",
        ),
        (
            NO_END,
            "<|endoftext|>",
            ("<|endoftext|>", -1),
            "user: Hi?\nassistant: Yes.\nuser: Why?\nassistant:[[ So.\n<|endoftext|>]]",
        ),
    ],
    ids=["plain", "newline", "late eos", "always open", "none", "none, newline"],
)
def test_the_end_of_a_turn_is_the_first_special_token_after_it(template, eos, end, trained, tokenizer_of):
    tokenizer = tokenizer_of(template, eos)
    token, after = dpo.turn_end(tokenizer)
    assert (tokenizer.convert_ids_to_tokens(token), after) == end
    assert set(tokenizer.convert_ids_to_tokens(dpo.stop_tokens(tokenizer))) == {end[0], eos}
    found = turns(tokenizer, TWO)
    assert found[-1] == trained and len(found) == (
        2 if after < 0 else 1
    )  # without an end in the text, a row for each turn
    head, tail = trained.replace("]]", "").rsplit("[[", 1)
    found = answers(tokenizer, TWO[:3], ["So.", "No."])
    assert found == [head.replace("[[", ""), f"[[{tail}]]", f"[[{tail.replace('So.', 'No.')}]]"]


def test_a_turn_that_ends_otherwise_keeps_an_end_of_its_own(tokenizer_of):
    """A call that the template ends with another special token than an answer."""
    for ending in ("'<|sep|>'", "'<|sep|>\n'", "'<|tool|><|sep|>'"):
        template = CALLS.replace(
            "{{ '<|end|>' }}{% endfor %}{% if", "{{ " + ending + " if m.tool_calls else '<|end|>\n' }}{% endfor %}{% if"
        )
        found = turns(tokenizer_of(template), LOOK[:2])
        assert isinstance(found, str) or re.search(r"Oslo<\|(sep|tool|end)\|>(<\|sep\|>)?\]\]$", found[0])


def test_a_text_that_holds_its_end_already_gets_no_second_one(tokenizer_of):
    assert turns(tokenizer_of(PLAIN), [user("Hi?"), assistant("Yes.")]) == [
        "<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]"
    ]
    assert answers(tokenizer_of(PLAIN), [user("Hi?")], ["Yes.<|end|>", "No."])[1:] == [
        "[[Yes.<|end|>]]",
        "[[No.<|end|>]]",
    ]
    assert re.match(r"special token .*in the text", answers(tokenizer_of(PLAIN), [user("Hi<|end|>")], ["Yes.", "No."]))
    assert re.match(r"special token .*in the text", answers(tokenizer_of(PLAIN), [user("Hi?")], ["Yes<|sep|>", "No."]))


# -------------------------------------------------------------------------------------------------------- begun answers


@pytest.mark.parametrize("begun", ["<think>\nlet me", "The answer", "The answer ", "a", "One.\nTwo"])
@pytest.mark.parametrize("template", [PLAIN, EMPTY_THINKING, THINKS, NEWLINE, TRIM])
def test_a_begun_answer_is_prompt_in_training_and_in_sampling(template, begun, tokenizer_of):
    tokenizer = tokenizer_of(template)
    prompt = [user("Hi?"), assistant(begun)]
    opening = tokenizer.apply_chat_template(prompt[:1], tokenize=False, add_generation_prompt=True)
    expected = opening + (begun.removeprefix("<think>\n") if opening.endswith("<think>\n") else begun)
    assert tokenizer.decode(dpo.prompt_ids(tokenizer, prompt, {})) == expected
    assert answers(tokenizer, prompt, [" + 4.", " + 5."]) == [expected, "[[ + 4.<|end|>]]", "[[ + 5.<|end|>]]"]


def test_a_begun_answer_keeps_a_header_of_special_tokens(tokenizer_of):
    found = answers(tokenizer_of(HEADERS), [user("Hi?"), assistant("The answer")], [" is 4.", " is 5."])
    assert (
        isinstance(found, str)
        or found[0] == "<|start|>user<|tool|>Hi?<|end|><|start|>assistant<|sep|>final<|tool|>The answer"
    )


# ----------------------------------------------------------------------------------------------------------- saved files


def test_a_reloaded_tokenizer_reads_the_same_ids_whatever_its_legacy(tmp_path):
    characters = [
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:+=<>|'\n",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    merges = [("▁", "H"), ("e", "l"), ("▁", "a"), ("t", "h"), ("▁", "x")]
    words = [*dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *characters, *("".join(pair) for pair in merges)])]
    vocabulary, texts = (
        {word: i for i, word in enumerate(words)},
        ["Hello th a.", "a</s> th x</s>th", "</s>th </s> x", "<s>Ha</s>"],
    )
    ids = {}
    for legacy in (True, False):
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ bos_token + m.role + ' ' + m.content + eos_token }}{% endfor %}"
        )
        ids[legacy] = [tokenizer(text).input_ids for text in texts]
        for generation in ("child", "grandchild"):  # a stage saves, the next one loads and saves again
            folder = tmp_path / f"{legacy}-{generation}"
            folder.mkdir()
            dpo.save_tokenizer(tokenizer, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert [tokenizer(text).input_ids for text in texts] == ids[legacy]
            assert [dpo.load_tokenizer(str(folder))(text).input_ids for text in texts] == ids[legacy]
    assert ids[True] != ids[False]


def test_a_tokenizer_that_reads_other_ids_once_saved_is_refused(tokenizer_of, tmp_path, capsys, monkeypatch):
    tokenizer_of(PLAIN).save_pretrained(tmp_path / "here")
    dpo.load_tokenizer(str(tmp_path / "here"))

    def wrong(tokenizer, directory):
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["ell"])
        other.save_pretrained(directory)

    monkeypatch.setattr(dpo, "save_tokenizer", wrong)
    with pytest.raises(SystemExit):
        dpo.load_tokenizer(str(tmp_path / "here"))
    assert "reads other ids once it is saved" in capsys.readouterr().err


PARENTS = [
    (dict(do_sample=False), dict(do_sample=False)),
    (dict(), dict()),
    (dict(do_sample=True), dict(do_sample=True)),
    (dict(do_sample=True, temperature=0.6, top_p=0.9), dict(do_sample=True, temperature=0.6, top_p=0.9)),
    (dict(temperature=0.6), dict(do_sample=True, temperature=0.6)),
    (dict(top_p=0.9), dict(do_sample=True, top_p=0.9)),
    (dict(repetition_penalty=1.1, max_new_tokens=7), dict(repetition_penalty=1.1, max_new_tokens=7)),
    (dict(do_sample=True, min_p=0.1), dict(do_sample=True, min_p=0.1)),
]


def saved_generation(parent: dict, tokenizer, folder: Path) -> dict:
    """The generation_config.json of a model saved after one that had `parent` in it."""
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    (folder / "parent" / "generation_config.json").write_text(json.dumps(parent))
    model = dpo.read_model(AutoModelForCausalLM, str(folder / "parent"), tokenizer)
    dpo.save_model(folder / "child", model, tokenizer, torch.float32)
    return json.loads((folder / "child" / "generation_config.json").read_text())


@pytest.mark.parametrize("parent, child", PARENTS)
def test_the_childs_generation_config_is_its_parents_with_the_stop_tokens(parent, child, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(NEWLINE, "<|endoftext|>")
    saved = saved_generation(parent, tokenizer, tmp_path)
    assert {tokenizer.convert_ids_to_tokens(i) for i in saved.pop("eos_token_id")} == {"<|end|>", "<|endoftext|>"}
    assert {
        k: v for k, v in saved.items() if k not in ("pad_token_id", "transformers_version", "_from_model_config")
    } == child


@pytest.mark.parametrize("parent", [dict(min_p=0.1), dict(typical_p=0.5), dict(temperature=0.0)])
def test_an_odd_generation_config_is_no_reason_to_lose_the_run(parent, tokenizer_of, tmp_path):
    saved_generation(parent, tokenizer_of(PLAIN), tmp_path)
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    child.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------- the date


@pytest.mark.parametrize(
    "written, shown",
    [
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2001"),
        ('{%- set day = strftime_now("%Y-%m-%d") -%}{{ day }}', "2001-02-03"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}never{% endif %}", "2001"),
        ("""{{ strftime_now("it's %Y") }}""", "it's 2001"),
        ("{{ strftime_now( '%Y' ) }}", "2001"),
        ("{{ strftime_now(format='%Y') }}", "2001"),
    ],
)
def test_a_template_writes_the_date_of_the_runs_start(written, shown, tokenizer_of, monkeypatch):
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2001, 2, 3, 4, 5)])
    tokenizer = tokenizer_of(written + PLAIN)
    assert turns(tokenizer, TWO[:2]) == [f"{shown}<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]"]
    assert answers(tokenizer, TWO[:1], ["Yes.", "No."])[0] == f"{shown}<|user|>Hi?<|end|><|assistant|>"


def test_a_named_template_writes_the_date_of_the_runs_start(tokenizer_of, monkeypatch):
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2001, 2, 3)])
    tokenizer = tokenizer_of({"default": "{{ strftime_now('%Y') }}" + PLAIN, "rag": PLAIN})
    assert turns(tokenizer, TWO[:2]) == ["2001<|user|>Hi?<|end|><|assistant|>[[Yes.<|end|>]]"]


def test_the_date_stands_in_args_json_and_a_resumed_run_takes_it_from_there(tmp_path, monkeypatch):
    args = dpo.Args(model="m", dataset="d", output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2001, 2, 3, 4, 5)])
    out, _, signature = dpo.open_run(args, "m", "d")
    dpo.clear_run(args, out, signature)
    assert json.loads((out / "args.json").read_text())["date"].startswith("2001-02-03")
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2002, 2, 3)])
    dpo.open_run(dpo.Args(model="m", dataset="d", output_dir=str(tmp_path / "out"), resume=True), "m", "d")
    assert dpo.RUN_DATE[0] == datetime(2001, 2, 3, 4, 5)


# --------------------------------------------------------------------------------------- templates of published models

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("no such folder")
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
ENDS = dict(
    cohere="<|END_OF_TURN_TOKEN|>",
    deepseek="<｜end▁of▁sentence｜>",
    diffusion="<turn|>",
    gemma4="<turn|>",
    gemma="<eos>",
)
ENDS |= dict(glm="<|endoftext|>", gptoss="<|return|>", idefics="<end_of_utterance>", llama="<|eot_id|>", llava="</s>")
ENDS |= dict(smolvlm="<end_of_utterance>", muse="<|eot|>", phi="<|endoftext|>")
TOOLS = [
    dict(
        type="function",
        function=dict(
            name="look",
            description="Weather",
            parameters=dict(
                type="object", properties=dict(city=dict(type="string", description="Town")), required=["city"]
            ),
        ),
    )
]
TALKS = {  # name: (messages, options); every text occurs once
    "one turn": ([user("Alpha?"), assistant("Beta.")], {}),
    "system": ([system("Gamma."), user("Alpha?"), assistant("Beta.")], {}),
    "two turns": ([user("Alpha?"), assistant("Beta."), user("Delta?"), assistant("Kappa.")], {}),
    "thinking": ([user("Alpha?"), assistant("<think>\nOmega\n</think>\n\nBeta.")], {}),
    "reasoning": ([user("Alpha?"), assistant("Beta.", reasoning_content="Omega")], {}),
    "call": (
        [user("Alpha?"), assistant("", **call(dict(city="Oslo"))), tool("Delta"), assistant("Kappa.")],
        dict(tools=TOOLS),
    ),
    "words and call": (
        [user("Alpha?"), assistant("Beta.", **call(dict(city="Oslo"))), tool("Delta"), assistant("Kappa.")],
        dict(tools=TOOLS),
    ),
}


@pytest.fixture(scope="module")
def published():
    """published(name): a byte-level tokenizer with the special tokens of a published chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(name):
        template = (FOLDER / f"{name}.jinja").read_text()
        pattern = r"<\|[A-Za-z_0-9]+\|?>|<[a-z_]+\|>|<｜[^｜<> ]{2,30}｜>|<(?:start|end)_of_(?:turn|utterance|image)>|</?s>|<bos>|<\|\"\|>"
        eos = next((v for k, v in ENDS.items() if name.startswith(k)), "<|im_end|>")
        special = sorted({*re.findall(pattern, template), eos, "<s>"})
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        )
        extra = [s for s in special if s not in (eos, "<s>")]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=eos, bos_token="<s>", extra_special_tokens=extra
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMES or [pytest.param("-", marks=pytest.mark.skip("trl is not installed"))])
def test_published_templates_train_the_assistants_turns_and_nothing_else(name, talk, published):
    tokenizer, (messages, options), notes = published(name), TALKS[talk], Counter()
    if name.startswith("llava"):
        with pytest.raises(dpo.Drop):
            dpo.turn_end(tokenizer)
        return
    try:
        rows = dpo.encode_turns(tokenizer, messages, 1, options, notes)
    except dpo.Drop as drop:
        assert str(drop)  # the reason that is counted
        assert talk not in ("one turn", "two turns") or name in (
            "idefics3",
            "smolvlm",
        )  # these two show lists of parts only
        return
    special = set(tokenizer.added_tokens_encoder.values())
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(rows) in (1, len(replies))
    starts = 0
    for ids, trained in rows:
        spans = [
            range(t, next((u for u in range(t, len(ids)) if not trained[u]), len(ids)))
            for t in range(1, len(ids))
            if trained[t] and not trained[t - 1]
        ]
        theirs = replies if len(rows) == 1 else [replies[rows.index((ids, trained))]]
        assert len(spans) == len(theirs)
        for span, i in zip(spans, theirs):
            said = tokenizer.decode([ids[t] for t in span])
            content, said_plainly = (re.sub(r"<think>|\s", "", text) for text in (messages[i]["content"], said))
            assert content in said_plainly  # the prompt may hold the <think>
            assert not any(other["content"] and other["content"] in said for j, other in enumerate(messages) if j != i)
            assert ids[span[-1]] in special  # it ends with a token at which generation stops
            head = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True, **options)
            head = tokenizer(head, add_special_tokens=False).input_ids
            if ids[: span[0]] != head:  # only the generation prompt differs: thinking that it opens, say
                starts += 1
                assert head[: span[0]] == ids[: span[0]]
    assert starts == notes["replies that do not begin where the generation prompt ends"]
    if talk in ("call", "words and call") and "Oslo" not in tokenizer.decode(rows[-1][0]):
        assert sum(notes.values()) > starts  # a call that the template leaves out is counted
