"""grpo.py: the method against worked numbers and brute force, answers found and compared, what rewards may see, whole runs in this process."""

import gzip
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_config
from test_plumbing import CPU, equal, in_child, jsonl, lasting, lines_of, on_ranks, refused, talk, weights_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grpo
from grpo import Row

f64 = lambda *values: torch.tensor(values, dtype=torch.float64)


def settings(**options):
    """Args for functions that read neither --model nor --dataset."""
    return grpo.Args(**dict(model="", dataset="") | options)


def near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


# --------------------------------------------------------------------------------------------------------- the method, in numbers

GROUPS = [  # worked numbers: rewards, by the population's deviation, by the sample's, by none
    ([1, 0, 0, 1], [1, -1, -1, 1], [0.866025, -0.866025, -0.866025, 0.866025], [0.5, -0.5, -0.5, 0.5]),
    ([1, 0, 0, 0], [1.732051, *[-0.57735] * 3], [1.5, -0.5, -0.5, -0.5], [0.75, -0.25, -0.25, -0.25]),
    ([0.2, 0.8, 0.5], [-1.224745, 1.224745, 0], [-1, 1, 0], [-0.3, 0.3, 0]),
    ([2, 1, 1, 0], [1.414214, 0, 0, -1.414214], [1.224745, 0, 0, -1.224745], [1, 0, 0, -1]),
    ([1, 1, 1, 0], [*[0.577350] * 3, -1.732051], [0.5, 0.5, 0.5, -1.5], [0.25, 0.25, 0.25, -0.75]),
]


@pytest.mark.parametrize("rewards, population, sample, none", GROUPS)
def test_advantages_of_a_group(rewards, population, sample, none):
    for scale, expected in dict(population=population, sample=sample, none=none).items():
        near(grpo.group_advantages(f64(rewards), scale, 0.0), [expected])
    near(grpo.group_advantages(f64(rewards, [5.0] * len(rewards)), epsilon=0.0)[0], sample)  # each row by itself
    deviation = f64(rewards).std(1).item()
    near(grpo.group_advantages(f64(rewards)), [[a * deviation / (deviation + 1e-4) for a in sample]])


@pytest.mark.parametrize("size", [2, 3, 7, 8, 12, 16, 64])
@pytest.mark.parametrize("scale", ["sample", "population", "none"])
def test_a_group_of_equal_rewards_is_exactly_nothing(size, scale):
    """Also where the mean of equal numbers is, for rounding, another number: AdamW would make a whole step of any remainder."""
    rewards = torch.tensor([0.1, 0.3, 0.7, 1.1, 1 / 3, 2.2, 0.0, 1.0, -5.5]).repeat(size, 1).T
    assert not grpo.group_advantages(rewards, scale).any()
    assert not torch.cat(grpo.step_advantages(list(rewards[0].split([1, size - 1])), scale)).any()


def test_advantages_of_steps():
    """Two answers of three steps and of two."""
    rewards = [f64(0.1, 0.7, 0.9), f64(0.3, 0.2)]
    a, b = grpo.step_advantages(rewards, "population", 0.0)
    near(a, [1.236795, 2.343400, 1.497172]), near(b, [-1.236795, -0.781133])
    a, b = grpo.step_advantages(rewards, "sample", 0.0)
    near(a, [1.106223, 2.096001, 1.339112]), near(b, [-1.106223, -0.698667])
    a, b = grpo.step_advantages(rewards, "none")
    near(a, [-0.34 + 0.26 + 0.46, 0.26 + 0.46, 0.46]), near(b, [-0.14 - 0.24, -0.24])


@pytest.mark.parametrize(
    "logp, ref, kl",
    [(-1, -1.2, 0.018731), (-1, -0.5, 0.148721), (-1, -1, 0.0), (math.log(0.6), math.log(0.5), 0.01565489)],
)
def test_kl_of_a_token(logp, ref, kl):
    near(grpo.kl_estimate(f64(logp), f64(ref)), [kl])


def test_the_kl_estimate_is_unbiased_and_never_negative():
    torch.manual_seed(0)
    logp, ref = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    found = grpo.kl_estimate(logp, ref)
    near((logp.exp() * found).sum(), (logp.exp() * (logp - ref)).sum().item(), 1e-12)
    assert found.min() >= 0


@pytest.mark.parametrize(
    "ratio, advantage, objective",
    [(1.25, 1, 1.25), (1.3, 1, 1.28), (0.7, 1, 0.7), (1.3, -1, -1.3), (0.7, -1, -0.8), (0.9, -1, -0.9)],
)
def test_clip_higher(ratio, advantage, objective):
    logp = f64(math.log(ratio) - 2).requires_grad_()
    found = grpo.clipped_objective(logp, f64(-2), f64(advantage), 0.2, 0.28)
    near(found.detach(), [objective])
    near(
        torch.autograd.grad(found.sum(), logp)[0],
        [ratio * advantage if abs(objective - ratio * advantage) < 1e-9 else 0.0],
    )


@pytest.mark.parametrize("advantage, logp, ref, coefficient", [(1, -1, -1.2, 0.992749), (-1, -1, -0.5, -0.974051)])
def test_gradient_coefficient(advantage, logp, ref, coefficient):
    """Eq. 21: A + beta (pi_ref / pi - 1) on the gradient of log pi, where pi_old is pi."""
    logps = f64(logp).requires_grad_()
    grpo.grpo_loss(logps, logps.detach(), f64(ref), f64(advantage), f64(1.0), settings(kl_coef=0.04)).backward()
    near(-logps.grad, [coefficient])


AGGREGATED = [("response", [0.25, 0.125], 0.0), ("token", [1 / 6, 1 / 6], 1 / 3), ("constant", [1 / 16, 1 / 16], 0.125)]


@pytest.mark.parametrize("normalise, weights, loss", AGGREGATED)
def test_normalisers(normalise, weights, loss):
    """An answer of 2 tokens with advantage 1, one of 4 with -1, at most 8; then the first cut off; then both."""
    lengths, advantages = f64(2, 4), f64(1, 1, -1, -1, -1, -1)
    found = grpo.answer_weights(lengths, f64(1, 1), normalise, 8)
    near(found, weights)
    by_token, logps = found.repeat_interleave(lengths.long()), torch.randn(6, dtype=torch.float64).requires_grad_()
    result = grpo.grpo_loss(logps, logps.detach(), None, advantages, by_token, settings())
    near(result.detach(), loss)
    near(torch.autograd.grad(result, logps)[0], (-advantages * by_token).tolist())
    near(
        grpo.answer_weights(lengths, f64(0, 1), normalise, 8),
        [0, dict(response=1 / 4, token=1 / 4, constant=1 / 8)[normalise]],
    )
    assert not grpo.answer_weights(lengths, f64(0, 0), normalise, 8).any()


@pytest.mark.parametrize(
    "longest, cache, table",
    [(20480, 4096, {16384: 0, 18432: -0.5, 20480: -1, 20481: -1, 7: 0}), (100, 20, {80: 0, 90: -0.5, 100: -1})],
)
def test_overlong_penalty(longest, cache, table):
    near(grpo.overlong_penalty(torch.tensor(list(table)), longest, cache), list(map(float, table.values())))


def test_the_gradient_of_a_group_is_unbiased():
    """Every pair of answers of one token or two, by a table's policy: on average the gradient is (G - 1) / G of the exact one, since the mean
    that is taken off holds the answer itself; with GRPO's own length normalisation it is not in proportion."""
    torch.manual_seed(0)
    table, stop, longest = (
        torch.randn(3, 3, dtype=torch.float64).requires_grad_(),
        0,
        2,
    )  # a row of logits at the start, and after tokens 1 and 2
    answers = [(stop,), *((a, b) for a in (1, 2) for b in (0, 1, 2))]
    rewards = dict(zip(answers, torch.randn(len(answers), dtype=torch.float64).tolist()))

    def logps(answer):
        return torch.stack(
            [table.log_softmax(-1)[0 if t == 0 else answer[t - 1], token] for t, token in enumerate(answer)]
        )

    exact = torch.autograd.grad(sum(logps(a).sum().exp() * r for a, r in rewards.items()), table)[0] * -1 / longest
    found = {}
    for normalise in ("constant", "response"):
        expected = 0.0
        for pair in itertools.product(answers, repeat=2):
            lengths = torch.tensor([len(a) for a in pair])
            advantages = grpo.group_advantages(f64([rewards[a] for a in pair]), "none")[0].repeat_interleave(lengths)
            weights = grpo.answer_weights(
                lengths, torch.ones(2, dtype=torch.float64), normalise, longest
            ).repeat_interleave(lengths)
            both = torch.cat([logps(a) for a in pair])
            expected = expected + both.sum().exp().detach() * grpo.grpo_loss(
                both, both.detach(), None, advantages, weights, settings()
            )
        found[normalise] = torch.autograd.grad(expected, table)[0]
    torch.testing.assert_close(found["constant"], exact / 2, rtol=0, atol=1e-12)
    assert torch.cosine_similarity(found["response"].flatten(), exact.flatten(), dim=0) < 0.999


