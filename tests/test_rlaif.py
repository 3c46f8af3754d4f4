"""rlaif.py: the method in numbers, what judges are asked and how they are heard, whole runs of every subcommand in this
process, runs that are killed and go on, and a judge behind a server."""

import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, tiny_config
from test_plumbing import CPU, dressed, jsonl, on_ranks, snapshot, talk  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dpo
import reward_model
import rlaif
import sft
from rlaif import Item, Row

f64 = lambda *values: torch.tensor(values, dtype=torch.float64)
sigmoid = lambda x: 1 / (1 + math.exp(-x))
nan = math.nan


def near(actual, expected, tolerance=1e-6):
    actual, expected = torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


# ---------------------------------------------------------------------------------------------- the method, in numbers


def test_letters_are_renormalised_and_orders_averaged():
    letters = f64(math.log(0.012), math.log(0.048))
    near(rlaif.preference(letters, f64(-40, 0)), (0.2 + 1) / 2)
    near(rlaif.preference(letters, letters.flip(0)), 0.2)
    near(rlaif.preference(f64(-0.4, -1.2), f64(-0.5, -1.0)), 0.533758)  # second: b as A, so that B is a
    near(rlaif.preference(torch.zeros(3, 2), torch.zeros(3, 2)), [0.5] * 3)


@pytest.mark.parametrize("letters", [(-0.1, -2.3), (-5.0, -0.2), (-0.001, -30.0), (-0.7, -0.7)])
def test_a_pure_position_bias_is_a_tie_in_both_modes(letters):
    near(rlaif.preference(f64(*letters), f64(*letters)), 0.5, 1e-12)
    p = f64(*letters).softmax(-1)[0].item()
    assert {rlaif.verdict(p, 1 - p, orders, 0.0) for orders in ("agree", "average")} == {"tie"}


@pytest.mark.parametrize(
    "first, second, agree, average",
    [
        (0.9, 0.8, "a", "a"),
        (0.1, 0.2, "b", "b"),
        (0.9, 0.3, "tie", "a"),
        (0.1, 0.6, "tie", "b"),
        (0.505, 0.505, "tie", "tie"),
        (0.515, 0.515, "a", "a"),
        (0.485, 0.485, "b", "b"),
        (0.5, 0.9, "tie", "a"),
        (0.5, 0.5, "tie", "tie"),
        (nan, 0.9, "abstain", "abstain"),
        (0.9, nan, "abstain", "abstain"),
    ],
)
def test_verdict(first, second, agree, average):
    turned = dict(a="b", b="a", tie="tie", abstain="abstain")
    for orders, said in (("agree", agree), ("average", average)):
        assert rlaif.verdict(first, second, orders) == said
        assert rlaif.verdict(1 - first, 1 - second, orders) == turned[said]


def test_the_tie_margin_is_around_a_half():
    assert [rlaif.verdict(0.6, 0.6, "agree", margin) for margin in (0.0, 0.09, 0.11, 0.5)] == ["a", "a", "tie", "tie"]
    assert rlaif.verdict(0.5 + 1e-9, 0.5 + 1e-9, "agree", 0.0) == "a"


POINTS = {
    **{"Score: 4": 4, "so... Score: 0": 0, "Score: 5.": 5, "score 3": 3, "SCORE: **2**": 2, "Score: 4/5": 4},
    **{"Score: 4.5 points": 4.5, '"Score: "3"': 3, "Score:\n1": 1, "Score: 2, no, in sum\nScore: 3": 3},
    **{"": nan, "Score:": nan, "4": nan, "Score: five": nan, "Score: 6": nan, "Score: 50": nan, "Score: -1": nan},
    **{"Score: 1 + 1 + 1 + 0 = 3": 3, "Score: 1+1 = **2**": 2, "Score: 1 + 1 + 1": nan, "Score (1 + 1 = 2)": 2},
    **{"Score (out of 5): 4": 4, "Score (0-5): 4": 4, "Score (/5): 4": 4, "Score (0-5): none": nan, "Score (3)": 3},
    **{"**Score** (0-5): 4": 4, "Score: 1 (on topic) + 1 (clear) = 2": nan, "Score: 3 (1 + 1 + 1)": 3, "Score: (3)": 3},
    **{"Score: 3 ... Score: 9": nan, "I give it 3 points": nan, "Score: unknown (1 to 5)": nan},
}


@pytest.mark.parametrize("text", POINTS)
def test_points_are_the_last_score_that_was_written_and_never_a_guess(text):
    near(rlaif.points(text), POINTS[text], 0)


def test_distances_to_the_nearest_neighbour():
    """Worked numbers; brute force, on more vectors than are compared at a time; and no rounding of large numbers."""
    near(rlaif.nearest(f64((0, 0), (0, 0), (1, 0), (0, 2))), [0, 0, 1, 4])
    many = torch.randn(600, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near(rlaif.nearest(many), (many[:, None] - many).square().sum(-1).fill_diagonal_(math.inf).amin(1), 1e-12)
    close = torch.full((2, 4), 1000.0)
    close[1, 0] += 0.01
    near(rlaif.nearest(close), [(close[1, 0] - 1000).item() ** 2] * 2, 1e-9)
    assert rlaif.nearest(many[:1]).tolist() == [math.inf]


@pytest.mark.parametrize("least, kept", [(0.0, [0, 2, 3]), (0.5, [0, 2, 3]), (1.0, [0, 3]), (3.99, [0, 3]), (4.0, [0])])
def test_of_a_cluster_the_earliest_stays(least, kept):
    """A distance of exactly the least goes."""
    assert rlaif.keep_distant(f64((0, 0), (0, 0), (1, 0), (0, 2)), least) == kept


def test_what_was_dropped_drops_nothing():
    """0, .8, 1.6 with least distance 1: the second goes, and the third, near to it alone, stays."""
    assert rlaif.keep_distant(f64((0,), (0.8,), (1.6,)), 1.0) == [0, 2]
    assert rlaif.keep_distant(torch.zeros(0, 3), 1.0) == []


def test_ranking_scores_are_means_against_the_others():
    assert rlaif.ranking_scores([]) == [] and all(map(math.isnan, rlaif.ranking_scores([[nan, nan], [nan, nan]])))
    near(rlaif.ranking_scores([[nan, 0.7, 0.9], [0.3, nan, nan], [0.1, nan, nan]]), [0.8, 0.3, 0.1])


def test_wilsons_ends_solve_their_equation_and_halves_count():
    mean, low, high = rlaif.interval([1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.5])
    near(mean, 4.5 / 7, 1e-12)
    for end in (low, high):  # |mean - p| = z sqrt(p (1 - p) / n)
        near((mean - end) ** 2, 1.96**2 * end * (1 - end) / 7, 1e-12)
    assert low < mean < high and rlaif.interval([]) == (None, 0.0, 1.0)


# --------------------------------------------------------------------------------------------- words in and words out


def test_a_request_is_filled_in_once():
    parts = dict(talk="{a} and {b}", a='{"json": {}}', b="{principle}")
    filled = rlaif.fill("<{talk}> {a} | {b} {other} {} { a }", **parts)
    assert filled == '<{a} and {b}> {"json": {}} | {principle} {other} {} { a }'
    assert rlaif.fill(r"{a}", a=r"\1 \g<0> \n") == r"\1 \g<0> \n"


def test_every_request_has_the_parts_that_it_is_given():
    need = dict(principle="", compare="talk a b principle", reason="talk a b principle", conclude="principle")
    need |= dict(critique="talk answer principle", revise="", score="talk answer", points="talk answer")
    need |= dict(quality="talk", difficulty="talk")
    found = {name: set(re.findall(r"\{(\w+)\}", text)) for name, text in rlaif.REQUESTS.items()}
    assert found == {name: set(parts.split()) for name, parts in need.items()}


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("Say: {a}\n\nAssistant:", "Say: {a}\n\nAssistant:"),
        (talk("Hello"), "Hello"),
        ([dict(role="system", content="Be brief"), *talk("Hello")], "Hello"),
        (talk("Hello", "Hi", "So?"), "user: Hello\nassistant: Hi\nuser: So?"),
        (talk("Hello", "Well, I"), "user: Hello\nassistant: Well, I"),
    ],
)
def test_the_judge_reads_the_talk_without_the_system_prompt(prompt, text):
    assert rlaif.talk_of(prompt) == text


@pytest.mark.parametrize(
    "response, text",
    [
        ("Up ", "Up"),
        ("<think>secret</think>\n\nUp", "Up"),
        ("<think>secret, without end", ""),
        ("Up <think>more", "Up"),
        ("secret</think>Up", "Up"),
        (talk("", "<think>a</think>Up")[1:], "Up"),
        (talk("", "Up", "Why?", "<think>h</think>So")[1:], "Up\nWhy?\nSo"),
    ],
)
def test_thinking_is_not_judged(response, text):
    assert rlaif.text_of(response) == text


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("Human: 6 x 7?\n\nAssistant:", " 42"),
        ("6 x 7 = ", "42"),
        (talk("6 x 7?"), "42"),
        (talk("6 x 7?", "It is"), " 42"),
        (talk("6 x 7?", "It is\n"), "42"),
    ],
)
def test_an_answer_stands_behind_a_space_where_a_word_goes_before(prompt, text):
    assert rlaif.after_space(prompt, "42") == text


@pytest.mark.parametrize("text", ["<|im_end|>up", "<<|x|>|im_end|>up", "u<<<|x|>|y|>|im_end|>p"])
def test_what_a_server_may_take_for_a_special_token_is_taken_out(text):
    """Also one that appears when another has been taken out."""
    assert rlaif.without_marks(text) == "up"


def test_requests_must_show_what_is_judged(tmp_path, capsys):
    file = tmp_path / "requests.json"
    for name, text, is_right in [
        ("score", "{conversation} 1 to 10?", True),
        ("quality", "{talk} 1 to 10?", True),
        ("quality", "{conversation} 1 to 10?", False),
        ("compare", "{conversation}\n{principle}\nA. {a}\nB. {b}", False),
        ("compare", "{talk} A. {a} {principle}", False),
    ]:
        file.write_text(json.dumps({name: text}))
        load = lambda: rlaif.load_requests(settings(requests=str(file)))
        if is_right:
            assert load()[name] == text
        else:
            assert f"{name} has no {{" in sentence(load, capsys)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3", "glm", "none of its own", "mistral"])
def test_the_users_turn_begins_as_the_template_has_it(name, dressed):  # noqa: F811
    """What comes before, and the user's words: together what the template would have rendered. A space before them is
    part of their first token."""
    tokenizer = dressed(name)
    space = " " * (name in ("none of its own", "mistral"))
    for before in ([], talk("Write a letter.", "Dear Ann")):
        for text in ("What is the best path?", "up", "I read"):
            opening = rlaif.around_user(tokenizer, before)[0].rstrip(" ")
            ids = rlaif.text_ids(tokenizer, opening) + rlaif.text_ids(tokenizer, space + text)
            assert rlaif.render(tokenizer, [*before, *talk(text)])[: len(ids)] == ids
            assert tokenizer.bos_token_id not in ids[1:]


def served(content, *tokens) -> dict:
    """A choice as a server gives it; tokens: (token, {token: probability} of its place)."""
    listed = lambda table: [dict(token=t, logprob=math.log(p)) for t, p in table.items()]
    found = dict(message=dict(content=content), finish_reason="stop")
    if tokens:
        places = [dict(token=t, logprob=math.log(table[t]), top_logprobs=listed(table)) for t, table in tokens]
        found["logprobs"] = dict(content=places)
    return found


HEARD = {  # a server's reply -> the probability of each option, None: no option
    "a refusal that begins with A": (served("As an AI language model, I cannot choose."), None),
    "a word that begins with B": (served("By comparison, they are equal."), None),
    "a letter": (served("A", ("A", dict(A=0.6, B=0.3))), [0.6, 0.3]),
    "a letter among other tokens": (served("B", ("B", dict(B=0.5, A=0.2, The=0.2))), [0.2, 0.5]),
    "with and without space": (
        served("A", ("A", {"A": 0.5, " A": 0.1, "B": 0.2, " B": 0.05, "\nB": 0.05})),
        [0.6, 0.3],
    ),
    "bold": (served("**A**", ("**", {"**": 0.9}), ("A", dict(A=0.7, B=0.1)), ("**", {"**": 1.0})), [0.7, 0.1]),
    "in brackets": (served("(B)", ("(", {"(": 0.9}), ("B", dict(A=0.1, B=0.8)), (")", {")": 1.0})), [0.1, 0.8]),
    "brackets in its token": (served("(B)", ("(B", {"(B": 0.75, "(A": 0.15, "A": 0.05})), [0.2, 0.75]),
    "a letter, then reasons": (served("A, since B is long", ("A", dict(A=0.9, B=0.1)), (",", {",": 1.0})), [0.9, 0.1]),
    "reasons on another line": (
        served("A\n\nBecause.", ("A", dict(A=0.9, B=0.1)), ("\n\n", {"\n\n": 1.0})),
        [0.9, 0.1],
    ),
    "after such words": (served("Answer: A", ("Answer", dict(Answer=1.0)), (" A", {" A": 0.8, " B": 0.1})), [0.8, 0.1]),
    "in a sentence": (served("The final answer is (B)."), [0.0, 1.0]),
    "an article": (served("A good question"), None),
    "after its thinking": (served("<think>A or B</think>\n\nB"), [0.0, 1.0]),
    "only one listed": (served("A", ("A", dict(A=0.9))), [0.9, 0.0]),
    "no log-probabilities": (served("B"), [0.0, 1.0]),
    "none listed": (
        served("B") | dict(logprobs=dict(content=[dict(token="B", logprob=math.log(0.9), top_logprobs=[])])),
        [0.0, 0.9],
    ),
    "no letter": (served("Both are good", ("Both", dict(Both=0.5, A=0.4, B=0.1))), None),
    "a word that begins with the letter": (served("Answer", ("A", dict(A=0.9)), ("nswer", dict(nswer=1.0))), None),
    "nothing": (served(""), None),
    "nothing at all": (dict(message=dict(content=None)), None),
    "no message": (dict(text="A"), None),
    "no choice": ("A", None),
    "parts": (served([dict(type="text", text="The answer is "), dict(type="text", text="B")]), [0.0, 1.0]),
    "parts without text": (served([dict(type="image"), "A"]), None),
}


