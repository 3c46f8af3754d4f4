"""What is trained is what generation sees: chat templates of many behaviours, and the exact text that each of them trains.

A `[[span]]` of the expected texts is trained. Templates of published models are tried too where trl is installed.
"""

import copy
import importlib.util
import json
import re
from collections import Counter
from datetime import datetime
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import assistant, system, user
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import dpo
import sft


@pytest.fixture(scope="module")
def tokenizer_of(tiny_tokenizer):
    """tokenizer_of(template): the tiny tokenizer with a few more special tokens; its end of sequence is <|end|>."""

    def make(template, eos="<|end|>"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        special = [*tiny_tokenizer.extra_special_tokens, "<|tool|>", "<|call|>", "<|sep|>", "<|start|>"]
        tokenizer.add_special_tokens(dict(eos_token=eos, extra_special_tokens=special))
        tokenizer.chat_template = template
        return tokenizer

    return make


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


def turns(tokenizer, messages, first=1, notes=None, **options):
    """The text of the row that `encode_turns` makes, those of several rows, or the reason why it makes none."""
    try:
        rows = dpo.encode_turns(tokenizer, messages, first, options, Counter() if notes is None else notes)
    except dpo.Drop as drop:
        return str(drop)
    texts = [marked(tokenizer, *row) for row in rows]
    return texts[0] if len(texts) == 1 else texts


def answers(tokenizer, prompt, responses):
    """The text of the prompt, then those of its responses, as `encode` gives them; or the reason why it gives none."""
    try:
        head, ids, trained = dpo.encode(tokenizer, prompt, responses, {}, Counter())
    except dpo.Drop as drop:
        return str(drop)
    assert all(len(i) == len(t) for i, t in zip(ids, trained))
    return [tokenizer.decode(head), *(marked(tokenizer, i, t) for i, t in zip(ids, trained))]


# ---- templates

EACH = "{% for m in messages %}"
TURN = "{{ '<|' + m.role + '|>' + m.content }}"
CLOSE = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = EACH + TURN + "<|end|>" + CLOSE
NEWLINE = PLAIN.replace("<|end|>", "{{ '<|end|>\n' }}")
TRIM = PLAIN.replace("m.content", "m.content | trim")
LATE_EOS = (  # the end of sequence follows the last turn
    EACH + TURN + "{{ '<|sep|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
ALWAYS_OPEN = EACH + TURN + "<|sep|>{% endfor %}<|assistant|>"
NO_END = EACH + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
NO_END_OPEN = EACH + TURN + CLOSE
LAST_SYSTEM = (  # the system text stands with the last message if that is the user's
    "{% set rules = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '<|user|>' + (rules if loop.last else '') + m.content + '<|sep|>' }}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
LAST_TOOLS = (  # so do the tools
    EACH + "{% if m.role == 'user' %}{% if loop.last and tools %}<|tool|>{{ tools | tojson }}{% endif %}"
    "{{ '<|user|>' + m.content + '<|sep|>' }}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
STRIPS_THINKING = (  # and opens it for generation
    PLAIN.replace("m.content", "m.content.split('</think>')[-1]").replace(
        "<|assistant|>", "{{ '<|assistant|><think>\n' }}"
    )
)
STRIPS_OLD_THINKING = PLAIN.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
EMPTY_THINKING = PLAIN.replace("m.content", "('<think></think>' if m.role == 'assistant' else '') + m.content")
THINKS = (  # shows reasoning_content and opens the thinking for generation
    EACH + "{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
ITEMS = "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v | string }}{% endfor %}"
CALLS = (  # arguments are objects
    EACH
    + TURN
    + "{% for c in m.tool_calls or () %}{{ '<|call|>' + c.function.name }}"
    + ITEMS
    + "{% endfor %}<|end|>"
    + CLOSE
)
CALLS_JSON = CALLS.replace(ITEMS, "{{ ' ' + c.function.arguments | tojson }}")
CALLS_EITHER = CALLS.replace(
    ITEMS, "{% if c.function.arguments is string %} {{ c.function.arguments }}{% else %}" + ITEMS + "{% endif %}"
)
CALLS_TEXT = CALLS.replace(ITEMS, "{{ ' ' + c.function.arguments }}")
CALLS_SHOWN = CALLS.replace(ITEMS, " {{ c.function.arguments }}")  # an object in Python's notation
HEADERS = (  # a header that the generation prompt leaves to the model
    EACH
    + "{{ '<|start|>' + m.role + ('<|sep|>final' if m.role == 'assistant' else '') + '<|tool|>' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LATE_RESULT = PLAIN.replace(
    TURN + "<|end|>", "{% if m.role != 'tool' or not loop.last %}" + TURN + "<|end|>{% endif %}"
)
OTHER_END = CALLS.replace("<|end|>{% endfor %}", "{{ '<|sep|>\n' if m.tool_calls else '<|end|>\n' }}{% endfor %}")

# ---- what a conversation trains

HI, YES, WHY, SO = user("Hi?"), assistant("Yes."), user("Why?"), assistant("So.")
TWO = [HI, YES, WHY, SO]
LOOK = [user("Sun?"), assistant("Look.", **call(dict(city="Oslo"))), tool("grey"), assistant("It rains.")]
SILENT = assistant("", **call(dict(city="Oslo")))
THOUGHT = assistant("<think>\n2 and 2\n</think>\n\nIt is 4.")
REASONED = assistant("It is 4.", reasoning_content="2 and 2")
CHANGED = "the chat template changes the prompt once a reply follows"
CUT = "the chat template leaves out part of the reply"
EMPTY = "the reply is empty but for its end-of-turn token"
U, A, E = "<|user|>", "<|assistant|>", "<|end|>"
HI_YES, RAINS = f"{U}Hi?{E}{A}[[Yes.{E}]]", f"<|tool|>grey{E}{A}[[It rains.{E}]]"
BEGINS = "replies that do not begin where the generation prompt ends"
CALLED = "replies whose tool_calls the chat template leaves out"
REASON = "replies whose reasoning_content the chat template leaves out"
PROMPT = "prompt messages that the chat template leaves out"
NO_RESULT = PLAIN.replace(TURN + E, "{% if m.role != 'tool' %}" + TURN + E + "{% endif %}")
REWRITTEN = CALLS.replace("'<|call|>' +", "('<|call|>' if loop.last and m == messages[-1] else '') +")
THOUGHTS = [HI, assistant("<think>a</think>Yes."), WHY, assistant("<think>b</think>So.")]
TALKS = {  # template, messages, the text of the row (or of two, or why there is none), what is noted of it
    "two turns": (PLAIN, TWO, f"{HI_YES}{U}Why?{E}{A}[[So.{E}]]"),
    "white space is moved": (TRIM, [HI, assistant(" Yes. \n")], HI_YES),
    "a system text for generation alone": (LAST_SYSTEM, [system("Rules."), *TWO], CHANGED),
    "and a newline": (LAST_SYSTEM.replace("<|sep|>", "<|sep|>\n"), [system("Rules."), HI, YES], CHANGED),
    "no system text": (LAST_SYSTEM, [HI, YES], f"{U}Hi?<|sep|>[[Yes.{E}]]"),
    "thinking is stripped": (STRIPS_THINKING, [HI, THOUGHT], CUT),
    "a shortened reply": (PLAIN.replace("m.content", "m.content[:5]"), [HI, assistant("It is 4.")], CUT),
    "thinking is opened": (STRIPS_THINKING, [HI, YES], HI_YES, BEGINS),
    "earlier thoughts are dropped": (
        STRIPS_OLD_THINKING,
        THOUGHTS,
        [
            f"{U}Hi?{E}{A}[[<think>a</think>Yes.{E}]]",
            f"{U}Hi?{E}{A}Yes.{E}{U}Why?{E}{A}[[<think>b</think>So.{E}]]",
        ],
        PROMPT,
    ),
    "reasoning is left out": (PLAIN, [HI, REASONED], f"{U}Hi?{E}{A}[[It is 4.{E}]]", REASON),
    "reasoning is shown": (THINKS, [HI, REASONED], f"{U}Hi?{E}{A}<think>\n[[2 and 2\n</think>\n\nIt is 4.{E}]]"),
    "a tool's result": (CALLS, LOOK, f"{U}Sun?{E}{A}[[Look.<|call|>look city=Oslo{E}]]{RAINS}"),
    "a call is rewritten once a result follows": (
        REWRITTEN,
        LOOK,
        [f"{U}Sun?{E}{A}[[Look.<|call|>look city=Oslo{E}]]", f"{U}Sun?{E}{A}Look.look city=Oslo{E}{RAINS}"],
    ),
    "a result is shown once a reply follows": (LATE_RESULT, LOOK, CHANGED, CALLED),
    "a result is left out": (NO_RESULT, [HI, YES, *LOOK[2:]], f"{HI_YES}{A}[[It rains.{E}]]", PROMPT),
    "a call is left out beside words": (PLAIN, LOOK[:2], f"{U}Sun?{E}{A}[[Look.{E}]]", CALLED),
    "a call is all that is left out": (PLAIN, [HI, SILENT], EMPTY, CALLED),
    "a call ends in its own way": (OTHER_END, LOOK[:2], f"{U}Sun?{E}\n{A}[[Look.<|call|>look city=Oslo<|sep|>]]"),
}
for name, template in (("an empty thought", EMPTY_THINKING), ("a thought", THINKS), ("a header", HEADERS)):
    TALKS[f"{name} before no words"] = (template, [HI, assistant("")], EMPTY)
    TALKS[f"{name} before no call"] = (template, [HI, SILENT], EMPTY, CALLED)


@pytest.mark.parametrize("name", TALKS)
def test_what_a_conversation_trains(name, tokenizer_of):
    template, messages, expected, *noted = TALKS[name]
    tokenizer, notes = tokenizer_of(template), Counter()
    assert (turns(tokenizer, messages, notes=notes), +notes) == (expected, Counter(noted))
    if "[[" in expected and not noted:  # as an answer to compare with another one
        head, trained = expected.rsplit("[[", 1)
        shown = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        found = answers(tokenizer, messages[:-1], [messages[-1:], "No."])
        assert found[0] == head.replace("[[", "").replace("]]", "") == shown and found[1] == "[[" + trained


def test_tools_that_only_generation_sees_drop_the_row(tokenizer_of):
    tools = [dict(type="function", function=dict(name="look", parameters=dict(type="object", properties={})))]
    assert turns(tokenizer_of(LAST_TOOLS), [HI, YES], tools=tools) == CHANGED
    assert turns(tokenizer_of(LAST_TOOLS), [HI, YES]) == f"{U}Hi?<|sep|>[[Yes.{E}]]"


def test_answers_to_compare_have_one_text_and_end_once(tokenizer_of):
    found = answers(tokenizer_of(STRIPS_OLD_THINKING), [HI], [THOUGHTS[1:], "No."])
    assert found == "the chat template rewrites earlier turns"
    plain, more = tokenizer_of(PLAIN), f"{U}Why?{E}{A}[[So.{E}]]"
    assert answers(plain, [HI], ["Yes.<|end|>", [YES, WHY, SO]])[1:] == [f"[[Yes.{E}]]", f"[[Yes.{E}]]{more}"]
    unweighted = assistant("No.", weight=0)
    assert answers(plain, [HI], [[unweighted, WHY, SO], "Yes."])[1] == f"No.{E}{more}"
    for prompt, reply in (("Hi<|end|>", "Yes."), ("Hi?", "Yes<|sep|>"), ("Hi?", "Yes.<|end|><|end|>")):
        assert "in the text; write a conversation as messages" in answers(plain, [user(prompt)], [reply, "No."])


@pytest.mark.parametrize("script", [dpo, sft])
def test_what_the_template_cannot_take_drops_its_row_alone_and_is_counted(script, tokenizer_of, tmp_path, capsys):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    tokenizer = tokenizer_of(no_system + CALLS.replace("m.content", "m.content.split('</think>')[-1]"))
    called = [assistant("Look.", **call(arguments)) for arguments in ("no JSON", "[1, 2]")]
    talks = [[HI, YES], [system("Rules."), HI, YES], *([HI, reply] for reply in (THOUGHT, assistant("  "), *called))]
    rows = [dict(prompt=talk[:-1], completion=talk[-1:], chosen=talk[-1:], rejected=[SO]) for talk in talks]
    read = dict(dpo=partial(dpo.preference_rows, tokenizer, 512))
    read |= dict(sft=partial(sft.demonstration_rows, tokenizer, 512, False))

    def prepared(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = script.prepare("--dataset", str(tmp_path / "rows.jsonl"), "train", tokenizer, read[script.__name__])
        return len(made), capsys.readouterr().out

    kept, printed = prepared(rows)
    refused = "dropped: refused by the chat template"
    empty = "dropped: empty answer" if script is sft else "dropped: nothing to compare"
    counts = [CUT, "No system role", "'str object' has no attribute 'items'", empty]
    assert kept == 1 and all(reason in printed for reason in counts) and printed.count(refused) == 2
    with pytest.raises(SystemExit):
        prepared(rows[1:2])
    assert f"none of its 1 rows can be used (1 {refused} (No system role))" in capsys.readouterr().err


# ---- arguments of tools


@pytest.mark.parametrize("city", ["Oslo", 'a "b" \\ c', "Zürich", "北京", "</x> & 'y'"])
@pytest.mark.parametrize("template", [CALLS, CALLS_JSON, CALLS_EITHER], ids=["objects", "JSON", "either"])
def test_arguments_as_json_text_train_what_objects_train(template, city, tokenizer_of):
    tokenizer, arguments = tokenizer_of(template), dict(city=city, days=3)
    texts = [json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)]
    found = [turns(tokenizer, [HI, assistant("Look.", **call(form))]) for form in (arguments, *texts)]
    shown = texts[1] if template == CALLS_JSON else f"city={city} days=3"
    assert found == [f"{U}Hi?{E}{A}[[Look.<|call|>look {shown}{E}]]"] * 3


def test_an_argument_that_is_named_arguments_stays_as_it_is(tokenizer_of):
    arguments = dict(arguments="5")
    found = turns(tokenizer_of(CALLS_JSON), [HI, assistant("Look.", **call(json.dumps(arguments)))])
    assert found == f"{U}Hi?{E}{A}[[Look.<|call|>look {json.dumps(arguments)}{E}]]"


@pytest.mark.parametrize("template", [CALLS_TEXT, CALLS_SHOWN])
def test_arguments_as_text_stay_text_where_the_template_wants_text(template, tokenizer_of):
    text = '{"city":  "Oslo"}'
    assert turns(tokenizer_of(template), [HI, assistant("Look.", **call(text))]).endswith(f"look {text}{E}]]")


@pytest.mark.parametrize("empty", ["", "{}", {}])
def test_a_call_without_arguments_is_kept(empty, tokenizer_of):
    for template, shown in ((CALLS, ""), (CALLS_JSON, " {}")):
        assert turns(tokenizer_of(template), [HI, assistant("Look.", **call(empty))]).endswith(f"look{shown}{E}]]")


# ---- the end of a turn

ENDINGS = {  # template, end of sequence, the turn's end, what follows it
    "plain": (PLAIN, E, E, ""),
    "newline": (NEWLINE, "<|endoftext|>", E, "\n"),
    "late eos": (LATE_EOS, "<|endoftext|>", "<|sep|>", "\n"),
    "always open": (ALWAYS_OPEN, E, "<|sep|>", ""),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_turn_ends_with_the_first_special_token_after_it(name, tokenizer_of):
    template, eos, end, gap = ENDINGS[name]
    tokenizer = tokenizer_of(template, eos)
    assert {*tokenizer.convert_ids_to_tokens(dpo.stop_tokens(tokenizer))} == {end, eos}
    head = f"{U}Hi?{end}{gap}{A}[[Yes.{end}]]{gap}{U}Why?{end}{gap}{A}"
    assert turns(tokenizer, TWO) == f"{head}[[So.{end}]]"
    found = answers(tokenizer, TWO[:3], ["So.", "No."])
    assert found == [re.sub(r"\[\[|\]\]", "", head), f"[[So.{end}]]", f"[[No.{end}]]"]


def test_where_nothing_ends_a_turn_the_end_of_sequence_does_and_each_turn_is_a_row(tokenizer_of):
    expected = [f"{U}Hi?{A}[[Yes.{E}]]", f"{U}Hi?{A}Yes.{U}Why?{A}[[So.{E}]]"]
    assert turns(tokenizer_of(NO_END_OPEN), TWO) == expected
    expected = [
        "user: Hi?\nassistant:[[ Yes.\n<|end|>]]",
        "user: Hi?\nassistant: Yes.\nuser: Why?\nassistant:[[ So.\n<|end|>]]",
    ]
    assert turns(tokenizer_of(NO_END), TWO) == expected
    assert dpo.turn_end(tokenizer_of(NO_END, "<|endoftext|>"))[1] == -1


# ---- begun answers


@pytest.mark.parametrize("begun", ["<think>\nlet me", "The answer ", "a", "One.\nTwo"])
@pytest.mark.parametrize("template", [PLAIN, EMPTY_THINKING, THINKS, NEWLINE, TRIM])
def test_a_begun_answer_is_prompt_in_training_and_in_sampling(template, begun, tokenizer_of):
    tokenizer, prompt = tokenizer_of(template), [HI, assistant(begun)]
    opening = tokenizer.apply_chat_template(prompt[:1], tokenize=False, add_generation_prompt=True)
    expected = opening + (begun.removeprefix("<think>\n") if opening.endswith("<think>\n") else begun)
    assert tokenizer.decode(dpo.prompt_ids(tokenizer, prompt, {})) == expected
    assert answers(tokenizer, prompt, [" + 4.", " + 5."]) == [expected, "[[ + 4.<|end|>]]", "[[ + 5.<|end|>]]"]


def test_a_begun_answer_keeps_a_header_of_special_tokens(tokenizer_of):
    found = answers(tokenizer_of(HEADERS), [HI, assistant("The answer")], [" is 4.", " is 5."])
    assert found[0] == "<|start|>user<|tool|>Hi?<|end|><|start|>assistant<|sep|>final<|tool|>The answer"


# ---- saved files


def test_a_reloaded_tokenizer_reads_the_same_ids_whatever_its_legacy(tmp_path):
    characters = [*"aehlstxHS.,<>/|'\n", *(f"<0x{b:02X}>" for b in range(256))]
    merges = [("▁", "H"), ("e", "l"), ("▁", "a"), ("t", "h"), ("▁", "x")]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *characters, *("".join(pair) for pair in merges)])
    texts, ids = ["Hello th a.", "a</s> th x</s>th", "</s>th </s> x", "<s>Ha</s>"], {}
    for legacy in (True, False):
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ bos_token + m.role + ' ' + m.content + eos_token }}{% endfor %}"
        )
        ids[legacy] = [tokenizer(text).input_ids for text in texts]
        for generation in ("child", "grandchild"):  # a stage saves, the next one loads and saves again
            folder = tmp_path / f"{legacy}-{generation}"
            folder.mkdir()
            dpo.save_tokenizer(tokenizer, folder)
            tokenizer = dpo.load_tokenizer(str(folder))
            assert [tokenizer(text).input_ids for text in texts] == ids[legacy]
    assert ids[True] != ids[False]


def test_a_tokenizer_that_reads_other_ids_once_saved_is_refused(tokenizer_of, tmp_path, capsys, monkeypatch):
    def wrong(tokenizer, directory):
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["ell"])
        other.save_pretrained(directory)

    tokenizer_of(PLAIN).save_pretrained(tmp_path)
    monkeypatch.setattr(dpo, "save_tokenizer", wrong)
    with pytest.raises(SystemExit):
        dpo.load_tokenizer(str(tmp_path))
    assert "reads other ids once it is saved" in capsys.readouterr().err