@pytest.mark.parametrize("n, correct", [(10, 3), (8, 0), (8, 8), (6, 5), (5, 1)])
def test_pass_at_k(n, correct):
    right = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert grpo.pass_at_k(correct, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for k, value in {1: 0.3, 2: 0.53333333, 5: 0.91666667}.items():
        assert grpo.pass_at_k(3, 10, k) == pytest.approx(value)
    assert grpo.pass_at_k(8, 16, 1) == 0.5


def test_majority_of_votes_and_ties():
    majority = lambda votes, k: grpo.majority_at_k(votes, [v == "r" for v in votes], k)
    assert majority(list("rrwx"), 4) == 1 and majority(list("rwwx"), 4) == 0
    assert majority(list("rwrw"), 4) == 0.5 and majority(list("rwx"), 3) == pytest.approx(1 / 3)  # exact ties
    assert majority(list("rwwrrwxx"), 2) == pytest.approx((0.5 + 0.5 + 0.5 + 0) / 4)  # the mean over disjoint parts
    assert majority(list("rrwww"), 2) == pytest.approx((1 + 0) / 2)  # what is left over does not vote
    assert (
        majority([None, None, "r", None], 4) == 1 and majority([None, None, "w", None], 4) == 0
    )  # no answer is no vote
    assert majority([None] * 4, 4) == 0 and majority([None] * 4, 1) == 0
    assert majority(list("rwrr"), 1) == 0.75


VOTES = [  # worked numbers: the right answer first
    ([0.4, 0.2, 0.2, 0.2], {1: 0.4, 3: 0.448, 5: 0.50944, 8: 0.580096, 16: 0.707554}),
    ([0.3, 0.4, 0.3], {1: 0.3, 3: 0.288, 8: 0.260755, 64: 0.133359}),
]


@pytest.mark.parametrize("chances, table", VOTES)
def test_the_expected_majority(chances, table):
    """Over all ways in which k votes can fall."""
    for k, value in table.items():
        expected = 0.0
        for cuts in itertools.combinations(range(k + len(chances) - 1), len(chances) - 1):
            counts = [b - a - 1 for a, b in zip((-1, *cuts), (*cuts, k + len(chances) - 1))]
            ways = math.factorial(k) // math.prod(map(math.factorial, counts))
            votes = [str(i) for i, n in enumerate(counts) for _ in range(n)]
            expected += (
                ways
                * math.prod(p**n for p, n in zip(chances, counts))
                * grpo.majority_at_k(votes, [v == "0" for v in votes], k)
            )
        assert expected == pytest.approx(value, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- verifiable answers

FOUND = [  # text, how, what is found, what it is compared as
    ("So 3 + 4 = 7.", "number", "7", "7"),
    ("it is 1e5", "number", "1e5", "100000"),
    ("2.5e-3 of it", "number", "2.5e-3", "1/400"),
    ("3eggs", "number", "3", "3"),
    ("it is \u22125.", "number", "\u22125", "-5"),
    ("It is -7", "number", "-7", "-7"),
    ("10-3 is 10 - 3", "number", "3", "3"),
    ("f(2)-3", "number", "3", "3"),
    ("A loss: -$1,234.50!", "number", "-$1,234.50", "-2469/2"),
    ("$1,234,567.", "number", "1,234,567", "1234567"),
    ("of 1,2345 the last", "number", "2345", "2345"),
    ("3.0", "number", "3.0", "3"),
    ("a share of .5", "number", ".5", "1/2"),
    ("-.25 or so...", "number", "-.25", "-1/4"),
    ("1/2 of it", "number", "1/2", "1/2"),
    ("1/0", "number", "1/0", "1/0"),
    ("50%", "number", "50", "50"),
    ("Step 1. Then 2.", "number", "2", "2"),
    ("no number", "number", None, None),
    ("", "number", None, None),
    (r"\boxed{1} and \boxed{72}", "boxed", "72", "72"),
    (r"\boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{\$1{,}0}", "boxed", r"\$1{,}0", r"\$1{,}0"),
    (r"\boxed{\$18}", "boxed", r"\$18", "18"),
    (r"\boxed{50\%}", "boxed", r"50\%", "50"),
    (r"\boxed{ }", "boxed", " ", None),
    (r"\boxed{1", "boxed", None, None),
    (r"\boxed{\frac{1}{2}", "boxed", None, None),
    ("boxed 3", "boxed", None, None),
    ("so\n#### 72", "hash", "72", "72"),
    ("#### 1\n#### 1,000", "hash", "1,000", "1000"),
    ("####", "hash", "", None),
    ("72", "hash", None, None),
    ("It is (B), no, (C).", r"\(([A-D])\)", "C", "c"),
    ("It is B, no, C.", r"\b[A-D]\b", "C", "c"),
    ("answer: ", r"answer: (\d+)?", None, None),
    ("none", r"\(([A-D])\)", None, None),
]


@pytest.mark.parametrize("text, how, found, compared", FOUND)
def test_answers_are_found(text, how, found, compared):
    assert grpo.found_answer(text, how) == found and grpo.canonical(found) == compared


SAME = [
    ["72", "72.", " 72 ", "$72", "72.0", "72.00", "144/2", "+72", "72%", "72 %", r"\$72", "$ 72", "7.2e1"],
    ["1000", "1,000", "$1,000.00", "1 000", "1e3"],
    ["-1/2", "-0.5", "-.5", "-2/4", "-$0.50"],
    ["3/2", "1.5", "3 / 2"],
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
        assert len({grpo.canonical(text) for text in group}) == 1, group
        assert not {grpo.canonical(group[0])} & {grpo.canonical(other[0]) for j, other in enumerate(SAME) if i != j}
    assert grpo.canonical(None) is grpo.canonical("") is grpo.canonical(" . ") is None


def test_a_number_of_any_length_is_compared_at_once():
    """A policy may write what would take a billion digits."""
    for text in ("1e999999999", "-2e-999999999", "9" * 6000, "1/" + "0" * 6000):
        assert grpo.canonical(text) == text


def test_true_answers():
    column = {
        "5 + 5 = 10\n#### 1,000": "1000",
        r"thus \boxed{\frac{1}{2}}": r"\frac{1}{2}",
        "72": "72",
        "72.0": "72",
        "Up": "up",
        "": None,
        "####": None,
    }
    assert {text: grpo.true_answer(text) for text in column} == column
    assert (
        grpo.true_answer(72) == grpo.true_answer(72.0) == "72"
        and grpo.true_answer(0.5) == "1/2"
        and grpo.true_answer(True) == "true"
    )


AFTER = [  # text, what stands after the thinking, whether it is well formed
    ("12", "12", False),
    ("<think>a</think>12", "12", True),
    ("<think></think> 12", " 12", False),
    ("\n<think>a\nb</think>\n\n12\n", "\n\n12\n", True),
    ("<think>a</think>", "", False),
    ("<think>a</think> \n", " \n", False),
    ("<think>a 12", "", False),
    (
        "a 12</think>12",
        "12",
        False,
    ),  # no opening tag: the template has not opened it either, or as_written would have put it
    ("<think>a</think>1<think>b</think>2", "2", False),
    ("<think>a</think>1<think>b 2", "1", False),
    ("1<think>b 2", "1", False),
    ("1 <think>a</think>12", "12", False),
    ("<think>a<think>b</think>12", "12", False),
    ("<think>a</think>b</think>12", "12", False),
    ("", "", False),
]


@pytest.mark.parametrize("text, after, formed", AFTER)
def test_after_thinking(text, after, formed):
    assert grpo.after_thinking(text) == after and grpo.well_formed(text) == formed


def test_every_answer_of_gsm8k_is_read(real_data):
    with gzip.open(real_data / "gsm8k.jsonl.gz", "rt") as f:
        rows = list(map(json.loads, f))
    assert len(rows) == 7473
    for row in rows:
        true = grpo.canonical(row["final"])
        assert true == str(int(row["final"])) == grpo.true_answer(row["answer"])  # every one of them is a whole number
        assert grpo.canonical(grpo.found_answer(row["answer"], "hash")) == true
        assert grpo.canonical(grpo.found_answer(row["answer"], "number")) == true
        assert grpo.canonical(grpo.found_answer(rf"<<1>> so it is \boxed{{\${row['final']}}}.", "boxed")) == true
        solution = row["answer"].rpartition("####")[0]
        last = grpo.found_answer(solution.replace("<<", " ").replace(">>", " "), "number")
        assert last is None or grpo.canonical(last) is not None


# ------------------------------------------------------------------------------------------------------------------------ rewards

QUESTIONS = [
    "What is the best path?",
    "Write a letter",
    "Is it safe? Say so.",
    "Sum: 4 3 5",
    "up",
    "Where does the robot start? I'd like to talk.",
]
REPLIES = ["right", "Dear Ann, thank you", "No", "12", "Right, up, right", "I read it"]


def asked(prompt, **extra) -> Row:
    return Row([1], [[2]], None, dict(prompt=prompt, kind="") | extra)


def load_policy(folder):
    return grpo.load_frozen(AutoModelForCausalLM, str(folder), CPU, torch.float32, grpo.token_logps)


@pytest.fixture(scope="module")
def talker(tiny_model_dir, tmp_path_factory):
    """A tiny policy that has learnt to give short answers and to end them, mostly."""
    policy, tokenizer = load_policy(tiny_model_dir("llama"))
    rows = [Row(*grpo.encode(tokenizer, talk(q), [r], grpo.stop_tokens(tokenizer))) for q, r in zip(QUESTIONS, REPLIES)]
    forwards, target = grpo.pack(rows, CPU)
    optimizer = torch.optim.Adam(policy.requires_grad_(True).parameters(), 3e-3)
    for _ in range(25):
        (-policy.token_logps(forwards, target)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("talker")
    policy.config._attn_implementation = None
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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


THOUGHTS = [
    "No",
    "<think>a secret 12</think>No",
    "<think>a secret",
    "<think>a</think>\nNo <think>a secret",
    "\n<think>12</think> 7 \n",
]
OPEN = ["No", "No", "", "No", "7"]


def test_no_reward_but_the_format_sees_the_thinking(talker, scorer, tmp_path):
    seen = []

    def rule(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(prompts)

    args = settings(reward_model=(scorer,), judge=talker, format_weight=1.0)
    rewards = grpo.load_rewards(args, CPU, torch.float32)
    rewards["rule"] = 1.0, lambda rows, texts: grpo.rule_scores(rule, CPU, rows, texts)
    rewards["match"] = 1.0, lambda rows, texts: grpo.match_scores("number", CPU, rows, texts)
    rows = [asked(talk("Is it safe?"), answer=12)] * len(THOUGHTS)
    total, named = grpo.all_rewards(rewards, args, rows, THOUGHTS, CPU)
    assert seen == [[dict(role="assistant", content=text)] for text in OPEN]
    assert named["format"].tolist() == [0, 1, 0, 0, 1] and not named["match"].any()
    _, plain = grpo.all_rewards(rewards, args, rows, OPEN, CPU)
    for name in (Path(scorer).name, "judge"):
        torch.testing.assert_close(named[name], plain[name], rtol=0, atol=1e-5)
        assert (
            named[name][0] == pytest.approx(named[name][1].item(), abs=1e-5)
            and abs(named[name][0] - named[name][4]) > 1e-4
        )
    torch.testing.assert_close(total, sum(named.values()))


@pytest.mark.parametrize(
    "prompt", ["The sum is", [*talk("Sum"), dict(role="assistant", content="The sum is")]], ids=["text", "begun"]
)
def test_an_answer_that_goes_on_keeps_its_first_space(prompt, scorer):
    args = settings(reward_model=(scorer,))
    rewards = grpo.load_rewards(args, CPU, torch.float32)
    found, _ = grpo.all_rewards(rewards, args, [asked(prompt)], [" 12"], CPU)
    model, tokenizer = grpo.load_frozen(
        AutoModelForSequenceClassification, scorer, CPU, torch.float32, grpo.response_scores, num_labels=1
    )
    score = lambda text: grpo.reward_scores(model, tokenizer, {}, args, CPU, [asked(prompt)], [text]).item()
    assert found.item() == pytest.approx(score(" 12"), abs=1e-5) and abs(score(" 12") - score("12")) > 1e-4


def test_weights_and_rewards_that_do_not_apply():
    """DeepSeek-V2's mix of three; None of a rule and NaN of a match add nothing."""
    give = lambda *values: lambda rows, texts: torch.tensor(values)
    rewards = dict(helpful=(0.6, give(1.2, 1.2)), safe=(0.3, give(0.5, math.nan)), rule=(0.1, give(1.0, 1.0)))
    total, named = grpo.all_rewards(rewards, settings(), [asked("a"), asked("b")], ["x", "y"], CPU)
    near(total, [0.97, 0.82]), near(named["helpful"], [1.2, 1.2])
    total, named = grpo.all_rewards(
        rewards, settings(format_weight=2.0), [asked("a"), asked("b")], ["<think>1</think>x", "y"], CPU
    )
    near(total, [2.97, 0.82])
    total, named = grpo.all_rewards({}, settings(format_weight=0.5), [asked("a")], ["<think>1</think>x"], CPU)
    assert total.tolist() == [0.5] and list(named) == ["format"]
    rule = lambda prompts, completions, **columns: [None, 2, -1.5]
    scores = grpo.rule_scores(rule, CPU, [asked("a"), asked("b"), asked("c")], ["x", "y", "z"])
    assert scores[0].isnan() and scores[1:].tolist() == [2, -1.5]


def test_match_scores():
    rows = [asked("a", answer=answer) for answer in ("12", "so\n#### 1,200", None, "", 12, 0.5)]
    scores = grpo.match_scores("number", CPU, rows, ["= 12.0", "$1,200", "12", "12", "no", "1/2"])
    assert scores[2:4].isnan().all() and [*scores[:2].tolist(), *scores[4:].tolist()] == [1, 1, 0, 1]


def test_what_is_right():
    nan = math.nan
    assert grpo.correctness(settings(), {}) is None
    rule, match = torch.tensor([1.0, 0.99, 2.0, nan]), torch.tensor([0.0, 1.0, nan, 0.0])
    near(grpo.correctness(settings(), dict(rule=rule))[:3], [1, 0, 1])
    assert grpo.correctness(settings(), dict(rule=rule)).isnan().tolist() == [False, False, False, True]
    near(
        grpo.correctness(settings(match="number"), dict(rule=rule, match=match))[:2], [0, 1]
    )  # the match, where there is one


STEPS = [  # the pieces in which an answer is written, and its text at the end of each step
    (["a", "\n", "b", "\n", "c"], ["a\n", "a\nb\n", "a\nb\nc"], [2, 2, 1]),
    (["a b c"], ["a b c"], None),
    (["a", "\n"], ["a\n"], [2]),  # nothing follows the last separator
    (["a", "\n", "\n", "b"], ["a\n\n", "a\n\nb"], [3, 1]),  # between two separators there is no step
    (["\n", "a", "\n", "b"], ["\na\n", "\na\nb"], [3, 1]),  # nothing stands before the first one
    (
        ["<think>", "x", "\n", "y", "</think>", "a", "\n", "b"],
        ["<think>x\ny</think>a\n", "<think>x\ny</think>a\nb"],
        None,
    ),
    (["<think>", "x", "\n", "y"], ["<think>x\ny"], None),  # thinking that never ended is one step
]


@pytest.mark.parametrize("pieces, texts, counts", STEPS)
@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_is_cut_into_steps(pieces, texts, counts, ended, tiny_tokenizer):
    ids = [i for piece in pieces for i in tiny_tokenizer(piece, add_special_tokens=False).input_ids]
    stops, row = grpo.stop_tokens(tiny_tokenizer), asked(talk("Hi"))
    found, lengths = grpo.cut_into_steps(tiny_tokenizer, row, ids + stops * ended, stops, "\n")
    assert found == texts and len(lengths) == len(texts) and sum(lengths) == len(ids) + ended
    assert counts is None or lengths == [*counts[:-1], counts[-1] + ended]
    for text, end in zip(texts[:-1], itertools.accumulate(lengths)):
        assert tiny_tokenizer.decode(ids[:end]) == text


def test_advantages_by_steps(tiny_tokenizer):
    """Each step is scored as the answer stands then; two groups, each normalised by itself."""
    tokenizer, stops, seen = tiny_tokenizer, grpo.stop_tokens(tiny_tokenizer), []
    write = lambda text: tokenizer(text, add_special_tokens=False).input_ids + stops
    score = {"a": 0.1, "a\nb": 0.7, "a\nb\nc": 0.9, "x": 0.3, "x\ny": 0.2}

    def rule(rows, texts):
        seen.extend(texts)
        return torch.tensor([score.get(text, 5.0) for text in texts])

    rows = [
        asked(talk("1"))._replace(responses=[write("a\nb\nc"), write("x\ny")]),
        asked(talk("2"))._replace(responses=[write("k\nk"), write("k")]),
    ]
    args = settings(step_separator="\n", scale="population")
    first, second = grpo.process_advantages(dict(rule=(1.0, rule)), tokenizer, rows, stops, args, CPU)
    assert seen == ["a", "a\nb", "a\nb\nc", "x", "x\ny", "k", "k\nk", "k"]
    one, two, three, four, five = [1.236795] * 2, [2.343400] * 2, [1.497172] * 2, [-1.236795] * 2, [-0.781133] * 2
    near(first, one + two + three + four + five, 2e-3)  # the deviation has 1e-4 added
    assert second.tolist() == [0.0] * 6
    assert grpo.process_advantages(dict(rule=(1.0, rule)), tokenizer, [], stops, args, CPU) == []


def test_answers_as_written(tiny_tokenizer):
    tokenizer, stops = tiny_tokenizer, grpo.stop_tokens(tiny_tokenizer)
    ids = tokenizer("<think>a</think> No<|user|>!", add_special_tokens=False).input_ids
    opened = asked(talk("Hi"))._replace(prompt=tokenizer("<|user|>Hi<|end|><|assistant|><think>\n").input_ids)
    plain, text = asked(talk("Hi"))._replace(prompt=[1, 5, 6]), asked("Hi")._replace(prompt=tokenizer("Hi").input_ids)
    written = grpo.as_written(tokenizer, [plain, opened, text], [ids + stops, ids, ids + stops], stops)
    assert written == ["<think>a</think> No!", "<think><think>a</think> No!", "<think>a</think> No!"]
    assert grpo.as_written(tokenizer, [plain, plain], [stops, []], stops) == ["", ""]


def test_thinking_length(tiny_tokenizer):
    count = lambda text: len(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    for thought in ("<think>up, right, up</think>", "<think>"):
        whole = count(thought + "12")
        assert grpo.thinking_length(tiny_tokenizer, thought + "12", whole) == (
            whole - count("12") if "</think>" in thought else whole
        )
    assert grpo.thinking_length(tiny_tokenizer, "12", 2) == 0


# ----------------------------------------------------------------------------------------------------------------- whole runs

RULES = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in c[0]["content"])) for c in completions]

def lively(prompts, completions, number, **columns):  # tells the answers to some prompts apart only
    return [v * (n % 3 == 0) for v, n in zip(vowels(prompts, completions), number)]

def column(prompts, completions, truth, **columns):
    return list(truth)

def same(prompts, completions, **columns):
    return [0.1] * len(prompts)

def letter(prompts, completions, **columns):
    return [c[0]["content"].startswith("No") for c in completions]

def some(prompts, completions, number, **columns):
    return [v if n % 2 else None for v, n in zip(vowels(prompts, completions), number)]
"""


@pytest.fixture
def train(talker, tmp_path, monkeypatch):
    """train(**options) runs grpo.main here, on a rule that counts vowels unless told otherwise, and returns the lines of its metrics."""
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text(RULES)
    jsonl(Path("prompts.jsonl"), [dict(prompt=talk(q), number=i, answer="12") for i, q in enumerate(QUESTIONS)])
    usual = dict(
        model=talker,
        rule="rules.py:vowels",
        dataset="prompts.jsonl",
        eval_fraction=0.0,
        max_new_tokens=8,
        batch_size=3,
        num_generations=3,
    )
    usual |= dict(learning_rate=1e-3, warmup_ratio=0.0, max_steps=2, show_every=0, output_dir="out", epochs=4)

    def go(ranks=0, **options):
        flags = usual | options
        if ranks:
            on_ranks(grpo, ranks, **flags)
        else:
            grpo.main(grpo.Args(**flags))
        return lines_of(flags["output_dir"])

    go.usual = usual
    return go


@pytest.fixture
def spy(monkeypatch):
    """spy(name) -> list of the calls of that function of grpo.py from now on, each as (its arguments, its result)."""

    def watch(name):
        calls, real = [], getattr(grpo, name)

        def watched(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(grpo, name, watched)
        return calls

    return watch


def hand_made(monkeypatch, write):
    """Sampling gives, for a row, the k-th of its answers and the most tokens there may be, the ids that `write` returns."""

    def sample_answers(model, rows, numbers, *rest, **options):
        n = len(numbers) // max(1, len(rows))
        tokens = [write(row, k, numbers.shape[1])[: numbers.shape[1]] for row in rows for k in range(n)]
        return [tokens, [[0.0] * len(t) for t in tokens], [None] * len(tokens)]

    monkeypatch.setattr(grpo, "sample_answers", sample_answers)


def unmoved(folder, before) -> bool:
    return equal(weights_of(folder), weights_of(before))


def assert_near(a, b, tolerance=1e-5):
    """Two runs' lines of metrics and weights."""
    for x, y in zip(lasting(a), lasting(b), strict=True):
        x.pop("step_time"), y.pop("step_time")
        assert x.keys() == y.keys()
        for k in x:
            assert x[k] == pytest.approx(y[k], rel=tolerance, abs=tolerance), f"{k} at step {x['step']}"
    a, b = weights_of(a), weights_of(b)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=20 * tolerance
        )  # a fifth of one step of the learning rate 1e-3


def steady(out) -> list:
    return [{k: v for k, v in line.items() if k != "step_time"} for line in lasting(out)]


def test_before_the_first_update_all_policies_are_one(train, spy):
    losses = spy("grpo_loss")
    first, second = train(num_iterations=2)
    assert first["kl"] < 1 and first["sampling/sampling_logp_difference/max"] < 1e-4
    logps, old, ref, *_ = losses[0][0]
    size = 1e-5 * old.abs().max().item()  # log-probabilities near -8, each a chain of sums in float32
    (
        torch.testing.assert_close(logps.detach(), old, rtol=0, atol=size),
        torch.testing.assert_close(old, ref, rtol=0, atol=size),
    )
    first, second = train(output_dir="one")
    assert first["kl"] < 1e-9 < second["kl"]
    for line in (first, second):  # one update a batch: the ratio is 1
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == line["clip_ratio/region_mean"] == 0
    assert first["learning_rate"] == 1e-3 and first["grad_norm"] > 0 and first["entropy"] > 0 and second["epoch"] == 1


def test_the_distribution_that_is_trained_is_the_sampled_one(train, spy):
    losses = spy("grpo_loss")
    lines = train(
        temperature=0.7,
        top_p=0.9,
        num_iterations=2,
        num_minibatches=2,
        max_steps=5,
        learning_rate=1e-2,
        max_new_tokens=6,
    )
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines)
    assert all(torch.isfinite(x).all() for (logps, old, ref, *_), loss in losses for x in (logps, old, ref, loss))
    assert lines[0]["kl"] > 0 and lines[-1]["clip_ratio/region_mean"] > 0  # passes after the first have moved


def test_two_equal_prompts_are_two_groups(train, spy, talker):
    """Rewards all 0 for one, all 1 for the other: nothing to learn, where a mixture of both groups would teach much."""
    jsonl(Path("twins.jsonl"), [dict(prompt=talk("up"), truth=truth) for truth in (0.0, 1.0)])
    advantages = spy("group_advantages")
    twins = dict(dataset="twins.jsonl", rule="rules.py:column", batch_size=2, kl_coef=0.0, max_steps=2)
    for ranks in (0, 2):
        lines = train(ranks, **twins, output_dir=f"out{ranks}")
        assert [line["frac_reward_zero_std"] for line in lines] == [1, 1] and [line["reward"] for line in lines] == [
            0.5,
            0.5,
        ]
        assert [line["grad_norm"] for line in lines] == [0, 0] and unmoved(f"out{ranks}", talker)
    assert len(advantages) == 4 and all(
        len(set(rewards[0].tolist())) == 1 and not found.any() for (rewards, *_), found in advantages
    )


@pytest.mark.parametrize("normalise", ["response", "token", "constant"])
def test_the_first_gradients_are_those_of_a_naive_implementation(
    normalise, train, spy, monkeypatch, talker, tiny_model_dir
):
    """Two minibatches, a temperature, a reference of its own, answers cut off and masked: every index in the loop counts."""
    gradients, real = [], grpo.take_step

    def record(model, *rest):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real(model, *rest)

    monkeypatch.setattr(grpo, "take_step", record)
    reference, sampled, scored = str(tiny_model_dir("llama")), spy("sample_answers"), spy("all_rewards")
    options = dict(
        normalise=normalise,
        temperature=0.8,
        num_minibatches=2,
        batch_size=5,
        kl_coef=0.3,
        reference=reference,
        mask_truncated=True,
    )
    train(**options, max_steps=1, tokens_per_forward=60, max_new_tokens=5)
    (_, rows, *_), (tokens, *_) = sampled[0]
    rewards = scored[0][1][0].view(5, 3)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()
    policy, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (talker, reference))
    chosen = [place * 3 + k for place in next(grpo.minibatches(5, 1, 2, 0, 0)) for k in range(3)]
    whole = [i for i in chosen if tokens[i][-1] == 2]
    assert 0 < len(whole) < len(chosen)
    loss = 0.0
    for i in whole:
        prompt, ids = rows[i // 3].prompt, tokens[i]
        states, own = slice(len(prompt) - 1, len(prompt) + len(ids) - 1), []
        for model in (policy, other):
            logits = model(torch.tensor([prompt + ids])).logits[0, states] / 0.8
            own.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
        ratio, gap = (own[0] - own[0].detach()).exp(), own[1].detach() - own[0]
        weight = dict(
            response=1 / len(ids) / len(whole),
            token=1 / sum(len(tokens[j]) for j in whole),
            constant=1 / (5 * len(whole)),
        )[normalise]
        loss = loss - weight * (ratio * advantages[i] - 0.3 * (gap.exp() - gap - 1)).sum()
    loss.backward()
    direct = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    scale = max(g.abs().max().item() for g in direct.values())
    assert direct.keys() == gradients[0].keys() and len(gradients) == 2 and scale > 1e-3
    for name in direct:
        torch.testing.assert_close(
            gradients[0][name], direct[name], rtol=0, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_neither_memory_knob_changes_anything(train):
    for name, change in dict(
        whole={}, small=dict(tokens_per_forward=30), again=dict(gradient_checkpointing=True)
    ).items():
        train(**change, output_dir=name, num_minibatches=2, num_iterations=2)
    assert_near("whole", "small"), assert_near("whole", "again")


def test_equal_rewards_move_nothing(train, talker):
    (line,) = train(rule="rules.py:same", kl_coef=0.0, max_steps=1, num_generations=8, learning_rate=1e-2)
    assert (
        line["frac_reward_zero_std"] == 1
        and line["grad_norm"] == 0
        and line["reward"] == pytest.approx(0.1)
        and line["reward_std"] < 1e-6
    )
    assert unmoved("out", talker)


def test_groups_without_spread_are_kept_or_skipped(train, talker, tiny_model_dir):
    """Kept, their KL pulls; skipped, they do nothing."""
    flags = dict(rule="rules.py:same", reference=str(tiny_model_dir("llama")), kl_coef=0.5, max_steps=1)
    train(**flags, output_dir="keep")
    (line,) = train(**flags, output_dir="skip", zero_spread="skip")
    assert not unmoved("keep", talker) and unmoved("skip", talker) and line["grad_norm"] == 0 and line["loss"] == 0


def test_skipped_groups_are_in_no_mean(train, spy):
    losses = spy("grpo_loss")
    (line,) = train(rule="rules.py:lively", zero_spread="skip", batch_size=6, max_steps=1, max_new_tokens=4)
    weights = torch.cat([args[4] for args, _ in losses])
    assert (
        line["frac_reward_zero_std"] == pytest.approx(4 / 6)
        and weights.sum().item() == pytest.approx(1, abs=1e-5)
        and (weights > 0).all()
    )


def test_resampling_replaces_groups_without_spread(train, spy, talker):
    options = dict(rule="rules.py:lively", zero_spread="resample", batch_size=3, max_steps=3, temperature=1.5)
    sampled, advantages, numbers = spy("sample_answers"), spy("group_advantages"), spy("uniform_numbers")
    lines = train(**options)
    drawn = [(step, slot) for (_, step, slots, _), _ in numbers for slot in slots]
    assert len(set(drawn)) == len(drawn)  # each time with other randomness
    calls = [len(rows) for (_, rows, *_), _ in sampled]
    assert (
        calls[0] == max(calls) == 3 and len(calls) > 3 and min(calls) < 3
    )  # only the groups to replace are asked anew
    trained = [rewards[0] for (rewards, *_), _ in advantages]
    at_first = round(
        sum(3 - 3 * line["frac_reward_zero_std"] for line in lines)
    )  # what is logged is of the prompts as they came
    assert sum(len(set(r.tolist())) > 1 for r in trained) > at_first and len(trained) == 9
    assert sum(line["resampled"] for line in lines) * 3 == pytest.approx(sum(calls) - 9)
    train(**options, output_dir="again")
    assert steady("out") == steady("again") and unmoved("out", "again")
    sampled.clear()
    (line,) = train(
        rule="rules.py:same", zero_spread="resample", kl_coef=0.0, max_steps=1, output_dir="dull"
    )  # none to be found: it gives up
    assert (
        len(sampled) == 5 and line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0 and unmoved("dull", talker)
    )


def test_cut_off_answers_can_be_left_out(train, monkeypatch, talker):
    a, x = AutoTokenizer.from_pretrained(talker)(["a", "x"], add_special_tokens=False).input_ids
    hand_made(
        monkeypatch, lambda row, k, most: [*a, *x * most] if k == 0 else x * most if k == 1 else [*a, *a, 2]
    )  # two cut off, one whole
    for mask in (True, False):
        (line,) = train(mask_truncated=mask, max_steps=1, max_new_tokens=5, output_dir=f"mask{mask}")
        assert line["completions/clipped_ratio"] == pytest.approx(2 / 3) and line[
            "completions/mean_length"
        ] == pytest.approx(13 / 3)
        assert line["completions/min_length"] == 3 and line["completions/max_length"] == 5
    assert not unmoved("maskTrue", "maskFalse")
    hand_made(monkeypatch, lambda row, k, most: (a if k else x) * most)
    (line,) = train(mask_truncated=True, max_steps=1, max_new_tokens=5, output_dir="none")  # nothing left
    assert line["grad_norm"] == 0 and unmoved("none", talker)


def test_long_answers_cost_something(train, monkeypatch, spy):
    hand_made(monkeypatch, lambda row, k, most: [40] * (3 + 2 * k) + [2])  # 4, 6 and 8 tokens
    advantages = spy("group_advantages")
    (line,) = train(overlong_cache=4, rule="rules.py:same", max_steps=1)
    for (rewards, *_), _ in advantages:
        near(rewards, [[0.1, 0.1 - 0.5, 0.1 - 1]])
    assert (
        line["reward"] == pytest.approx(0.1 - 0.5)
        and line["frac_reward_zero_std"] == 0
        and line["rewards/rule/mean"] == pytest.approx(0.1)
    )


def test_without_a_kl_there_is_no_reference(train, spy):
    models, frozen = spy("load_model"), spy("load_frozen")
    lines = train(kl_coef=0.0, max_steps=1)
    assert len(models) == 1 and not frozen and lines[0]["kl"] == 0
    train(max_steps=1, output_dir="with")
    assert len(models) == 3 and len(frozen) == 1


def test_the_reference_follows(train):
    kl = lambda **flags: [line["kl"] for line in train(**flags, max_steps=4, learning_rate=3e-3)]
    fixed, every, other = kl(), kl(reference_every=1, output_dir="every"), kl(reference_every=2, output_dir="other")
    assert (
        max(every) < 1e-9 < min(fixed[1:]) and other[2] < 1e-9 < other[1] and other[3] > 1e-9 and other[:2] == fixed[:2]
    )
    assert not (Path("every") / "reference").exists()


def test_max_kl_stops_and_saves(train, talker, capsys):
    lines = train(max_kl=1e-3, max_steps=8, learning_rate=1e-2, eval_fraction=0.2, epochs=9)
    assert (
        1 < len(lines) < 8
        and lines[-1]["kl"] > 1e-3
        and all(line["kl"] <= 1e-3 for line in lines[:-1])
        and "eval_reward" in lines[-1]
    )
    assert f"stopped after step {len(lines)}" in capsys.readouterr().out
    assert not unmoved("out", talker) and json.loads(Path("out/args.json").read_text())["finished"]


def test_a_policy_learns_what_is_rewarded(train):
    lines = train(
        rule="rules.py:letter",
        batch_size=6,
        num_generations=8,
        max_steps=14,
        epochs=14,
        learning_rate=3e-3,
        max_new_tokens=4,
        kl_coef=0.0,
    )
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards


def test_process_supervision_runs(train, spy, monkeypatch):
    """The advantage of a step is greater where vowels still follow; every token has one."""
    tokenizer = AutoTokenizer.from_pretrained(train.usual["model"])
    texts = ["x\na\nx", "x\nx", "a\nx\nx"]
    hand_made(monkeypatch, lambda row, k, most: tokenizer(texts[k], add_special_tokens=False).input_ids + [2])
    losses = spy("grpo_loss")
    (line,) = train(step_separator="\n", scale="none", max_steps=1, batch_size=1, kl_coef=0.0)
    rewards = [0, 1, 1, 0, 0, 1, 1, 1]
    mean = sum(rewards) / 8
    steps = [
        [3 * (0 - mean) + 2, 2 * (1 - mean), 1 - mean],
        [-2 * mean, -mean],
        [3 * (1 - mean), 2 * (1 - mean), 1 - mean],
    ]
    near(losses[0][0][3], [a for own in steps for a in own for _ in range(2)], 1e-5)
    assert line["reward"] == pytest.approx(2 / 3)


def test_a_rule_that_does_not_apply(train):
    (line,) = train(rule="rules.py:some", batch_size=6, max_steps=1)
    (whole,) = train(rule="rules.py:vowels", batch_size=6, max_steps=1, output_dir="whole")
    assert line["reward"] < whole["reward"] and line["rewards/rule/mean"] > line["reward"] == pytest.approx(
        line["rewards/rule/mean"] / 2
    )


def test_every_source_of_reward_at_once(train, talker, scorer, capsys):
    options = dict(
        reward_model=(scorer,),
        reward_weights=(0.5,),
        judge=talker,
        judge_weight=2.0,
        match="number",
        match_weight=3.0,
        format_weight=0.1,
    )
    (line,) = train(**options, max_steps=1, show_every=1, batch_size=6)
    names = [Path(scorer).name, "rule", "judge", "match", "format"]
    assert {key.split("/")[1] for key in line if key.startswith("rewards/")} == set(names)
    weighted = sum(w * line[f"rewards/{name}/mean"] for name, w in zip(names, (0.5, 1, 2, 3, 0.1)))
    assert line["reward"] == pytest.approx(weighted, abs=1e-5)
    said = capsys.readouterr()
    assert "judge " in said.out + said.err and "total " in said.out + said.err  # the table of samples


def test_a_column_named_question(train, talker):
    rows = [dict(question=q, answer=f"so\n#### {i}") for i, q in enumerate(QUESTIONS)]
    (line,) = train(dataset=jsonl(Path("questions.jsonl"), rows), rule="", match="number", max_steps=1)
    train(dataset=jsonl(Path("chats.jsonl"), [dict(prompt=talk(row["question"]), answer=row["answer"]) for row in rows]), rule="", match="number",
          max_steps=1, output_dir="chats")  # fmt: skip
    assert steady("out") == steady("chats") and line["rewards/match/mean"] >= 0 and unmoved("out", "chats")


def test_what_is_saved_loads_and_goes_on(train, talker):
    train(save_every=1, kl_coef=0.01)
    for folder in ("out", "out/checkpoint-1"):
        policy, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained("out")
    ids = tokenizer.apply_chat_template(talk("up"), add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert policy.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG") and not Path("out/report.json").exists()
    assert not list(Path("out").rglob("*.part")) and not list(Path("out").glob("saving*"))
    (line,) = train(model="out", max_steps=1, output_dir="next")
    assert line["kl"] < 1e-9 and not unmoved("next", "out")


# ------------------------------------------------------------------------------------------------------ evaluation and thinking


def test_pass_and_majority_against_an_independent_count(train, monkeypatch, talker, spy):
    tokenizer, said = AutoTokenizer.from_pretrained(talker), {}

    def write(row, k, most):
        answer = random.Random(f"{row.prompt} {k}").choice(
            ["12", "It is 12.", "7", "No", "<think>12</think>7", "<think>12</think>No", "8", "<think>7</think>12"]
        )
        said.setdefault(row.extra["number"], []).append(answer)
        return tokenizer(answer, add_special_tokens=False).input_ids + [2]

    hand_made(monkeypatch, write)
    held_out = [
        dict(prompt=talk(q + "?"), number=10 + i, answer=None if i == 5 else "12.0") for i, q in enumerate(QUESTIONS)
    ]
    (line,) = train(
        eval_dataset=jsonl(Path("held.jsonl"), held_out),
        rule="",
        match="number",
        eval_samples=6,
        max_steps=1,
        max_new_tokens=30,
    )
    counts = {f"eval_{kind}@{k}": 0.0 for kind in ("pass", "majority") for k in (1, 2, 4)}
    for answers in (said[10 + i] for i in range(5)):  # the sixth has no answer to compare with
        votes = [
            {"12": "12", "It is 12.": "12", "No": None}.get(text.rpartition(">")[2], text.rpartition(">")[2])
            for text in answers
        ]
        for k in (1, 2, 4):
            draws = list(itertools.combinations(votes, k))
            counts[f"eval_pass@{k}"] += sum("12" in draw for draw in draws) / len(draws) / 5
            parts, good = [votes[i : i + k] for i in range(0, 6 - k + 1, k)], 0.0
            for part in parts:
                ranking = Counter(v for v in part if v)
                best = [v for v in ranking if ranking[v] == max(ranking.values())]
                good += ("12" in best) / max(1, len(best))
            counts[f"eval_majority@{k}"] += good / len(parts) / 5
    assert {k: line[k] for k in line if "@" in k} == pytest.approx(counts)
    assert line["eval_reward"] == pytest.approx(
        sum(answer.endswith(("12", "12.")) for i in range(5) for answer in said[10 + i]) / 36
    )
    assert 0 < line["eval_completions/mean_thinking_length"] < line["eval_completions/mean_length"]
    report = json.loads(Path("out/report.json").read_text())
    assert (
        report["pass"] == {str(k): line[f"eval_pass@{k}"] for k in (1, 2, 4)}
        and report["majority"]["4"] == line["eval_majority@4"]
    )
    assert report["thinking_budget"] == {} and Path("out/test_time.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_at_their_steps_and_of_the_policy_as_it_is(train):
    lines = train(eval_fraction=0.4, eval_every=2, max_steps=5, learning_rate=0.0, eval_samples=4, batch_size=2)
    assert ["eval_pass@4" in line for line in lines] == [False, True, False, True, True] and "eval_pass@8" not in lines[
        -1
    ]
    evaluated = [{k: v for k, v in line.items() if k.startswith("eval_")} for line in lines if "eval_reward" in line]
    assert (
        evaluated[0] == evaluated[1] == evaluated[2]
        and 0 <= evaluated[0]["eval_pass@1"] <= evaluated[0]["eval_pass@4"] <= 1
    )


def test_without_a_rule_of_what_is_right_rewards_are_evaluated(train, scorer):
    (line,) = train(eval_fraction=0.4, rule="", reward_model=(scorer,), max_steps=1)
    assert "eval_reward" in line and not any("@" in k for k in line) and not Path("out/report.json").exists()


@pytest.mark.parametrize("opens", ["policy", "template", "nobody"])
def test_thinking_budgets(opens, train, monkeypatch, talker, tmp_path, spy):
    """A policy that thinks for ever unless it is stopped, and then knows the answer."""
    tokenizer = AutoTokenizer.from_pretrained(talker)
    if opens == "template":
        shutil.copytree(talker, tmp_path / "opens")
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|assistant|>'", "'<|assistant|><think>'")
        tokenizer.save_pretrained(tmp_path / "opens")
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids

    def write(row, k, most):
        if tokenizer.decode(row.prompt).rstrip().endswith("</think>"):
            return ids(" 12") + [2]
        if opens == "nobody":
            return ids("up") * 100
        return ids("<think>" * (opens == "policy") + "up up up up up up up") * 10

    hand_made(monkeypatch, write)
    rewarded = spy("all_rewards")
    flags = dict(
        rule="",
        match="number",
        eval_fraction=0.4,
        thinking_budgets=(0, 12),
        max_new_tokens=30,
        max_steps=1,
        eval_samples=2,
    )
    (line,) = train(**flags, model=talker if opens != "template" else str(tmp_path / "opens"))
    assert line["eval_pass@1"] == line["rewards/match/mean"] == 0
    assert json.loads(Path("out/report.json").read_text())["thinking_budget"] == {
        "0": 1.0,
        "12": float(opens != "nobody"),
    }
    none, some = (args[3] for args, _ in rewarded[-2:])
    for text in none:
        assert text in ("<think> </think> 12", "<think></think> 12")
    if opens == "nobody":  # an answer without thinking is not interrupted
        return
    for text in some:
        begun = text.partition("</think>")[0]
        thought = begun.partition("<think>")[2]
        assert text.count("<think>") == text.count("</think>") == 1 and text.endswith("</think> 12") and "up" in thought
        assert len(ids(thought)) <= 12 + 1  # and the space before the tag


def test_thinking_that_ended_by_itself_is_left_alone(train, monkeypatch, talker, spy):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    written = tokenizer("<think>up</think> 7", add_special_tokens=False).input_ids + [2]
    asked_for = []

    def write(row, k, most):
        done = len(row.prompt) - len(row.extra["ids"])
        asked_for.append(done)
        return written[done:]

    prompts = [dict(prompt=talk(q), number=i, answer="7", ids=tokenizer.apply_chat_template(talk(q), add_generation_prompt=True, return_dict=False))
               for i, q in enumerate(QUESTIONS)]  # fmt: skip
    hand_made(monkeypatch, write)
    rewarded = spy("all_rewards")
    train(dataset=jsonl(Path("ids.jsonl"), prompts), rule="", match="number", eval_fraction=0.4, thinking_budgets=(len(written) - 2, 29),
          max_new_tokens=30, max_steps=1)  # fmt: skip
    assert all(text == "<think>up</think> 7" for args, _ in rewarded[-2:] for text in args[3])
    assert max(asked_for) == 0  # thinking that ends in time is never asked to go on


def test_a_thought_that_is_cut_off_fits_with_its_tags(train, tiny_model_dir, tiny_tokenizer):
    """Into the positions that a GPT-2 has, 512, also behind the longest of prompts."""
    unit, rows = len(tiny_tokenizer("0").input_ids), [dict(prompt="0" * n, number=0) for n in range(470, 512)]
    assert len(tiny_tokenizer("0" * 500).input_ids) == 500 + unit - 1
    flags = dict(
        rule="rules.py:digits",
        eval_fraction=0.9,
        eval_samples=1,
        max_steps=1,
        batch_size=1,
        max_new_tokens=12,
        thinking_budgets=(0, 4),
    )
    with open("rules.py", "a") as f:
        f.write("\ndef digits(prompts, completions, **columns):\n    return [float('0' in c) for c in completions]\n")
    train(model=str(tiny_model_dir("gpt2")), dataset=jsonl(Path("long.jsonl"), rows), **flags)
    assert json.loads(Path("out/report.json").read_text())["thinking_budget"].keys() == {"0", "4"}


def test_sampled_thinking_budgets(train, spy):
    """By the real sampler, whose answers may also end before the budget."""
    rewarded = spy("all_rewards")
    train(eval_fraction=0.6, thinking_budgets=(0, 3, 7), max_steps=1, max_new_tokens=8, rule="rules.py:letter")
    report = json.loads(Path("out/report.json").read_text())["thinking_budget"]
    for budget, (args, (total, _)) in zip((0, 3, 7), rewarded[-3:], strict=True):
        assert report[str(budget)] == pytest.approx(total.mean().item()) and (
            budget or all(t.startswith("<think> </think>") for t in args[3])
        )


# ------------------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


LONG = dict(
    batch_size=4, epochs=4, max_steps=0, num_minibatches=2, save_every=2, eval_fraction=0.17, eval_every=3
)  # eight steps, two an epoch
RESUMED = [
    dict(),
    dict(reference_every=3, kl_coef=0.5),
    dict(
        zero_spread="resample",
        rule="rules.py:lively",
        temperature=0.7,
        top_p=0.9,
        lr_schedule="cosine",
        weight_decay=0.1,
    ),
    dict(num_iterations=2, kl_coef=0.0, mask_truncated=True, normalise="token"),
]


@pytest.mark.parametrize("options", RESUMED, ids=lambda options: " ".join(options) or "plain")
def test_a_killed_run_resumed_is_the_uninterrupted_one(options, train, monkeypatch, spy):
    options = LONG | options
    train(**options, output_dir="whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        real = grpo.log

        def log(args, out, metrics):
            real(args, out, metrics)
            if metrics["step"] == 5:
                raise Killed

        patch.setattr(grpo, "log", log)
        train(**options, output_dir="killed")
    frozen = spy("load_frozen")
    lines = train(**options, output_dir="killed", resume=True)
    assert len(lines) == 8 and steady("killed") == steady("whole") and unmoved("killed", "whole")
    if "reference_every" in options:  # the reference of step 3, not the one of the start
        assert frozen[0][0][1] == "killed/checkpoint-4/reference" and lines[3]["kl"] < 1e-2
        moved = weights_of("killed/checkpoint-4/reference")
        assert not equal(moved, weights_of(train.usual["model"])) and not equal(
            moved, weights_of("killed/checkpoint-4")
        )
    a, b = (torch.load(f"{name}/checkpoint-6/state.pt", weights_only=True) for name in ("whole", "killed"))
    assert equal(a | dict(seconds=0), b | dict(seconds=0))


def test_killed_for_good_and_resumed(train):
    """By the signal that nothing can catch, at a random moment."""
    options = train.usual | LONG | dict(reference_every=2)
    train(**LONG, reference_every=2, output_dir="whole")
    assert in_child(killed_at, grpo.Args(**options | dict(output_dir="killed")), 6) == -9
    train(**LONG, reference_every=2, output_dir="killed", resume=True)
    assert steady("killed") == steady("whole") and unmoved("killed", "whole")


def killed_at(args, step: int):
    real = grpo.over_ranks

    def die(values, *rest):
        if Path("killed/metrics.jsonl").exists() and Path("killed/metrics.jsonl").read_text().count("\n") >= step:
            os.kill(os.getpid(), 9)
        return real(values, *rest)

    grpo.over_ranks = die
    grpo.main(args)


def test_a_run_killed_in_its_last_evaluation_is_not_finished(train, monkeypatch):
    options = dict(eval_fraction=0.4, thinking_budgets=(0, 3), save_every=1)
    train(**options, output_dir="whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(grpo, "draw_test_time", lambda *args: (_ for _ in ()).throw(Killed))
        train(**options, output_dir="killed")
    train(**options, output_dir="killed", resume=True)
    assert Path("killed/report.json").read_bytes() == Path("whole/report.json").read_bytes() and unmoved(
        "killed", "whole"
    )


def test_resuming_a_finished_run_and_another(train, capsys):
    train(max_steps=1)
    with pytest.raises(SystemExit) as done:
        train(max_steps=1, resume=True)
    assert done.value.code == 0 and "finished already" in capsys.readouterr().out
    assert "clip_high was 0.2 and is 0.28" in refused(
        grpo, capsys, **train.usual | dict(max_steps=1, resume=True, clip_high=0.28)
    )


# ---------------------------------------------------------------------------------------------------------------------- two ranks

RANKED = {
    "resample": dict(
        zero_spread="resample",
        rule="rules.py:lively",
        batch_size=5,
        num_minibatches=2,
        num_iterations=2,
        eval_fraction=0.17,
    ),
    "steps of a reward model": dict(
        step_separator=" ", batch_size=3, reward_model=("SCORER",), reference_every=1, match="number"
    ),
    "one prompt": dict(
        batch_size=1,
        mask_truncated=True,
        overlong_cache=3,
        normalise="token",
        eval_fraction=0.17,
        thinking_budgets=(0, 4),
    ),
    "nucleus": dict(
        batch_size=5,
        temperature=0.8,
        top_p=0.9,
        normalise="constant",
        scale="none",
        save_every=1,
        reference_every=2,
        max_steps=3,
    ),
}


@pytest.mark.parametrize(
    "name", [n if i < 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(RANKED)]
)
def test_two_ranks_are_one(name, train, scorer):
    options = dict(RANKED[name])
    options |= dict(reward_model=(scorer,)) if "reward_model" in options else {}
    train(**options, output_dir="one")
    train(2, **options, output_dir="two")
    assert_near("one", "two")
    if "thinking_budgets" in options:
        one, two = (json.loads(Path(f"{n}/report.json").read_text()) for n in ("one", "two"))
        assert one == two


@pytest.mark.slow
def test_two_ranks_resumed(train):
    options = dict(
        batch_size=3,
        epochs=3,
        max_steps=4,
        save_every=2,
        reference_every=1,
        zero_spread="resample",
        rule="rules.py:lively",
    )
    train(2, **options, output_dir="whole")
    shutil.copytree("whole", "killed")
    for file in ("model.safetensors", "report.json"):
        (Path("killed") / file).unlink(missing_ok=True)
    kept = json.loads(Path("killed/args.json").read_text())
    Path("killed/args.json").write_text(json.dumps(kept | dict(finished=False)))
    train(2, **options, output_dir="killed", resume=True)
    assert steady("killed") == steady("whole") and unmoved("killed", "whole")


# --------------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    "family",
    [f if f in ("qwen3", "gemma2", "gpt2", "qwen2_moe") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_every_family_trains(family, train, tiny_model_dir):
    flags = dict(
        num_iterations=2,
        batch_size=2,
        num_generations=2,
        max_new_tokens=12,
        eval_fraction=0.2,
        eval_samples=2,
        thinking_budgets=(0, 4),
    )
    lines = train(model=str(tiny_model_dir(family)), **flags)
    assert len(lines) == 2 and all(math.isfinite(v) for line in lines for v in line.values())
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines) and lines[1]["kl"] > 0
    assert not unmoved("out", tiny_model_dir(family)) and AutoModelForCausalLM.from_pretrained("out")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_bfloat16(ranks, train, scorer):
    flags = dict(
        dtype="bfloat16",
        max_steps=3,
        reference_every=1,
        reward_model=(scorer,),
        step_separator=" ",
        eval_fraction=0.17,
        eval_every=1,
    )
    lines = train(ranks, **flags)
    assert all(line["sampling/sampling_logp_difference/mean"] < 0.05 and abs(line["kl"]) < 0.01 for line in lines)
    assert {w.dtype for w in weights_of("out").values()} == {torch.float32}  # as the parent was stored


# --------------------------------------------------------------------------------------------------------------------- bad input

BAD = {  # what is wrong: (options, what the message names)
    "no reward at all": (dict(rule=""), "nothing gives a reward"),
    "weights for other models": (dict(reward_weights=(1.0,)), "--reward-weights"),
    "a rubric and no judge": (dict(rubric="rubric.json"), "--judge"),
    "a group of one": (dict(num_generations=1), "--num-generations 1"),
    "no room for a prompt": (dict(max_new_tokens=2048), "--max-new-tokens"),
    "no room for any prompt": (dict(max_length=10), "--dataset"),
    "a cache longer than an answer": (dict(overlong_cache=9), "--overlong-cache"),
    "a cache and steps": (dict(overlong_cache=4, step_separator="\n"), "--step-separator"),
    "a budget beyond an answer": (dict(thinking_budgets=(2, 8)), "--thinking-budgets"),
    "a negative budget": (dict(thinking_budgets=(2, -1)), "--thinking-budgets"),
    "budgets and nothing right": (dict(thinking_budgets=(2,), rule="", format_weight=1.0), "--thinking-budgets"),
    "a reference and no KL": (dict(kl_coef=0.0, reference="TALKER"), "--reference"),
    "a moving reference and no KL": (dict(kl_coef=0.0, reference_every=2), "--reference-every"),
    "a greatest KL and no KL": (dict(kl_coef=0.0, max_kl=0.1), "--max-kl"),
    "a wrong expression": (dict(match="(a"), "--match (a"),
    "no column answer": (dict(match="number", dataset="texts.jsonl"), "--match"),
    "no column answer to evaluate": (dict(match="number", eval_dataset="texts.jsonl"), "--eval-dataset texts.jsonl"),
    "no prompt column": (dict(dataset="no_prompts.jsonl"), "prompt"),
    "no such data set": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "no such evaluation data set": (dict(eval_dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "no such policy": (dict(model="runs/nowhere"), "runs/nowhere"),
    "a policy for a reward model": (dict(reward_model=("TALKER",)), "not a reward model"),
    "no such rule": (dict(rule="rules.py:nowhere"), "--rule rules.py:nowhere"),
    "too few rewards": (dict(rule="rules.py:few"), "--rule"),
    "a reference with another tokenizer": (dict(reference="OTHER"), "--reference"),
    "a reference that is built otherwise": (dict(reference="DEEPER", reference_every=1), "--reference-every"),
    "temperature 0": (dict(temperature=0.0), "--temperature"),
    "top-p 0": (dict(top_p=0.0), "--top-p"),
    "no passes": (dict(num_iterations=0), "--num-iterations"),
    "no evaluation samples": (dict(eval_samples=0), "--eval-samples"),
    "a negative cache": (dict(overlong_cache=-1), "--overlong-cache"),
}


@pytest.fixture(scope="module")
def other_policy(talker, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("other") / "other", AutoTokenizer.from_pretrained(talker)
    tokenizer.add_tokens(["newword"])
    AutoModelForCausalLM.from_config(tiny_config("llama", tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deeper_policy(talker, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("deeper") / "deeper", AutoTokenizer.from_pretrained(talker)
    config = tiny_config("llama", tokenizer)
    config.num_hidden_layers += 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(wrong, train, talker, other_policy, deeper_policy, capsys):
    options, named = BAD[wrong]
    jsonl(Path("texts.jsonl"), [dict(prompt=q) for q in QUESTIONS])
    jsonl(Path("no_prompts.jsonl"), [dict(text=q) for q in QUESTIONS])
    with open("rules.py", "a") as f:
        f.write("\ndef few(prompts, completions, **columns):\n    return [1.0]\n")
    known = dict(TALKER=talker, OTHER=other_policy, DEEPER=deeper_policy)
    options = {
        k: tuple(known.get(x, x) for x in v) if isinstance(v, tuple) else known.get(v, v) for k, v in options.items()
    }
    with pytest.raises(SystemExit) as end:
        train(**options)
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert end.value.code == 2 and len(errors) == 1 and named in errors[0]


# ------------------------------------------------------------------------------------------------------------------- command line


def test_on_the_command_line(run_script, talker, tmp_path):
    jsonl(tmp_path / "rows.jsonl", [dict(question=q, answer=f"so\n#### {i}") for i, q in enumerate(QUESTIONS)])
    flags = "--dataset rows.jsonl --match number --format-weight 0.1 --max-new-tokens 8 --batch-size 2 --num-generations 2 --max-steps 2".split()
    flags += "--eval-fraction 0.4 --thinking-budgets 0 4 --eval-samples 2 --output-dir out --learning-rate 1e-4 --show-every 1".split()
    done = run_script("grpo", "--model", talker, *flags, cwd=tmp_path)
    assert (
        "rewards: match, format; answers end at <|end|>" in done.stdout
        and "held out: reward" in done.stdout
        and "Traceback" not in done.stderr
    )
    lines = lines_of(tmp_path / "out")
    assert (
        len(lines) == 2
        and "eval_majority@2" in lines[-1]
        and set(json.loads((tmp_path / "out/report.json").read_text())["thinking_budget"]) == {"0", "4"}
    )


def test_model_and_dataset_are_required(run_script, tmp_path):
    done = run_script("grpo", "--output-dir", "out", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "--model" in done.stderr and "--dataset" in done.stderr and "--rule" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------- real data


def test_gsm8k_and_a_real_checkpoint(real_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with gzip.open(real_data / "gsm8k.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(400))]
    rows = [
        dict(question=row["prompt"][0]["content"], answer=row["answer"])
        for row in rows
        if len(row["prompt"][0]["content"]) < 160
    ][:20]
    assert len(rows) == 20
    flags = dict(
        model=str(real_data / "stories260K-hf"),
        match="number",
        format_weight=0.1,
        max_length=512,
        max_new_tokens=24,
        max_steps=2,
    )
    flags |= dict(
        batch_size=4, num_generations=4, learning_rate=1e-4, eval_fraction=0.1, eval_samples=4, thinking_budgets=(8,)
    )
    grpo.main(grpo.Args(dataset=jsonl(Path("rows.jsonl"), rows), **flags, output_dir="out"))
    said, lines = capsys.readouterr().out, lines_of("out")
    assert (
        len(lines) == 2
        and all(math.isfinite(v) for line in lines for v in line.values())
        and "rewards: match, format" in said
    )
    assert (
        lines[0]["kl"] < 1e-6
        and lines[0]["sampling/sampling_logp_difference/max"] < 1e-3
        and "eval_majority@4" in lines[-1]
    )
    assert AutoModelForCausalLM.from_pretrained("out").config.tie_word_embeddings and Path("out/test_time.png").exists()
