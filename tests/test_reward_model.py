"""reward_model.py: its losses against closed forms, how it reads rankings, and what its scores are worth."""

import copy
import itertools
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import reward_model as rm
import torch
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from reward_model import Row
from test_plumbing import CPU, TEMPLATES, every_template, in_child, jsonl, killed_at_rename, lasting, lines_of, on_ranks, refused
from test_plumbing import dressed, same_run, snapshot, talk, tokenizer_of, weights_of  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

f64 = lambda *values: torch.tensor(values, dtype=torch.float64, requires_grad=True)


def logsig(x: float) -> float:
    return -math.log1p(math.exp(-x))


# ---------------------------------------------------------------------------------------------------------------------- the losses


def ranked(k: int, ranks=None, soft=False, probability=1.0) -> Row:
    """A row of k answers, the best first, with all its pairs."""
    ranks = ranks or list(range(k, 0, -1))
    pairs = [(w, l, probability, float(ranks[w] - ranks[l])) for w in range(k) for l in range(k) if ranks[w] > ranks[l]]
    return Row([1], [[2]] * k, None, dict(pairs=pairs, ranks=[float(r) for r in ranks], kind="", soft=soft))


def loss_of(scores, *rows, **flags):
    return rm.ranking_loss(rm.Args(**flags), scores, rows or [ranked(len(scores))])


@pytest.mark.parametrize("gap, loss", [(1, 0.313262), (0, 0.693147), (-1, 1.313262), (1.6, 0.18390074)])
def test_pair_loss(gap, loss):
    assert rm.pair_loss(f64(gap), f64(0.0)).item() == pytest.approx(loss, abs=1e-6)
    assert rm.pair_loss(f64(gap + 2.0), f64(0.0), 2.0).item() == pytest.approx(loss, abs=1e-6)  # the margin is taken off the gap


def test_a_ranking_is_the_mean_over_its_pairs():
    """InstructGPT: the C(K,2) pairs of a prompt are one element; METHODS.md A1.6."""
    scores = f64(2, 1, 0.5, -1)
    loss = loss_of(scores)
    loss.backward()
    assert loss.item() == pytest.approx(0.227613, abs=1e-6)
    assert loss.item() == pytest.approx(-sum(logsig(a - b) for a, b in itertools.combinations(scores.tolist(), 2)) / 6, abs=1e-9)
    assert scores.grad.tolist() == pytest.approx([-0.083132, -0.037967, 0.062923, 0.058176], abs=1e-6) and abs(scores.grad.sum()) < 1e-9
    assert loss_of(scores + 7).item() == pytest.approx(loss.item(), abs=1e-9)


def test_a_batch_is_the_sum_over_its_rankings():
    """Whatever their sizes: a prompt with six pairs counts as much as one with a single pair."""
    a, b, c = f64(2, 1, 0.5, -1), f64(0.3, 0.9), f64(1, 1, 0)
    rows = [ranked(4), ranked(2), ranked(3, [1, 2, 1])]
    apart = sum(loss_of(s, row).item() for s, row in zip((a, b, c), rows))
    assert loss_of(torch.cat([a, b, c]), *rows).item() == pytest.approx(apart, abs=1e-9)


def test_ties_say_nothing():
    row = ranked(3, [1, 0, 1])
    assert loss_of(f64(3, 1, 2), row).item() == pytest.approx(-(logsig(2) + logsig(1)) / 2, abs=1e-9)


@pytest.mark.parametrize("gap, factor, loss", [(2, 0.056837, 0.007214), (1, 0.289318, 0.090632), (0, 1, 0.693147), (-1, 1, 1.313262)])
def test_focal_loss(gap, factor, loss):
    """InternLM2, eq. 1; METHODS.md A4.5."""
    assert rm.focal_pair_loss(f64(gap), f64(0)).item() == pytest.approx(loss, abs=1e-6) == pytest.approx(-factor * logsig(gap), abs=1e-5)
    assert loss_of(f64(gap, 0), loss="focal").item() == pytest.approx(loss, abs=1e-6)


BARRIER = [(0, -3.218876, 0), (2, -3.044522, 0.190476), (4, -2.197225, 0.888889), (4.9, 0.010050, None), (-4.5, -1.558145, None)]


@pytest.mark.parametrize("x, barrier, slope", BARRIER)
def test_log_barrier(x, barrier, slope):
    """InternLM2, eq. 2; symmetric, with its minimum at 0."""
    scores = f64(x, -x)
    values = rm.log_barrier(scores)
    (gradient,) = torch.autograd.grad(values[0], scores)
    assert values.tolist() == pytest.approx([barrier, barrier], abs=1e-6)
    assert slope is None or gradient[0].item() == pytest.approx(slope, abs=1e-6)


def test_log_barrier_beyond_its_bounds_is_finite():
    values = rm.log_barrier(f64(5, -7, 100))
    assert values.tolist() == pytest.approx([-math.log(0.001) - math.log(9.999)] * 3, abs=1e-6)


def test_barrier_and_score_l2_are_summed_over_a_pairs_two_scores():
    assert loss_of(f64(2, 1), loss="focal", barrier=0.02).item() == pytest.approx(-0.033819, abs=2e-6)  # negative, and not clipped
    assert loss_of(f64(1.2, -0.4), score_l2=0.01).item() == pytest.approx(0.19990074, abs=1e-6)  # METHODS.md B1
    scores = f64(1, 0.5, -2)  # a ranking of three has three pairs, of two scores each
    pairs = [-logsig(x - y) + 0.1 * (x * x + y * y) for x, y in itertools.combinations(scores.tolist(), 2)]
    assert loss_of(scores, score_l2=0.1).item() == pytest.approx(sum(pairs) / 3, abs=1e-6)


@pytest.mark.parametrize("p, loss", [(1, 0.313262), (0.8, 0.513262), (0.6, 0.713262)])
def test_soft_labels(p, loss):
    """Constitutional AI; METHODS.md A5.6: at p = 0.6 the best gap is log 1.5, and the loss there the label's entropy."""
    assert rm.soft_pair_loss(f64(1), f64(0), p).item() == pytest.approx(loss, abs=1e-6)
    assert loss_of(f64(1, 0), ranked(2, soft=True, probability=p)).item() == pytest.approx(loss, abs=1e-6)


def test_soft_labels_have_their_minimum_at_the_log_odds():
    gap = f64(math.log(1.5))
    loss = rm.soft_pair_loss(gap, f64(0), 0.6)
    loss.backward()
    assert gap.item() == pytest.approx(0.405465, abs=1e-6) and loss.item() == pytest.approx(0.673012, abs=1e-6) and abs(gap.grad.item()) < 1e-9