PARENTS = [  # generation_config.json of a model, and what its child's has beside the token ids
    (dict(do_sample=False), dict(do_sample=False)),
    (dict(), dict()),
    (dict(do_sample=True, temperature=0.6, top_p=0.9), dict(do_sample=True, temperature=0.6, top_p=0.9)),
    (dict(top_p=0.9), dict(do_sample=True, top_p=0.9)),
    (dict(min_p=0.1), dict(do_sample=True, min_p=0.1)),
    (dict(typical_p=0.5), dict(do_sample=True, typical_p=0.5)),
    (dict(temperature=0.0), dict()),
    (dict(repetition_penalty=1.1, max_new_tokens=7), dict(repetition_penalty=1.1, max_new_tokens=7)),
]


@pytest.mark.parametrize("parent, expected", PARENTS)
def test_the_childs_generation_config_is_its_parents_with_the_stop_tokens(parent, expected, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(NEWLINE, "<|endoftext|>")
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "parent")
    (tmp_path / "parent" / "generation_config.json").write_text(json.dumps(parent))
    model = dpo.read_model(AutoModelForCausalLM, str(tmp_path / "parent"), tokenizer)
    dpo.save_model(tmp_path / "child", model, tokenizer, torch.float32)
    saved = json.loads((tmp_path / "child" / "generation_config.json").read_text())
    assert {tokenizer.convert_ids_to_tokens(i) for i in saved.pop("eos_token_id")} == {"<|end|>", "<|endoftext|>"}
    written = ("pad_token_id", "transformers_version", "_from_model_config")
    assert {k: v for k, v in saved.items() if k not in written} == expected
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    child.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