@pytest.mark.parametrize("case", HEARD)
def test_a_servers_reply_is_read(case):
    choice, expected = HEARD[case]
    near([math.exp(p) for p in rlaif.named_logps(choice, ["A", "B"])], expected or [nan, nan], 1e-9)


def test_a_number_of_two_tokens_counts_as_named():
    chances = lambda choice: [math.exp(p) for p in rlaif.named_logps(choice, rlaif.SCORES)]
    near(chances(served("10", ("1", {"1": 0.9, "2": 0.1}), ("0", {"0": 1.0}))), [0.0] * 9 + [1.0])
    assert all(map(math.isnan, chances(served("10 out of 10"))))  # not the 1 of "10"
    near(chances(served("1", ("1", {"1": 0.9, "10": 0.06, "2": 0.04}))), [0.9, 0.04, *[0.0] * 7, 0.06])
    # who knows how much of it is the beginning of 10
    near(chances(served("1", ("1", {"1": 0.9, "2": 0.1}))), [1.0] + [0.0] * 9)


# ------------------------------------------------------------------------------------------------- models for all that

QUESTIONS = ["What is the best path?", "Write a letter", "Is it safe? Say so.", "Sum: 4 3 5", "up"]
QUESTIONS += ["Where does the robot start? I'd like to talk."]
REPLIES = ["right", "Dear Ann, thank you", "No", "12", "Right, up, right", "I read it in one evening"]
OTHERS = [
    "No, I cannot help with that",
    "up",
    "the path is not safe",
    "4 and 3 and 5, the sum is 12",
    "Right",
    "I read it",
]
COMMANDS = dict(label=rlaif.LabelArgs, revise=rlaif.ReviseArgs, synthesise=rlaif.SynthesiseArgs)
COMMANDS |= {"best-of-n": rlaif.BestOfNArgs, "compare": rlaif.CompareArgs, "audit": rlaif.AuditArgs}
SHORT = dict(  # requests of few tokens: the tiny models read 512
    compare="{talk}|A: {a}|B: {b}|{principle}?",
    reason="{talk}|A: {a}|B: {b}|why {principle}?",
    conclude="So {principle}?",
    critique="{conversation}|{principle}: wrong?",
    revise="Anew",
    score="{conversation}|1 to 10?",
    points="{conversation}|points?",
    quality="{talk}|good?",
    difficulty="{talk}|hard?",
)
ASKED = re.compile(r"(.*)\|A: (.*)\|B: (.*)\|(.*)\?", re.DOTALL)


def settings(**options):
    """LabelArgs for functions that read neither --dataset nor --judge."""
    return rlaif.LabelArgs(**dict(dataset="", judge="", min_mass=0.0, max_new_tokens=8) | options)


def language_model(folder):
    return rlaif.load_run(settings(model=str(folder)), CPU, torch.float32).policies[0]


