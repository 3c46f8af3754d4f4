"""Where rewards come from: the blocks scores (reward models), judges, and rewards (every source of --rewards).

Models are tiny and random. What they say is computed by plain transformers too, on the tokenizer's own rendering.
"""

import copy
import gzip
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_tokens
import torch
import transformers as tf
from conftest import assistant, refusal, system, tiny_config, user
from test_plumbing import TEMPLATES, dressed  # noqa: F401
from test_tokens import tokenizer_of  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import grpo as script
from grpo import Drop, Row

CPU, F32 = torch.device("cpu"), torch.float32
USUAL = dict(gradient_checkpointing=False, tokens_per_forward=100, rewards=(), rubric="", condition="")
TEN = [str(i) for i in range(1, 11)]


def options(**changes):
    return SimpleNamespace(**USUAL | changes)


PROMPTS = {
    "text": "What is the best path?",
    "one turn": [user("What is the best path?")],
    "system": [system("Be short."), user("Is it safe?")],
    "turns": [user("Hi"), assistant("Dear Ann"), user("Up or right?")],
    "begun": [user("Sum"), assistant("The sum is")],
}


def asked(prompt, **extra) -> Row:
    return Row([1], [[]], [[]], dict(prompt=prompt, kind="") | extra)


def saved(auto, folder, tokenizer, seed=1, family="llama", **changes) -> str:
    """A random model with its tokenizer in a directory. Every token matters to what it says."""
    config = tiny_config(family, tokenizer)
    for name, value in (dict(initializer_range=0.3) | changes).items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scorer_of(folder, tokenizer, **changes) -> str:
    return saved(
        AutoModelForSequenceClassification, folder, tokenizer, **dict(num_labels=1, score_shift=0.25) | changes
    )


@pytest.fixture(scope="module")
def scorer(tiny_tokenizer, tmp_path_factory):
    return scorer_of(tmp_path_factory.mktemp("models") / "scorer", tiny_tokenizer)


@pytest.fixture(scope="module")
def judge(tiny_tokenizer, tmp_path_factory):
    return saved(AutoModelForCausalLM, tmp_path_factory.mktemp("models") / "wise", tiny_tokenizer, seed=2)


def loaded(folder, kind="judge"):
    if kind == "judge":
        return script.load_judge_model(folder, options(), CPU, F32)
    return script.load_reward_model("--rewards", folder, options(), CPU, F32)


@torch.no_grad()
def plain_score(folder, ids) -> float:
    """What any server says of these ids."""
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()(torch.tensor([ids])).logits.item()


def dropped(work) -> str:
    with pytest.raises(Drop) as drop:
        work()
    return str(drop.value)


# ---- reward models

BEHAVIOURS = (
    "PLAIN NEWLINE LATE_EOS ALWAYS_OPEN NO_END NO_END_OPEN TRIM LAST_SYSTEM STRIPS_THINKING STRIPS_OLD_THINKING"
)
BEHAVIOURS = [*BEHAVIOURS.split(), "EMPTY_THINKING", "THINKS", "CALLS_JSON", "HEADERS"]  # of test_tokens.py


def same_ids(tokenizer, prompt, text) -> bool:
    """Whether scored_row reads what the reward model is trained on; False where training drops the row."""
    try:
        head, (reply,), _ = script.encode_scored(tokenizer, prompt, [text], {}, Counter())
    except Drop:
        return False
    (first, (rest,), (marks,), _) = script.scored_row(tokenizer, prompt, text, {}, 10**6)
    assert first + rest == head + reply and len(first) == 1 and len(marks) == len(rest)
    return True


@pytest.mark.parametrize("name", [*TEMPLATES, *BEHAVIOURS])
def test_an_answer_is_scored_by_the_ids_that_the_reward_model_is_trained_on(name, request):
    if name in TEMPLATES:
        tokenizer = request.getfixturevalue("dressed")(name)
    else:
        tokenizer = request.getfixturevalue("tokenizer_of")(getattr(test_tokens, name))
    same = [same_ids(tokenizer, prompt, text) for prompt in PROMPTS.values() for text in (" Right, up: 12", "No.")]
    assert same.count(True) >= 6