def test_margin():
    """Llama 2: the column where there is one, else the difference of the scores; only when asked."""
    row = ranked(3, [5, 2, 1])
    plain, wide = loss_of(f64(1, 0, 2), row).item(), loss_of(f64(1, 0, 2), row, use_margin=True).item()
    assert plain == pytest.approx(-(logsig(1) + logsig(-1) + logsig(-2)) / 3, abs=1e-6)
    assert wide == pytest.approx(-(logsig(1 - 3) + logsig(-1 - 4) + logsig(-2 - 1)) / 3, abs=1e-6)


PLACKETT_LUCE = [
    ([2, 1, 0], 0.72086765),
    ([0, 1, 2], 3.72086765),
    ([0, 0, 0], math.log(6)),
    ([3] * 7, 8.52516136),
    ([7, 6, 5, 4, 3, 2, 1], 2.52692791),
    ([1, 0], 0.31326169),
]


@pytest.mark.parametrize("scores, loss", PLACKETT_LUCE)
def test_plackett_luce(scores, loss):
    """Starling; METHODS.md B6."""
    assert loss_of(f64(*scores), loss="plackett-luce").item() == pytest.approx(loss, abs=1e-6)
    assert loss_of(f64(*scores) - 5, loss="plackett-luce").item() == pytest.approx(loss, abs=1e-6)


def test_plackett_luce_gradient():
    scores = f64(2, 1, 0)
    loss_of(scores, loss="plackett-luce").backward()
    assert scores.grad.tolist() == pytest.approx([-0.33475904, -0.02421295, 0.35897199], abs=1e-6)


def test_plackett_luce_is_a_distribution_over_rankings():
    """The probabilities of all 24 rankings of four answers sum to 1, and each is the product of its choices."""
    scores, total = f64(0.3, -1.2, 2.0, 0.7), 0.0
    for order in itertools.permutations(range(4)):  # the best first
        ranks = torch.tensor([4.0 - order.index(i) for i in range(4)])
        p = math.exp(-rm.plackett_luce_loss(scores, ranks).item())
        e = [math.exp(scores[i].item()) for i in order]
        assert p == pytest.approx(math.prod(e[j] / sum(e[j:]) for j in range(3)), rel=1e-6)
        total += p
    assert total == pytest.approx(1.0, abs=1e-6)


def test_plackett_luce_with_ties():
    """Equal ranks do not compete: each is chosen from itself and the worse ones, and neither pushes the other."""
    a, b, c = scores = f64(1.0, 0.2, -0.5)
    loss = rm.plackett_luce_loss(scores, torch.tensor([2.0, 2.0, 1.0]))
    assert loss.item() == pytest.approx(rm.pair_loss(a, c).item() + rm.pair_loss(b, c).item(), abs=1e-9)
    assert rm.plackett_luce_loss(scores, torch.zeros(3)).item() == pytest.approx(0.0, abs=1e-9)