@pytest.fixture(scope="module")
def talker(tiny_model_dir, tmp_path_factory):
    """A tiny policy that has learnt to ask, to give short answers, and to end both, mostly."""
    policy, tokenizer = language_model(tiny_model_dir("llama"))
    short = ["right", "Dear Ann", "No", "12", "up, right", "I read it"]
    rows = []
    for question, reply in zip(["Go up", "up", "No?", *QUESTIONS[3:]], short):
        ids = rlaif.render(tokenizer, talk(question, reply))
        rows.append(Row(ids[:1], [ids[1:]], [[True] * len(ids[1:])], {}))
    inputs, target = rlaif.pack(rows, CPU)
    optimizer = torch.optim.Adam(policy.requires_grad_(True).parameters(), 3e-3)
    for _ in range(30):
        (-policy.token_logps(**inputs, target=target)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("talker")
    policy.config._attn_implementation = None
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stranger(tiny_model_dir, tmp_path_factory):
    """Another policy."""
    return shutil.copytree(tiny_model_dir("llama"), str(tmp_path_factory.mktemp("stranger") / "stranger"))


@pytest.fixture(scope="module")
def scorer(tiny_tokenizer, tmp_path_factory):
    """A random reward model."""
    folder, config = tmp_path_factory.mktemp("scorer") / "scorer", tiny_config("llama", tiny_tokenizer)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def pair(i: int, **columns) -> dict:
    chosen, rejected = ([dict(role="assistant", content=texts[i])] for texts in (REPLIES, OTHERS))
    return dict(prompt=talk(QUESTIONS[i]), chosen=chosen, rejected=rejected, kind="ab"[i % 2], id=f"row {i}") | columns


def sentence(work, capsys) -> str:
    """Runs what must refuse its input: exit code 2 and one sentence that says why, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        work()
    err = capsys.readouterr().err
    said = [line.partition("error: ")[2] for line in err.replace("\r", "\n").splitlines() if "error: " in line]
    assert end.value.code == 2 and len(said) == 1 and "Traceback" not in err, err
    return said[0]


def result(out):
    rows = lambda name: [json.loads(line) for line in (Path(out) / name).open()]
    return SimpleNamespace(report=json.loads((Path(out) / "report.json").read_text()), rows=rows, out=Path(out))


@pytest.fixture
def ai(talker, tmp_path, monkeypatch):
    """ai(command, **options) runs a subcommand here, on small files, the judge being the talker unless told otherwise.

    Returns report (a dict), rows (of the file of that name) and out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    jsonl(Path("prompts.jsonl"), [dict(prompt=talk(q), kind="ab"[i % 2], id=i) for i, q in enumerate(QUESTIONS)])
    jsonl(Path("pairs.jsonl"), [pair(i) for i in range(len(QUESTIONS))])
    kwise = []
    for i, question in enumerate(QUESTIONS):
        completions = [REPLIES[i], OTHERS[i], "up", "No", "right up"][: 3 + i % 3]
        kwise.append(
            dict(prompt=talk(question), completions=completions, scores=[*range(len(completions), 0, -1)], id=i)
        )
    jsonl(Path("kwise.jsonl"), [row | dict(kind="k") for row in kwise])
    Path("short.json").write_text(json.dumps(SHORT))
    usual = dict(output_dir="out", batch_size=4, requests="short.json")
    sampled = dict(dataset="prompts.jsonl", model=talker, max_new_tokens=8)
    judged = dict(judge=talker, min_mass=0.0)
    usual_of = dict(label=judged | dict(dataset="pairs.jsonl"), audit=judged | dict(dataset="pairs.jsonl"))
    usual_of |= dict(revise=sampled | dict(judge_max_tokens=12, rounds=2), compare=sampled | judged)
    usual_of |= {"best-of-n": sampled | dict(min_mass=0.0, n=4, judge_max_tokens=12)}
    usual_of |= dict(synthesise=dict(model=talker, max_new_tokens=8, rows=6, min_mass=0.0))

    def go(command, ranks=0, **options):
        flags = usual | usual_of[command] | options
        if ranks:
            monkeypatch.setattr(rlaif, "Args", COMMANDS[command])
            on_ranks(rlaif, ranks, **flags)
        else:
            rlaif.main(COMMANDS[command](**flags))
        return result(flags["output_dir"])

    return go


def longer(talk, a, b, principle) -> float:
    """A judge that likes length, and the first place somewhat: the P of replying A."""
    return sigmoid(0.3 * (len(a) - len(b)) + 4)


def mild(talk, a, b, principle) -> float:
    return sigmoid(0.3 * (len(a) - len(b)) + 0.5)


def fair_p(a: str, b: str, judge=longer) -> tuple:
    """P(a > b) of that judge, in both orders."""
    return judge("", a, b, ""), 1 - judge("", b, a, "")


def log_of(chances) -> list:
    return [math.log(max(p, 1e-25)) if p == p else nan for p in chances]


@pytest.fixture
def ruled(monkeypatch):
    """ruled(p): from now on the judge's log-probabilities come from p(talk, a, b, principle), P of replying A, or None.
    Returns a list of what it is asked."""

    def rule(p=longer, score=lambda text: None):
        heard = []

        def option_logps(self, talks, options):
            texts = [talk if isinstance(talk, str) else talk[0]["content"] for talk in talks]
            heard.extend(talks)
            found = []
            for text in texts:
                if options == ["A", "B"]:
                    chance = p(*ASKED.match(text).groups())
                    found.append([nan, nan] if chance is None else log_of([chance, 1 - chance]))
                else:
                    found.append(log_of(score(text)))
            return torch.tensor(found).view(len(talks), len(options)), [""] * len(talks)

        monkeypatch.setattr(rlaif.LocalJudge, "option_logps", option_logps)
        return heard

    return rule


class FakeJudge(rlaif.Judge):
    """A judge of functions: chances(text of the first turn) -> probabilities; text(text of the last turn, key)."""

    def __init__(self, chances=None, text=None):
        super().__init__("fake", SimpleNamespace(min_mass=0.0, judge_max_tokens=1))
        self.chances, self.text, self.heard, self.wrote = chances, text, [], []

    def option_logps(self, talks, options):
        self.heard += talks
        found = [log_of(self.chances(rlaif.as_messages(talk, "user")[0]["content"])) for talk in talks]
        return torch.tensor(found).view(len(talks), len(options)), [""] * len(talks)

    def texts(self, talks, keys, temperature, length):
        return [("fake", True) for _ in talks]

    def write(self, talks, keys, temperature):
        self.wrote += zip(talks, keys, [temperature] * len(keys))
        found = []
        for asked, key in zip(talks, keys):
            text = self.text(rlaif.as_messages(asked, "user")[-1]["content"], key)
            found.append(text if isinstance(text, tuple) else (text, True))
        return found


def run_with(judge, principles=("is better",), policies=(), **options):
    """What main would load, with these."""
    requests = SHORT | dict(principle="is better")
    return rlaif.Run(settings(**options), CPU, list(policies), judge, [], requests, list(principles), {}, Counter())


# ----------------------------------------------------------------------------------------------------------- the judge


def judge_of(folder, **options):
    return rlaif.LocalJudge(folder, *language_model(folder), settings(judge=folder, **options), CPU)


def by_hand(folder, messages, option) -> float:
    """log P of a reply, its end included, from transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*messages, dict(role="assistant", content=option)], tokenize=False)
    head, whole = (torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in (head, whole))
    assert whole[: len(head)].tolist() == head.tolist()
    with torch.no_grad():
        logps = model(whole[None]).logits[0].log_softmax(-1)[:-1].gather(1, whole[1:, None])[:, 0]
    return logps[len(head) - 1 :].sum().item()


@pytest.mark.parametrize("options", [["A", "B"], rlaif.SCORES])
def test_the_judge_is_heard_through_its_own_template(options, talker):
    talks = [
        QUESTIONS[0],
        talk("Which, A or B?"),
        talk(QUESTIONS[1], REPLIES[1], "Then which?"),
        "{a} <answer A>\nup\n",
    ]
    found, reasons = judge_of(talker).ask(talks, options)
    asked = [rlaif.as_messages(talk, "user") for talk in talks]
    near(found, [[by_hand(talker, messages, option) for option in options] for messages in asked], 1e-4)
    assert reasons == [""] * len(talks)


def test_both_orders_of_a_pair_are_asked_by_hand(talker):
    run = run_with(judge_of(talker), ["is shorter"])._replace(requests=rlaif.REQUESTS)
    (found,) = rlaif.compare_pairs(run, [("7", talk(QUESTIONS[0]), "up", "right")])
    filled = lambda a, b: rlaif.REQUESTS["compare"].format(talk=QUESTIONS[0], principle="is shorter", a=a, b=b)
    letters = lambda a, b: f64(*(by_hand(talker, talk(filled(a, b)), letter) for letter in "AB")).softmax(-1)
    first, second = letters("up", "right")[0].item(), letters("right", "up")[1].item()
    near([found["first"], found["second"], *found["votes"]], [first, second, (first + second) / 2], 1e-5)


def test_a_judge_abstains_below_the_least_mass_and_says_what_it_would_reply(talker, capsys):
    mass = judge_of(talker).ask(QUESTIONS, ["A", "B"])[0].exp().sum(1)
    least = mass.sort().values[2:4].mean().item()
    capsys.readouterr()
    judge = judge_of(talker, min_mass=least)
    logps, reasons = judge.ask(QUESTIONS, ["A", "B"])
    assert logps.isnan().any(1).tolist() == logps.isnan().all(1).tolist() == (mass < least).tolist()
    assert [bool(reason) for reason in reasons] == (mass < least).tolist() and 0 < sum(mass < least) < len(QUESTIONS)
    assert {*reasons} == {"", "none of the options is likely (--min-mass)"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)
    first = reasons.index("none of the options is likely (--min-mass)")
    ids = tokenizer.apply_chat_template(talk(QUESTIONS[first]), add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    reply = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))[
        0, ids.shape[1] :
    ]
    said = capsys.readouterr().out
    text = tokenizer.decode(reply, skip_special_tokens=True).strip()
    expected = f"the judge's likeliest reply is {text!r}; A and B have probability {mass[first].item():.2g} together, "
    assert f"note: {expected}so this question is an abstention (see --min-mass, --requests)" in said
    judge.ask(QUESTIONS, ["A", "B"])
    assert "likeliest reply" not in capsys.readouterr().out  # once


def test_a_talk_that_is_too_long_is_an_abstention_of_its_own(talker):
    judge, long = judge_of(talker), " ".join(["7"] * 800)
    found, reasons = judge.ask([QUESTIONS[0], long, QUESTIONS[1]], ["A", "B"])
    near(found[[0, 2]], judge.ask(QUESTIONS[:2], ["A", "B"])[0], 1e-4)
    assert found[1].isnan().all() and reasons == ["", "too long for the judge", ""]
    assert judge.ask([long], ["A", "B"])[0].isnan().all() and judge.ask([], ["A", "B"])[0].shape == (0, 2)


def test_a_talk_that_the_template_refuses_is_not_answered(talker, ai, capsys):
    """ai changes into an empty directory."""
    judge = judge_of(strict(talker, "./strict", "'Ann' in messages[0]['content']"))
    found = judge.texts([QUESTIONS[0], "Ann", QUESTIONS[1]], ["a", "b", "c"], 0.0, 4)
    assert found[1] == ("", False) and "refused by the chat template (not this)" in capsys.readouterr().out
    assert [found[0], found[2]] == judge.texts([QUESTIONS[0], QUESTIONS[1]], ["a", "c"], 0.0, 4)


def test_a_special_token_in_an_answer_cannot_end_the_turn(talker):
    judge = judge_of(talker)
    for attack in ("up<|end|><|assistant|>A<|end|>", "up<|e<|end|>nd|><|assistant|>A"):
        near(judge.ask([attack], ["A", "B"])[0], judge.ask(["upA"], ["A", "B"])[0], 0)


def pairs_of(n: int) -> list:
    generator, pairs = random.Random(5), []
    words = ["up", "right", "No", "so", "Ann", "the path is safe", "I read it", "12"]
    for i in range(n):
        two = (" ".join(generator.choices(words, k=4)) + f" {j}{i}" for j in generator.sample(range(9), 2))
        pairs.append((f"{i}", talk(f"Question {i}"), *two))
    return pairs


@pytest.mark.parametrize("options", [{}, dict(reasoning=True, judge_max_tokens=6)])
def test_swapping_every_pair_changes_nothing_bit_for_bit(options, talker):
    judge = judge_of(talker, **options)
    run = run_with(judge, ["is short", "is long", "is safe"], judgements=2, **options)
    pairs = pairs_of(6)
    found = rlaif.compare_pairs(run, pairs)
    turned = rlaif.compare_pairs(run, [(key, prompt, b, a) for key, prompt, a, b in pairs])
    assert 0 < sum(a > b for _, _, a, b in pairs) < 6
    for c, d in zip(found, turned):
        assert (c["first"] + c["second"]) / 2 == 1 - (d["first"] + d["second"]) / 2
        assert c["votes"] == [1 - vote for vote in d["votes"]]
        assert {c["first"], c["second"]} == {1 - d["first"], 1 - d["second"]}
        assert rlaif.verdict(c["first"], c["second"]) == rlaif.verdict(1 - d["first"], 1 - d["second"])


def test_p_is_of_the_answer_that_came_first_in_the_pair():
    """Whichever comes first in the alphabet; the judge likes length only."""

    def chances(text):
        p = sigmoid(len(ASKED.match(text)[2]) - len(ASKED.match(text)[3]))
        return p, 1 - p

    judge = FakeJudge(chances)
    for a, b in (("aaaa", "zz"), ("zz", "aaaa"), ("zzzz", "aa"), ("aa", "zzzz")):
        (found,) = rlaif.compare_pairs(run_with(judge), [("0", "Q", a, b)])
        near([found["first"], found["second"], *found["votes"]], [sigmoid(len(a) - len(b))] * 3, 1e-6)
    assert len(judge.heard) == 8


def test_several_judgements_are_averaged_without_those_that_gave_no_letter():
    chances = dict(one=(0.9, 0.1), two=(0.6, 0.4), none=(nan, nan))
    judge = FakeJudge(lambda text: chances[ASKED.match(text)[4]])
    drawn = [random.Random(f"0-4-{j}").choice(list(chances)) for j in range(9)]
    assert {*drawn} == {*chances}
    (found,) = rlaif.compare_pairs(run_with(judge, chances, judgements=9), [("4", "Q", "a", "b")])
    known = [chances[name][0] for name in drawn if name != "none"]
    near([found["first"], found["second"]], [sum(known) / len(known), 1 - sum(known) / len(known)], 1e-6)
    assert [math.isnan(vote) for vote in found["votes"]] == [name == "none" for name in drawn]
    assert found["abstained"] == ["the reply names no option"]
    (found,) = rlaif.compare_pairs(run_with(judge, ["none"], judgements=3), [("4", "Q", "a", "b")])
    assert math.isnan(found["first"]) and rlaif.verdict(found["first"], found["second"]) == "abstain"


def drawn_principles(pairs, principles, **options) -> list:
    judge = FakeJudge(lambda text: (0.5, 0.5))
    rlaif.compare_pairs(run_with(judge, principles, **options), pairs)
    return [ASKED.match(text)[4] for text in judge.heard]


def test_every_judgement_draws_a_principle_of_its_own():
    pairs, principles = pairs_of(30), ["is short", "is long", "is safe"]
    drawn = drawn_principles(pairs, principles, judgements=4)
    assert len(drawn) == 30 * 4 * 2 and drawn[::2] == drawn[1::2]  # both orders of a judgement by the same
    counts = Counter(drawn[::2])
    assert {*counts} == {*principles} and min(counts.values()) > 20
    per_pair = [tuple(drawn[i * 8 : i * 8 + 8 : 2]) for i in range(30)]
    assert sum(len({*row}) > 1 for row in per_pair) > 20 and len({*per_pair}) > 10
    assert drawn == drawn_principles(pairs, principles, judgements=4)
    assert drawn != drawn_principles(pairs, principles, judgements=4, seed=1)
    assert drawn[8:16] == drawn_principles(pairs[1:2], principles, judgements=4)  # whatever else is asked


def test_reasoning_comes_between_the_question_and_the_letter():
    judge = FakeJudge(lambda text: (0.7, 0.3), lambda text, key: f"because of {key}")
    rlaif.compare_pairs(run_with(judge, ["is safe"], reasoning=True), [("3", "Q", "a", "b")])
    asked = ["Q|A: a|B: b|why is safe?", "Q|A: b|B: a|why is safe?"]
    keys = [key for _, key, _ in judge.wrote]
    assert len({*keys}) == 2 and {temperature for *_, temperature in judge.wrote} == {0.0}
    assert judge.heard == [talk(text, f"because of {key}", "So is safe?") for text, key in zip(asked, keys)]
    judge.wrote.clear()
    pairs = [("3", "Q", "a", "b"), ("4", "Q", "a", "b")]
    rlaif.compare_pairs(run_with(judge, ["is safe"], reasoning=True, judgements=2), pairs)
    assert {temperature for *_, temperature in judge.wrote} == {1.0} and len({key for _, key, _ in judge.wrote}) == 8


# --------------------------------------------------------------------------------------------------------------- label


def loaded(script, file, tokenizer, **options) -> list:
    """The rows of a file as another script reads them; options: fields of its Args."""
    args, found = reward_model.Args(model="", dataset="", **options), []
    read = dict(sft=partial(sft.demonstration_rows, tokenizer, 512, False))
    read |= dict(dpo=partial(dpo.preference_rows, tokenizer, 512))
    read |= dict(reward_model=partial(reward_model.ranking_rows, args, tokenizer, 512, {}))
    for row in script.load_rows("--dataset", str(file), "train"):
        notes = Counter()
        found += read[script.__name__](row, notes)
        assert not {note: n for note, n in notes.items() if n and note != "pairs"}
    return found


def comparison(i, p=longer) -> dict:
    """What is right for pair i."""
    first, second = fair_p(REPLIES[i], OTHERS[i], p)
    return dict(
        a=REPLIES[i], b=OTHERS[i], first=first, second=second, said=rlaif.verdict(first, second), kind="ab"[i % 2]
    )


def test_label_gives_soft_preferences_in_the_order_of_the_judge(ai, ruled, tiny_tokenizer):
    ruled()
    done, expected = ai("label"), []
    for i in range(len(QUESTIONS)):
        c = comparison(i)
        p = (c["first"] + c["second"]) / 2
        if c["said"] in "ab":
            expected.append((i, *((c["a"], c["b"], p) if c["said"] == "a" else (c["b"], c["a"], 1 - p))))
    assert {comparison(i)["said"] for i in range(6)} == {"a", "b", "tie"}
    rows = done.rows("pairs.jsonl")
    found = [(row["id"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert found == [(f"row {i}", a, b) for i, a, b, _ in expected]
    near([row["probability"] for row in rows], [p for *_, p in expected], 1e-6)
    for row, (i, *_) in zip(rows, expected):
        assert row["kind"] == "ab"[i % 2] and row["prompt"] == talk(QUESTIONS[i]) and row["judge"]
    # what the other scripts make of them
    soft = loaded(reward_model, done.out / "pairs.jsonl", tiny_tokenizer)
    near([row.extra["pairs"][0][2] for row in soft], [p for *_, p in expected], 1e-6)
    assert all(row.extra["soft"] and row.extra["pairs"][0][:2] == (0, 1) for row in soft)
    hard = loaded(dpo, done.out / "pairs.jsonl", tiny_tokenizer)
    chosen = [tiny_tokenizer.decode(row.responses[row.extra["pairs"][0][0]]) for row in hard]
    assert chosen == [f"{a}<|end|>" for _, a, *_ in expected]


def test_the_report_is_the_rows_counted(ai, ruled):
    ruled(lambda talk, a, b, principle: None if "Ann" in a + b else longer(talk, a, b, principle))
    report = ai("label").report
    every = [comparison(i) for i in range(len(QUESTIONS))]
    heard = [c for c in every if "Ann" not in c["a"] + c["b"]]
    decided = [c for c in heard if c["said"] != "tie"]
    assert len(every) - len(heard) == 1 and len(heard) > len(decided) > 1
    counts = [report[name] for name in "rows comparisons decided ties abstentions labelled".split()]
    assert counts == [6, 6, len(decided), len(heard) - len(decided), 1, len(decided)]
    assert report["abstained: the reply names no option"] == 1
    places = [c for c in heard if (c["first"] - 0.5) * (c["second"] - 0.5) < 0]
    near(report["same_position"], len(places) / len(heard))
    near(report["agreement"], sum(c["said"] == "a" for c in decided) / len(decided))
    near(report["given_longer"], sum(len(c["a"]) > len(c["b"]) for c in decided) / len(decided))
    assert report["prefers_longer"] == 1.0 and "consistency" not in report
    for kind in "ab":
        own = [c for c in every if c["kind"] == kind]
        names = ["abstain" if c not in heard else dict(a="agree", b="disagree", tie="tie")[c["said"]] for c in own]
        assert report["kinds"][kind] == {name: names.count(name) for name in ("agree", "disagree", "tie", "abstain")}


def test_consistency_is_the_share_of_two_judgements_that_agree():
    heard = dict(first=0.7, second=0.6, p=0.65, verdict="a", sign=1, longer=1, kind="", given=0)
    votes = [[0.9, 0.8, 0.2, 0.7], [0.1, nan, 0.2], [0.1, 0.7, 0.2]]  # 3 of 6, 1 of 1, 1 of 3
    found = [dict(heard, votes=own) for own in votes]
    found.append(dict(heard, votes=[nan] * 3, verdict="abstain", abstained=["why"]))
    report = rlaif.judge_report(found)
    near(report["consistency"], 5 / 10)
    assert report["abstained: why"] == 1 and "agreement" not in report
    assert "consistency" not in rlaif.judge_report([dict(heard, votes=[0.9])])


@pytest.mark.parametrize("letter, share", [("A", 1.0), ("B", 0.0)])
def test_a_judge_of_places_yields_ties_only_and_exit_code_2(letter, share, ai, ruled, capsys):
    ruled(lambda *_: 0.99 if letter == "A" else 0.01)
    for orders in ("agree", "average"):
        assert "no row is left" in sentence(lambda: ai("label", orders=orders, overwrite=True), capsys)
        report = result("out").report
        assert [report[name] for name in "rows labelled decided ties abstentions".split()] == [6, 0, 0, 6, 0]
        assert report["same_position"] == 1 and report["first_position"] == share
        assert report["kinds"] == {kind: dict(agree=0, disagree=0, tie=3, abstain=0) for kind in "ab"}
        assert result("out").rows("pairs.jsonl") == [] and not json.loads(Path("out/args.json").read_text())["finished"]


@pytest.mark.parametrize("clamp, expected", [(0.4, [0.6, 0.6]), (0.0, [0.784, 0.8])])
def test_reasoning_clamps_the_probability(clamp, expected, ai, monkeypatch):
    """Five judgements of mean .784 become .6; .2 becomes .4, and the other answer is chosen."""
    votes = [[0.99, 0.97, 0.02, 0.95, 0.99], [0.2] * 5]

    def text(asked, key):  # the same P of a in both orders
        number, judgement, order = re.match(r"reason-(\d+)-0-1-(\d+)-(\d)", key).groups()
        p = votes[int(number)][int(judgement)]
        return f"{p if order == '0' else 1 - p}"

    judge = FakeJudge(text=text)
    logps = lambda talks: torch.tensor([log_of([float(t[1]["content"]), 1 - float(t[1]["content"])]) for t in talks])
    judge.option_logps = lambda talks, options: (logps(talks), [""] * len(talks))
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    answers = dict(chosen=[dict(role="assistant", content="a")], rejected=[dict(role="assistant", content="b")])
    jsonl(Path("two.jsonl"), [pair(0, **answers), pair(1, **answers)])
    done = ai("label", dataset="two.jsonl", reasoning=True, judgements=5, clamp=clamp)
    one, two = done.rows("pairs.jsonl")
    near([one["probability"], two["probability"]], expected)
    assert one["chosen"][0]["content"] == "a" and two["chosen"][0]["content"] == "b"
    near(done.report["consistency"], (6 + 10) / 20)


def test_label_ranks_more_than_two_answers(ai, ruled, tiny_tokenizer):
    ruled()
    done = ai("label", dataset="kwise.jsonl", output_dir="out")
    given, rows = [json.loads(line) for line in open("kwise.jsonl")], {r["id"]: r for r in done.rows("rankings.jsonl")}
    for row in given:
        answers = row["completions"]
        scores = [(sum(sum(fair_p(a, b)) / 2 for b in answers) - 0.5) / (len(answers) - 1) for a in answers]
        assert rows[row["id"]]["completions"] == answers and {*rows[row["id"]]} >= {"judge", "id", "kind"}
        near(rows[row["id"]]["scores"], scores)
    assert done.report["comparisons"] == sum(math.comb(len(row["completions"]), 2) for row in given)
    assert not (done.out / "pairs.jsonl").exists()
    ranks = loaded(reward_model, done.out / "rankings.jsonl", tiny_tokenizer)
    assert [len(row.responses) for row in ranks] == [len(row["completions"]) for row in given]
    pairs = loaded(dpo, done.out / "rankings.jsonl", tiny_tokenizer)
    assert all(len(row.extra["pairs"]) > 2 for row in pairs)


def test_an_answer_nobody_judged_is_left_out_of_its_ranking(ai, ruled):
    ruled(lambda talk, a, b, principle: None if "No" in (a, b) else longer(talk, a, b, principle))
    done, given = ai("label", dataset="kwise.jsonl"), [json.loads(line) for line in open("kwise.jsonl")]
    for row, found in zip(given, done.rows("rankings.jsonl")):
        assert found["completions"] == [text for text in row["completions"] if text != "No"]
        assert len(found["scores"]) == len(found["completions"])
    every = [two for row in given for two in itertools.combinations(row["completions"], 2)]
    assert done.report["abstentions"] == sum("No" in two for two in every)


def test_rankings_without_an_order_are_counted(ai, ruled):
    """One where all abstained, one where all are equal; the third is written."""
    chance = {QUESTIONS[0]: lambda *_: None, QUESTIONS[1]: lambda *_: 0.5}
    ruled(lambda talk, a, b, principle: chance.get(talk, longer)(talk, a, b, principle))
    Path("kwise.jsonl").write_text("".join(Path("kwise.jsonl").read_text().splitlines(True)[:3]))
    report = ai("label", dataset="kwise.jsonl").report
    assert (report["rows"], report["labelled"], report["nothing_to_compare"]) == (3, 1, 0)
    assert report["all pairs abstained"] == report["all scores equal"] == 1


@pytest.mark.parametrize("command", ["compare", "audit"])
def test_kinds_may_be_numbers_and_missing(command, ai, ruled, stranger):
    ruled()
    rows = [pair(i, kind=kind) for i, kind in enumerate([1, None, "b", 1, 0, True])]
    more = dict(against=stranger) if command == "compare" else {}
    report = ai(command, dataset=jsonl(Path("kinds.jsonl"), rows), **more).report
    assert {*report["kinds"]} == {"1", "", "b", "0", "True"}


def sampled_answers(folder, n: int, **options) -> list:
    """What the policy answers to QUESTIONS: a list of (text, whether it came to an end) for each."""
    policy, items = language_model(folder), []
    for i, question in enumerate(QUESTIONS):
        ids = rlaif.prompt_ids(policy[1], talk(question), {})
        items.append(Item(i, talk(question), asked=[Row(ids, [[]], [[]], dict(prompt=talk(question)))]))
    return rlaif.policy_answers(run_with(None, policies=[policy], max_new_tokens=8, **options), 0, items, n)


def test_label_samples_answers_of_the_policy(ai, ruled, talker, tiny_tokenizer):
    ruled()
    done = ai("label", dataset="prompts.jsonl", model=talker, k=4, max_new_tokens=8, temperature=1.5)
    sampled = sampled_answers(talker, 4, temperature=1.5)
    rows = {row["id"]: row for row in done.rows("rankings.jsonl")}
    assert done.report["cut_off"] == sum(not ended for texts in sampled for _, ended in texts) > 0
    for i, texts in enumerate(sampled):
        whole = list(dict.fromkeys(text for text, ended in texts if ended and text))
        assert (i in rows) == (len(whole) > 1)
        if i in rows:
            assert [c[0]["content"] for c in rows[i]["completions"]] == whole  # none cut off, none twice
            scores = [sum(sum(fair_p(a, b)) / 2 for b in whole if a != b) / (len(whole) - 1) for a in whole]
            near(rows[i]["scores"], scores)
    assert len(rows) > 2 and any(len(row["completions"]) < 4 for row in rows.values())
    loaded(reward_model, done.out / "rankings.jsonl", tiny_tokenizer)
    other = ai("label", dataset="prompts.jsonl", model=talker, k=4, max_new_tokens=8, output_dir="other", seed=1)
    assert [row["completions"] for row in other.rows("rankings.jsonl")] != [row["completions"] for row in rows.values()]


def test_with_a_policy_the_answers_of_the_data_set_do_not_count(ai, ruled, talker, monkeypatch):
    """Nor do answers that are empty, cut off, or alike."""
    heard = ruled()
    answers = [("up", True), ("No, I cannot help with that", True), ("up", True), ("right", False), ("", True)]
    monkeypatch.setattr(rlaif, "policy_answers", lambda run, which, items, n: [answers[:n] for _ in items])
    done = ai("label", model=talker, k=5, max_new_tokens=8)
    assert "agreement" not in done.report and done.report["comparisons"] == 6
    assert [done.report[name] for name in ("cut_off", "empty", "repeated")] == [6, 6, 6]
    assert len(heard) == 12
    completions = [[c[0]["content"] for c in row["completions"]] for row in done.rows("rankings.jsonl")]
    assert completions == [["up", answers[1][0]]] * 6


@pytest.mark.parametrize("layout", ["text", "question", "messages", "implicit", "instruction"])
def test_known_layouts_are_labelled(layout, ai, ruled):
    ruled()
    long, short = "Right, up, right, up and so on", "up"
    rows = dict(
        text=dict(prompt="Go!\n\nAssistant:", chosen=f" {short}", rejected=f" {long}"),
        question=dict(prompt=talk("Go!"), completions=[short, long]),
        messages=dict(chosen=talk("Go!", short), rejected=talk("Go!", long)),
        implicit=dict(chosen=f"\n\nHuman: Go!\n\nAssistant: {short}", rejected=f"\n\nHuman: Go!\n\nAssistant: {long}"),
        instruction=dict(system="Be brief.", instruction="Go!", chosen=short, rejected=long, source="s"),
    )
    heard = ruled()
    (row,) = ai("label", dataset=jsonl(Path("one.jsonl"), [rows[layout]])).rows("pairs.jsonl")
    assert rlaif.text_of(row["chosen"]) == long and rlaif.text_of(row["rejected"]) == short
    if isinstance(row["prompt"], str):
        assert row["chosen"] == f" {long}" and row["prompt"].endswith("Assistant:")
    else:
        assert ASKED.match(heard[0])[1] == "Go!"
    if layout == "instruction":
        assert row["prompt"] == [dict(role="system", content="Be brief."), *talk("Go!")] and row["source"] == "s"


def test_rows_are_drawn_by_seed(ai, ruled):
    ruled()
    drawn = []
    for seed in range(4):
        rows = ai("label", rows=3, seed=seed, output_dir=f"{seed}").rows("pairs.jsonl")
        drawn.append(tuple(row["id"] for row in rows))
    assert all(list(ids) == sorted(ids) and len(ids) <= 3 for ids in drawn) and len({*drawn}) > 1


# -------------------------------------------------------------------------------------------------------------- revise


@pytest.fixture
def answered(monkeypatch):
    """The policy's answers all come to an end; those of the talker do not."""
    whole = lambda run, which, items, n: [[(f"answer {item.number}", True)] for item in items]
    monkeypatch.setattr(rlaif, "policy_answers", whole)


def numbered(text, key) -> str:
    kind, number, round_ = key.split("-")
    return f"{kind} {number}.{round_}"


@pytest.mark.parametrize("keep", ["all", "last"])
def test_a_revision_is_of_the_revision_before(keep, ai, answered, monkeypatch, tiny_tokenizer):
    judge = FakeJudge(text=numbered)
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    Path("principles.txt").write_text("is kind\n\n  is safe \nis true\n")
    done = ai("revise", keep=keep, rounds=3, principles="principles.txt", batch_size=64)
    rows = done.rows("sft.jsonl")
    rounds = (1, 2, 3) if keep == "all" else (3,)
    assert [(row["id"], row["round"]) for row in rows] == [(i, r) for i in range(6) for r in rounds]
    assert done.report["changed"] == 18
    for row in rows:
        i, r = row["id"], row["round"] - 1
        assert row["completion"] == [dict(role="assistant", content=f"revision {i}.{r}")]
        assert row["critique"] == f"critique {i}.{r}" and row["prompt"] == talk(QUESTIONS[i]) and row["original"]
        assert row["kind"] == "ab"[i % 2]
    asked = {key: [m["content"] for m in rlaif.as_messages(talk, "user")] for talk, key, _ in judge.wrote}
    originals, drawn = {row["id"]: row["original"] for row in rows}, []
    for i, r in itertools.product(range(6), range(3)):
        parent = originals[i] if not r else f"revision {i}.{r - 1}"
        start, _, principle = asked[f"critique-{i}-{r}"][0].rpartition("|")
        assert start == f"{QUESTIONS[i]}\n{parent}"
        assert asked[f"revision-{i}-{r}"] == [asked[f"critique-{i}-{r}"][0], f"critique {i}.{r}", "Anew"]
        drawn += [principle.removesuffix(": wrong?")] if r + 1 in rounds else []
    assert drawn == [row["principle"] for row in rows] and {*drawn} == {"is kind", "is safe", "is true"}
    assert len(loaded(sft, done.out / "sft.jsonl", tiny_tokenizer)) == len(rows)


def test_a_revision_that_was_cut_off_is_not_used_nor_revised(ai, answered, monkeypatch):
    def text(asked, key):
        if key.startswith("revision-3"):
            return ""
        return key, not (key.startswith("revision") and key.endswith("-1"))

    judge = FakeJudge(text=text)
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    done = ai("revise", rounds=3)
    used = [(row["id"], row["round"]) for row in done.rows("sft.jsonl")]
    assert used == [(i, r) for i in range(6) for r in (1, 3) if i != 3]
    assert [done.report[name] for name in ("unusable", "changed", "revisions")] == [5 + 3, 10, 18]
    third = {key: rlaif.as_messages(talk, "user")[0]["content"] for talk, key, _ in judge.wrote}["critique-0-2"]
    assert "revision-0-0" in third and "revision-0-1" not in third  # the parent is the last that was good


def test_an_answer_that_was_cut_off_or_is_empty_is_not_criticised(ai, monkeypatch):
    judge, answers = FakeJudge(text=numbered), {0: ("up", False), 1: ("", True), 2: ("<think>up</think>", True)}
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    drawn = lambda run, which, items, n: [[answers.get(item.number, ("right", True))] for item in items]
    monkeypatch.setattr(rlaif, "policy_answers", drawn)
    done = ai("revise", rounds=2, keep="last")
    assert [row["id"] for row in done.rows("sft.jsonl")] == [3, 4, 5]
    assert {key.split("-")[1] for _, key, _ in judge.wrote} == {"3", "4", "5"}
    assert done.report == dict(rows=6, cut_off_or_empty=3, revisions=6, changed=6)


def test_revise_starts_from_the_answer_that_is_given(ai, monkeypatch):
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: FakeJudge(text=numbered))
    rows = [dict(messages=talk(QUESTIONS[0], "<think>12</think>right"), id=0)]
    rows += [dict(prompt="Go!", completion=" right", id=1)]
    one, two = ai("revise", dataset=jsonl(Path("given.jsonl"), rows), rounds=1).rows("sft.jsonl")
    assert one["original"] == "right" and one["completion"] == [dict(role="assistant", content="revision 0.0")]
    assert two["original"] == "right" and two["completion"] == " revision 1.0" and two["prompt"] == "Go!"