# ---- the date

DATES = [
    ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2001"),
    ('{%- set day = strftime_now("%Y-%m-%d") -%}{{ day }}', "2001-02-03"),
    ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}never{% endif %}", "2001"),
    ("""{{ strftime_now( format="it's %-d/%m/%y, %H:%M" ) }}""", "it's 3/02/01, 04:05"),
    ("{% set form = '%A, ' + '%e %B' %}{{ strftime_now(form) }}", "Saturday,  3 February"),
    ("{% macro day(form) %}{{ strftime_now(form) | upper }}{% endmacro %}{{ day('%b') }}", "FEB"),
]


@pytest.mark.parametrize("written, shown", DATES)
@pytest.mark.parametrize("named", [False, True])
def test_a_template_writes_the_date_of_the_runs_start(written, shown, named, tokenizer_of, monkeypatch):
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2001, 2, 3, 4, 5)])
    template = "\n  {% if true %}{% endif %}\n" + written + PLAIN  # white space is as without the date
    tokenizer = tokenizer_of(dict(default=template, rag=PLAIN) if named else template)
    assert turns(tokenizer, TWO[:2]) == f"\n{shown}{HI_YES}"


def test_the_date_stands_in_args_json_and_a_resumed_run_takes_it_from_there(tmp_path, monkeypatch):
    args = dpo.Args(model="m", dataset="d", output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2001, 2, 3, 4, 5)])
    out, _, signature = dpo.open_run(args, "m", "d")
    dpo.clear_run(args, out, signature)
    assert json.loads((out / "args.json").read_text())["date"].startswith("2001-02-03")
    monkeypatch.setattr(dpo, "RUN_DATE", [datetime(2002, 2, 3)])
    dpo.open_run(dpo.Args(model="m", dataset="d", output_dir=str(tmp_path / "out"), resume=True), "m", "d")
    assert dpo.RUN_DATE[0] == datetime(2001, 2, 3, 4, 5)