LOSSES = {
    "pairs": dict(), "margin": dict(use_margin=True), "focal": dict(loss="focal"), "plackett-luce": dict(loss="plackett-luce"),
    "barrier": dict(loss="focal", barrier=0.02), "score l2": dict(score_l2=0.01), "soft": dict(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_gradient_is_that_of_finite_differences(name):
    scores, row = f64(2.0, -0.3, 0.9, -1.1), ranked(4, soft=name == "soft", probability=0.7)
    assert torch.autograd.gradcheck(lambda s: loss_of(s, row, **LOSSES[name]), scores, atol=1e-6)


def test_length_balancing():
    """ChatGLM-RLHF's buckets; METHODS.md B1: lengths of winner and loser, edges at 4 and 10."""
    pairs = [(12, 10), (10, 12), (15, 10), (16, 10), (10, 16), (40, 10)]
    kept = rm.balance_lengths([w - l for w, l in pairs], (4, 10), 0)
    assert kept in ([0, 1, 2, 4], [0, 1, 3, 4])  # one of the two longer winners of the middle bucket, none of the last


@given(st.lists(st.integers(-20, 20), max_size=40), st.sampled_from([(), (4,), (4, 10)]), st.integers(0, 3))
def test_length_balancing_leaves_no_bucket_uneven(differences, edges, seed):
    kept = rm.balance_lengths(differences, edges, seed)
    bucket = lambda d: sum(abs(d) >= edge for edge in edges)
    count = lambda numbers: Counter((bucket(differences[i]), differences[i] > 0) for i in numbers if differences[i])
    before, after = count(range(len(differences))), count(kept)
    for b in range(len(edges) + 1):
        assert after[b, True] == after[b, False] == min(before[b, True], before[b, False])
    assert {i for i, d in enumerate(differences) if d == 0} <= set(kept) and kept == sorted(set(kept)) == rm.balance_lengths(differences, edges, seed)


# ----------------------------------------------------------------------------------------------------------------------- reading


def read(tokenizer, row, conditions=None, notes=None, **flags) -> Row:
    (row,) = rm.rankings(rm.Args(**flags), tokenizer, flags.get("max_length", 512), conditions or {})(row, Counter() if notes is None else notes)
    return row


def texts(tokenizer, row: Row):
    return tokenizer.decode(row.prompt), [tokenizer.decode(r) for r in row.responses]


CHAT = ("<|bos|><|user|>Which way?<|end|><|assistant|>", ["Up.<|end|>", "Right.<|end|>"])
GOOD, BAD = ([dict(role="assistant", content=text)] for text in ("Up.", "Right."))
TEXT = ("<|bos|>Which way?", [" Up.<|end|>", " Right.<|end|>"])
WAY, HH = talk("Which way?"), "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Which way?\n\nAssistant:"
LAYOUTS = {
    "prompt apart, text": (dict(prompt="Which way?", chosen=" Up.", rejected=" Right."), TEXT),
    "prompt apart, messages": (dict(prompt=WAY, chosen=GOOD, rejected=BAD), CHAT),
    "prompt in messages, answers in text": (dict(prompt=WAY, chosen="Up.", rejected="Right."), CHAT),
    "prompt inside, messages": (dict(chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "prompt inside, messages, and once more in words": (dict(prompt="Which way?", chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "prompt in words, answers as messages": (dict(prompt="Which way?", chosen=GOOD, rejected=BAD), CHAT),
    "from and value": (
        dict(
            prompt=[{"from": "human", "value": "Which way?"}],
            chosen=[{"from": "gpt", "value": "Up."}],
            rejected=[{"from": "gpt", "value": "Right."}],
        ),
        CHAT,
    ),
    "prompt inside, text": (dict(chosen="Which way? Up.", rejected="Which way? Right."), TEXT),
    "HH-RLHF": (dict(chosen=f"{HH} Up, I think.", rejected=f"{HH} Up."), (f"<|bos|>{HH}", [" Up, I think.<|end|>", " Up.<|end|>"])),
    "prompt apart in messages, and once more in both": (dict(prompt=WAY, chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "K-wise, text": (dict(prompt="Which way?", completions=[" Up.", " Right."], scores=[1, 0]), TEXT),
    "K-wise, prompt in messages": (dict(prompt=WAY, completions=["Up.", "Right."], scores=[0.5, 0.1]), CHAT),
    "K-wise, messages": (dict(prompt=WAY, completions=[GOOD, BAD], scores=[0.5, 0.1]), CHAT),
    "several turns": (
        dict(prompt=WAY, chosen=GOOD + talk("Why?", "So."), rejected=BAD),
        (CHAT[0], ["Up.<|end|><|user|>Why?<|end|><|assistant|>So.<|end|>", "Right.<|end|>"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("from_file", [False, True])
def test_every_layout(name, from_file, tiny_tokenizer, tmp_path):
    row, expected = LAYOUTS[name]
    if from_file:
        row = rm.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, dict.fromkeys(row)]))[0]
    row = read(tiny_tokenizer, row)
    assert texts(tiny_tokenizer, row) == expected and [pair[:2] for pair in row.extra["pairs"]] == [(0, 1)]


@every_template
def test_bug18_every_answer_ends_with_its_end_of_turn(name, dressed):  # noqa: F811
    """There the score is read: behind it a template may put a line break, which is no part of the answer."""
    tokenizer, end = dressed(name), TEMPLATES[name][3]
    row = read(tokenizer, dict(prompt=talk("Which way?", "Up.", "Why?"), chosen=GOOD, rejected=BAD))
    assert [text.lstrip() for text in texts(tokenizer, row)[1]] == [f"Up.{end}", f"Right.{end}"]


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("Say it: yes", "Say it: no", "Say it:"),
    ("The sky is blue", "The sky is black", "The sky is"),  # not `The sky is bl`
    ("The sky is blue", "The sky is blue and wide", "The sky is"),  # one begins with the other
    ("The sky is blue and wide", "The sky is blue", "The sky is"),
    ("blue ", "red", ""),  # nothing shared, and a space at the end
    ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes!\n\nHuman: So?\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant:"),
    ("same old", "same old", "same"),
])  # fmt: skip
def test_bug11_a_prompt_inside_two_texts(chosen, rejected, prompt):
    found, answers = rm.as_pair(None, chosen, rejected)
    assert (found, answers) == (prompt, [chosen[len(prompt) :], rejected[len(prompt) :]])


words = st.lists(st.sampled_from(["up", "right", "bl", "ue", " ", " ", "\n\nHuman: a", "\n\nAssistant:", "."]), max_size=8).map("".join)


@given(words, words, words)
def test_bug11_prompt_and_answer_rebuild_the_text(prompt, chosen, rejected):
    """Both answers keep something of their own, and the prompt ends where a word or a turn does."""
    chosen, rejected = prompt + chosen, prompt + rejected
    found, answers = rm.as_pair(None, chosen, rejected)
    assert [found + answer for answer in answers] == [chosen, rejected]
    if not found.endswith("\n\nAssistant:"):
        assert (answers[0] or not chosen) and (answers[1] or not rejected)
        assert not found or answers[0].startswith(" ")


turn = st.sampled_from(["a", "b", "c"])


@given(st.lists(turn, max_size=2), st.lists(turn, min_size=1, max_size=3), st.lists(turn, min_size=1, max_size=3))
def test_bug11_a_prompt_inside_two_conversations(start, chosen, rejected):
    """Both answers are left with a message at least, even where one conversation begins with the other or both are the same."""
    chosen, rejected = talk("q", *start, *chosen), talk("q", *start, *rejected)
    prompt, answers = rm.as_pair(None, chosen, rejected)
    assert [prompt + answer for answer in answers] == [chosen, rejected] and all(answers) and prompt
    assert prompt[-1]["role"] == "user" and [answer[0]["role"] for answer in answers] == ["assistant"] * 2


PARTING = [  # what two talks share, what each goes on with, and how many messages are the prompt
    (talk("q"), talk("", "a")[1:], talk("", "b")[1:], 1),
    (talk("q", "a"), talk("r", "c"), talk("s", "c"), 1),  # at a user's turn: the answer before it belongs to both
    (talk("q", "a", "r", "b"), talk("s", "c"), talk("t", "d"), 3),
    (talk("q", "a", "r"), talk("", "c")[1:], talk("", "d", "s", "e")[1:], 3),
    ([dict(role="system", content="s"), *talk("q", "a")], talk("r", "c"), talk("s", "c"), 2),
]


@pytest.mark.parametrize("start, chosen, rejected, n", PARTING)
@pytest.mark.parametrize("again", [False, True])
def test_bug11_where_two_conversations_part(start, chosen, rejected, n, again):
    """The answers begin with the assistant's turn before; given apart as messages too, the prompt stands where it was given, and once."""
    whole = [start + chosen, start + rejected]
    assert rm.as_pair(whole[0][:n] if again else None, *whole) == (whole[0][:n], [talk[n:] for talk in whole])
    assert whole[0][n]["role"] == whole[1][n]["role"] == "assistant"


def test_bug11_a_prompt_that_one_answer_only_repeats_is_kept():
    """An answer may quote; only where both begin with the prompt is it theirs."""
    assert rm.as_pair(WAY, WAY + GOOD, BAD) == (WAY, [WAY + GOOD, BAD])
    assert rm.as_pair(WAY, WAY, WAY + GOOD) == (WAY, [WAY, WAY + GOOD])


USELESS = {
    "identical": dict(prompt="Which way?", chosen=" Up.", rejected=" Up."),
    "identical, prompt inside": dict(chosen="Which way? Up.", rejected="Which way? Up."),
    "identical, messages": dict(chosen=WAY + GOOD, rejected=WAY + GOOD),
    "a tie": dict(prompt="a", completions=["b", "c"], scores=[1, 1]),
    "one answer": dict(prompt="a", completions=["b"], scores=[1]),
    "no answer": dict(prompt="a", completions=[], scores=[]),
    "an empty answer": dict(prompt="a", chosen=" ", rejected="b"),
    "an empty list": dict(prompt=WAY, chosen=[], rejected=GOOD),
}


@pytest.mark.parametrize("row", USELESS.values(), ids=USELESS)
def test_bug11_what_cannot_be_compared_is_dropped(row, tiny_tokenizer):
    with pytest.raises(rm.Drop, match="nothing to compare"):
        read(tiny_tokenizer, row)


def test_bug10_an_answer_that_swallows_the_prompt_is_dropped(dressed):  # noqa: F811
    """Without a BOS token, `u` and `p` are one token: nothing is left that both answers follow."""
    tokenizer = copy.deepcopy(dressed("chatml"))
    tokenizer.backend_tokenizer.post_processor = None
    assert len(tokenizer("u").input_ids) == len(tokenizer("up").input_ids) == 1
    with pytest.raises(rm.Drop, match="boundary"):
        read(tokenizer, dict(prompt="u", chosen="p", rejected=" x"))


def test_a_ranking_has_all_pairs_of_unequal_rank(tiny_tokenizer):
    row = read(tiny_tokenizer, dict(prompt=talk("a"), completions=["b", "c", "d", "b"], scores=[0.5, 2, 0.5, 1]))
    assert {pair[:2]: pair[3] for pair in row.extra["pairs"]} == {(1, 0): 1.5, (1, 2): 1.5, (1, 3): 1.0, (3, 2): 0.5}  # 0 and 3 are the same text
    assert row.extra["ranks"] == [0.5, 2, 0.5, 1]


def test_bug09_an_answer_too_long_is_dropped_and_never_cut(tiny_tokenizer):
    notes = Counter()
    row = dict(prompt="up " * 10, completions=["no", "up " * 60, "yes", "up " * 30], scores=[4, 3, 2, 1])
    kept = read(tiny_tokenizer, row, max_length=60, notes=notes)
    assert [text.strip() for text in texts(tiny_tokenizer, kept)[1]] == ["no<|end|>", "yes<|end|>", "up " * 30 + "<|end|>"]
    assert [pair[:2] for pair in kept.extra["pairs"]] == [(0, 1), (0, 2), (1, 2)] and kept.extra["ranks"] == [4, 2, 1]
    assert notes["answers dropped: beyond --max-length"] == 1 and max(len(kept.prompt + r) for r in kept.responses) <= 60
    with pytest.raises(rm.Drop):
        read(tiny_tokenizer, row, max_length=10)


def test_special_tokens_in_the_text_are_dropped_unless_allowed(tiny_tokenizer):
    for row in (dict(prompt=talk("a<|end|>b"), chosen="c", rejected="d"), dict(prompt="a", completions=["b", "<|user|>"], scores=[1, 0])):
        with pytest.raises(rm.Drop, match="special token"):
            read(tiny_tokenizer, row)
        assert read(tiny_tokenizer, row, allow_special=True)
    assert read(tiny_tokenizer, dict(prompt="a", chosen=" b<|end|>", rejected=" c"))  # an answer may bring its end


@pytest.mark.parametrize("prompt, expected", [
    (talk("a"), "<|bos|><|system|>Be safe.<|end|><|user|>a<|end|><|assistant|>"),
    ([dict(role="system", content="Be brief."), *talk("a")], "<|bos|><|system|>Be safe.\n\nBe brief.<|end|><|user|>a<|end|><|assistant|>"),
    ("a", "<|bos|>Be safe.\n\na"),
])  # fmt: skip
def test_a_condition_stands_before_the_prompts_of_its_kind_only(prompt, expected, tiny_tokenizer):
    row, conditions = dict(prompt=prompt, chosen=" b", rejected=" c"), dict(harmless="Be safe.")
    conditioned = read(tiny_tokenizer, row | dict(kind="harmless"), conditions)
    plain = read(tiny_tokenizer, row)
    assert texts(tiny_tokenizer, conditioned)[0] == expected and conditioned.responses == plain.responses
    for kind in ("helpful", "", None):
        assert read(tiny_tokenizer, row | dict(kind=kind), conditions).prompt == plain.prompt


def test_margin_and_probability_are_read(tiny_tokenizer):
    row = dict(prompt="a", chosen=" b", rejected=" c")
    assert read(tiny_tokenizer, row).extra["pairs"] == [(0, 1, 1.0, 1.0)] and not read(tiny_tokenizer, row).extra["soft"]
    both = read(tiny_tokenizer, row | dict(margin=0.25, probability=0.8))
    assert both.extra["pairs"] == [(0, 1, 0.8, 0.25)] and both.extra["soft"]
    assert read(tiny_tokenizer, row | dict(margin=0.0)).extra["pairs"] == [(0, 1, 1.0, 0.0)]
    for names in (("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward")):
        assert read(tiny_tokenizer, row | dict(zip(names, (3.5, 1.5)))).extra["pairs"] == [(0, 1, 1.0, 2.0)]
    swapped = read(tiny_tokenizer, row | dict(probability=0.25))  # the better one first
    assert texts(tiny_tokenizer, swapped)[1] == [" c<|end|>", " b<|end|>"] and swapped.extra["pairs"][0][:3] == (0, 1, 0.75)
    assert read(tiny_tokenizer, row | dict(probability=0.25, margin=-0.5)).extra["pairs"] == [(0, 1, 0.75, 0.5)]  # the gap turns with the pair


# ------------------------------------------------------------------------------------------------------------------------ scores


@pytest.fixture(scope="module")
def scoring_dir(tiny_model_dir, tmp_path_factory):
    """scoring_dir(family): a reward model of that family with a random head."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("scoring") / family
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir(family), num_labels=1)
                torch.nn.init.normal_(model.score.weight)
            model.save_pretrained(made[family])
            tokenizer_of(tiny_model_dir(family)).save_pretrained(made[family])
        return made[family]

    return make


def some_rankings(seed=0) -> list:
    """Rankings of very different shapes; most are longer than the sliding window of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(7, 300, (n,), generator=generator).tolist() + [2]
    return [
        Row(ids(4), [ids(3), ids(17), ids(1), ids(9)]),
        Row(ids(20), [ids(8), ids(8)]),
        Row(ids(20), [ids(8), ids(8)]),
        Row(ids(11), [ids(5), ids(30)]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bug18_packed_scores_are_those_of_each_answer_alone(family, scoring_dir):
    """The prompt of four answers is computed once; Hugging Face's model gets one answer at a time."""
    model, tokenizer, new = rm.load_reward_model(str(scoring_dir(family)), CPU, torch.float32)
    plain, rows = AutoModelForSequenceClassification.from_pretrained(scoring_dir(family), attn_implementation="eager").eval(), some_rankings()
    expected = [plain(torch.tensor([row.prompt + r])).logits.item() for row in rows for r in row.responses]
    forwards, _ = rm.pack(rows, CPU, model.together)
    scores = rm.response_scores(model.eval(), forwards)
    assert not new and model.together == (family not in ("gemma2", "nemotron"))
    assert scores.tolist() == pytest.approx(expected, abs=2e-4) and scores.std() > 0.1


def test_the_head_multiplies_in_float32(monkeypatch):
    """Where hidden states and head are bfloat16: a score near 20 would come in steps of an eighth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden, head = torch.randn(1, 6, 64).bfloat16(), torch.nn.Linear(64, 1, bias=False).bfloat16()
    head.weight.data.mul_(40)
    base, config = lambda **inputs: SimpleNamespace(last_hidden_state=hidden), SimpleNamespace(score_shift=0.5)
    scores = rm.response_scores(SimpleNamespace(base_model=base, score=head, config=config), [({}, None, torch.tensor([5, 2]))])
    expected = hidden[0, [5, 2]].double() @ head.weight[0].double() - 0.5
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (head(hidden[0, [5, 2]])[:, 0].float() - 0.5 - expected).abs().max() > 1e-3  # as it was


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_bug18_padding_does_not_move_the_score(side, scoring_dir):
    """Padded by hand, on either side, with an end of turn inside the prompt: Hugging Face's batch of four has our scores."""
    model, tokenizer, _ = rm.load_reward_model(str(scoring_dir("llama")), CPU, torch.float32)
    answers = ["Up.", "Right, then up.", "No", "I do not know."]
    row = read(tokenizer, dict(prompt=talk("a", "b", "Which way?"), completions=answers, scores=[3, 2, 1, 0]))
    ours = rm.response_scores(model.eval(), rm.pack([row], CPU)[0])
    plain = AutoModelForSequenceClassification.from_pretrained(scoring_dir("llama"))
    batch = tokenizer.pad(dict(input_ids=[row.prompt + r for r in row.responses]), padding_side=side, return_tensors="pt")
    assert plain(**batch).logits[:, 0].tolist() == pytest.approx(ours.tolist(), abs=1e-5) and batch["attention_mask"].min() == 0


@pytest.mark.parametrize("padding", ["<|end|>", None])
@pytest.mark.parametrize("unknown", ["<|endoftext|>", None])
@torch.no_grad()
def test_bug18_the_padding_is_no_token_that_ends_an_answer(padding, unknown, tiny_model_dir, tmp_path):
    """Hugging Face reads the score before the padding: were that the end of turn, it would read it elsewhere than we do."""
    tokenizer = copy.deepcopy(tokenizer_of(tiny_model_dir("llama")))
    tokenizer.pad_token, tokenizer.unk_token = padding, unknown
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = jsonl(tmp_path / "rows.jsonl", [dict(prompt=talk("Which way?"), chosen=GOOD, rejected=BAD)] * 2)
    with torch.enable_grad():
        rm.main(rm.Args(model=str(tmp_path / "base"), dataset=data, output_dir=str(tmp_path / "run"), learning_rate=0.1, eval_fraction=0))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.pad_token_id == tokenizer.pad_token_id not in rm.stop_tokens(tokenizer)
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    ours, _, _ = rm.load_reward_model(str(tmp_path / "run"), CPU, torch.float32)
    row = read(tokenizer, dict(prompt=talk("Which way?"), completions=["Up.", "I do not know the way."], scores=[1, 0]))
    scores = rm.response_scores(ours.eval(), rm.pack([row], CPU)[0]) + ours.config.score_shift
    batch = tokenizer.pad(dict(input_ids=[row.prompt + r for r in row.responses]), return_tensors="pt")
    assert model(**batch).logits[:, 0].tolist() == pytest.approx(scores.tolist(), abs=1e-4)


@torch.no_grad()
def test_bug18_a_prompt_that_merged_into_its_answers(scoring_dir):
    """Where prompt and answers share no token, each answer is a sequence of its own."""
    model, *_ = rm.load_reward_model(str(scoring_dir("llama")), CPU, torch.float32)
    rows = [some_rankings()[0], Row([], [[8, 9, 2], [10, 2]]), Row([], [[7, 9, 2], [10, 2]])]
    scores = [rm.response_scores(model.eval(), rm.pack(rows, CPU, together)[0]).tolist() for together in (True, False)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------------------ metrics


def scored_pairs(gaps, labels=None):
    """Rows of two answers whose scores differ by the gaps, whose labels differ by the labels; the better has the length 3, the worse 1."""
    extra = lambda gap, label: dict(pairs=[(0, 1, 1.0, label)], ranks=[label, 0.0], kind="k" if gap > 1 else "", soft=False)
    rows = [Row([1], [[2, 2, 2], [2]], None, extra(gap, label)) for gap, label in zip(gaps, labels or [1.0] * len(gaps))]
    return rows, [torch.tensor([gap, 0.0]) for gap in gaps]


def test_accuracy_counts_ties_as_wrong():
    assert rm.accuracy(rm.compare(*scored_pairs([2.0, 0.5, 0.0, -1.0]))) == 0.5
    assert math.isnan(rm.accuracy([]))


def test_calibration_error():
    """Of two pairs both 0.7 sure one is right: 0.2 off. Bins of one pair each: |1 - 0.6| and |0 - 0.9|."""
    gap = lambda p: math.log(p / (1 - p))
    assert rm.calibration_error([gap(0.72), -gap(0.72)]) == pytest.approx(0.22)
    assert rm.calibration_error([gap(0.62), -gap(0.92)]) == pytest.approx((0.38 + 0.92) / 2)
    assert rm.calibration_error([gap(0.75)] * 3 + [-gap(0.75)]) == pytest.approx(0.0, abs=1e-9)
    assert rm.calibration_error([1e6]) == pytest.approx(0.0, abs=1e-9)
    assert rm.calibration_error([gap(0.52), -gap(0.57)]) == pytest.approx((0.48 + 0.57) / 2)  # not in one bin: each is a tenth of 0.5 to 1


def test_length_correlation_is_within_prompts():
    """Longer prompts' answers may be longer and score higher altogether: only differences between answers to one prompt count."""
    rows = [Row([1], [[2] * n for n in lengths]) for lengths in ((1, 3), (11, 13))]
    assert rm.length_correlation(rows, [torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0])]) == pytest.approx(1.0)
    assert rm.length_correlation(rows, [torch.tensor([1.0, 0.0]), torch.tensor([6.0, 5.0])]) == pytest.approx(-1.0)
    assert rm.length_correlation(rows, [torch.tensor([0.0, 1.0]), torch.tensor([6.0, 5.0])]) == pytest.approx(0.0)
    assert rm.length_correlation(rows, [torch.zeros(2), torch.zeros(2)]) == 0.0


def test_the_report_groups_pairs(tiny_tokenizer):
    rows, scores = scored_pairs([3.0, 2.0, 0.5, -1.0])
    result = rm.full_report(rows, scores, tiny_tokenizer)
    assert (result["pairs"], result["accuracy"]) == (4, 0.75)
    assert result["length_correlation"] == pytest.approx(rm.length_correlation(rows, scores))
    groups = {name: (group["pairs"], group["accuracy"]) for name, group in result["groups"].items()}
    assert groups == {"kind all": (2, 0.5), "kind k": (2, 1.0), "better is longer": (4, 0.75)}
    worst, *_, best = result["examples"]
    assert (worst["gap"], best["gap"]) == (-1.0, 3.0) and {"prompt", "better", "worse"} <= worst.keys()


def test_the_report_tells_close_calls_from_clear_ones(tiny_tokenizer):
    result = rm.full_report(*scored_pairs([-1.0, -2.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), tiny_tokenizer)
    close, clear = (group for name, group in result["groups"].items() if name.startswith("labelled gap"))
    assert close == dict(pairs=3, accuracy=pytest.approx(1 / 3)) and clear["accuracy"] == 1.0 and clear["pairs"] in (1, 2)


# -------------------------------------------------------------------------------------------------------------------------- runs


def walks(n: int, k: int, seed=0) -> list:
    """Rankings by the number of times that an answer says `up`: simple, and noisy in everything else."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    rows = []
    for i in range(n):
        answers = [" ".join(("up", "right", "left")[number(0, 3)] for _ in range(number(2, 9))) for _ in range(k)]
        row = dict(prompt=talk(f"Walk {i % 7}!"), completions=answers, scores=[a.split().count("up") for a in answers])
        rows.append(row | dict(kind=("helpful", "harmless")[i % 2]))
    return rows


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on rankings of 3: 21 rows and 5 a step, so that the last step of an epoch has one."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", walks(21, 3))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=5, learning_rate=1e-3, eval_fraction=0.0, eval_dataset=data)
    return flags | dict(tokens_per_forward=90, save_every=2, epochs=2)


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory):
    """The output directory of short_run. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    rm.main(rm.Args(**short_run, output_dir=str(out)))
    return out


@pytest.mark.parametrize("flags, k, expected", [
    (dict(), 2, math.log(2)), (dict(), 4, math.log(2)), (dict(loss="focal"), 4, math.log(2)), (dict(loss="plackett-luce"), 4, math.log(24)),
    (dict(barrier=0.02), 2, math.log(2) - 2 * 0.02 * math.log(25)), (dict(score_l2=0.1), 3, math.log(2)),
])  # fmt: skip
def test_a_new_head_is_zero_and_the_first_loss_known(flags, k, expected, tiny_model_dir, tmp_path):
    rows = [row | dict(scores=list(range(k)), completions=[f"up {j} {i}" for j in range(k)]) for i, row in enumerate(walks(6, k))]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    rm.main(rm.Args(model=str(tiny_model_dir("qwen2")), dataset=data, max_steps=1, eval_fraction=0, output_dir=str(tmp_path / "run"), **flags))
    (line,) = lines_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(expected, abs=1e-6)
    assert [line[name] for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")] == [0] * 5


def by_hand(folder, rows: list) -> list:
    """The scores of every row's answers by Hugging Face's model alone, less the shift."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return [torch.tensor([model(torch.tensor([row.prompt + r])).logits.item() for r in row.responses]) - model.config.score_shift for row in rows]


def test_metrics_and_report_are_those_of_the_rows(short_run, finished):
    tokenizer = tokenizer_of(finished)
    rows = [read(tokenizer, row) for row in walks(21, 3) if len(set(row["scores"])) > 1]
    scores = by_hand(finished, rows)
    pairs = [(float(s[w] - s[l]), row.extra["kind"]) for row, s in zip(rows, scores) for w, l, *_ in row.extra["pairs"]]
    assert torch.cat(scores).mean().item() == pytest.approx(0.0, abs=1e-4)  # InstructGPT's bias: mean 0 on the training set
    last, report = lines_of(finished)[-1], json.loads((finished / "report.json").read_text())
    accuracy = sum(gap > 0 for gap, _ in pairs) / len(pairs)
    assert last["eval_accuracy"] == pytest.approx(accuracy) == pytest.approx(report["accuracy"]) and report["pairs"] == len(pairs)
    assert last["eval_margin"] == pytest.approx(sum(gap for gap, _ in pairs) / len(pairs), abs=1e-4)
    loss = [sum(-logsig(float(s[w] - s[l])) for w, l, *_ in row.extra["pairs"]) / len(row.extra["pairs"]) for row, s in zip(rows, scores)]
    assert last["eval_loss"] == pytest.approx(sum(loss) / len(loss), abs=1e-4)
    for kind in ("helpful", "harmless"):
        own = [gap > 0 for gap, k in pairs if k == kind]
        assert report["groups"][f"kind {kind}"] == dict(pairs=len(own), accuracy=pytest.approx(sum(own) / len(own)))
    assert last["num_tokens"] == 2 * sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows) and last["epoch"] == 2.0


def first_gradient(monkeypatch, **flags) -> torch.Tensor:
    """The gradient of a run's first step, as the optimiser gets it."""
    seen, real = [], rm.take_step

    def spy(model, *rest):
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return real(model, *rest)

    monkeypatch.setattr(rm, "take_step", spy)
    rm.main(rm.Args(**flags, max_steps=1))
    monkeypatch.setattr(rm, "take_step", real)
    return seen[0]


def test_bug04_the_split_into_forwards_changes_no_gradient(short_run, scoring_dir, monkeypatch, tmp_path):
    """Nor does gradient checkpointing; and it is the gradient of the mean over all rankings of the step."""
    flags = short_run | dict(model=str(scoring_dir("llama")), batch_size=21)
    model = AutoModelForSequenceClassification.from_pretrained(flags["model"])
    rows = [read(tokenizer_of(flags["model"]), row) for row in walks(21, 3) if len(set(row["scores"])) > 1]
    total = 0
    for row in rows:
        scores = torch.stack([model(torch.tensor([row.prompt + r])).logits[0, 0] for r in row.responses])
        total += sum(torch.nn.functional.softplus(scores[l] - scores[w]) for w, l, *_ in row.extra["pairs"]) / len(row.extra["pairs"]) / len(rows)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for i, change in enumerate((dict(), dict(tokens_per_forward=1), dict(gradient_checkpointing=True))):
        gradient = first_gradient(monkeypatch, **flags | change, output_dir=str(tmp_path / str(i)))
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), change
        assert lines_of(tmp_path / str(i))[0]["loss"] == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("family, world", [("llama", 2), ("nemotron", 2), pytest.param("llama", 4, marks=pytest.mark.slow)])
def test_bug04_ranks_change_nothing(family, world, short_run, tiny_model_dir, tmp_path):
    """The last step has one row, so that a rank has none; metrics, report, weights and files are those of one process."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), max_steps=5, eval_every=2)
    on_ranks(rm, world, **flags, output_dir=str(tmp_path / "many"))
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "one")))
    for ours, theirs in zip(lasting(tmp_path / "many"), lasting(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = weights_of(tmp_path / "many"), weights_of(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert snapshot(tmp_path / "many").keys() == snapshot(tmp_path / "one").keys()
    shift = [json.loads((tmp_path / name / "config.json").read_text())["score_shift"] for name in ("many", "one")]
    assert shift[0] == pytest.approx(shift[1], abs=1e-4)


def test_bfloat16(short_run, tmp_path):
    """FSDP's mixed precision on one rank: near the float32 run."""
    for dtype in ("bfloat16", "float32"):
        assert in_child(rm.main, rm.Args(**short_run | dict(max_steps=3), dtype=dtype, output_dir=str(tmp_path / dtype))) == 0
    for ours, theirs in zip(lines_of(tmp_path / "bfloat16"), lines_of(tmp_path / "float32"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.03) and ours["max_reward"] == pytest.approx(theirs["max_reward"], abs=0.05)


@pytest.mark.parametrize("moment", [0.5, 0.8])
def test_bug28_killed_and_resumed(moment, short_run, finished, tmp_path):
    args = rm.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    in_child(rm.main, args, kill_after=moment * lines_of(finished)[-1]["seconds"])
    assert in_child(rm.main, args) == 0
    same_run(tmp_path / "run", finished)
    assert (tmp_path / "run" / "report.json").read_text() == (finished / "report.json").read_text()


@pytest.mark.parametrize("number", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3, *range(5, 13)))])
def test_bug28_killed_before_a_rename_and_resumed(number, short_run, finished, tmp_path):
    args = rm.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, rm, args, number) == -9
    assert in_child(rm.main, args) == 0
    same_run(tmp_path / "run", finished)


def test_bug28_other_conditions_are_other_data(short_run, tmp_path, capsys):
    (tmp_path / "conditions.json").write_text('{"helpful": "Be nice."}')
    flags = short_run | dict(condition=str(tmp_path / "conditions.json"), max_steps=1, output_dir=str(tmp_path / "run"))
    rm.main(rm.Args(**flags))
    (tmp_path / "conditions.json").write_text('{"helpful": "Be rude."}')
    assert "content of condition was" in refused(rm, capsys, **flags, resume=True)


@torch.no_grad()
def test_bug29_a_saved_reward_model_is_a_classifier_of_one_label(finished):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    config = json.loads((finished / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and model.config.num_labels == 1 and "attn_implementation" not in str(config)
    assert tokenizer.chat_template == tokenizer_of(finished).chat_template and model.score.weight.abs().max() > 0
    ours, _, new = rm.load_reward_model(str(finished), CPU, torch.float32)
    rows = [read(tokenizer, row) for row in walks(4, 3, seed=5)]
    scores = rm.response_scores(ours.eval(), rm.pack(rows, CPU)[0])
    assert not new and scores.tolist() == pytest.approx(torch.cat(by_hand(finished, rows)).tolist(), abs=1e-5)


def test_bug29_a_reward_model_is_gone_on_from(short_run, finished, tmp_path):
    """Its head is kept, so that training starts where it stood; its shift is renewed, to the mean 0 of the new data."""
    flags = short_run | dict(model=str(finished), batch_size=21, max_steps=1, learning_rate=1e-5)
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    before, (line,) = lines_of(finished)[-1], lines_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(before["eval_loss"], abs=1e-4) and line["accuracy"] == pytest.approx(before["eval_accuracy"], abs=1e-6)
    rows = [read(tokenizer_of(finished), row) for row in walks(21, 3) if len(set(row["scores"])) > 1]
    assert line["mean_reward"] == pytest.approx(torch.cat(by_hand(finished, rows)).mean().item(), abs=1e-4)
    assert torch.cat(by_hand(tmp_path / "run", rows)).mean().item() == pytest.approx(0.0, abs=1e-4)


def test_length_balancing_in_a_run(tiny_model_dir, tmp_path, capsys):
    """Four pairs with a longer winner, two with a shorter one: two of each are left."""
    pairs = [("up " * 5, "no")] * 4 + [("no", "up " * 5)] * 2
    data = jsonl(tmp_path / "rows.jsonl", [dict(prompt=talk(f"{i}?"), chosen=c, rejected=r) for i, (c, r) in enumerate(pairs)])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_fraction=0, length_buckets=(3,))
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    assert "4 of 6 pairs kept" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [dict(), dict(loss="plackett-luce"), dict(loss="focal", barrier=0.02)])
def test_a_simple_preference_is_learnt(flags, tiny_model_dir, tmp_path):
    """On held-out rankings by the number of `up` in an answer, whatever its length."""
    data, test = jsonl(tmp_path / "rows.jsonl", walks(160, 4)), jsonl(tmp_path / "test.jsonl", walks(60, 4, seed=1))
    flags = flags | dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=test, epochs=6, batch_size=16, learning_rate=5e-3)
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    last = lines_of(tmp_path / "run")[-1]
    assert last["eval_accuracy"] > 0.9 and abs(last["eval_length_correlation"]) < 0.95
    assert "barrier" not in flags or -5 < last["min_reward"] < last["max_reward"] < 5


def test_a_condition_decides_between_two_preferences(tiny_model_dir, tmp_path):
    """One kind wants `up`, the other `right`: with the condition both are learnt, without it neither can be (InternLM2)."""
    kinds = [("helpful", [0, 1]), ("harmless", [1, 0])] * 32
    rows = [dict(prompt=talk(f"Walk {i % 9}!"), completions=["up", "right"], scores=s, kind=kind) for i, (kind, s) in enumerate(kinds)]
    (tmp_path / "conditions.json").write_text('{"helpful": "Go right.", "harmless": "Go up."}')
    flags = dict(model=str(tiny_model_dir("llama")), dataset=jsonl(tmp_path / "rows.jsonl", rows), eval_fraction=0.25)
    flags |= dict(epochs=8, batch_size=16, learning_rate=5e-3)
    for name, condition in (("with", str(tmp_path / "conditions.json")), ("without", "")):
        rm.main(rm.Args(**flags, condition=condition, output_dir=str(tmp_path / name)))
    accuracy = {name: lines_of(tmp_path / name)[-1]["eval_accuracy"] for name in ("with", "without")}
    assert accuracy["with"] > 0.9 and accuracy["without"] < 0.8


# ---------------------------------------------------------------------------------------------------------------------- bad input

OK = dict(prompt="a", completions=["b", "c"], scores=[1.0, 0.0])
BAD_ROWS = {  # rows -> what the message must say
    "a score that is missing": ([OK, OK, OK | dict(scores=[1.0, None])], "row 2"),
    "a score that is no number": ([OK, OK | dict(scores=[1.0, math.nan])], "row 1"),
    "a score too few": ([OK, OK | dict(scores=[1.0])], "row 1"),
    "other columns": ([dict(text="a")], "chosen"),
    "no rejected": ([dict(prompt="a", chosen="b")], "rejected"),
    "nothing usable": ([OK | dict(scores=[1.0, 1.0])], "nothing to compare"),
    "a probability that is no share": ([dict(prompt="a", chosen="b", rejected="c", probability=1.7)], "row 0"),
}


@pytest.mark.parametrize("rows, says", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused(rows, says, tiny_model_dir, tmp_path, capsys):
    rm.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = refused(rm, capsys, model=str(tiny_model_dir("llama")), dataset=str(tmp_path / "rows.parquet"), output_dir=str(tmp_path / "run"))
    assert "--dataset" in said and says in said


@pytest.mark.parametrize("flags", [
    dict(batch_size=0), dict(epochs=0), dict(eval_fraction=1.0, eval_dataset=""), dict(condition="nowhere.json"), dict(max_grad_norm=0.0),
    dict(model="no/such/model"), dict(dataset="nowhere.jsonl"),
    dict(loss="focal", use_margin=True), dict(loss="plackett-luce", length_buckets=(3,)),
], ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))  # fmt: skip
def test_bad_arguments_are_refused(flags, short_run, tmp_path, capsys):
    said = refused(rm, capsys, **short_run | flags, output_dir=str(tmp_path / "run"))
    name = next(iter(flags))
    assert f"--{name.replace('_', '-')}" in said or str(flags[name]) in said


@pytest.mark.parametrize("flags, named", [(dict(loss="focal"), "--loss focal"), (dict(use_margin=True), "--use-margin")])
@pytest.mark.parametrize("option", ["dataset", "eval_dataset"])
def test_soft_labels_with_a_loss_that_takes_none_are_refused(option, flags, named, short_run, tmp_path, capsys):
    soft = jsonl(tmp_path / "soft.jsonl", [dict(prompt="a", chosen=" b", rejected=" c", probability=0.8)] * 4)
    assert named in refused(rm, capsys, **short_run | flags | {option: soft}, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("content", ["[1]", '{"helpful": 3}', "{"])
def test_bad_conditions_are_refused(content, short_run, tmp_path, capsys):
    (tmp_path / "conditions.json").write_text(content)
    said = refused(rm, capsys, **short_run, condition=str(tmp_path / "conditions.json"), output_dir=str(tmp_path / "run"))
    assert "--condition" in said and "conditions.json" in said


def test_length_buckets_that_leave_nothing_are_refused(tiny_model_dir, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", [dict(prompt="a", chosen=" b c d", rejected=" e")] * 4)
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, length_buckets=(4,), output_dir=str(tmp_path / "run"))
    assert "--length-buckets" in refused(rm, capsys, **flags)


def test_a_classifier_is_no_reward_model(short_run, tiny_model_dir, tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(tiny_model_dir("llama"), num_labels=3).save_pretrained(tmp_path / "three")
    tokenizer_of(tiny_model_dir("llama")).save_pretrained(tmp_path / "three")
    assert "label" in refused(rm, capsys, **short_run | dict(model=str(tmp_path / "three")), output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("change", [None, lambda b: b[:-9]], ids=["no config", "broken config"])
def test_a_checkpoint_without_its_config_is_refused(change, short_run, tiny_model_dir, tmp_path, capsys):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "broken")
    config = tmp_path / "broken" / "config.json"
    config.unlink() if change is None else config.write_bytes(change(config.read_bytes()))
    assert "broken" in refused(rm, capsys, **short_run | dict(model=str(tmp_path / "broken")), output_dir=str(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------- real data


def test_real_pairs(real_data, tmp_path, capsys):
    """HH-RLHF's strings: the prompt ends with the last shared turn of the assistant, and both answers are what follows it."""
    data = rm.load_rows("--dataset", str(real_data / "hh_rlhf_raw_implicit.jsonl"))
    tokenizer, kept = tokenizer_of(real_data / "stories260K-hf"), 0
    for row in data:
        prompt, answers = rm.as_pair(None, row["chosen"], row["rejected"])
        assert (
            prompt.startswith("\n\nHuman:")
            and prompt.endswith("\n\nAssistant:")
            and [prompt + a for a in answers] == [row["chosen"], row["rejected"]]
        )
        kept += all(a.strip() for a in answers) and max(len(tokenizer(prompt + a).input_ids) + 1 for a in answers) <= 512 and answers[0] != answers[1]
    flags = dict(
        model=str(real_data / "stories260K-hf"), dataset=str(real_data / "hh_rlhf_raw_implicit.jsonl"), max_steps=3, batch_size=8, learning_rate=1e-3
    )
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    assert f"{kept} rows from 200" in capsys.readouterr().out and 20 < kept < 200
    assert lines_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_real_rankings(real_data, tmp_path, capsys):
    """XSTest's five answers with many ties: a row needs two answers of different score that fit; the tokenizer alone counts them."""
    data = rm.load_rows("--dataset", str(real_data / "kwise_xstest.jsonl"))
    tokenizer, rows, pairs = tokenizer_of(real_data / "stories260K-hf"), 0, 0
    for row in data:
        head = f"<s>user: {row['prompt'][0]['content']}</s>\nassistant: "
        size = lambda text: len(tokenizer(head + text + "</s>", add_special_tokens=False).input_ids)
        fit = [score for text, score in zip(row["completions"], row["scores"]) if text.strip() and size(text) <= 512]
        own = sum(a != b for a, b in itertools.combinations(fit, 2))
        rows, pairs = rows + (own > 0), pairs + own
    flags = dict(
        model=str(real_data / "stories260K-hf"), dataset=str(real_data / "kwise_xstest.jsonl"), max_steps=3, batch_size=8, learning_rate=1e-3
    )
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert f"{rows} rows from {len(data)}" in said and f"{pairs} pairs" in said and 50 < rows < len(data)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["groups"]["kind all"]["pairs"] > 0