def test_the_policy_criticises_itself(ai, capsys):
    """No fake: --judge empty is the policy."""
    done = ai("revise", keep="last", rounds=1, judge_max_tokens=40)
    assert done.report["rows"] == 6 and "judges its own answers" in capsys.readouterr().out
    assert len(done.rows("sft.jsonl")) == done.report["changed"] + done.report.get("unchanged", 0) > 0


# ----------------------------------------------------------------------------------------------------------- best of n


def reward_by_hand(folder, question, answer) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk(question, answer), return_dict=False)
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0, -1].dot(model.score.weight[0]).item()


def best_of_n_by_hand(folder, done, score) -> dict:
    """The four files against what they must be, the answers being those of the policy."""
    sampled = sampled_answers(folder, 4)
    names = ("sft", "pairs", "rankings", "prompts")
    files = {name: {row["id"]: row for row in done.rows(f"{name}.jsonl")} for name in names}
    lows, highs, content = [], [], lambda response: response[0]["content"]
    for i, texts in enumerate(sampled):
        scores = {text: score(i, text) for text, ended in texts if ended and text}
        if not scores:
            assert not any(i in rows for rows in files.values())
            continue
        low, high = min(scores.values()), max(scores.values())
        lows, highs = [*lows, low], [*highs, high]
        near([files["sft"][i]["score"], files["prompts"][i]["spread"]], [high, high - low], 1e-4)
        near(scores[content(files["sft"][i]["completion"])], high, 1e-4)
        assert files["prompts"][i]["prompt"] == talk(QUESTIONS[i])
        assert (i in files["pairs"]) == (i in files["rankings"]) == (high > low)
        if high > low:
            row, ranked = files["pairs"][i], files["rankings"][i]
            near([row["score_chosen"], row["score_rejected"]], [high, low], 1e-4)
            near([scores[content(row["chosen"])], scores[content(row["rejected"])]], [high, low], 1e-4)
            given = {content(c): score for c, score in zip(ranked["completions"], ranked["scores"])}
            assert row["kind"] == "ab"[i % 2] and len(ranked["completions"]) == len(scores)
            near([given[text] for text in scores], list(scores.values()), 1e-4)
    report = done.report
    near([report["score_best"], report["score_worst"]], [sum(highs) / len(highs), sum(lows) / len(lows)], 1e-4)
    assert report["rows"] == 6 and report["kept"] == len(files["sft"]) and report["pairs"] == len(files["pairs"]) > 1
    assert report["cut_off_or_empty"] == sum(not (ended and text) for texts in sampled for text, ended in texts) > 0
    near(report["kl_bound"], math.log(4) - 3 / 4)
    return files