# ---- templates of published models

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("no such folder")
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
ENDS = dict(cohere="<|END_OF_TURN_TOKEN|>", deepseek="<｜end▁of▁sentence｜>", diffusion="<turn|>", gemma4="<turn|>")
ENDS |= dict(gemma="<eos>", glm="<|endoftext|>", gptoss="<|return|>", idefics="<end_of_utterance>", llama="<|eot_id|>")
ENDS |= dict(llava="</s>", smolvlm="<end_of_utterance>", muse="<|eot|>", phi="<|endoftext|>")
CITY = dict(type="object", properties=dict(city=dict(type="string", description="Town")), required=["city"])
TOOLS = [dict(type="function", function=dict(name="look", description="Weather", parameters=CITY))]
WEATHER = [tool("Delta"), assistant("Kappa.")]
PUBLISHED = {  # every text occurs once
    "one turn": [user("Alpha?"), assistant("Beta.")],
    "system": [system("Gamma."), user("Alpha?"), assistant("Beta.")],
    "two turns": [user("Alpha?"), assistant("Beta."), user("Delta?"), assistant("Kappa.")],
    "thinking": [user("Alpha?"), assistant("<think>\nOmega\n</think>\n\nBeta.")],
    "reasoning": [user("Alpha?"), assistant("Beta.", reasoning_content="Omega")],
    "call": [user("Alpha?"), assistant("", **call('{"city": "Oslo"}')), *WEATHER],
    "words and call": [user("Alpha?"), assistant("Beta.", **call(dict(city="Oslo"))), *WEATHER],
}