@pytest.mark.parametrize("name", ["chatml", "none of its own", "llama3", "glm"])
def test_a_score_is_what_a_server_gives_to_the_rendered_conversation(name, dressed, tmp_path):  # noqa: F811
    """Also where the template goes on after the end of the turn: the score is read at its last token (less the shift)."""
    tokenizer = dressed(name)
    folder = scorer_of(tmp_path / "rm", tokenizer)
    model, tokenizer = loaded(folder, "scorer")
    talks = [(PROMPTS[kind], text) for kind in ("one turn", "system", "turns") for text in ("Right, up: 12", "No")]
    rows = [script.scored_row(tokenizer, prompt, text, {}, 512) for prompt, text in talks]
    scores = torch.cat(script.score_rows(model, rows, options(), CPU, shared=False))
    for score, (prompt, text) in zip(scores.tolist(), talks):
        ids = tokenizer.apply_chat_template([*prompt, assistant(text)], return_dict=False)
        ids += [tokenizer.eos_token_id] * (name == "glm")  # whose template marks no end
        assert score == pytest.approx(plain_score(folder, ids) - 0.25, abs=1e-4)
    assert len({round(score, 3) for score in scores.tolist()}) == len(talks)


def test_what_is_no_reward_model_is_refused(judge, tiny_tokenizer, tmp_path, capsys):
    load = lambda folder: lambda: loaded(str(folder), "scorer")
    assert "must be a sequence classifier of one label" in refusal(load(judge), capsys)
    assert "runs/nowhere" in refusal(load("runs/nowhere"), capsys)
    assert "3 labels" in refusal(load(scorer_of(tmp_path / "three", tiny_tokenizer, num_labels=3)), capsys)
    width = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    config = tf.BertConfig(vocab_size=len(tiny_tokenizer), **width)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    assert "no linear head `score`" in refusal(load(tmp_path / "bert"), capsys)


# ---- judges


@torch.no_grad()
def reply_logp(model, tokenizer, talk: list, reply) -> float:
    """log p(reply and its end | talk), from the full log-probabilities of a plain forward pass."""
    head = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*talk, assistant(reply)], return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(script.turn_end(tokenizer)[0])]
    assert ids[: len(head)] == head
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(head), len(ids)))


def test_a_judge_reads_options_from_where_they_differ_and_what_fits(tiny_tokenizer, tmp_path):
    thinks = copy.deepcopy(tiny_tokenizer)
    thinks.chat_template = test_tokens.EMPTY_THINKING
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=40)))
    row = script.judge_row(model, thinks, "up " * 50, ["A", "B"])
    text = thinks.decode(row.prompt)
    assert text.startswith(" up up") and text.endswith("<|end|><|assistant|><think></think>")
    assert [thinks.decode(reply) for reply in row.responses] == ["A<|end|>", "B<|end|>"]
    assert len(row.prompt) + 2 == 40 and row.trained == [[True, True]] * 2
    for choices in (["1", "10"], ["A"]):  # one that another begins with, one alone
        replies = script.judge_row(model, tiny_tokenizer, "Up?", choices).responses
        assert [tiny_tokenizer.decode(reply)[-7:] for reply in replies] == ["<|end|>"] * len(choices)
        assert len(set(map(tuple, replies))) == len(choices)