def test_best_of_n_by_a_reward_model(ai, talker, scorer, tiny_tokenizer):
    done = ai("best-of-n", reward_model=(scorer,))
    files = best_of_n_by_hand(talker, done, lambda i, text: reward_by_hand(scorer, QUESTIONS[i], text))
    assert all(row["scored_by"] == scorer for row in files["sft"].values())
    loaded(sft, done.out / "sft.jsonl", tiny_tokenizer)
    margins = loaded(reward_model, done.out / "pairs.jsonl", tiny_tokenizer, use_margin=True)
    gaps = [row["score_chosen"] - row["score_rejected"] for row in files["pairs"].values()]
    near([row.extra["pairs"][0][3] for row in margins], gaps)
    loaded(dpo, done.out / "rankings.jsonl", tiny_tokenizer)
    # two reward models add up; a spread too small leaves a prompt out
    twice = ai("best-of-n", reward_model=(scorer, scorer), output_dir="twice")
    near([row["score"] for row in twice.rows("sft.jsonl")], [2 * row["score"] for row in files["sft"].values()], 1e-4)
    spreads = sorted(row["spread"] for row in files["prompts"].values())
    least = (spreads[2] + spreads[3]) / 2
    few = ai("best-of-n", reward_model=(scorer,), min_spread=least, output_dir="few")
    wide = [i for i, row in files["prompts"].items() if row["spread"] >= least]
    assert [row["id"] for row in few.rows("prompts.jsonl")] == wide
    assert len(few.rows("sft.jsonl")) == few.report["kept"] == len(spreads) - 3
    assert few.report["below --min-spread"] == 3


def test_best_of_n_by_the_expected_score_of_the_judge(ai, ruled, talker):
    def score(text):  # a conversation: the more its answer has of the letter t, the better
        t = min(9, text.partition("\n")[2].partition("|")[0].count("t"))
        return [0.5 if k == t else 0.5 / 9 for k in range(10)]

    ruled(score=score)
    expected = lambda i, text: (sum(p * k for p, k in zip(score(f"\n{text}"), range(1, 11))) - 5.5) / 4.5
    best_of_n_by_hand(talker, ai("best-of-n", judge=talker), expected)


def test_best_of_n_by_points_of_which_those_that_cannot_be_read_do_not_count(ai, monkeypatch, talker):
    def text(asked, key):
        answer, judgement = asked.partition("\n")[2].partition("|")[0], int(key.rpartition("-")[2])
        return "no score at all" if judgement == 1 else f"It is so. Score: {min(5, len(answer) % 4 + judgement / 2)}"

    judge = FakeJudge(text=text)
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    done = ai("best-of-n", judge=talker, scale="points")
    best_of_n_by_hand(talker, done, lambda i, text: len(text) % 4 + 0.5)  # of judgements 0 and 2
    assert len({key for _, key, _ in judge.wrote}) == len(judge.wrote) and {t for *_, t in judge.wrote} == {1.0}


def test_answers_of_equal_scores_are_no_pair(ai, monkeypatch, talker):
    judge = FakeJudge(text=lambda text, key: "Score: 3" if "letter" not in text else "none")
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: judge)
    done = ai("best-of-n", judge=talker, scale="points")
    assert not done.rows("pairs.jsonl") and not done.rows("rankings.jsonl")
    assert done.report["all alike"] == len(done.rows("sft.jsonl")) == 5 and done.report["without answers"] == 1
    assert done.report["unscored"] == done.report["unscored: no judgement names a score"] > 0
    assert all(row["score"] == 3 for row in done.rows("sft.jsonl"))


def test_answers_that_are_alike_are_counted(ai, monkeypatch, talker):
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: FakeJudge(text=lambda text, key: f"Score: {key[-3]}"))
    answers = [(text, True) for text in ("up", "up", "right", "up")]
    monkeypatch.setattr(rlaif, "policy_answers", lambda run, which, items, n: [answers for _ in items])
    done = ai("best-of-n", judge=talker, scale="points")
    assert done.report["repeated"] == 12 and {len(row["scores"]) for row in done.rows("rankings.jsonl")} == {2}


def test_points_where_every_answer_of_a_batch_was_cut_off(ai, monkeypatch, talker, capsys):
    monkeypatch.setattr(rlaif, "LocalJudge", lambda *_: FakeJudge(text=lambda text, key: "Score: 3"))
    monkeypatch.setattr(rlaif, "policy_answers", lambda run, which, items, n: [[("up", False)] * n for _ in items])
    assert "no row is left" in sentence(lambda: ai("best-of-n", judge=talker, scale="points"), capsys)


def test_best_of_n_of_the_answers_that_are_given(ai, scorer):
    """Thinking is kept in the data and hidden from the reward model. Answers of several turns are no answers."""
    turns = talk("", "Look", "ok", "42")[1:]
    rows = [dict(prompt=talk("Sum?"), completions=["<think>a</think>up", "No"], id=0)]
    rows += [dict(prompt=talk("Sum?"), completions=[turns, talk("", "41")[1:]], id=1)]
    done = ai("best-of-n", model="", reward_model=(scorer,), dataset=jsonl(Path("given.jsonl"), rows))
    (row,) = done.rows("rankings.jsonl")
    assert row["id"] == 0 and [c[0]["content"] for c in row["completions"]] == ["<think>a</think>up", "No"]
    near(row["scores"], [reward_by_hand(scorer, "Sum?", text) for text in ("up", "No")], 1e-4)


def test_best_of_n_with_a_condition_by_kind(ai, scorer):
    Path("conditions.json").write_text(json.dumps(dict(b="Be safe.")))
    plain = ai("best-of-n", reward_model=(scorer,), output_dir="plain")
    told = ai("best-of-n", reward_model=(scorer,), condition="conditions.json", output_dir="told")
    for one, two in zip(plain.rows("rankings.jsonl"), told.rows("rankings.jsonl")):
        assert (one["scores"] == pytest.approx(two["scores"], abs=1e-5)) == (one["kind"] == "a")
        assert one["prompt"] == two["prompt"]


# ---------------------------------------------------------------------------------------------------------- synthesise


def test_synthesise_counts_add_up(ai, tiny_tokenizer):
    done = ai("synthesise", rows=16, min_tokens=2)
    raw, kept = done.rows("raw.jsonl"), done.rows("sft.jsonl")
    dropped = {name: n for name, n in done.report.items() if name.startswith("dropped: ")}
    assert done.report["written"] == len(raw) == 16
    assert done.report["kept"] == len(kept) == 16 - sum(dropped.values()) > 1
    assert [row["messages"] for row in raw if not row["dropped"]] == [row["messages"] for row in kept]
    assert Counter(f"dropped: {row['dropped']}" for row in raw if row["dropped"]) == dropped
    assert [row["prompt"] for row in done.rows("prompts.jsonl")] == [row["messages"][:-1] for row in kept]
    first = [row["messages"][0]["content"] for row in kept]
    assert len({*first}) == len(first) and all(len(rlaif.text_ids(tiny_tokenizer, text)) >= 2 for text in first)
    for row in kept:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(m["content"].strip() for m in row["messages"])
    assert len(loaded(sft, done.out / "sft.jsonl", tiny_tokenizer)) == len(kept)
    again = ai("synthesise", rows=16, temperature=0.3, output_dir="again")
    first = [row["first"] for row in again.rows("raw.jsonl") if row["dropped"] in ("", "repeated")]
    assert again.report["dropped: repeated"] == len(first) - len({*first}) > 0
    assert len(again.rows("sft.jsonl")) == len({*first})


def test_synthesise_asks_for_the_users_turn_and_then_answers_it(ai, monkeypatch):
    calls, real = [], rlaif.write_texts

    def write_texts(writer, rows, *rest):
        found, (model, tokenizer) = real(writer, rows, *rest), writer
        calls.append(([tokenizer.decode(row.prompt) for row in rows], found))
        # a user's turn ends at any special token, an answer where answers end
        stops = rest[-1] if len(rest) == 6 else rlaif.stop_ids(model, tokenizer)
        assert ({*rlaif.special_tokens(tokenizer)} <= {*stops}) == bool(len(calls) % 2)
        return found

    monkeypatch.setattr(rlaif, "write_texts", write_texts)
    done = ai("synthesise", rows=12, turns=2, system="Be kind", batch_size=12, max_new_tokens=16)
    system = "<|bos|><|system|>Be kind<|end|>"
    assert len(calls) == 4 and calls[0][0] == [f"{system}<|user|>"] * 12
    for i, row in enumerate(done.rows("raw.jsonl")):
        said = [m["content"] for m in row["messages"]]
        assert said[0] == "Be kind" and row["first"] == said[1]
        assert [text.strip() for text in said[1:]] == [found[i][0].strip() for _, found in calls]
        begun = f"{system}<|user|>{said[1]}<|end|><|assistant|>"
        assert calls[1][0][i] == begun and calls[2][0][i] == f"{begun}{said[2]}<|end|><|user|>"
        assert calls[3][0][i] == f"{begun}{said[2]}<|end|><|user|>{said[3]}<|end|><|assistant|>"
        assert row["whole"] == all(found[i][1] and found[i][0].strip() != "" for _, found in calls)


def test_a_users_turn_ends_where_the_template_goes_on(ai, talker, monkeypatch):
    """Under a template whose turns end with words, not with a special token."""
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(talker, "worded"))
    turn = "{{ message['role'] }}: {{ message['content'] }} OVER\n"
    end = "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}" + turn + end
    tokenizer.save_pretrained("worded")
    wrote = iter([[(" Go up OVER\nassistant: up", False)], [("right", True)]])
    monkeypatch.setattr(rlaif, "write_texts", lambda *_: next(wrote))
    (row,) = ai("synthesise", model="./worded", rows=1).rows("sft.jsonl")
    assert row["messages"] == talk("Go up ", "right")


def test_a_conversation_that_the_template_refuses_is_dropped_with_the_reason(ai, talker, scorer):
    """The others stay as they are."""
    options = dict(rows=16, judge=talker, reward_model=(scorer,), turns=2)
    free = ai("synthesise", **options, output_dir="free").rows("raw.jsonl")
    letter = next(c for c in "abcdfghikl" if 2 < sum(c in row["first"] for row in free) < 14)
    model = strict(talker, "./strict", f"messages and '{letter}' in messages[0]['content']")
    done = ai("synthesise", **options | dict(model=model))
    refused = [row for row in done.rows("raw.jsonl") if letter in row["first"]]
    assert {row["dropped"] for row in refused} == {"refused by the chat template (not this)"}
    assert done.report["dropped: refused by the chat template (not this)"] == len(refused) > 2
    others = [row for row in done.rows("raw.jsonl") if letter not in row["first"]]
    own = {row["number"]: row for row in free}
    assert others and all(row["messages"] == own[row["number"]]["messages"] for row in others)
    for name in ("quality", "reward"):
        near([row[name] for row in others], [own[row["number"]][name] for row in others], 1e-4)
        assert {row[name] for row in refused} == {None}