def published(name):
    """A byte-level tokenizer with the special tokens of a published chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (FOLDER / f"{name}.jinja").read_text()
    pattern = r"<\|[A-Za-z_0-9]+\|?>|<[a-z_]+\|>|<｜[^｜<> ]{2,30}｜>|<(?:start|end)_of_(?:turn|utterance|image)>|</?s>|<bos>|<\|\"\|>"
    eos = next((v for k, v in ENDS.items() if name.startswith(k)), "<|im_end|>")
    special = sorted({*re.findall(pattern, template), eos, "<s>"})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = dict(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator([], trainers.BpeTrainer(**learn))
    roles = dict(eos_token=eos, bos_token="<s>", extra_special_tokens=[s for s in special if s not in (eos, "<s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("talk", PUBLISHED)
@pytest.mark.parametrize("name", NAMES or [pytest.param("-", marks=pytest.mark.skip("trl is not installed"))])
def test_published_templates_train_the_assistants_turns_and_nothing_else(name, talk):
    tokenizer, messages, notes = published(name), PUBLISHED[talk], Counter()
    options = dict(tools=TOOLS) if "call" in talk else {}
    if name.startswith("llava"):
        with pytest.raises(dpo.Drop):
            dpo.turn_end(tokenizer)
        return
    try:
        rows = dpo.encode_turns(tokenizer, messages, 1, options, notes)
    except dpo.Drop:  # two templates show lists of parts only
        assert talk not in ("one turn", "two turns") or name in ("idefics3", "smolvlm")
        return
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(rows) in (1, len(replies))
    starts = 0
    for ids, trained in rows:
        spans = [[t for t, _ in part] for mark, part in groupby(enumerate(trained), lambda pair: pair[1]) if mark]
        theirs = replies if len(rows) == 1 else [replies[rows.index((ids, trained))]]
        for span, i in zip(spans, theirs, strict=True):
            said = tokenizer.decode([ids[t] for t in span])
            content, said_plainly = (re.sub(r"<think>|\s", "", text) for text in (messages[i]["content"], said))
            assert content in said_plainly  # the prompt may hold the <think>
            assert not any(other["content"] and other["content"] in said for j, other in enumerate(messages) if j != i)
            assert ids[span[-1]] in tokenizer.added_tokens_encoder.values()  # a token at which generation stops
            head = dpo.render(tokenizer, messages[:i], True, **options)
            if ids[: span[0]] != head:  # only the generation prompt differs: thinking that it opens, say
                starts += 1
                assert head[: span[0]] == ids[: span[0]]
    assert starts == notes[BEGINS]
    if "call" in talk and "Oslo" not in tokenizer.decode(rows[-1][0]):
        assert sum(notes.values()) > starts  # a call that the template leaves out is counted