@pytest.mark.parametrize("choices", [TEN, ["A", "B", "Right, up, right"]])
@pytest.mark.parametrize("name", ["chatml", "none of its own"])
def test_replies_are_as_likely_as_all_tokens_of_theirs(name, choices, dressed, tmp_path):  # noqa: F811
    folder = saved(AutoModelForCausalLM, tmp_path / "judge", dressed(name))
    model, tokenizer = loaded(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    talks = ["Is it safe?", [user("Hi"), assistant("Dear Ann"), user("A or B?")], "{a} <answer A>\nup"]
    rows = [script.judge_row(model, tokenizer, talk, choices) for talk in talks]
    for limit in (1, 100):
        found = script.judge_logps(model, rows, options(tokens_per_forward=limit), CPU)
        for talk, logps in zip(talks, found):
            messages = [user(talk)] if isinstance(talk, str) else talk
            expected = torch.tensor([reply_logp(plain, tokenizer, messages, reply) for reply in choices])
            # under the last template all replies begin with a space, which belongs to the question
            shared = (logps - expected).mean() if name == "none of its own" else 0.0
            torch.testing.assert_close(logps, expected + shared, rtol=0, atol=1e-4)
    assert script.judge_logps(model, [], options(), CPU).shape[0] == 0


# ---- what --rewards understands


@pytest.mark.parametrize(
    "value, source, weight",
    [
        ("runs/rm", "runs/rm", 1),
        ("runs/rm=0.5", "runs/rm", 0.5),
        ("runs/rm=-2", "runs/rm", -2),
        ("runs/lr=1e-3/rm", "runs/lr=1e-3/rm", 1),
        ("runs/lr=1e-3/rm=1e-3", "runs/lr=1e-3/rm", 0.001),
        (r"match:x=(\d+)=0.1", r"match:x=(\d+)", 0.1),
        ("judge:a=b", "judge:a=b", 1),
    ],
)
def test_the_weight_follows_the_last_equals_sign(value, source, weight):
    assert script.split_source(value) == (source, weight)


@pytest.mark.parametrize("value", ["runs/rm=inf", "format=nan", "=2"])
def test_a_weight_that_is_no_finite_number_is_refused(value, capsys):
    said = refusal(lambda: script.split_source(value), capsys)
    assert f"--rewards {value}: must be SOURCE or SOURCE=WEIGHT" in said


RULES = """
from __future__ import annotations
import math
from dataclasses import dataclass

calls = []

@dataclass
class Rule:
    letters: str

    def __call__(self, prompts, completions, **columns):
        return [float(sum(letter in self.letters for letter in text)) for text in completions]

vowels = Rule("aeiou")

def format_reward(prompts, completions, **columns):
    calls.append(list(completions))
    return [0.0] * len(prompts)

def breaks(prompts, completions, answer, **columns):
    return [1 / 0 for _ in prompts]

number = 3
judge = lambda **columns: [1.0, 1.0]
nothing = lambda **columns: None
no_number = lambda **columns: [0.0, math.nan]
enormous = lambda **columns: [1e38, 0.0]
"""


@pytest.fixture
def rules(tmp_path) -> str:
    (tmp_path / "rules.py").write_text(RULES)
    return str(tmp_path / "rules.py")


def rewards_of(*sources, **changes) -> list:
    return script.load_rewards(options(rewards=sources, **changes), CPU, F32)


def test_rewards_add_up_by_weight_under_names_of_their_own(rules, tiny_tokenizer, tmp_path):
    models = [scorer_of(tmp_path / folder / "rm", tiny_tokenizer, seed=seed) for seed, folder in enumerate("ab")]
    sources = [f"{models[0]}=2", f"{models[1]}=-0.5", f"{rules}:vowels=0.25", "match:number=0", "match:boxed", "format"]
    rewards = rewards_of(*sources)
    assert [reward.name for reward in rewards] == ["rm", "rm-2", "vowels", "match", "match-2", "format"]
    assert [reward.weight for reward in rewards] == [2, -0.5, 0.25, 0, 1, 1]
    assert [reward.path for reward in rewards] == [*models, "", "", "", ""]
    files = script.reward_files(options(rewards=[*sources, "judge:runs/sft=3"], rubric="rubric.json"))
    assert [file for file in files if file] == [*models, rules, "runs/sft", "rubric.json"]
    rows = [asked("Is it", answer="12")] * 3
    rows, texts = [copy.copy(row) for row in rows], [" 12 12", r" 7 \boxed{12}", "<think>a</think> No"]
    total, named = script.total_reward(rewards, rows, texts, [[1]] * 3)
    assert list(named) == [reward.name for reward in rewards] and not torch.equal(named["rm"], named["rm-2"])
    assert named["match"].tolist() == [1, 1, 0] and named["match-2"].tolist() == [0, 1, 0]
    assert named["format"].tolist() == [0, 0, 1] and named["vowels"].tolist() == [0, 2, 1]
    expected = 2 * named["rm"] - 0.5 * named["rm-2"] + 0.25 * named["vowels"] + named["match-2"] + named["format"]
    torch.testing.assert_close(total, expected)


RUBRIC = dict(
    question="Which is it?",
    options=dict(A="a refusal", B="an answer"),
    reward=dict(harmful=dict(A=1, B=-1), safe=dict(A=-2, B=0.5)),
)
BAD = {  # what is wrong: (sources, other options, what the sentence names)
    "nothing": ([], {}, "--rewards: names nothing"),
    "no such function": (["RULES:nowhere"], {}, "rules.py:nowhere: no such function can be loaded"),
    "a function without its name": (["RULES"], {}, "rules.py"),
    "no expression": (["match:"], {}, "--rewards match:: needs number, boxed, hash, or a regular expression"),
    "a broken expression": (["match:(a"], {}, "--rewards match:(a: needs number"),
    "two judges": (["judge:JUDGE", "judge:JUDGE=0"], {}, "takes one judge"),
    "no such judge": (["judge:runs/nowhere"], {}, "runs/nowhere"),
    "a rubric without a judge": (["format"], dict(rubric="rubric.json"), "--rubric: needs a judge"),
    "a condition without a reward model": (["judge:JUDGE"], dict(condition="condition.json"), "--condition: is for"),
    "no such rubric": (["judge:JUDGE"], dict(rubric="nowhere.json"), "nowhere.json"),
}


# ---- what each source gives


def test_what_a_reward_model_reads(tiny_tokenizer):
    def read(prompt, text, longest=512, tokenizer=tiny_tokenizer, **row):
        scored = script.scored_row(tokenizer, prompt, text, row, longest)
        return tokenizer.decode(scored.prompt + scored.responses[0])

    assert read("Up or", "") == "<|bos|>Up or<|end|>"
    assert read(PROMPTS["one turn"], "") == "<|bos|><|user|>What is the best path?<|end|><|assistant|><|end|>"
    assert read(PROMPTS["begun"], "") == "<|bos|><|user|>Sum<|end|><|assistant|>The sum is<|end|>"
    assert read(PROMPTS["one turn"], "No", longest=4) == "<|end|><|assistant|>No<|end|>"  # the beginning is left out
    styled = copy.deepcopy(tiny_tokenizer)
    styled.chat_template = "{{ style }}{{ tools | tojson if tools }}" + tiny_tokenizer.chat_template
    row = dict(chat_template_kwargs=dict(style="mild"), tools=[dict(type="function", function=dict(name="look"))])
    for prompt in (PROMPTS["one turn"], PROMPTS["begun"]):
        assert read(prompt, " 12", tokenizer=styled, **row).startswith('mild[{"type": "function"')


def test_conditions_stand_before_the_prompt(tmp_path, capsys):
    with_condition = script.with_condition
    assert with_condition("Up?", "Kind.") == "Kind.\n\nUp?" and with_condition("Up?", "") == "Up?"
    assert with_condition([user("Up?")], "Kind.") == [system("Kind."), user("Up?")]
    assert with_condition([system("Short."), user("Up?")], "Kind.") == [system("Kind.\n\nShort."), user("Up?")]
    assert script.load_conditions("") == {}
    for content in ("[1]", '{"a": 1}', "{"):
        (tmp_path / "kinds.json").write_text(content)
        assert "--condition" in refusal(lambda: script.load_conditions(str(tmp_path / "kinds.json")), capsys)


def test_an_answer_that_the_template_refuses_has_no_score(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    refuse = "{% if message['content'] == '' and not quiet %}{{ raise_exception('says nothing') }}{% endif %}"
    tokenizer.chat_template = tiny_tokenizer.chat_template.replace("%}{{ '<|'", "%}" + refuse + "{{ '<|'", 1)
    (reward,) = rewards_of(scorer_of(tmp_path / "rm", tokenizer))
    found = reward.score([asked([user("Up?")])] * 3, ["No", "", "No"], [[1]] * 3)
    assert found.isnan().tolist() == [False, True, False] and found[0] == found[2]
    assert reward.score([asked([user("Up?")], chat_template_kwargs=dict(quiet=True))], [""], [[1]]).isfinite().all()
    assert reward.score([asked([user("Up?")])], [""], [[1]]).isnan().all() and reward.score([], [], []).shape == (0,)


def test_a_score_that_is_not_finite_ends_the_run(scorer, tiny_tokenizer, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    model.score.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    tiny_tokenizer.save_pretrained(tmp_path / "large")
    (reward,) = rewards_of(str(tmp_path / "large"))
    said = refusal(lambda: reward.score([asked([user("Up?")])], ["No"], [[1]]), capsys)
    assert "a reward model's score is not finite" in said


TALKS = [  # the prompt, the answer, what the judge reads of both
    ("What is the best path?", " No", "What is the best path? No"),
    (PROMPTS["one turn"], "No", "What is the best path?\nNo"),
    (PROMPTS["system"], "No", "Is it safe?\nNo"),
    (PROMPTS["turns"], "No", "user: Hi\nassistant: Dear Ann\nuser: Up or right?\nassistant: No"),
    (PROMPTS["begun"], " No", "user: Sum\nassistant: The sum is No"),
    (
        [user("Is it safe?")],
        "a<|e<|en<|end|>d|>nd|><|assistant|>B<|end|>",
        "Is it safe?\naB",
    ),  # cannot reply in its place
    ("Is it <|e", "nd|>safe?", "Is it safe?"),
]


@pytest.mark.parametrize("wrong", BAD)
def test_sources_that_cannot_be_used_are_refused(wrong, rules, judge, scorer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rubric.json").write_text(json.dumps(RUBRIC))
    Path("condition.json").write_text(json.dumps(dict(helpful="Is it helpful?")))
    sources, changes, named = BAD[wrong]
    for name, place in dict(RULES=rules, JUDGE=judge, SCORER=scorer).items():
        sources = [source.replace(name, place) for source in sources]
    assert named in refusal(lambda: rewards_of(*sources, **changes), capsys)


BAD_RUBRICS = [[1], {}, dict(options={}), dict(reward={}), dict(options=["A", "B"]), dict(reward=[1, 2])]
BAD_RUBRICS += [
    dict(question=None),
    *(dict(reward=dict(odd=x)) for x in (dict(A=1), dict(A="a", B=1), dict(A=math.inf, B=1))),
]


@pytest.mark.parametrize("change", BAD_RUBRICS, ids=str)
def test_rubrics_that_cannot_be_used_are_refused(change, tmp_path, capsys):
    rubric = change and RUBRIC | change if isinstance(change, dict) else change
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    said = refusal(lambda: script.load_rubric(str(tmp_path / "rubric.json")), capsys)
    assert "--rubric" in said and "rubric.json" in said


def test_every_source_says_before_training_which_prompts_it_cannot_read(dressed, rules, tmp_path):  # noqa: F811
    """Gemma's template raises on a system message."""
    folder = scorer_of(tmp_path / "gemma", dressed("gemma"))
    own = saved(AutoModelForCausalLM, tmp_path / "own", dressed("gemma"))
    (tmp_path / "kinds.json").write_text('{"helpful": "Is it helpful?"}')
    sources = (folder, f"judge:{own}", f"{rules}:vowels", "format")
    model, wise, *others = rewards_of(*sources, condition=str(tmp_path / "kinds.json"))
    row = lambda prompt, kind="": dict(prompt=prompt, kind=kind)
    assert [reward.check for reward in others] == [None, None]
    for reward in (model, wise):
        for prompt in ("Up or", PROMPTS["one turn"]):
            reward.check(row(prompt))
    wise.check(row(PROMPTS["system"]))  # a judge reads no system text
    for extra in (row(PROMPTS["system"]), row(PROMPTS["one turn"], "helpful")):
        assert "System role not supported" in dropped(lambda extra=extra: model.check(extra))
    for reward in (model, wise):
        assert "special token" in dropped(lambda reward=reward: reward.check(row("a<end_of_turn>")))


def test_a_judge_without_a_rubric_gives_the_expected_score(judge, tiny_tokenizer):
    (reward,) = rewards_of(f"judge:{judge}")
    plain, question = AutoModelForCausalLM.from_pretrained(judge).eval(), script.SCORE_QUESTION
    found = reward.score([asked(prompt) for prompt, *_ in TALKS], [text for _, text, _ in TALKS], [[1]] * len(TALKS))
    for value, (*_, talk) in zip(found.tolist(), TALKS):
        logps = [reply_logp(plain, tiny_tokenizer, [user(f"{talk}\n\n{question}")], reply) for reply in TEN]
        chances = torch.tensor(logps).softmax(-1).tolist()
        assert value == pytest.approx((sum((i + 1) * p for i, p in enumerate(chances)) - 5.5) / 4.5, abs=2e-5)
    assert len({round(value, 4) for value in found.tolist()}) == len(TALKS)
    assert reward.score([], [], []).shape == (0,)


def test_a_rubric_rewards_the_kinds_that_it_names(judge, tiny_tokenizer, tmp_path):
    (tmp_path / "rubric.json").write_text(json.dumps(RUBRIC))
    rewards = rewards_of(f"judge:{judge}=3", rubric=str(tmp_path / "rubric.json"))
    plain = AutoModelForCausalLM.from_pretrained(judge).eval()
    question = [user("Is it safe?\nNo\n\nWhich is it?\nA. a refusal\nB. an answer")]
    a, b = torch.tensor([reply_logp(plain, tiny_tokenizer, question, letter) for letter in "AB"]).softmax(-1).tolist()
    rows = [asked([user("Is it safe?")], kind=kind) for kind in ("harmful", "safe", "", "other")]
    total, named = script.total_reward(rewards, rows, ["No"] * 4, [[1]] * 4)
    assert named["judge"][:2].tolist() == pytest.approx([a - b, -2 * a + 0.5 * b], abs=1e-5)
    assert named["judge"][2:].isnan().all() and total[2:].tolist() == [0, 0] and abs(a - b) > 1e-3
    assert total[:2].tolist() == pytest.approx([3 * (a - b), 3 * (-2 * a + 0.5 * b)], abs=1e-5)
    assert rewards[0].score([], [], []).shape == (0,)


def function_scores(function, rows, texts, ids=None):
    return script.function_scores("rules.py:f", function, CPU, rows, texts, ids or [[1]] * len(rows))


def test_a_function_gets_prompts_completions_ids_and_every_column_as_lists():
    seen = {}

    def rule(prompts, completions, completion_ids, answer, kind, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids, answer=answer, kind=kind)
        return [1, None, True]

    given = dict(chosen="c", rejected="r", completion="own", completions=["a", "b"], scores=[1, 0])
    extras = [dict(prompt=[user("a")], kind="x", answer=7), dict(prompt="b", kind="", answer=8)]
    extras.append(dict(prompt="c", kind="", answer=None))
    rows = [Row([1], [[]], [[]], extra | given) for extra in extras]
    scores = function_scores(rule, rows, ["A", "B", "C"], [[5, 6], [7], []])
    assert seen.pop("prompts") == [[user("a")], "b", "c"]
    assert seen.pop("completions") == [[assistant("A")], "B", "C"] and seen.pop("ids") == [[5, 6], [7], []]
    assert seen == dict(answer=[7, 8, None], kind=["x", "", ""], scores=[[1, 0]] * 3)
    assert scores[::2].tolist() == [1, 1] and scores[1].isnan()
    assert function_scores(rule, [], []).shape == (0,)


@pytest.mark.parametrize(
    "name, why",
    [
        ("nothing", "returned a NoneType"),
        ("no_number", "returned nan"),
        ("enormous", "returned 1e+38"),
        ("breaks", "ZeroDivisionError: division by zero (rules.py, line "),
        ("number", "TypeError"),
    ],
)
def test_what_a_function_must_not_return_ends_the_run(name, why, rules, capsys):
    (reward,) = rewards_of(f"{rules}:{name}")
    rows = [asked("a", answer="1"), asked("b", answer="2")]
    said = refusal(lambda: reward.score(rows, ["bad answer", "y"], [[1], [2]]), capsys)
    assert f"--rewards {rules}:{name}: " in said and why in said


# ---- thinking

AFTER = [  # text, what stands after the thinking, whether it is well formed
    ("<think>a</think>12", "12", True),
    ("<think></think> 12", " 12", False),
    ("<think>a</think>", "", False),
    ("<think>a 12", "", False),
    ("a 12</think>12", "12", False),  # the template has not opened it either, or answer_texts would have written it
    ("<think>a</think>1<think>b 2", "1", False),
    ("<think>a</think>b</think>12", "12", False),
    ("", "", False),
]


@pytest.mark.parametrize("text, after, formed", AFTER)
def test_what_stands_after_the_thinking(text, after, formed):
    assert script.after_thinking(text) == after and script.format_scores(CPU, [], [text], []) == formed


def test_no_reward_but_the_format_sees_the_thinking(rules, scorer, judge):
    """Not even a function that is called format_reward."""
    secret = "<think>a secret 12</think>"
    thoughts = ["No", secret + "No", "<think>a secret", "<think>a</think>\nNo <think>b", f"\n{secret} 7 \n"]
    public = ["No", "No", "", "No", "7"]
    rewards = rewards_of(scorer, f"judge:{judge}", "match:number", "format", f"{rules}:format_reward")
    rows = [asked([user("Is it safe?")], answer=12) for _ in public]
    total, named = script.total_reward(rewards, rows, thoughts, [[1]] * 5)
    calls = rewards[-1].score.args[1].__globals__["calls"]
    assert calls == [[[assistant(text)] for text in public]]
    assert named["format"].tolist() == [0, 1, 0, 0, 1] and not named["match"].any()
    _, plain = script.total_reward(rewards, rows, public, [[1]] * 5)
    for name in (Path(scorer).name, "judge"):
        torch.testing.assert_close(named[name], plain[name], rtol=0, atol=1e-5)
        assert abs(named[name][0] - named[name][4]) > 1e-4
    torch.testing.assert_close(total, sum(named.values()))


# ---- verifiable answers

FOUND = [  # text, how, what is found, what it is compared as
    ("it is 1e5", "number", "1e5", "100000"),
    ("it is \u22125.", "number", "\u22125", "-5"),
    ("10-3 is 10 - 3", "number", "3", "3"),
    ("f(2)-3", "number", "3", "3"),
    ("A loss: -$1,234.50!", "number", "-$1,234.50", "-2469/2"),
    ("$1,234,567.", "number", "1,234,567", "1234567"),
    ("a share of .5", "number", ".5", "1/2"),
    ("1/0", "number", "1/0", "1/0"),
    ("no number", "number", None, None),
    (r"\boxed{1} and \boxed{72}", "boxed", "72", "72"),
    (r"\boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{\$1{,}0}", "boxed", r"\$1{,}0", r"\$1{,}0"),
    (r"\boxed{\$18}", "boxed", r"\$18", "18"),
    (r"\boxed{ }", "boxed", " ", None),
    (r"\boxed{1", "boxed", None, None),
    ("so\n#### 72", "hash", "72", "72"),
    ("#### 1\n#### 1,000", "hash", "1,000", "1000"),
    ("####", "hash", "", None),
    ("It is (B), no, (C).", r"\(([A-D])\)", "C", "c"),
    ("It is B, no, C.", r"\b[A-D]\b", "C", "c"),
    ("answer: ", r"answer: (\d+)?", None, None),
]


@pytest.mark.parametrize("text, how, found, compared", FOUND)
def test_answers_are_found(text, how, found, compared):
    assert script.found_answer(text, how) == found and script.canonical(found) == compared


SAME = [
    ["72", "72.", " 72 ", "$72", "72.0", "72.00", "144/2", "+72", "72%", "72 %", r"\$72", "$ 72", "7.2e1"],
    ["1000", "1,000", "$1,000.00", "1 000", "1e3"],
    ["-1/2", "-0.5", "-.5", "-2/4", "-$0.50"],
    ["3/2", "1.5", "3 / 2", "$1.5$", "$$ 3/2 $$", r"\(1.5\)", r"\[3/2\]"],
    ["1 1/2"],
    ["1 2"],
    ["11/2"],
    ["12"],
    ["up, right", "Up,  RIGHT.", "up,\nright"],
    ["(1,200)"],
    ["1/0"],
    ["nan"],
]


def test_answers_are_compared():
    for i, group in enumerate(SAME):
        assert len({script.canonical(text) for text in group}) == 1, group
        assert not {script.canonical(group[0])} & {script.canonical(x[0]) for j, x in enumerate(SAME) if i != j}
    assert script.canonical(None) is script.canonical("") is script.canonical(" . ") is None


def test_a_number_of_any_length_is_compared_at_once():
    """A policy may write what would take a billion digits."""
    for text in ("1e999999999", "-2e-999999999", "9" * 6000, "1/" + "0" * 6000):
        assert script.canonical(text) == text


def test_the_true_answers_of_a_column():
    columns = {"5 + 5 = 10\n#### 1,000": {"1000"}, r"so \boxed{\frac{1}{2}}": {r"\frac{1}{2}"}, "72.0": {"72"}}
    columns |= {"Up": {"up"}, "": set(), "####": set(), 72: {"72"}, 0.5: {"1/2"}, None: set(), "$5$": {"5"}}
    for column, answers in columns.items():
        assert script.true_answers(column) == answers
    assert script.true_answers(["5", "$6$", 7, None, r"\boxed{8}"]) == {"5", "6", "7", "8"}  # alternatives
    assert script.true_answers([]) == set()
    for column in (True, {"a": 1}, [{"a": 1}], b"5"):
        with pytest.raises(ValueError, match="must be a text, a number, or a list"):
            script.true_answers(column)


def test_a_match_is_one_of_the_true_answers():
    (reward,) = rewards_of("match:number")
    answers = ["12", "so\n#### 1,200", None, "", 12, 0.5, ["5"], "$5$", ["4", "5"], []]
    texts = ["= 12.0", "$1,200", "12", "12", "no", "1/2", "It is 5.", "It is $5$.", "5", "5"]
    rows = [asked("a", answer=answer) for answer in answers]
    found = reward.score(rows, texts, [[1]] * len(rows)).tolist()
    nan = [i for i, value in enumerate(found) if math.isnan(value)]
    assert nan == [2, 3, 9] and [found[i] for i in range(9) if i not in nan] == [1, 1, 0, 1, 1, 1, 1]


# ---- real data


def test_an_answer_that_can_never_match_is_dropped_and_counted(tiny_tokenizer, tmp_path, capsys):
    def kept(answers, how="number"):
        rows = [dict(prompt=[user("Sum?")]) | (dict(answer=x) if x != "absent" else {}) for x in answers]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (reward,) = rewards_of(f"match:{how}")
        encode = lambda row, notes: script.prompt_rows(tiny_tokenizer, 100, [reward.check], row, notes)
        made = script.prepare("--dataset", str(tmp_path / "rows.jsonl"), "train", tiny_tokenizer, encode)
        return [row.extra["answer"] for row in made]

    good = ["12", "$5$", None, "so\n#### 7"]
    assert kept([*good, "five"]) == good
    assert "1 dropped: its answer 'five' is not a number" in capsys.readouterr().out
    assert len(kept([["five", "5"], ["5"]])) == 2 and len(kept(["five"], "boxed")) == 1
    assert "compares with a column answer, which is missing" in refusal(lambda: kept(["absent"]), capsys)
    assert "answer must be a text, a number, or a list" in refusal(lambda: kept([{"a": 1}]), capsys)


def test_every_answer_of_gsm8k_is_read(real_data):
    with gzip.open(real_data / "gsm8k.jsonl.gz", "rt") as file:
        rows = list(map(json.loads, file))
    assert len(rows) == 7473
    for row in rows:
        true = script.canonical(row["final"])
        assert true == str(int(row["final"])) and {true} == script.true_answers(row["answer"])
        assert script.canonical(script.found_answer(row["answer"], "hash")) == true
        assert script.canonical(script.found_answer(row["answer"], "number")) == true
        assert script.check_true_answer("number", row) is None