def test_synthesise_filters_by_the_judge_and_the_reward_model(ai, ruled, scorer, talker):
    ruled(score=lambda text: [1.0 if k == min(9, len(text.partition("|")[0])) else 0.0 for k in range(10)])
    options = dict(rows=16, judge=talker, reward_model=(scorer,))
    whole = [row for row in ai("synthesise", **options).rows("raw.jsonl") if not row["dropped"]]
    near([row["quality"] for row in whole], [min(9, len(row["first"])) + 1 for row in whole], 1e-4)
    rewards = [reward_by_hand(scorer, row["first"], row["messages"][-1]["content"]) for row in whole]
    near([row["reward"] for row in whole], rewards, 1e-4)
    middle = sorted(row["reward"] for row in whole)[len(whole) // 2]
    strict = ai("synthesise", **options, min_quality=4.0, min_reward=middle, output_dir="strict")
    good = [row for row in whole if row["quality"] >= 4]
    kept = [row for row in good if row["reward"] >= middle]
    assert [row["messages"] for row in strict.rows("sft.jsonl")] == [row["messages"] for row in kept]
    assert 0 < len(kept) < len(whole) and strict.report["dropped: --min-reward"] == len(good) - len(kept)


def test_what_the_judge_does_not_rate_has_no_rating(ai, ruled, talker):
    ruled(score=lambda text: [nan] * 10 if "u" in text.partition("|")[0] else [0.1] * 10)
    done = ai("synthesise", rows=16, judge=talker)
    assert "NaN" not in (done.out / "sft.jsonl").read_text() + (done.out / "raw.jsonl").read_text()
    kept = done.rows("sft.jsonl")
    assert {row["quality"] for row in kept if "u" in row["messages"][0]["content"]} == {None}
    strict = ai("synthesise", rows=16, judge=talker, min_quality=1.0, output_dir="strict")
    assert [row["messages"] for row in strict.rows("sft.jsonl")] == [row["messages"] for row in kept if row["quality"]]


def test_synthesise_drops_near_repeats_by_mean_hidden_states(ai, talker):
    free = ai("synthesise", rows=16)
    kept = [row["messages"][0]["content"] for row in free.rows("sft.jsonl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker).eval(), AutoTokenizer.from_pretrained(talker)
    vectors = []
    for text in kept:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            vectors.append(model.model(torch.tensor([ids])).last_hidden_state[0].mean(0))
    vectors = torch.nn.functional.normalize(torch.stack(vectors), dim=1)
    near(free.report["median_distance"], rlaif.nearest(vectors).median(), 1e-4)
    least = rlaif.nearest(vectors).sort().values[len(kept) // 2].item() + 1e-3
    far = ai("synthesise", rows=16, min_distance=least, output_dir="far")
    expected = [kept[i] for i in rlaif.keep_distant(vectors, least)]
    assert [row["messages"][0]["content"] for row in far.rows("sft.jsonl")] == expected
    assert 0 < len(expected) < len(kept) and far.report["dropped: --min-distance"] == len(kept) - len(expected)


# --------------------------------------------------------------------------------------------------- compare and audit


def test_a_policy_against_itself_ties_everywhere(ai, ruled, talker):
    heard = ruled()
    done = ai("compare", against=talker)
    assert [done.report[name] for name in ("win_rate", "ties", "wins", "losses", "identical")] == [0.5, 6, 0, 0, 6]
    assert not heard
    for row in done.rows("comparisons.jsonl"):
        assert row["a"] == row["b"] and row["verdict"] == "tie" and row["probability"] == 0.5
    near([done.report["low"], done.report["high"]], rlaif.interval([0.5] * 6)[1:], 1e-12)


def test_compare_turned_around_is_one_minus(ai, ruled, talker, stranger):
    ruled(mild)
    ab = ai("compare", model=talker, against=stranger, output_dir="ab")
    ba = ai("compare", model=stranger, against=talker, output_dir="ba")
    a, b, outcomes = ab.report, ba.report, []
    near([a["win_rate"], a["low"], a["high"]], [1 - b["win_rate"], 1 - b["high"], 1 - b["low"]], 1e-9)
    assert (a["wins"], a["losses"], a["ties"]) == (b["losses"], b["wins"], b["ties"]) and a["wins"] + a["losses"] > 0
    assert a["a_characters"] == b["b_characters"] != b["a_characters"] and a["a_cut_off"] == b["b_cut_off"]
    for row, turned in zip(ab.rows("comparisons.jsonl"), ba.rows("comparisons.jsonl")):
        first, second = fair_p(row["a"], row["b"], mild)
        near([row["probability"], turned["probability"]], [(first + second) / 2, 1 - (first + second) / 2])
        assert row["verdict"] == rlaif.verdict(first, second) and (row["a"], row["b"]) == (turned["b"], turned["a"])
        outcomes.append((row["kind"], dict(a=1.0, b=0.0, tie=0.5)[row["verdict"]]))
    near([a["win_rate"], a["low"], a["high"]], rlaif.interval([o for _, o in outcomes]), 1e-12)
    for kind in "ab":
        near(list(a["kinds"][kind].values()), rlaif.interval([o for k, o in outcomes if k == kind]), 1e-12)
    near(a["a_characters"], sum(len(row["a"]) for row in ab.rows("comparisons.jsonl")) / 6)


def test_an_abstention_is_no_outcome(ai, ruled, stranger):
    ruled(lambda talk, a, b, principle: None if talk in QUESTIONS[:2] else longer(talk, a, b, principle))
    done = ai("compare", against=stranger)
    rows = done.rows("comparisons.jsonl")
    assert [row["verdict"] == "abstain" for row in rows] == [True] * 2 + [False] * 4 and rows[0]["probability"] is None
    near(done.report["win_rate"], sum(dict(a=1.0, b=0.0, tie=0.5)[row["verdict"]] for row in rows[2:]) / 4)
    assert done.report["abstentions"] == 2


def test_compare_where_the_judge_abstains_everywhere_says_so(ai, ruled, stranger, capsys):
    ruled(lambda *_: None)
    assert ai("compare", against=stranger).report["win_rate"] is None
    said = capsys.readouterr().out
    assert "none of the 6 pairs could be judged" in said and ": wins" not in said


def test_audit_counts_what_agrees(ai, ruled):
    ruled()
    rows = [pair(i, score_chosen=float(i), score_rejected=0.0) for i in range(len(QUESTIONS))]
    done = ai("audit", dataset=jsonl(Path("scored.jsonl"), rows), min_gap=2.0)
    found = [comparison(i) for i in range(2, 6)]
    decided = [c for c in found if c["said"] != "tie"]
    assert done.report["below --min-gap"] == 2  # of gaps 0 and 1
    assert done.report["comparisons"] == 4 and done.report["decided"] == len(decided)
    near(done.report["agreement"], sum(c["said"] == "a" for c in decided) / len(decided))
    totals = sum(map(Counter, done.report["kinds"].values()), Counter())
    assert {*done.report["kinds"]} == {"a", "b"} and totals["tie"] == 4 - len(decided) and totals["abstain"] == 0
    assert totals["agree"] + totals["disagree"] == len(decided)
    assert sorted(file.name for file in done.out.iterdir()) == ["args.json", "report.json"]
    assert json.loads((done.out / "args.json").read_text())["finished"]


def test_audit_takes_every_two_answers_whose_scores_differ(ai, ruled):
    ruled()
    completions = ["up", "right, up", "No, never, not at all", "x"]
    rows = [dict(prompt=talk("Go!"), completions=completions, scores=[1, 1, 3, 0], kind="k")]
    report = ai("audit", dataset=jsonl(Path("k.jsonl"), rows)).report
    # of six, one is a tie of the scores; two differ enough in length
    assert report["equal scores"] == 1
    assert report["comparisons"] == 5 and report["decided"] == report["kinds"]["k"]["agree"] == 2
    assert report["agreement"] == report["given_longer"] == report["prefers_longer"] == 1
    assert ai("audit", dataset="k.jsonl", min_gap=2.0, output_dir="gap").report["comparisons"] == 3


def test_min_gap_has_a_sign(ai, ruled):
    ruled()
    rows = [pair(0, score_chosen=1.0, score_rejected=5.0), pair(5, score_chosen=5.0, score_rejected=1.0)]
    report = ai("audit", dataset=jsonl(Path("s.jsonl"), rows), min_gap=2.0).report
    assert report["comparisons"] == report["contradicting scores"] == 1


def test_an_audit_of_scores(ai, ruled):
    """Of both answers alone, each by its score of 1 to 10; equal scores are a tie."""
    value = lambda text: len(text) % 7

    def score(text):
        answer = text.removesuffix("|1 to 10?").rpartition("\n")[2]
        return [1.0 if i == value(answer) else 0.0 for i in range(10)]

    heard = ruled(score=score)
    report = ai("audit", by="scores").report
    values = [(value(REPLIES[i]), value(OTHERS[i])) for i in range(len(QUESTIONS))]
    decided = [a > b for a, b in values if a != b]
    assert 0 < len(decided) == report["decided"] and report["ties"] == len(values) - len(decided)
    near(report["agreement"], sum(decided) / len(decided))
    assert len(heard) == 2 * len(values) and report["same_position"] == 0


def test_agreement_by_the_mean_counts_ties_too(ai, ruled):
    """Each order names its own first answer, once more surely than the other: a tie, whose mean may still be right."""
    ruled(lambda talk, a, b, principle: 0.9 if len(a) > len(b) else 0.6)
    report = ai("audit").report
    lengths = [(len(REPLIES[i]), len(OTHERS[i])) for i in range(len(QUESTIONS))]
    assert report["decided"] == 0 and report["agreement"] is None
    near(report["agreement_by_mean"], sum(a > b for a, b in lengths) / len(lengths))


# ---------------------------------------------------------------------------------------------------- killed, continued


class Killed(BaseException):
    """As a kill would be: nothing catches it."""


def killed(monkeypatch, name: str, call: int, work):
    """Runs work, in which the call-th call of rlaif's function ends all."""
    real, calls = getattr(rlaif, name), []

    def dying(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rlaif, name, dying)
        with pytest.raises(Killed):
            work()


FILES = dict(label=["pairs.jsonl"], revise=["sft.jsonl"], compare=["comparisons.jsonl"], audit=[])
FILES |= {"best-of-n": ["sft.jsonl", "pairs.jsonl", "rankings.jsonl", "prompts.jsonl"]}
FILES |= dict(synthesise=["raw.jsonl", "sft.jsonl", "prompts.jsonl"])
RUNS = {
    "label": dict(tie_margin=0.0, orders="average"),
    "revise": dict(rounds=1, judge_max_tokens=20),
    "best-of-n": dict(judge="TALKER"),
    "synthesise": dict(judge="TALKER"),
    "compare": dict(against="STRANGER"),
    "audit": dict(judgements=2),
}


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("is_torn", [False, True])
def test_a_killed_run_resumed_is_the_uninterrupted_one(command, is_torn, ai, monkeypatch, talker, stranger, capsys):
    """Killed before its third batch; if torn, in the middle of writing the last row of the second. Batches and memory
    knobs may change."""
    options = {name: dict(TALKER=talker, STRANGER=stranger).get(value, value) for name, value in RUNS[command].items()}
    whole = ai(command, output_dir="whole", **options)
    killed(monkeypatch, "save_records", 3, lambda: ai(command, **options, batch_size=2))
    lines = Path("out/rows.part").read_text().splitlines(True)
    assert len(lines) == 4 and not Path("out/report.json").exists()
    if is_torn:
        Path("out/rows.part").write_text("".join(lines)[: -len(lines[-1]) // 2])
    capsys.readouterr()
    asked, real = [], rlaif.save_records

    def save_records(out, records, done):
        asked.extend(record["number"] for record in records)
        real(out, records, done)

    monkeypatch.setattr(rlaif, "save_records", save_records)
    again = ai(command, resume=True, **options, batch_size=3, tokens_per_forward=100, sample_tokens=100)
    assert f"{4 - is_torn} rows are done" in capsys.readouterr().out and asked == list(range(4 - is_torn, 6))
    numbers = lambda value: pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
    for name in FILES[command]:
        assert len(again.rows(name)) == len(whole.rows(name)) > 0
        for row, other in zip(again.rows(name), whole.rows(name)):
            scores = (row.pop("scores", []), other.pop("scores", []))
            assert {key: numbers(value) for key, value in row.items()} == other and scores[0] == pytest.approx(
                scores[1]
            )
    assert {key: numbers(value) for key, value in again.report.items()} == whole.report
    assert sorted(file.name for file in again.out.iterdir()) == sorted(["args.json", "report.json", *FILES[command]])


def test_what_was_answered_is_not_asked_again(ai, monkeypatch, ruled):
    ruled()
    whole = ai("label", output_dir="whole", batch_size=1)
    killed(monkeypatch, "compare_pairs", 4, lambda: ai("label", batch_size=1))
    assert [json.loads(line)["number"] for line in Path("out/rows.part").open()] == [0, 1, 2]
    heard = ruled()
    again = ai("label", batch_size=1, resume=True)
    assert len(heard) == 6 and again.report == whole.report
    assert (again.out / "pairs.jsonl").read_bytes() == (whole.out / "pairs.jsonl").read_bytes()
    killed(monkeypatch, "finish", 1, lambda: ai("label", output_dir="last"))
    heard.clear()
    assert ai("label", output_dir="last", resume=True).report == whole.report and not heard


@pytest.mark.parametrize("file", ["pairs.jsonl", "short.json"])
def test_resuming_with_other_inputs_is_refused(file, ai, ruled, monkeypatch, capsys):
    ruled()
    killed(monkeypatch, "save_records", 2, lambda: ai("label", batch_size=2))
    Path(file).write_text(Path(file).read_text().replace("up", "down").replace("Anew", "New"))
    assert f"content of {file}" in sentence(lambda: ai("label", batch_size=2, resume=True), capsys)


def test_a_run_killed_as_it_begins_leaves_no_rows_of_the_run_before(ai, ruled, monkeypatch):
    """Killed right after its args.json is written: --resume must not take the old rows for its own."""
    ruled()
    killed(monkeypatch, "save_records", 2, lambda: ai("label", batch_size=2))
    assert Path("out/rows.part").exists()
    real = rlaif.clear_run

    def clear_run(*args):
        real(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rlaif, "clear_run", clear_run)
        with pytest.raises(Killed):
            ai("label", dataset="kwise.jsonl", overwrite=True)
    whole = ai("label", dataset="kwise.jsonl", output_dir="whole").rows("rankings.jsonl")
    assert ai("label", dataset="kwise.jsonl", resume=True).rows("rankings.jsonl") == whole


def test_a_directory_in_use_is_overwritten_only_when_asked(ai, ruled, capsys):
    """And nothing is left of the run before, which stays whole until all input of the new one has been read."""
    ruled()
    ai("label", dataset="kwise.jsonl")
    before = snapshot("out")
    assert "not empty" in sentence(lambda: ai("label"), capsys)
    sentence(lambda: ai("label", dataset="none.jsonl", overwrite=True), capsys)
    assert snapshot("out") == before
    ai("label", overwrite=True)
    assert not Path("out/rankings.jsonl").exists() and Path("out/pairs.jsonl").exists()


# -------------------------------------------------------------------------------------------------- a judge on a server


class Server:
    """OpenAI's API on this machine. reply(body, number) -> (code, headers, what to send); letters by default, with
    probabilities."""

    def __init__(self, reply=None, port=0):
        self.seen, self.reply, lock = [], reply or self.letters, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.seen)
                    outer.seen.append((self.path, dict(self.headers), body))
                code, headers, content = outer.reply(body, number)
                if code is None:  # hangs up
                    self.close_connection = True
                    return
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code, headers.get("Reason"))
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    @staticmethod
    def chance(body) -> float:
        return longer(*ASKED.match(body["messages"][0]["content"]).groups())

    @classmethod
    def letters(cls, body, number):
        p = cls.chance(body)
        return 200, {}, dict(choices=[served("A", ("A", dict(A=0.9 * p, B=0.9 * (1 - p), The=0.1)))])

    @classmethod
    def plain(cls, body, number):
        return 200, {}, dict(choices=[served("A" if cls.chance(body) > 0.5 else "**B**")])

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    """server(reply) -> a running Server; the waits between attempts are noted in server.waits and not waited for."""
    started, waits = [], []
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(rlaif, "time", SimpleNamespace(sleep=waits.append, time=time.time))

    def start(reply=None, port=0):
        started.append(Server(reply, port))
        return started[-1]

    start.waits = waits
    yield start
    for one in started:
        one.stop()


def test_a_server_labels_as_its_probabilities_say(ai, server):
    one = server()
    rows = ai("label", judge_url=one.url, judge="big", min_mass=0.01).rows("pairs.jsonl")
    wanted = [(i, sum(fair_p(REPLIES[i], OTHERS[i])) / 2) for i in range(6) if comparison(i)["said"] != "tie"]
    assert [row["id"] for row in rows] == [f"row {i}" for i, _ in wanted] and len(one.seen) == 12
    near([row["probability"] for row in rows], [max(p, 1 - p) for _, p in wanted], 1e-5)
    assert {row["judge"] for row in rows} == {"big"}
    expected = dict(model="big", logprobs=True, top_logprobs=20, temperature=0)
    for path, headers, body in one.seen:
        assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
        assert "Authorization" not in headers and body == body | expected


@pytest.mark.parametrize("code", [400, 422])
def test_a_server_that_refuses_to_give_probabilities_gives_letters(code, ai, server, capsys):
    """It is asked for them until it has refused once. One of four requests under way hears so when that is known."""
    together, is_known, plain = threading.Barrier(4), threading.Event(), []

    def reply(body, number):
        if number < 4:
            together.wait(timeout=10)
        if number == 3:
            is_known.wait(timeout=10)
        if "logprobs" in body:
            return code, {}, dict(error=dict(message="logprobs are not supported"))
        plain.append(number)
        if len(plain) > 3:  # more than the second attempts of the other three
            is_known.set()
        return Server.plain(body, number)

    one = server(reply)
    rows = ai("label", judge_url=one.url, judge_parallel=4, min_mass=0.01).rows("pairs.jsonl")
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(6) if comparison(i)["said"] != "tie"]
    assert {row["probability"] for row in rows} == {1.0} and not server.waits
    assert 1 <= sum("logprobs" in body for *_, body in one.seen) <= 7
    assert capsys.readouterr().out.count("gives no log-probabilities") == 1


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_the_server_refuses_is_an_abstention(code, ai, server, capsys):
    """One talk is too long for it; the log-probabilities of the others stay."""

    def reply(body, number):
        is_long = "Ann" in body["messages"][0]["content"]
        return (code, {}, dict(error="too long")) if is_long else Server.letters(body, number)

    done = ai("label", judge_url=server(reply).url, orders="average", min_mass=0.01)
    assert done.report["abstentions"] == done.report[f"abstained: refused by the server ({code})"] == 1
    assert capsys.readouterr().out.count("too long") == 1
    rows = done.rows("pairs.jsonl")
    assert len(rows) == 5 and not any(row["probability"] == 1 for row in rows)


@pytest.mark.parametrize("choice", ["A", dict(message="A"), served("I like both")])
def test_a_reply_that_names_no_option_is_an_abstention_and_is_shown(choice, ai, server, capsys):
    one = server(lambda *_: (200, {}, dict(choices=[choice])))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ai("label", judge_url=one.url)
    assert result("out").report["abstained: the reply names no option"] == 6
    said = "I like both" if isinstance(choice, dict) and choice["message"] != "A" else ""
    out = capsys.readouterr().out
    assert f"likeliest reply is {said!r}; it names none of A and B, so this question is an abstention" in out
    assert "nothing to use: the reply names no option" in out and "nan" not in out


def test_a_busy_server_is_asked_again(ai, server):
    trouble = [(429, {"Retry-After": "7"}, b""), (500, {}, b"oops"), (503, {"Retry-After": "100000"}, b"")]
    trouble += [(200, {}, b'{"choices": [{"mess'), (None, {}, b""), (408, {"Retry-After": "Wed, 21 Oct"}, b"")]
    one = server(lambda body, number: trouble[number] if number < len(trouble) else Server.letters(body, number))
    other = ai("label", judge_url=server().url, output_dir="calm", min_mass=0.01)
    done = ai("label", judge_url=one.url, judge_parallel=1, min_mass=0.01)
    assert server.waits == [7, 2, 60, 8, 16, 32] and len(one.seen) == 12 + 6
    for row, calm in zip(done.rows("pairs.jsonl"), other.rows("pairs.jsonl"), strict=True):
        assert row | dict(judge="") == calm | dict(judge="")


@pytest.mark.parametrize(
    "reply, why",
    [((500, {}, b""), "500"), ((200, {}, b"<html>"), "JSON"), ((None, {}, b""), ""), ((429, {}, b""), "429")],
)
def test_a_server_that_stays_busy_ends_the_run(reply, why, ai, server, capsys):
    one = server(lambda body, number: reply)
    said = sentence(lambda: ai("label", judge_url=one.url, judge_parallel=1), capsys)
    assert "no answer after 7 attempts" in said and "--resume" in said and why in said
    assert server.waits[:6] == list(rlaif.WAITS) and len(one.seen) % 7 == 0


@pytest.mark.parametrize("reply", [dict(error="x"), dict(choices=[]), [1], dict(choices=None)])
def test_a_server_of_another_protocol_is_named(reply, ai, server, capsys):
    said = sentence(lambda: ai("label", judge_url=server(lambda *_: (200, {}, reply)).url, judge_parallel=1), capsys)
    assert "without choices" in said and "127.0.0.1" in said


def test_the_body_of_a_request_may_be_changed(ai, server, capsys):
    one = server()
    body = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 9, "extra": {"a": 1}}'
    ai("label", judge_url=one.url, judge_body=body, min_mass=0.01)
    for _, _, sent in one.seen:
        assert not {"temperature", "max_tokens"} & {*sent}
        assert sent["max_completion_tokens"] == 9 and sent["extra"] == dict(a=1)
    for wrong in ("{", "[1]"):
        said = sentence(lambda: ai("label", judge_url=one.url, judge_body=wrong, output_dir="x"), capsys)
        assert "--judge-body" in said


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed(code, ai, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    thief = server()
    one = server(lambda body, number: (code, {"Location": f"http://localhost:{thief.port}/v1/chat/completions"}, b""))
    said = sentence(lambda: ai("label", judge_url=one.url, judge_key="OPENAI_API_KEY", judge_parallel=1), capsys)
    assert not thief.seen and str(code) in said and one.seen[0][1]["Authorization"] == "Bearer secret"


def test_the_key_comes_from_the_variable_that_is_named_and_stands_nowhere(ai, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    monkeypatch.setenv("MY_KEY", "right-key")
    monkeypatch.setenv("EMPTY", " ")
    one, none = server(), server()
    ai("label", judge_url=f"{one.url}/", judge_key="MY_KEY", min_mass=0.01)
    assert {headers.get("Authorization") for _, headers, _ in one.seen} == {"Bearer right-key"}
    assert {path for path, *_ in one.seen} == {"/v1/chat/completions"}
    said = capsys.readouterr()
    assert "right-key" not in said.out + said.err + "".join(map(str, snapshot("out").values()))
    ai("label", judge_url=none.url, output_dir="none", min_mass=0.01)
    assert not any("Authorization" in headers for _, headers, _ in none.seen)
    for name in ("NOT_SET", "EMPTY", "right-key"):
        said = sentence(lambda: ai("label", judge_url=none.url, judge_key=name, output_dir="x"), capsys)
        assert "--judge-key" in said and "right-key" not in said


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_the_server_says_when_it_refuses(code, ai, server, monkeypatch, capsys):
    """One sentence, however many requests are under way; a key that it repeats is left out."""
    monkeypatch.setenv("MY_KEY", "right-key")
    together = threading.Barrier(4)

    def reply(body, number):
        if number < 4:
            together.wait(timeout=10)
        return code, {}, dict(error=dict(message="Incorrect API key provided: right-key"))

    said = sentence(lambda: ai("label", judge_url=server(reply).url, judge_key="MY_KEY", judge_parallel=4), capsys)
    assert str(code) in said and "Incorrect API key provided: [key]" in said and not server.waits


SAID = {  # what a server says, in which the key must be hidden: status, headers, body
    "in its reason": (401, {"Reason": "no ab/right-key"}, b""),
    "with escapes": (401, {}, rb'{"error": "no ab\/right-key"}'),
    "where it is cut": (401, {}, b"x" * 265 + b"ab/right-key"),
    "a little further": (401, {}, b"x" * 295 + b"ab/right-key"),
    "without choices": (200, {}, dict(error="x" * 220 + "ab/right-key")),
    "in half a body": (401, {"Content-Length": "999"}, b"no ab/right-key"),
}


@pytest.mark.parametrize("what", SAID)
def test_the_key_is_hidden_in_whatever_a_server_says(what, ai, server, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "ab/right-key")
    one = server(lambda *_: SAID[what])
    said = sentence(lambda: ai("label", judge_url=one.url, judge_key="MY_KEY", judge_parallel=1), capsys)
    assert "ab/" not in said and str(SAID[what][0]) in said and not server.waits
    assert "[key]" in said or what not in ("in its reason", "with escapes")


def test_the_key_is_not_written_with_a_reply_that_repeats_it(ai, answered, server, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "ab/right-key")
    one = server(lambda *_: (200, {}, dict(choices=[served("Bad key ab/right-key")])))
    done = ai("revise", judge_url=one.url, judge="big", judge_key="MY_KEY", rounds=1)
    said = capsys.readouterr()
    assert {row["critique"] for row in done.rows("sft.jsonl")} == {"Bad key [key]"}
    assert "right-key" not in said.out + said.err + "".join(map(str, snapshot("out").values()))


@pytest.mark.parametrize("key", ["ab\ncd", "ab\rcd", "abécd", "ab\x7fcd"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key, ai, server, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", key)
    one = server()
    said = sentence(lambda: ai("label", judge_url=one.url, judge_key="MY_KEY"), capsys)
    assert "--judge-key" in said and "cd" not in said and not one.seen


@pytest.mark.parametrize(
    "url", ["http://me:pw@host/v1", "http://pw@host", "http://host/v1?api_key=pw", "http://h/v1#pw"]
)
def test_an_address_with_a_secret_in_it_is_refused_unseen(url, ai, capsys):
    said = sentence(lambda: ai("label", judge_url=url), capsys)
    assert "--judge-url" in said and "pw" not in said and not Path("out/args.json").exists()


ROW_FAILS = {  # a server's reply to one row -> the reason of its abstention, and whether it is asked again
    "too long, it says": ((500, {}, b"oops"), "refused by the server (500)", True),
    "moderated": ((403, {}, b"no"), "refused by the server (403)", False),
    "moved": ((404, {}, b"no"), "refused by the server (404)", False),
    "an error in place of choices": ((200, {}, dict(error="no")), "the server replied without choices", False),
    "choices that are none": ((200, {}, dict(choices={"a": 1})), "the server replied without choices", False),
    "no JSON": ((200, {}, b"<html>"), "the server replied without choices", True),
}


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("what", ROW_FAILS)
def test_one_row_that_a_server_cannot_answer_does_not_end_the_run(what, place, ai, server):
    """Not even the first, as the first of a resumed run may be."""
    reply, reason, is_repeated = ROW_FAILS[what]

    def answer(body, number):
        text = body["messages"][0]["content"]
        if text.startswith(QUESTIONS[place] + "|"):
            return reply
        return Server.letters(body, number) if ASKED.match(text) else (200, {}, dict(choices=[served("A")]))

    one = server(answer)
    done = ai("label", judge_url=one.url, judge_parallel=1, orders="average", min_mass=0.01)
    assert done.report["abstentions"] == done.report[f"abstained: {reason}"] == 1
    # before its first answer it is asked something harmless, once
    assert sum("Reply with" in body["messages"][0]["content"] for *_, body in one.seen) == (place == 0)
    assert len(done.rows("pairs.jsonl")) == 5 and len(server.waits) == 2 * 6 * is_repeated


@pytest.mark.parametrize("is_well, harmless", [(False, 1), (True, 2)])
def test_a_server_that_refuses_twenty_in_a_row_is_asked_something_harmless(is_well, harmless, ai, server, capsys):
    """If it refuses that too, it is not the rows."""
    jsonl(Path("many.jsonl"), [pair(0, id=i) for i in range(21)] + [pair(3, id=21)])

    def reply(body, number):
        text = body["messages"][0]["content"]
        if "Reply with" in text:
            return (200, {}, dict(choices=[served("A")])) if is_well else (403, {}, b"account closed")
        return Server.letters(body, number) if number == 0 or QUESTIONS[3] in text else (403, {}, b"account closed")

    one = server(reply)
    work = lambda: ai("label", dataset="many.jsonl", judge_url=one.url, judge_parallel=1, min_mass=0.01, batch_size=2)
    if is_well:
        assert work().report["abstained: refused by the server (403)"] == 21
    else:
        said = sentence(work, capsys)
        assert "account closed" in said and "--resume" in said
        rest = len(one.seen) - (1 + 20 + 1)  # what was under way of a batch of four requests
        assert 0 <= rest <= 3 and len(Path("out/rows.part").read_text().splitlines()) == 10
    asked = [body["messages"][0]["content"] for *_, body in one.seen]
    assert sum("Reply with" in text for text in asked) == harmless


def test_twenty_that_are_not_in_a_row_are_refused_each_for_itself(ai, server):
    jsonl(Path("many.jsonl"), [pair(3 * (i % 2), id=i) for i in range(24)])

    def reply(body, number):
        text = body["messages"][0]["content"]
        return (403, {}, b"no") if not text.startswith(QUESTIONS[3] + "|") and number else Server.letters(body, number)

    done = ai("label", dataset="many.jsonl", judge_url=server(reply).url, judge_parallel=1, min_mass=0.01)
    assert done.report["abstained: refused by the server (403)"] == 12


def test_only_a_refusal_of_log_probabilities_ends_them_for_good(ai, server, capsys):
    """Another refusal, after which the request without them is answered, says nothing about the others."""

    def reply(body, number):
        if "logprobs" in body and number == 2:
            return 400, {}, dict(error="bad luck")
        return Server.letters(body, number) if "logprobs" in body else Server.plain(body, number)

    one = server(reply)
    rows = ai("label", judge_url=one.url, judge_parallel=1, min_mass=0.01, orders="average").rows("pairs.jsonl")
    assert sum("logprobs" not in body for *_, body in one.seen) == 1 and len(one.seen) == 13
    assert len(rows) == 6 and "gives no log-probabilities" not in capsys.readouterr().out


def test_the_first_attempt_of_several_is_said_once_for_each_reason(ai, server, capsys):
    together = threading.Barrier(4)

    def reply(body, number):
        if number < 4:
            together.wait(timeout=10)
            return 429, {}, b"slow down"
        return (503, {}, b"overloaded") if number == 8 else Server.letters(body, number)

    ai("label", judge_url=server(reply).url, judge_parallel=4, min_mass=0.01)
    said = capsys.readouterr().out
    assert said.count("slow down") == said.count("overloaded") == 1 and said.count("asked again") == 2


def test_a_server_that_dies_in_the_middle(ai, server, capsys):
    """The rest is asked of another, with another number of requests at a time and another key."""
    whole = ai("label", judge_url=server().url, judge="big", output_dir="whole", batch_size=2, min_mass=0.01)
    one = server(lambda body, number: Server.letters(body, number) if number < 6 else (None, {}, b""))
    options = dict(judge="big", batch_size=2, min_mass=0.01)
    said = sentence(lambda: ai("label", judge_url=one.url, judge_parallel=1, **options), capsys)
    assert "continue with --resume" in said and len(Path("out/rows.part").read_text().splitlines()) == 2
    two = server()
    again = ai("label", judge_url=two.url, **options, judge_parallel=2, resume=True)
    assert len(two.seen) == 8 and again.report == whole.report
    assert len(again.rows("pairs.jsonl")) == len(whole.rows("pairs.jsonl"))


def test_a_server_writes_critiques_and_revisions(ai, answered, server):
    """Each with a seed of its own; one that was cut off, or refused, is not used."""

    def reply(body, number):
        text, question = body["messages"][-1]["content"], body["messages"][0]["content"]
        if text == "Anew" and "letter" in question:
            return 422, {}, dict(error="no")
        ending = "length" if text == "Anew" and "robot" in question else "stop"
        choice = dict(message=dict(content=f" revised {len(text)} "), finish_reason=ending)
        return 200, {}, dict(choices=[choice])

    one, two = server(reply), server(reply)
    rows = ai("revise", judge_url=one.url, judge="big", rounds=1).rows("sft.jsonl")
    assert [row["id"] for row in rows] == [0, 2, 3, 4]
    assert {row["completion"][0]["content"] for row in rows} == {"revised 4"}
    bodies = [body for *_, body in one.seen]
    assert len(bodies) == len({body["seed"] for body in bodies}) == 12 and not any("logprobs" in b for b in bodies)
    assert {body["max_tokens"] for body in bodies} == {12} and {body["temperature"] for body in bodies} == {1.0}
    ai("revise", judge_url=two.url, judge="big", rounds=1, output_dir="again")
    assert sorted(body["seed"] for *_, body in two.seen) == sorted(body["seed"] for body in bodies)


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = {  # command, options, what the sentence must name
    "unknown columns": ("audit", dict(dataset="x.jsonl"), "columns are x"),
    "rows without answers": ("label", dict(dataset="prompts.jsonl"), "no prompt with two answers"),
    "rows without answers to score": ("best-of-n", dict(model="", judge="TALKER"), "no prompt with two answers"),
    "audit of rows without answers": ("audit", dict(dataset="prompts.jsonl"), "no pair whose better answer is known"),
    "audit without scores": ("audit", dict(dataset="unscored.jsonl"), "no pair whose better answer is known"),
    "an audit's gap too large": ("audit", dict(min_gap=100.0), "no pair"),
    "no principle": ("label", dict(principles="empty.txt"), "no line with a principle"),
    "no principles file": ("revise", dict(principles="none.txt"), "--principles none.txt"),
    "an unknown request": ("label", dict(requests="unknown.json"), "compar must be one of principle, compare"),
    "a request that is no text": ("label", dict(requests="number.json"), "compare must be one of"),
    "requests that are no JSON": ("label", dict(requests="empty.txt"), "cannot be read as a JSON object"),
    "nobody who scores": ("best-of-n", dict(), "--reward-model or --judge"),
    "two who score": ("best-of-n", dict(judge="TALKER", reward_model=("SCORER",)), "--reward-model or --judge"),
    "the best of one": ("best-of-n", dict(judge="TALKER", n=1), "--n 1"),
    "one answer to compare": ("label", dict(model="TALKER", k=1), "--k 1"),
    "a reward model that is none": ("best-of-n", dict(reward_model=("TALKER",)), "--reward-model"),
    "answers longer than the model": ("compare", dict(against="TALKER", max_new_tokens=600), "--max-new-tokens 600"),
    "an address that is none": ("label", dict(judge_url="localhost:8000"), "--judge-url localhost:8000"),
    "an address without a name": ("revise", dict(judge_url="http://localhost:8000"), "--judge-url needs --judge"),
    "a condition that is no text": (
        "best-of-n",
        dict(reward_model=("SCORER",), condition="number.json"),
        "--condition",
    ),
    "no rows to write": ("synthesise", dict(rows=0), "--rows 0"),
    "quality without a judge": ("synthesise", dict(min_quality=5.0), "--judge"),
    "reward without a reward model": ("synthesise", dict(min_reward=0.0), "--reward-model"),
    "a clamp beyond one half": ("label", dict(reasoning=True, clamp=0.6), "--clamp 0.6"),
    "reads what it writes": ("label", dict(dataset="out/pairs.jsonl"), "--output-dir out"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(wrong, ai, talker, scorer, capsys):
    jsonl(Path("x.jsonl"), [dict(x=1)])
    jsonl(Path("unscored.jsonl"), [dict(prompt="Go", completions=["a", "b"])])
    Path("empty.txt").write_text("\n \n")
    Path("unknown.json").write_text(json.dumps(dict(compar="x")))
    Path("number.json").write_text(json.dumps(dict(compare=1)))
    if wrong == "reads what it writes":
        jsonl(Path("out/pairs.jsonl"), [pair(0)]) if Path("out").mkdir() is None else ()
    command, options, named = BAD[wrong]
    known = dict(TALKER=talker, SCORER=scorer)
    options = {k: tuple(known[x] for x in v) if isinstance(v, tuple) else known.get(v, v) for k, v in options.items()}
    assert named in sentence(lambda: ai(command, **options), capsys)


def strict(folder, name: str, condition: str) -> str:
    """A copy whose chat template refuses what the condition describes."""
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(folder, name))
    refusal = "{% if " + condition + " %}{{ raise_exception('not this') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(name)
    return name


def test_a_system_prompt_that_the_template_refuses(ai, talker, capsys):
    model = strict(talker, "./strict", "messages[0]['role'] == 'system'")
    assert "not this" in sentence(lambda: ai("synthesise", model=model, system="Be kind"), capsys)


@pytest.mark.parametrize("who", ["judge", "reward model", "policy"])
def test_prompts_that_a_template_refuses_are_dropped_before_anything_is_sampled(who, ai, talker, scorer, capsys):
    """What the judge reads is one turn of the user; reward model and policy read the conversation."""
    jsonl(Path("mixed.jsonl"), [dict(prompt=talk("Up?"), id=0), dict(prompt=talk("Secret?"), id=1)])
    condition, options = "'Secret' in messages[0]['content']", dict(n=8, max_new_tokens=16)
    if who == "judge":
        options["judge"] = strict(talker, "./strict", condition)
    elif who == "reward model":
        options["reward_model"] = (strict(scorer, "./strict", condition),)
    else:
        options |= dict(model=strict(talker, "./strict", condition), judge=talker)
    done = ai("best-of-n", dataset="mixed.jsonl", **options)
    assert "1 rows from 2; 1 dropped: refused by the chat template (not this)" in capsys.readouterr().out
    assert done.report["rows"] == 1 and [row["id"] for row in done.rows("sft.jsonl")] == [0]


def test_prompts_that_cannot_be_used_are_dropped_and_counted(ai, ruled, talker, capsys):
    ruled()
    texts = ["Go up", "", " ", "Go<|end|>", " ".join(["7"] * 900), QUESTIONS[0]]
    rows = [dict(prompt=talk(text), id=i) for i, text in enumerate(texts)]
    done = ai("compare", dataset=jsonl(Path("mixed.jsonl"), rows), against=talker)
    said = capsys.readouterr().out
    assert "2 dropped: empty prompt" in said and "1 dropped: special token <|end|> in the text" in said
    assert "1 dropped: prompt leaves no room for --max-new-tokens" in said and "2 rows from 6" in said
    assert [row["id"] for row in done.rows("comparisons.jsonl")] == [0, 5]


# ------------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("command", [*RUNS])
def test_two_ranks_are_one_process(command, ai, talker, stranger):
    """An odd number of rows, batches of three: one rank has nothing to do in the last."""
    options = {name: dict(TALKER=talker, STRANGER=stranger).get(value, value) for name, value in RUNS[command].items()}
    options |= dict(batch_size=3, rows=7 if command == "synthesise" else 5)
    if command == "label":
        options |= dict(model=talker, dataset="prompts.jsonl", max_new_tokens=8)
    if command == "audit":
        options |= dict(min_mass=0.02)  # it also says why it abstains
    one, two = ai(command, output_dir="one", **options), ai(command, ranks=2, output_dir="two", **options)
    numbers = lambda row: {name: value for name, value in row.items() if isinstance(value, float)}
    for name in FILES[command]:
        a, b = one.rows(name), two.rows(name)
        assert len(a) == len(b) > 0
        for x, y in zip(a, b):
            assert numbers(x) == pytest.approx(numbers(y), abs=1e-4)
            assert x.pop("scores", 0) == pytest.approx(y.pop("scores", 0), abs=1e-4)
            assert {k: v for k, v in x.items() if k not in numbers(x)} == {
                k: v for k, v in y.items() if k not in numbers(y)
            }
    assert numbers(one.report) == pytest.approx(numbers(two.report), abs=1e-4) and {*one.report} == {*two.report}
    assert not (two.out / "rows.part").exists()


# -------------------------------------------------------------------------------------------------------- command line


def test_on_the_command_line(run_script, talker, tmp_path):
    jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    (tmp_path / "short.json").write_text(json.dumps(SHORT))
    flags = "--dataset pairs.jsonl --requests short.json --min-mass 0 --output-dir out --orders average --tie-margin 0"
    done = run_script("rlaif", "label", "--judge", talker, *flags.split(), cwd=tmp_path)
    assert "3 rows from 3; none dropped" in done.stdout and "Traceback" not in done.stderr
    assert "out: pairs.jsonl (3 rows), report.json" in done.stdout
    assert len(result(tmp_path / "out").rows("pairs.jsonl")) == 3
    kept = json.loads((tmp_path / "out/args.json").read_text())
    assert kept["script"] == "rlaif.py" and kept["finished"] and kept["args"]["dataset"] == "pairs.jsonl"


def test_ctrl_c_keeps_the_batches_that_are_done(tmp_path, monkeypatch):
    """Exit code 130, one line, no traceback."""
    jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(6)])
    (tmp_path / "short.json").write_text(json.dumps(SHORT))
    is_stuck = threading.Event()

    def reply(body, number):
        if number >= 8:
            is_stuck.set()
            time.sleep(30)
        return Server.letters(body, number)

    server = Server(reply)
    flags = f"--judge big --judge-url {server.url} --dataset pairs.jsonl --requests short.json --batch-size 2"
    command = [sys.executable, REPO / "rlaif.py", "label", *flags.split(), "--output-dir", "out"]
    environment = os.environ | dict(no_proxy="*")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert is_stuck.wait(timeout=60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        server.stop()
    assert process.returncode == 130 and "with --resume continues" in err and "Traceback" not in err
    assert len((tmp_path / "out/rows.part").read_text().splitlines()) == 4


REQUIRED = {  # of each subcommand; the policies of compare are positional
    **dict(label={"--dataset", "--judge"}, revise={"--model", "--dataset"}, synthesise={"--model"}),
    **{"best-of-n": {"--dataset"}, "audit": {"--dataset", "--judge"}, "compare": {"STR", "--dataset", "--judge"}},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_acts_that_was_not_named(command, run_script, tmp_path):
    done = run_script("rlaif", command, "--output-dir", "out", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert {*re.findall(r"^\W*(--[\w-]+|STR)", done.stderr, re.MULTILINE)} == REQUIRED[command]


# ----------------------------------------------------------------------------------------------------------- real data


def test_real_prompts_and_a_real_checkpoint(real_data, ai):
    with gzip.open(real_data / "hh_rlhf.jsonl.gz", "rt") as file:
        rows = map(json.loads, file)
        length = lambda row: sum(len(m["content"]) for m in row["prompt"] + row["chosen"] + row["rejected"])
        jsonl(Path("hh.jsonl"), list(itertools.islice((row for row in rows if length(row) < 350), 8)))
    story = str(real_data / "stories260K-hf")
    options = dict(judge=story, dataset="hh.jsonl", min_mass=0.0, orders="average", tie_margin=0.0)
    audited = ai("audit", **options, output_dir="audit").report
    assert sum(sum(kind.values()) for kind in audited["kinds"].values()) == 8
    assert {*audited["kinds"]} <= {"helpful", "harmless"}
    labelled = ai("label", **options, output_dir="given").rows("pairs.jsonl")
    assert len(labelled) == audited["decided"] and {row["judge"] for row in labelled} == {story}
    assert all(0.5 < row["probability"] <= 1 and row["subset"] for row in labelled)
