"""dpo.py: its losses against worked numbers, how it reads preferences and marks format tokens, and whole runs against Hugging Face's models."""

import copy
import gc
import json
import math
import os
import shutil
import weakref
from collections import Counter
from types import SimpleNamespace

import dpo
import orpo
import pytest
import reward_model
import rpo
import torch
import torch.distributed as dist
from conftest import FAMILIES, TEMPLATE, tiny_config
from dpo import Row
from hypothesis import given
from hypothesis import strategies as st
from test_plumbing import CPU, TEMPLATES, every_template, in_child, jsonl, killed_at_rename, lasting, lines_of, on_ranks, refused
from test_plumbing import dressed, same_run, snapshot, talk, tokenizer_of, weights_of  # noqa: F401
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

f64 = lambda *values: torch.tensor(values, dtype=torch.float64, requires_grad=True)


def logsig(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slope(loss, at: float) -> float:
    h = f64(at)
    return torch.autograd.grad(loss(h).sum(), h)[0].item()


# ---------------------------------------------------------------------------------------------------------------------- the losses

WORKED = [  # METHODS.md B8, at h = 1.5
    (lambda h: dpo.dpo_loss(h, 0.1), 0.62095705, -0.04625702),
    (lambda h: dpo.dpo_loss(h, 0.1, 0.1), 0.63595705, -0.03625702),
    (lambda h: dpo.dpo_loss(h, 0.5), 0.38687101, -0.16041065),
    (lambda h: dpo.dpo_loss(h, 0.5, 0.1), 0.46187101, None),
    (lambda h: dpo.ipo_loss(h, 0.1), 12.25, 2 * (1.5 - 5)),
    (lambda h: dpo.ipo_loss(h, 0.5), 0.25, 2 * (1.5 - 1)),
]


@pytest.mark.parametrize("loss, value, gradient", WORKED)
def test_losses(loss, value, gradient):
    assert loss(f64(1.5)).item() == pytest.approx(value, abs=1e-6)
    assert gradient is None or slope(loss, 1.5) == pytest.approx(gradient, abs=1e-6)


@given(st.floats(-30, 30), st.floats(0.01, 2), st.floats(0, 0.49))
def test_the_gradient_is_the_error_of_the_implicit_reward_model(h, beta, e):
    """DPO's: how wrong the policy's own preference is, beta (sigmoid(beta h) - (1 - e)), which is never 0 without smoothing."""
    wrong = beta * (1 / (1 + math.exp(-beta * h)) - (1 - e))
    assert slope(lambda x: dpo.dpo_loss(x, beta, e), h) == pytest.approx(wrong, abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_where_the_losses_are_least(beta):
    assert slope(lambda h: dpo.dpo_loss(h, beta, 0.2), math.log(0.8 / 0.2) / beta) == pytest.approx(0.0, abs=1e-12)
    assert slope(lambda h: dpo.ipo_loss(h, beta), 1 / (2 * beta)) == pytest.approx(0.0, abs=1e-12)
    assert slope(lambda h: dpo.dpo_loss(h, beta), 20 / beta) < 0


def test_implicit_gap():
    logps, ref_logps = f64(-1, -2, -3), f64(-1.5, -1, -5)
    gap = dpo.implicit_gap(logps, ref_logps, torch.tensor([0, 2, 2]), torch.tensor([1, 1, 0]))
    assert gap.tolist() == pytest.approx([0.5 + 1, 2 + 1, 2 - 0.5])


BANDIT = [(1.0, [0.35995554, 0.58707636, 0.0529681]), (0.5, [0.1822301, 0.80790504, 0.00986486])]


@pytest.mark.parametrize("beta, best", BANDIT)
def test_dpo_finds_the_policy_of_its_closed_form(beta, best):
    """On every pair, labelled with Bradley-Terry's probabilities, the loss is least at ref exp(r / beta) / Z (eq. 4; METHODS.md B8)."""
    ref, reward = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    better, worse = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T

    def gradient(policy):
        logits = policy.log().requires_grad_()
        h = dpo.implicit_gap(logits.log_softmax(-1), ref.log(), better, worse)
        (torch.sigmoid(reward[better] - reward[worse]) * dpo.dpo_loss(h, beta)).sum().backward()
        return logits.grad.abs().max().item()

    closed = ref * (reward / beta).exp()
    closed /= closed.sum()
    assert closed.tolist() == pytest.approx(best, abs=1e-6)
    assert gradient(closed) < 1e-9 and gradient(ref.clone()) > 0.01


def test_ipo_stops_where_dpo_goes_on():
    """Two actions, a uniform reference, the first always better: IPO's policy is sigmoid(1 / (2 tau)), DPO's goes to 1."""
    tau, ref = 0.5, torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    h = lambda p: dpo.implicit_gap(torch.stack([p.log(), (1 - p).log()]), ref, torch.tensor([0]), torch.tensor([1]))
    p = 1 / (1 + math.exp(-0.5 / tau))
    assert slope(lambda x: dpo.ipo_loss(h(x), tau), p) == pytest.approx(0.0, abs=1e-9) and slope(lambda x: dpo.dpo_loss(h(x), tau), p) < -0.1


# ------------------------------------------------------------------------------------------------------- the loss of a batch of rows


class Answer:
    """Its tokens' log-probabilities under policy and reference, and which of them are content (None: not marked)."""

    def __init__(self, policy, reference, content=None):
        self.policy, self.reference, self.content = list(policy), list(reference), content
        self.counted = content or [1.0] * len(self.policy)
        self.gain = sum(c * (p - r) for c, p, r in zip(self.counted, self.policy, self.reference))


def rows_of(*prompts) -> list:
    """prompts: for each a list of (answer, score)."""
    rows = []
    for answers in prompts:
        extra = dict(scores=[float(score) for _, score in answers])
        extra["pairs"] = [(i, j) for i, (_, a) in enumerate(answers) for j, (_, b) in enumerate(answers) if a > b]
        extra["ref_logps"] = f64(*(sum(c * r for c, r in zip(a.counted, a.reference)) for a, _ in answers)).detach()
        extra |= dict(content=[a.content for a, _ in answers]) if answers[0][0].content else {}
        rows.append(Row([1], [[2] * len(a.policy) for a, _ in answers], [[True] * len(a.policy) for a, _ in answers], extra))
    return rows


def terms_of(*prompts, logps=None, **flags):
    """The loss of hand-made prompts, what is logged of it by name, and the log-probabilities, of which gradients may be taken."""
    logps = f64(*(p for answers in prompts for a, _ in answers for p in a.policy)) if logps is None else logps
    entropy, top = -logps.detach(), logps.detach() > -1  # what they are is all the same here
    loss, seen = dpo.dpo_terms(dpo.Args(**flags), rows_of(*prompts), logps, entropy, top)
    return loss, dict(zip(dpo.LOGGED, seen.tolist(), strict=True)), logps


MASK = [0.0, 1.0, 1.0, 0.0]


def llama3_pair(mask=None):
    chosen = Answer([-0.1, -1, -0.5, -0.05], [-0.2, -1.2, -0.9, -0.3], mask)
    return [(chosen, 1), (Answer([-0.1, -2, -1.5, -0.4], [-0.2, -1.8, -1.1, -0.1], mask), 0)]


LLAMA3 = [(None, dict(), 0.60947043), (MASK, dict(), 0.63494610), (MASK, dict(nll_coef=0.2), 0.71744610)]
LLAMA3 += [(MASK, dict(nll_coef=0.2, nll_sum=True), 0.96494610)]


@pytest.mark.parametrize("mask, flags, loss", LLAMA3)
def test_llama3(mask, flags, loss):
    """METHODS.md B3: format tokens are out of the preference and stay in the likelihood."""
    got, seen, _ = terms_of(llama3_pair(mask), **flags)
    assert got.item() == pytest.approx(loss, abs=1e-6) and seen["nll_loss"] == pytest.approx(1.65 if flags.get("nll_sum") else 0.4125, abs=1e-6)


def rankings(marked=False) -> list:
    """A pair and a ranking of four with a tie, of answers of different lengths."""
    generator, prompts = torch.Generator().manual_seed(0), []
    for lengths, scores in (((3, 5), (1, 0)), ((4, 2, 6, 1), (0, 2, 1, 1))):
        number = lambda n: (-3 * torch.rand(n, generator=generator)).tolist()
        prompts.append([(Answer(number(n), number(n), [1.0] * (n - 1) + [float(n == 1)] if marked else None), s) for n, s in zip(lengths, scores)])
    return prompts


def by_formula(prompts, loss="sigmoid", beta=0.1, label_smoothing=0.0, nll_coef=0.0, nll_sum=False) -> float:
    """The mean over a prompt's pairs, then the sum over prompts, in plain Python."""
    total = 0
    for answers in prompts:
        per_pair = []
        for a, better in answers:
            for b, worse in answers:
                if better > worse and loss == "ipo":
                    per_pair.append((a.gain / sum(a.counted) - b.gain / sum(b.counted) - 1 / (2 * beta)) ** 2)
                elif better > worse:
                    h = beta * (a.gain - b.gain)
                    per_pair.append(-(1 - label_smoothing) * logsig(h) - label_smoothing * logsig(-h))
        best = max(answers, key=lambda pair: pair[1])[0].policy
        total += sum(per_pair) / len(per_pair) - nll_coef * sum(best) / (1 if nll_sum else len(best))
    return total


FLAGS = [
    dict(), dict(beta=0.5, label_smoothing=0.2), dict(loss="ipo"), dict(nll_coef=0.3), dict(nll_coef=0.3, nll_sum=True, loss="ipo", beta=0.7),
]  # fmt: skip


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
def test_the_loss_of_a_batch_and_its_gradient(flags, marked):
    """A prompt counts once, whatever the number of its pairs; a tie says nothing."""
    prompts = rankings(marked)
    loss, _, logps = terms_of(*prompts, **flags)
    assert loss.item() == pytest.approx(by_formula(prompts, **flags), abs=1e-6)
    assert torch.autograd.gradcheck(lambda x: terms_of(*prompts, logps=x, **flags)[0], logps, atol=1e-6)


def test_what_is_logged_of_a_batch():
    prompts = rankings()
    _, seen, _ = terms_of(*prompts, beta=0.2)
    mean = lambda of: sum(sum(of(a, b) for a, b in p) / len(p) for p in pairs)
    pairs = [[(a, b) for a, x in answers for b, y in answers if x > y] for answers in prompts]
    share = lambda a: sum(p > -1 for p in a.policy) / len(a.policy)
    expected = {
        "loss": by_formula(prompts, beta=0.2), "rewards/chosen": mean(lambda a, b: 0.2 * a.gain), "rewards/rejected": mean(lambda a, b: 0.2 * b.gain),
        "rewards/accuracies": mean(lambda a, b: a.gain > b.gain), "rewards/margins": mean(lambda a, b: 0.2 * (a.gain - b.gain)),
        "logps/chosen": mean(lambda a, b: sum(a.policy)), "logps/rejected": mean(lambda a, b: sum(b.policy)),
        "nll_loss": -sum(prompts[0][0][0].policy) / 3 - sum(prompts[1][1][0].policy) / 2,
        "entropy": mean(lambda a, b: -sum(a.policy) / len(a.policy)), "mean_token_accuracy": mean(lambda a, b: share(a)),
    }  # fmt: skip
    assert seen == pytest.approx(expected, abs=1e-5)


def test_answers_that_differ_in_format_only_are_not_pushed_apart():
    chosen, rejected = Answer([-1, -2, -0.5], [-1.5, -1, -3], [1.0, 1.0, 0.0]), Answer([-1, -2, -4], [-1.5, -1, -0.1], [1.0, 1.0, 0.0])
    loss, _, logps = terms_of([(chosen, 1), (rejected, 0)])
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient[2] == gradient[5] == 0 and (gradient[:2] + gradient[3:5]).abs().max() < 1e-12  # shared tokens get opposite pushes, which cancel
    assert loss.item() == pytest.approx(math.log(2), abs=1e-9)


def test_bug15_ipo_averages_over_tokens_and_dpo_does_not():
    """Twice the tokens of equal log-probabilities: IPO's loss is the same, DPO's gap has doubled."""
    answers = [([-1, -2], [-1.5, -2.5]), ([-3, -1, -2], [-2, -1, -1])]
    once, twice = ([(Answer(p * n, r * n), 1 - i) for i, (p, r) in enumerate(answers)] for n in (1, 2))
    assert terms_of(once, loss="ipo")[0].item() == pytest.approx(terms_of(twice, loss="ipo")[0].item(), abs=1e-9)
    assert terms_of(once)[0].item() == pytest.approx(-logsig(0.1 * 3), abs=1e-6)
    assert terms_of(twice)[0].item() == pytest.approx(-logsig(0.1 * 6), abs=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_an_answer_of_format_tokens_only_leaves_the_loss_finite(loss):
    """Cut behind its header, say: nothing of it counts in h."""
    got, seen, logps = terms_of([(Answer([-1, -2], [-1, -1], [0.0, 0.0]), 1), (Answer([-1], [-2], [1.0]), 0)], loss=loss)
    assert got.item() == pytest.approx(-logsig(-0.1) if loss == "sigmoid" else (-1 - 5) ** 2) and all(map(math.isfinite, seen.values()))
    assert torch.autograd.grad(got, logps)[0][:2].tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------- the merging


THETA, STEP, TAU = torch.ones(4), torch.tensor([0.02, -0.01, 0.005, -0.03]), torch.tensor([0.5, 0.4, -0.2, 0.1])


def test_largest():
    assert dpo.largest(STEP, 0.5).tolist() == [True, False, False, True] and dpo.largest(TAU, 0.5).tolist() == [True, True, False, False]
    assert dpo.largest(STEP.view(2, 2), 1.0).all() and dpo.largest(STEP, 1e-9).tolist() == [False, False, False, True]


def test_ondare_and_onties():
    """METHODS.md B4, by the paper: kept entries are not scaled, and weighing comes before the sign is elected."""
    keep = lambda *bits: torch.tensor(bits, dtype=torch.bool)
    dare = dpo.merged(THETA, THETA + STEP, TAU, 0.1, keep(1, 0, 1, 1), keep(1, 1, 0, 0), False)
    ties = dpo.merged(THETA, THETA + STEP, TAU, 0.1, dpo.largest(STEP, 0.5), dpo.largest(TAU, 0.5), True)
    assert dare.tolist() == pytest.approx([1.068, 1.04, 1.0045, 0.973], abs=1e-6)
    assert ties.tolist() == pytest.approx([1.068, 1.04, 1, 0.973], abs=1e-6)


@pytest.mark.parametrize("step, tau, change", [(-0.3, 0.5, -0.27), (-0.03, 0.5, 0.05), (0.3, 0.5, 0.32), (0.0, 0.5, 0.05), (0.3, 0.0, 0.27)])
def test_onties_elects_the_sign_of_the_larger(step, tau, change):
    one, all_kept = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    assert dpo.merged(one, one + step, one + tau, 0.1, all_kept, all_kept, True).item() == pytest.approx(change, abs=1e-6)


@given(st.integers(0, 1000), st.booleans())
def test_merging_nothing_is_adam_and_keeping_nothing_is_standing_still(seed, elect):
    generator = torch.Generator().manual_seed(seed)
    before, step, tau = torch.randn(3, 50, generator=generator)
    after, everything = 1e-3 * step, torch.ones(50, dtype=torch.bool)  # so far off that before + (after - before) is not always after
    assert torch.equal(dpo.merged(before, after, tau, 0.0, everything, everything, elect), after)
    assert torch.equal(dpo.merged(before, after, tau, 0.1, ~everything, ~everything, elect), before)


def merging(optimizer: str, keep: float, weight: float, tau=1.0, seed=0):
    """A layer of 40 x 50 and a function that makes one step of AdamW, merged, on it; returns the layer's change."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer, gradient = torch.nn.Linear(50, 40, bias=False), torch.randn(40, 50)
    adam = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    args = dpo.Args(optimizer=optimizer, merge_keep=keep, merge_weight=weight, seed=seed)
    dpo.merge_online(args, layer, adam, [torch.full((40, 50), tau)])

    def step():
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        adam.step()
        return layer.weight.detach() - before

    return step


def test_ondare_keeps_a_random_share_new_at_each_step():
    """Of the step and of tau apart, the same for a seed; Adam's moments are those of whole steps."""
    step, again, other = merging("ondare", 0.3, 0.0), merging("ondare", 0.3, 0.0), merging("ondare", 0.3, 0.0, seed=1)
    first, second = step(), step()
    assert 0.25 < (first != 0).float().mean() < 0.35 and not torch.equal(first != 0, second != 0)
    assert torch.equal(again(), first) and not torch.equal(other() != 0, first != 0)
    kept = first != 0
    assert torch.allclose(first[kept], merging("ondare", 1.0, 0.0)()[kept])
    tau_only, both = merging("ondare", 0.3, 1.0)(), merging("ondare", 0.3, 0.5)()
    assert 0.25 < (tau_only != 0).float().mean() < 0.35 and torch.allclose(tau_only[tau_only != 0], torch.tensor(1.0))
    assert (both != 0).float().mean() == pytest.approx(1 - 0.7**2, abs=0.05)  # were it one mask for both, 0.3


def test_onties_keeps_the_largest():
    assert (merging("onties", 0.3, 0.0)() != 0).sum() == 600 == (merging("onties", 0.3, 1.0)() != 0).sum()


# ----------------------------------------------------------------------------------------------------------------------- reading


def read(tokenizer, row, notes=None, **flags) -> Row:
    (row,) = dpo.preferences(dpo.Args(**flags), tokenizer, flags.get("max_length", 512))(row, Counter() if notes is None else notes)
    return row


def texts(tokenizer, row: Row):
    return tokenizer.decode(row.prompt), [tokenizer.decode(r) for r in row.responses]


def parts(tokenizer, row: Row) -> list:
    """For each answer, its trained tokens as text."""
    return [tokenizer.decode([t for t, keep in zip(r, marks) if keep]) for r, marks in zip(row.responses, row.trained)]


GOOD, BAD = ([dict(role="assistant", content=text)] for text in ("Up.", "Right."))
WAY, HH = talk("Which way?"), "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Which way?\n\nAssistant:"
CHAT = ("<|bos|><|user|>Which way?<|end|><|assistant|>", ["Up.<|end|>", "Right.<|end|>"])
TEXT = ("<|bos|>Which way?", [" Up.<|end|>", " Right.<|end|>"])
LAYOUTS = {
    "prompt apart, text": (dict(prompt="Which way?", chosen=" Up.", rejected=" Right."), TEXT),
    "prompt apart, messages": (dict(prompt=WAY, chosen=GOOD, rejected=BAD), CHAT),
    "prompt inside, text": (dict(chosen="Which way? Up.", rejected="Which way? Right."), TEXT),
    "prompt inside, messages": (dict(chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "UltraFeedback: inside, and once more in words": (dict(prompt="Which way?", chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "apart in messages, and once more in both": (dict(prompt=WAY, chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    "HH-RLHF": (dict(chosen=f"{HH} Up, I think.", rejected=f"{HH} Up."), (f"<|bos|>{HH}", [" Up, I think.<|end|>", " Up.<|end|>"])),
    "ranking, text": (dict(prompt="Which way?", completions=[" Up.", " Right."], scores=[1, 0]), TEXT),
    "ranking, messages": (dict(prompt=WAY, completions=[GOOD, BAD], scores=[0.5, 0.1]), CHAT),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, tiny_tokenizer, tmp_path):
    row, expected = LAYOUTS[name]
    row = read(tiny_tokenizer, dpo.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, dict.fromkeys(row)]))[0])
    assert texts(tiny_tokenizer, row) == expected and row.extra["pairs"] == [(0, 1)] and row.extra["scores"][0] > row.extra["scores"][1]
    assert parts(tiny_tokenizer, row) == expected[1]


def test_a_ranking_has_all_pairs_of_unequal_score(tiny_tokenizer):
    notes = Counter()
    row = read(tiny_tokenizer, dict(prompt=WAY, completions=["a", "b", " ", "c", "a"], scores=[0.5, 2, 9, 0.5, 1]), notes)
    assert row.extra == dict(pairs=[(1, 0), (1, 2), (1, 3), (3, 2)], scores=[0.5, 2, 0.5, 1])  # 0 and 3 are one text, 0 and 2 tied, " " is empty
    assert notes["pairs"] == 4 and notes["answers dropped: empty"] == 1
    assert dpo.pairings([row, row], CPU)[3].tolist() == [1, 5]  # the best answer of each


def text_of(tokenizer, word: str, n: int) -> str:
    """So many tokens."""
    assert len(tokenizer(word * n, add_special_tokens=False).input_ids) == n
    return word * n


def test_bug09_long_answers_are_cut_and_prompts_never(tiny_tokenizer):
    """A prompt of 20 tokens, answers of 40 and 30, and room for 50: 30 of each are left."""
    row = dict(prompt=text_of(tiny_tokenizer, " up", 19), chosen=text_of(tiny_tokenizer, " right", 39), rejected=text_of(tiny_tokenizer, " the", 29))
    notes = Counter()
    kept = read(tiny_tokenizer, row, notes, max_length=50)
    assert len(kept.prompt) == 20 and list(map(len, kept.responses)) == [30, 30] == list(map(len, kept.trained))
    assert notes["answers cut at --max-length"] == 1 and [r[-1] in dpo.stop_tokens(tiny_tokenizer) for r in kept.responses] == [False, True]
    assert list(map(len, read(tiny_tokenizer, row, max_length=21).responses)) == [1, 1]
    for limit in (20, 5):
        with pytest.raises(dpo.Drop, match="prompt beyond --max-length"):
            read(tiny_tokenizer, row, max_length=limit)


@pytest.mark.parametrize("rest, left, pairs", [(["Up.", "No"], 2, [(0, 1)]), (["Up."], 1, None)])
@pytest.mark.parametrize("rewards", [None, lambda row, scores: [-s for s in scores]])
def test_an_answer_left_without_trained_tokens_by_the_cut_is_dropped(rest, left, pairs, rewards, tiny_tokenizer):
    """Cut within the user's turn before the assistant's, with its score; where another answer is left, the others still teach."""
    best = [dict(role="user", content="up " * 40), dict(role="assistant", content="So.")]
    row, scores = dict(prompt=WAY, completions=[best, *rest], scores=[2, 1, 0][: left + 1]), [1.0, 0.0][:left]
    encode_row = dpo.preferences(dpo.Args(), tiny_tokenizer, 30, rewards)
    if pairs is None:
        with pytest.raises(dpo.Drop, match="nothing to compare"):
            encode_row(row, Counter())
    else:
        (kept,) = encode_row(row, Counter())
        assert kept.extra == dict(pairs=[(1, 0)] if rewards else pairs, scores=[-s for s in scores] if rewards else scores)
        assert len(kept.responses) == left == len(kept.trained) and all(map(any, kept.trained))


USELESS = {
    "identical": dict(prompt=WAY, chosen="Up.", rejected="Up."),
    "identical, prompt inside": dict(chosen=WAY + GOOD, rejected=WAY + GOOD),
    "a tie": dict(prompt=WAY, completions=["b", "c"], scores=[1, 1]),
    "an empty answer": dict(prompt=WAY, chosen=" ", rejected="b"),
    "one answer": dict(prompt=WAY, completions=["b"], scores=[1]),
    "alike where it is cut": dict(prompt=WAY, chosen="up " * 40, rejected="up " * 39 + "right"),
}


@pytest.mark.parametrize("row", USELESS.values(), ids=USELESS)
def test_bug11_what_cannot_be_compared_is_dropped(row, tiny_tokenizer):
    with pytest.raises(dpo.Drop, match="nothing to compare"):
        read(tiny_tokenizer, row, max_length=30)


@pytest.mark.parametrize("row", [
    dict(chosen=GOOD, rejected=BAD), dict(chosen=GOOD, rejected=BAD, question="Which way?"), dict(chosen=[], rejected=BAD), dict(prompt="", chosen=GOOD, rejected=[]),
])  # fmt: skip
def test_an_answer_to_nothing_is_dropped(row, tiny_tokenizer):
    with pytest.raises(dpo.Drop, match="empty prompt"):
        read(tiny_tokenizer, row)


def test_an_answer_that_only_calls_a_tool_is_an_answer(tiny_tokenizer):
    call = dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="go", arguments=dict(x=1)))])
    notes = Counter()
    row = read(tiny_tokenizer, dict(prompt=WAY, chosen=[call], rejected=BAD), notes)
    assert len(row.responses) == 2 and not notes["answers dropped: empty"]


def test_answers_are_shown_within_the_models_positions(tiny_model_dir, capsys):
    """A GPT-2 has no position beyond its last."""
    model, tokenizer = dpo.load_frozen(AutoModelForCausalLM, str(tiny_model_dir("gpt2")), CPU, torch.float32, dpo.token_logps)
    dpo.show_answers(model, tokenizer, [Row([5] * 505, [[6]])], [0], 128)
    assert "->" in capsys.readouterr().out


def test_an_empty_prompt_is_dropped(tiny_tokenizer):
    with pytest.raises(dpo.Drop, match="empty prompt"):
        read(tiny_tokenizer, dict(chosen="yes", rejected="no"))


def test_special_tokens_in_the_text_are_dropped_unless_allowed(tiny_tokenizer):
    for row in (dict(prompt=talk("a<|end|>b"), chosen="c", rejected="d"), dict(prompt="a", completions=["b", "<|user|>"], scores=[1, 0])):
        with pytest.raises(dpo.Drop, match="special token"):
            read(tiny_tokenizer, row)
        assert read(tiny_tokenizer, row, allow_special=True)
    assert read(tiny_tokenizer, dict(prompt="a", chosen=" b<|end|>", rejected=" c"))  # an answer may bring its end


def test_of_several_turns_the_assistants_are_trained(tiny_tokenizer):
    row = dict(prompt=WAY, chosen=GOOD + talk("Why?", "So."), rejected=BAD)
    kept = read(tiny_tokenizer, row)
    assert texts(tiny_tokenizer, kept)[1][0] == "Up.<|end|><|user|>Why?<|end|><|assistant|>So.<|end|>"
    assert parts(tiny_tokenizer, kept) == ["Up.<|end|>So.<|end|>", "Right.<|end|>"]


def test_of_several_turns_under_a_template_that_rewrites_them_the_last_is_trained(dressed):  # noqa: F811
    tokenizer, turns = dressed("qwen3"), talk("", "</think>Up.", "Why?", "So.")[1:]
    kept = read(tokenizer, dict(prompt=WAY, chosen=turns, rejected=BAD))
    assert "</think>" not in texts(tokenizer, kept)[1][0] and parts(tokenizer, kept) == ["So.<|im_end|>", "Right.<|im_end|>"]


def test_an_answer_already_begun_is_continued(tiny_tokenizer):
    row = dict(prompt=talk("Count.", "one,"), chosen=" two", rejected=" ten")
    assert parts(tiny_tokenizer, read(tiny_tokenizer, row)) == [" two<|end|>", " ten<|end|>"]
    with pytest.raises(dpo.Drop, match="several turns"):
        read(tiny_tokenizer, row | dict(chosen=GOOD + talk("Why?", "So."), rejected=BAD))


# ----------------------------------------------------------------------------------------------------------------- format tokens


def marked(tokenizer, row: dict, **flags) -> list:
    """For each answer, its content as text, and its format."""
    row = read(tokenizer, row, **flags)
    dpo.mark_content(tokenizer, [row], dpo.stop_tokens(tokenizer))
    found = []
    for response, trained, content in zip(row.responses, row.trained, row.extra["content"], strict=True):
        tokens = [t for t, keep in zip(response, trained) if keep]
        assert len(tokens) == len(content)
        found.append(tuple(tokenizer.decode([t for t, c in zip(tokens, content) if c == mark]) for mark in (1.0, 0.0)))
    return found


SEVERAL = dict(prompt=talk("Which way?", "Up.", "Why?"), chosen=GOOD + talk("Why?", "So."), rejected=BAD)


@every_template
def test_an_end_of_turn_is_format(name, dressed):  # noqa: F811
    """The generation prompt holds the header, so that an answer has none of its own; in later turns too."""
    (up, up_end), (right, right_end) = marked(dressed(name), SEVERAL if name != "glm" else dict(prompt=WAY, chosen=GOOD, rejected=BAD))
    end = TEMPLATES[name][3]
    assert (right.strip(), right_end.strip()) == ("Right.", end)
    assert (up.replace(" ", ""), up_end.strip()) == (("Up.So.", end * 2) if name != "glm" else ("Up.", end))


NO_PROMPT = TEMPLATE.split("{% if add_generation_prompt %}")[0]  # as published templates without a generation prompt
THINKS = TEMPLATE.replace("message['content']", "('<|pad|><|pad|>' if message['role'] == 'assistant' else '') + message['content']")


@pytest.mark.parametrize("template, header", [(NO_PROMPT, "<|assistant|>"), (THINKS, "<|pad|><|pad|>")])
def test_what_stands_before_an_answer_is_format(template, header, tiny_tokenizer):
    """Beyond the generation prompt, if there is one (as Qwen3's empty thinking): of every turn of the assistant."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assert marked(tokenizer, SEVERAL) == [("Up.So.", f"{header}<|end|>" * 2), ("Right.", f"{header}<|end|>")]
    short = dict(prompt=WAY, chosen="12", rejected="21")
    limit = len(read(tokenizer, short).prompt) + header.count("<") + 1  # cut behind the first token of its content
    assert marked(tokenizer, short, max_length=limit) == [("1", header), ("2", header)]
    begun = dict(prompt=talk("Count.", "one,"), chosen=" two", rejected=" ten")  # behind the header
    assert marked(tokenizer, begun) == [(" two", "<|end|>"), (" ten", "<|end|>")]


def test_a_header_that_merges_with_the_generation_prompt_is_format(tiny_tokenizer):
    """` ri` in the generation prompt, ` right:` before the answer, one token each: the answer begins with the latter."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    header = "(' right:' if message['role'] == 'assistant' else '') + message['content']"
    tokenizer.chat_template = TEMPLATE.replace("message['content']", header).replace("'<|assistant|>'", "'<|assistant|> ri'")
    assert marked(tokenizer, dict(prompt=WAY, chosen=GOOD, rejected=BAD)) == [("Up.", " right:<|end|>"), ("Right.", " right:<|end|>")]


def test_a_text_has_an_end_and_no_header(tiny_tokenizer):
    assert marked(tiny_tokenizer, LAYOUTS["prompt apart, text"][0]) == [(" Up.", "<|end|>"), (" Right.", "<|end|>")]


# -------------------------------------------------------------------------------------------------------------------------- runs


def walks(n: int, seed=0) -> list:
    """Pairs and rankings by the number of times that an answer says `up`: simple, and noisy in everything else."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    rows = []
    for i in range(n):
        answers = [" ".join(["up"] * (j + 1) + [("right", "left")[number(0, 2)] for _ in range(number(1, 8))]) for j in range(2 + i % 2)]
        rows.append(dict(prompt=talk(f"Walk {i % 7}!"), completions=answers, scores=list(range(len(answers)))))
    return rows


def another(folder, out, noise=0.02, seed=1) -> str:
    """A checkpoint whose weights are near those of another."""
    shutil.copytree(folder, out)
    model, generator = AutoModelForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    model.save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on 21 prompts, 5 a step, so that the last step of an epoch has one."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", walks(21))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=5, learning_rate=1e-3, eval_fraction=0.0, eval_dataset=data)
    return flags | dict(tokens_per_forward=150, save_every=3, epochs=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def base_dir(tiny_model_dir, tmp_path_factory):
    """A stand-in for the checkpoint that `llama` was fine-tuned from, and for another reference."""
    return another(tiny_model_dir("llama"), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(short_run, base_dir, tmp_path_factory):
    """whole(name) -> the output directory of short_run with the options of VARIANTS[name], never interrupted. Read only."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            dpo.main(dpo.Args(**short_run | variant(name, base_dir), output_dir=str(made[name])))
        return made[name]

    return make


VARIANTS = {
    "adamw": dict(), "reference": dict(reference="base", mask_format_tokens=True, nll_coef=0.2),
    "ondare": dict(optimizer="ondare", merge_base="base", merge_weight=0.1), "onties": dict(optimizer="onties", merge_base="base", merge_weight=0.1),
}  # fmt: skip


MOST = [pytest.param("adamw", marks=pytest.mark.slow), "reference", "ondare", "onties"]  # the second is AdamW's as well


def variant(name, base_dir) -> dict:
    return {k: base_dir if v == "base" else v for k, v in VARIANTS[name].items()}


@torch.no_grad()
def sums_by_hand(folder, rows: list) -> list:
    """For each row the log-probability of each of its answers, by Hugging Face's model alone."""
    model, out = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for row in rows:
        out.append([])
        for response in row.responses:
            logps = model(torch.tensor([row.prompt + response])).logits[0, len(row.prompt) - 1 : -1].double().log_softmax(-1)
            out[-1].append(logps.gather(-1, torch.tensor(response)[:, None]).sum().item())
    return out


def pair_mean(rows, of) -> float:
    """The mean over rows of the mean over a row's pairs of of(row number, better, worse)."""
    return sum(sum(of(n, i, j) for i, j in row.extra["pairs"]) / len(row.extra["pairs"]) for n, row in enumerate(rows)) / len(rows)


FIRST = [dict(), dict(label_smoothing=0.1, beta=0.5), dict(loss="ipo"), dict(loss="ipo", beta=0.01), dict(mask_format_tokens=True, nll_coef=0.2)]
FIRST += [dict(nll_coef=100.0, nll_sum=True)]


@pytest.mark.parametrize("flags, family", [(flags, family) for i, flags in enumerate(FIRST) for family in ("llama", "gpt2")[i % 2 :]], ids=str)
def test_bug12_the_first_loss_is_known(flags, family, short_run, tiny_model_dir, tmp_path):
    """ln 2, or 1 / (4 beta^2), with dropout in the checkpoint's config or without: policy and reference are one model."""
    dpo.main(dpo.Args(**short_run | dict(model=str(tiny_model_dir(family)), max_steps=1, eval_dataset="") | flags, output_dir=str(tmp_path / "run")))
    (line,) = lines_of(tmp_path / "run")
    expected = 1 / (4 * flags.get("beta", 0.1) ** 2) if flags.get("loss") == "ipo" else math.log(2)
    assert line["loss"] == pytest.approx(expected + flags.get("nll_coef", 0) * line["nll_loss"], rel=1e-6)
    assert [line[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == pytest.approx([0] * 3, abs=1e-5)
    assert 0 <= line["rewards/accuracies"] <= 1 and line["nll_loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bug12_every_family(family, short_run, tiny_model_dir, tmp_path):
    flags = short_run | dict(model=str(tiny_model_dir(family)), max_steps=2, save_every=0, eval_dataset="")
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    first, second = lines_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] != pytest.approx(math.log(2), abs=1e-5)
    rows = [read(tokenizer_of(tmp_path / "run"), row) for row in walks(21)]
    batch = [rows[i] for i in dpo.pick(21, 5, 0, 0)]
    logps = sums_by_hand(tiny_model_dir(family), batch)
    assert first["logps/chosen"] == pytest.approx(pair_mean(batch, lambda n, i, j: logps[n][i]), abs=2e-3)
    assert first["logps/rejected"] == pytest.approx(pair_mean(batch, lambda n, i, j: logps[n][j]), abs=2e-3)


def first_gradient(monkeypatch, **flags) -> torch.Tensor:
    """The gradient of a run's first step, as the optimiser gets it."""
    seen, real = [], dpo.take_step

    def spy(model, *rest):
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return real(model, *rest)

    monkeypatch.setattr(dpo, "take_step", spy)
    dpo.main(dpo.Args(**flags, max_steps=1))
    monkeypatch.setattr(dpo, "take_step", real)
    return seen[0]


def test_bug04_the_split_into_forwards_changes_no_gradient(short_run, base_dir, monkeypatch, tmp_path):
    """Nor does gradient checkpointing; and it is the gradient of the mean over all prompts of the step, by Hugging Face's model."""
    flags = short_run | dict(batch_size=21, reference=base_dir, beta=0.5, eval_dataset="")
    rows = [read(tokenizer_of(flags["model"]), row) for row in walks(21)]
    reference, model, total = sums_by_hand(base_dir, rows), AutoModelForCausalLM.from_pretrained(flags["model"]), 0
    for row, ref in zip(rows, reference):
        sums = []
        for response in row.responses:
            logps = model(torch.tensor([row.prompt + response])).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(-1, torch.tensor(response)[:, None]).sum())
        gaps = [0.5 * ((sums[i] - ref[i]) - (sums[j] - ref[j])) for i, j in row.extra["pairs"]]
        total += sum(torch.nn.functional.softplus(-gap) for gap in gaps) / len(gaps) / len(rows)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for i, change in enumerate((dict(), dict(tokens_per_forward=1), dict(gradient_checkpointing=True))):
        gradient = first_gradient(monkeypatch, **flags | change, output_dir=str(tmp_path / str(i)))
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max(), change
        assert lines_of(tmp_path / str(i))[0]["loss"] == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("change", [dict(tokens_per_forward=9999), dict(gradient_checkpointing=True)], ids=str)
def test_memory_knobs_change_no_curve(change, short_run, whole, tmp_path):
    dpo.main(dpo.Args(**short_run | change, output_dir=str(tmp_path / "run")))
    near(lasting(tmp_path / "run"), lasting(whole("adamw")))


def near(ours: list, theirs: list, tolerance=1e-3):
    """Two curves, but for the accuracies: ties of the first step fall to either side."""
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b | {k: a[k] for k in a if "rewards/accuracies" in k}, abs=tolerance)


def test_bug13_the_reference_is_the_model_before_its_first_step(short_run, whole, tmp_path):
    """Named or not, the curve is the same, and its files stay as they are."""
    before = snapshot(short_run["model"])
    dpo.main(dpo.Args(**short_run, reference=short_run["model"], output_dir=str(tmp_path / "run")))
    near(lasting(tmp_path / "run"), lasting(whole("adamw")), 1e-5)
    assert snapshot(short_run["model"]) == before


@pytest.mark.parametrize("name", ["adamw", "reference"])
def test_bug14_rewards_are_relative_to_the_reference(name, short_run, base_dir, whole):
    """At the last evaluation, those of the saved weights and the reference's, by Hugging Face's model."""
    rows = [read(tokenizer_of(short_run["model"]), row) for row in walks(21)]
    last = lines_of(whole(name))[-1]
    if name == "reference":  # every answer without its end of turn
        for row in rows:
            row.responses[:] = [r[:-1] for r in row.responses]
    after, before = (sums_by_hand(folder, rows) for folder in (whole(name), base_dir if name == "reference" else short_run["model"]))
    reward = lambda n, i: 0.1 * (after[n][i] - before[n][i])
    expected = {
        "rewards/chosen": lambda n, i, j: reward(n, i), "rewards/rejected": lambda n, i, j: reward(n, j),
        "rewards/margins": lambda n, i, j: reward(n, i) - reward(n, j), "rewards/accuracies": lambda n, i, j: reward(n, i) > reward(n, j),
        "logps/chosen": lambda n, i, j: after[n][i], "logps/rejected": lambda n, i, j: after[n][j],
        "loss": lambda n, i, j: -logsig(reward(n, i) - reward(n, j)),
    }  # fmt: skip
    nll = 0.2 * last["eval_nll_loss"] if name == "reference" else 0
    assert {k: last[f"eval_{k}"] - (nll if k == "loss" else 0) for k in expected} == pytest.approx(
        {k: pair_mean(rows, of) for k, of in expected.items()}, abs=1e-3
    )
    assert abs(last["eval_rewards/margins"]) > 0.01
    assert last["num_tokens"] == 2 * sum(len(row.prompt) + sum(len(r) + (name == "reference") for r in row.responses) for row in rows)


@pytest.mark.parametrize("name", MOST)
def test_bug28_killed_before_a_rename_and_resumed(name, short_run, base_dir, whole, tmp_path):
    """The renames: args.json, checkpoint-3, checkpoint-6, ..."""
    args = dpo.Args(**short_run | variant(name, base_dir), output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, dpo, args, 3) == -9
    assert in_child(dpo.main, args) == 0
    same_run(tmp_path / "run", whole(name))


def test_bug28_killed_and_resumed(short_run, whole, tmp_path):
    args = dpo.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    in_child(dpo.main, args, kill_after=0.7 * lines_of(whole("adamw"))[-1]["seconds"])
    assert in_child(dpo.main, args) == 0
    same_run(tmp_path / "run", whole("adamw"))


@pytest.mark.parametrize("name", MOST)
def test_bug04_ranks_change_nothing(name, short_run, base_dir, whole, tmp_path):
    """The last step has one row, so that a rank has none."""
    on_ranks(dpo, 2, **short_run | variant(name, base_dir), output_dir=str(tmp_path / "two"))
    ties = name == "onties"  # Adam's first steps are nearly all of one size: which are the largest is a matter of their last bits
    near(lasting(tmp_path / "two"), lasting(whole(name)), 0.02 if ties else 1e-3)
    ours, theirs = weights_of(tmp_path / "two"), weights_of(whole(name))
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=5e-3 if ties else 1e-4) for k in ours)
    assert snapshot(tmp_path / "two").keys() == snapshot(whole(name)).keys()


@pytest.mark.parametrize("name", ["ondare", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "onties"))])
def test_bug28_resumed_on_ranks(name, short_run, base_dir, tmp_path):
    """From the first checkpoint of a run on two ranks, as if the rest had not been."""
    out, flags = tmp_path / "run", short_run | variant(name, base_dir) | dict(max_steps=5, save_every=2)
    flags |= dict(output_dir=str(out))
    on_ranks(dpo, 2, **flags)
    shutil.copytree(out, tmp_path / "whole")
    shutil.rmtree(out / "checkpoint-4")
    dpo.write_json(out / "args.json", json.loads((out / "args.json").read_text()) | dict(finished=False))
    on_ranks(dpo, 2, **flags, resume=True)
    same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("name", ["ondare", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "reference", "onties"))])
def test_bfloat16(name, short_run, base_dir, whole, tmp_path):
    """Weights are sharded then, though there is one rank; its curve is near that of float32."""
    args = dpo.Args(**short_run | variant(name, base_dir) | dict(max_steps=4, dtype="bfloat16"), output_dir=str(tmp_path / "run"))
    assert in_child(dpo.main, args) == 0
    loss = [[line["loss"] for line in lines_of(folder)[:4]] for folder in (tmp_path / "run", whole(name))]
    assert loss[0] == pytest.approx(loss[1], abs=0.1)


class Stack(torch.nn.Module):
    """Layers of an uneven number of rows, one of them of a single row."""

    def __init__(self):
        super().__init__()
        self.layers, self.together = torch.nn.ModuleList([torch.nn.Linear(8, 7), torch.nn.Linear(7, 1)]), True


def merge_on_ranks(flags: dict):
    """Three merged steps on random gradients, the same on every rank; leaves the whole weights."""
    dpo.RANK, dpo.WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = Stack()
    gradients = [[torch.randn(p.shape) for p in model.parameters()] for _ in range(3)]
    tau = [torch.randn(p.shape) for p in model.parameters()]
    if dpo.WORLD > 1:
        dist.init_process_group("gloo")
    dpo.shard(model, torch.float32)
    like = lambda x, p: distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    merging = dpo.Args(optimizer=flags["optimizer"], merge_keep=0.5, merge_weight=0.01)
    dpo.merge_online(merging, model, adam, [like(t, p) for t, p in zip(tau, model.parameters())])
    for step in gradients:
        for p, g in zip(model.parameters(), step):
            p.grad = like(g, p)
        adam.step()
    weights = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    if dpo.RANK == 0:
        torch.save(weights, flags["out"])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("optimizer", ["ondare", "onties"])
def test_bug04_merging_on_ranks_takes_the_entries_of_whole_weights(optimizer, world, tmp_path):
    on_ranks(SimpleNamespace(Args=dict, main=merge_on_ranks), world, optimizer=optimizer, out=str(tmp_path / "many"))
    assert in_child(merge_on_ranks, dict(optimizer=optimizer, out=str(tmp_path / "one"))) == 0
    ours, theirs = (torch.load(tmp_path / name) for name in ("many", "one"))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(ours, theirs, strict=True)) and len(ours) == 4


@pytest.mark.parametrize("optimizer", ["ondare", "onties"])
def test_merging_with_weight_0_and_all_kept_is_adamw_to_the_last_bit(optimizer, short_run, base_dir, whole, tmp_path):
    flags = short_run | dict(optimizer=optimizer, merge_base=base_dir, merge_keep=1.0, merge_weight=0.0)
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    same_run(tmp_path / "run", whole("adamw"))


@pytest.mark.parametrize("optimizer, family", [("ondare", "llama"), ("onties", "llama"), ("ondare", "gpt2"), ("ondare", "mixtral")])
def test_merging_with_weight_1_adds_what_the_reference_has_learnt(optimizer, family, short_run, tiny_model_dir, tmp_path):
    """At every step, and nothing else; all kept. Also where embeddings are tied, and where an expert had no token."""
    source, base = tiny_model_dir(family), another(tiny_model_dir(family), tmp_path / "base")
    flags = short_run | dict(model=str(source), optimizer=optimizer, merge_base=base, merge_keep=1.0, merge_weight=1.0, max_steps=3, save_every=0)
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    start, base, end = (weights_of(folder) for folder in (source, base, tmp_path / "run"))
    assert all(torch.allclose(end[k], start[k] + 3 * (start[k] - base[k]), atol=1e-5) for k in start)


def test_tau_is_the_references(short_run, base_dir, tiny_model_dir, tmp_path):
    """Not the policy's, where the two differ."""
    reference = another(tiny_model_dir("llama"), tmp_path / "reference", seed=5)
    flags = short_run | dict(optimizer="ondare", merge_base=base_dir, merge_keep=1.0, merge_weight=1.0, max_steps=1, reference=reference)
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    start, tuned, base, end = (weights_of(folder) for folder in (short_run["model"], reference, base_dir, tmp_path / "run"))
    assert all(torch.allclose(end[k], start[k] + tuned[k] - base[k], atol=1e-5) for k in start)


LEARNING = [dict(), dict(loss="ipo"), dict(optimizer="onties", merge_weight=1e-4), dict(mask_format_tokens=True, nll_coef=0.2)]


@pytest.mark.parametrize("flags", LEARNING, ids=str)
def test_a_simple_preference_is_learnt(flags, base_dir, tiny_model_dir, tmp_path):
    """On held-out prompts."""
    rows = [dict(prompt=talk(f"Walk {i}!"), chosen=f"up {i % 5}", rejected=f"right {i % 3}") for i in range(80)]
    flags = flags | (dict(merge_base=base_dir) if "optimizer" in flags else {})
    run = dict(dataset=jsonl(tmp_path / "rows.jsonl", rows), epochs=3, batch_size=16, learning_rate=3e-3, eval_every=1, eval_fraction=0.2, show=0)
    dpo.main(dpo.Args(model=str(tiny_model_dir("llama")), **run, **flags, output_dir=str(tmp_path / "run")))
    first, *_, last = lines_of(tmp_path / "run")
    assert last["eval_rewards/accuracies"] > 0.9 and last["eval_loss"] < first["eval_loss"]
    gap = lambda line: line["eval_logps/chosen"] - line["eval_logps/rejected"]
    assert gap(last) > gap(first) + 1 and last["eval_rewards/margins"] > first["eval_rewards/margins"]


def test_likely_answers_are_printed_at_each_evaluation(short_run, tmp_path, capsys):
    dpo.main(dpo.Args(**short_run | dict(max_steps=4, eval_every=2, show=2), output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert said.count("    -> ") == 4 and "<|user|>Walk 0!" in said
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [2, 4]


def test_bug29_a_finished_run_is_a_model(short_run, whole, tmp_path):
    """Of Hugging Face's own, and to go on from: the reference is then this one."""
    out = whole("adamw")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(talk("Walk 1!"), add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1] and not model.training
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id] and tokenizer.chat_template == TEMPLATE
    dpo.main(dpo.Args(**short_run | dict(model=str(out), batch_size=21, max_steps=1), output_dir=str(tmp_path / "run")))
    (line,), before = lines_of(tmp_path / "run"), lines_of(out)[-1]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5) and line["logps/chosen"] == pytest.approx(before["eval_logps/chosen"], abs=1e-3)


# ------------------------------------------------------------------------------------- what all scripts that read preferences must do

every_script = pytest.mark.parametrize("script", [dpo, orpo, rpo, reward_model], ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def pairs_run(tiny_model_dir, tmp_path_factory):
    """Flags of a short run, for any of the scripts, on 12 pairs of which three each share a prompt."""
    rows = [dict(prompt=talk(f"Walk {i % 4}!"), chosen=f"up {i}", rejected=f"right {i % 3}", margin=0.5) for i in range(12)]
    data = jsonl(tmp_path_factory.mktemp("pairs") / "rows.jsonl", rows)
    return dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=3, max_steps=1, learning_rate=1e-3, eval_fraction=0.25)


@every_script
def test_no_prompt_of_the_training_is_held_out(script, pairs_run, monkeypatch, tmp_path):
    parts, real = [], script.hold_out
    monkeypatch.setattr(script, "hold_out", lambda rows, *rest: [*map(parts.append, (rows, real(rows, *rest)))] and parts[1])
    script.main(script.Args(**pairs_run, output_dir=str(tmp_path / "run")))
    ours, theirs = ({tuple(row.prompt) for row in part} for part in parts)
    assert not ours & theirs and list(map(len, (ours, theirs, *parts))) == [3, 1, 9, 3]
    assert lines_of(tmp_path / "run")[0]["epoch"] == pytest.approx(1 / 3) and "eval_loss" in lines_of(tmp_path / "run")[0]


@every_script
def test_a_picture_that_cannot_be_drawn_costs_no_model(script, pairs_run, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(script.Args(**pairs_run | dict(max_steps=2), output_dir=str(tmp_path / "run")))  # a new head's first step moves nothing else
    ours, theirs = weights_of(tmp_path / "run"), weights_of(pairs_run["model"])
    assert not torch.equal(ours["model.norm.weight"], theirs["model.norm.weight"]) and tokenizer_of(tmp_path / "run")


@every_script
def test_bug28_a_resumed_run_ends_in_the_dtype_of_its_parent(script, pairs_run, tmp_path):
    """Its checkpoints are float32."""
    AutoModelForCausalLM.from_pretrained(pairs_run["model"], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer_of(pairs_run["model"]).save_pretrained(tmp_path / "half")
    flags = pairs_run | dict(model=str(tmp_path / "half"), max_steps=2, save_every=1)
    assert in_child(script.main, script.Args(**flags, output_dir=str(tmp_path / "whole"))) == 0
    args = script.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, script, args, 3) == -9
    assert in_child(script.main, args) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert {w.dtype for w in weights_of(tmp_path / "run").values()} == {torch.bfloat16}


@every_script
def test_the_gradients_of_a_run_must_be_finite(script, pairs_run, monkeypatch, tmp_path, capsys):
    """At a loss that is; the weights on disk are those of the last good step, and the run is not finished."""
    real = script.take_step

    def poisoned(model, *rest):
        next(model.parameters()).grad.view(-1)[0] = math.nan
        return real(model, *rest)

    monkeypatch.setattr(script, "take_step", poisoned)
    assert "the norm of the gradients is nan" in refused(script, capsys, **pairs_run, output_dir=str(tmp_path / "run"))
    assert not json.loads((tmp_path / "run" / "args.json").read_text())["finished"] and not list(tmp_path.glob("run/*.safetensors"))


FREED = [(dpo, ["reference"]), (dpo, ["merge_base"]), (rpo, ["reward_model", "reference"])]


@pytest.mark.parametrize("script, others", FREED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_one_model_is_in_memory_while_training(script, others, pairs_run, base_dir, monkeypatch, tmp_path):
    """Whatever was loaded before the policy is gone when that is announced."""
    with torch.random.fork_rng():
        AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1).save_pretrained(tmp_path / "rm")
    tokenizer_of(base_dir).save_pretrained(tmp_path / "rm")
    loaded, alive, load, announce = [], [], script.load_model, script.announce

    def loads(*args, **options):
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(script, "load_model", loads)
    monkeypatch.setattr(script, "announce", lambda *args: alive.extend(r() is not None for r in loaded) or announce(*args))
    flags = pairs_run | {name: str(tmp_path / "rm") if name == "reward_model" else base_dir for name in others}
    flags |= dict(optimizer="ondare") if "merge_base" in others else {}
    gc.disable()  # else Python may happen to collect in time
    try:
        script.main(script.Args(**flags, output_dir=str(tmp_path / "run")))
    finally:
        gc.enable()
    assert alive == [False] * (len(alive) - 1) + [True] and len(alive) == 3 - (others == ["reference"])


# --------------------------------------------------------------------------------------------------------------------- averaging


@pytest.mark.parametrize("n", [1, 3])
def test_the_average_of_equal_checkpoints_is_the_checkpoint(n, tiny_model_dir, tmp_path):
    source = tiny_model_dir("qwen3")
    dpo.main(dpo.Args(average=(str(source),) * n, output_dir=str(tmp_path / "run")))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_the_average_of_three(tiny_model_dir, tmp_path):
    """Also the model loads, and its inputs are as they were."""
    names = [another(tiny_model_dir("llama"), tmp_path / str(i), noise=0.1, seed=i) for i in range(3)]
    before = [snapshot(name) for name in names]
    dpo.main(dpo.Args(average=tuple(names), output_dir=str(tmp_path / "run")))
    ours, theirs = weights_of(tmp_path / "run"), [weights_of(name) for name in names]
    assert all(torch.allclose(ours[k].double(), sum(w[k].double() for w in theirs) / 3, rtol=0, atol=1e-7) for k in ours)
    assert ours.keys() == theirs[0].keys() and [snapshot(name) for name in names] == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["finished"] and tokenizer_of(tmp_path / "run").chat_template == TEMPLATE


def made(family, tokenizer, folder, **change) -> str:
    config = tiny_config(family, tokenizer)
    for name, value in change.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("change", [dict(intermediate_size=48), dict(num_hidden_layers=1), dict(num_hidden_layers=3), dict(tokens=1)], ids=str)
def test_what_has_no_average_is_refused(change, tiny_model_dir, tiny_tokenizer, tmp_path, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if "tokens" in change:
        tokenizer.add_tokens(["<new>"])
    other = made("llama", tokenizer, tmp_path / "other", **{k: v for k, v in change.items() if k != "tokens"})
    said = refused(dpo, capsys, average=(str(tiny_model_dir("llama")), other), output_dir=str(tmp_path / "run"))
    assert f"--average {other}" in said and not (tmp_path / "run" / "args.json").exists()


# --------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags", [
    dict(loss="ipo", label_smoothing=0.1), dict(label_smoothing=0.5), dict(label_smoothing=-0.1), dict(optimizer="ondare"), dict(optimizer="onties"),
    dict(merge_base="."), dict(beta=0.0), dict(merge_keep=0.0), dict(merge_keep=1.5), dict(merge_weight=-1.0), dict(batch_size=0), dict(epochs=0),
    dict(nll_coef=-1.0), dict(beta=math.nan), dict(reference="no/such/model"), dict(model="no/such/model"), dict(dataset="nowhere.jsonl"),
    dict(average=("no/such/model",)), dict(max_grad_norm=0.0),
], ids=str)  # fmt: skip
def test_bad_arguments_are_refused(flags, short_run, tmp_path, capsys):
    said = refused(dpo, capsys, **short_run | flags, output_dir=str(tmp_path / "run"))
    *_, name = flags
    assert f"--{name.replace('_', '-')}" in said or "no/such/model" in said


def test_averaging_on_several_ranks_is_refused(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "WORLD", 2)
    assert "--average" in refused(dpo, capsys, average=(str(tiny_model_dir("llama")),), output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("change", [dict(intermediate_size=48), dict(num_hidden_layers=1), dict(num_hidden_layers=3)], ids=str)
def test_a_merge_base_of_another_shape_is_refused(change, short_run, tiny_tokenizer, tmp_path, capsys):
    base = made("llama", tiny_tokenizer, tmp_path / "base", **change)
    assert f"--merge-base {base}" in refused(dpo, capsys, **short_run, optimizer="ondare", merge_base=base, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("change", [dict(intermediate_size=48), dict(num_hidden_layers=3)], ids=str)
def test_merging_with_a_reference_of_another_shape_is_refused(change, short_run, tiny_tokenizer, tmp_path, capsys):
    """Alone it may be of any size; what it has learnt cannot be added to other weights."""
    other = made("llama", tiny_tokenizer, tmp_path / "other", **change)
    dpo.main(dpo.Args(**short_run | dict(max_steps=1), reference=other, output_dir=str(tmp_path / "fine")))
    flags = short_run | dict(optimizer="ondare", merge_base=other, reference=other)
    assert "--reference" in refused(dpo, capsys, **flags, output_dir=str(tmp_path / "run"))


def test_a_reference_of_other_tokens_is_refused(short_run, tiny_tokenizer, tmp_path, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<new>"])
    other = made("llama", tokenizer, tmp_path / "other")
    assert f"--reference {other}" in refused(dpo, capsys, **short_run, reference=other, output_dir=str(tmp_path / "run"))


OK = dict(prompt="a", completions=["b", "c"], scores=[1.0, 0.0])
BAD_ROWS = {  # rows -> what the message must say
    "a score that is missing": ([OK, OK, OK | dict(scores=[1.0, None])], "row 2"),
    "a score too few": ([OK, OK | dict(scores=[1.0])], "row 1"),
    "other columns": ([dict(text="a")], "chosen"),
    "no rejected": ([dict(prompt="a", chosen="b")], "rejected"),
    "nothing usable": ([OK | dict(scores=[1.0, 1.0])], "nothing to compare"),
}


@pytest.mark.parametrize("rows, says", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("option", ["dataset", "eval_dataset"])
def test_bad_rows_are_refused(option, rows, says, short_run, tmp_path, capsys):
    said = refused(dpo, capsys, **short_run | {option: jsonl(tmp_path / "rows.jsonl", rows)}, output_dir=str(tmp_path / "run"))
    assert f"--{option.replace('_', '-')}" in said and says in said


def test_bug28_what_does_not_change_the_result_may_change(short_run, whole):
    with pytest.raises(SystemExit) as end:
        dpo.main(dpo.Args(**short_run, show=0, gradient_checkpointing=True, output_dir=str(whole("adamw")), resume=True))
    assert end.value.code == 0


def test_another_reference_is_another_run(short_run, base_dir, whole, capsys):
    before = snapshot(whole("adamw"))
    said = refused(dpo, capsys, **short_run, reference=base_dir, output_dir=str(whole("adamw")), resume=True)
    assert "reference was" in said and snapshot(whole("adamw")) == before


# ---------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["hh_rlhf.jsonl.gz", "hh_rlhf_raw_implicit.jsonl", "kwise_xstest.jsonl"])
def test_real_preferences(name, real_data, tmp_path, capsys):
    """Messages, HH-RLHF's strings, and rankings with ties: read, cut and counted; the first loss is ln 2."""
    data = dpo.load_rows("--dataset", str(real_data / name)).select(range(20))
    data.to_json(tmp_path / "rows.jsonl")
    model, limit = str(real_data / "stories260K-hf"), 300
    encode_row, rows, notes = dpo.preferences(dpo.Args(), tokenizer_of(model), limit), [], Counter()
    for row in data:
        try:
            rows += encode_row(row, notes)
        except dpo.Drop as drop:
            notes[str(drop)] += 1
    assert 5 < len(rows) < 20 and notes["answers cut at --max-length"] > 0
    assert (notes["prompt beyond --max-length"] > 0) == name.startswith("hh")
    assert all(len(row.prompt + response) <= limit for row in rows for response in row.responses)
    flags = dict(model=model, dataset=str(tmp_path / "rows.jsonl"), max_length=limit, max_steps=2, batch_size=4, max_new_tokens=4)
    dpo.main(dpo.Args(**flags, eval_fraction=0.2, show=1, mask_format_tokens=True, output_dir=str(tmp_path / "run")))
    said, (first, last) = capsys.readouterr().out, lines_of(tmp_path / "run")
    assert f"{len(rows)} rows from 20" in said and f"{notes['pairs']} pairs" in said
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and math.isfinite(last["eval_loss"])


@pytest.mark.parametrize("flags", [dict(), pytest.param(dict(loss="ipo"), marks=pytest.mark.slow)], ids=str)
def test_real_politeness_is_learnt(flags, real_data, tmp_path):
    """On held-out instructions, from a checkpoint that knows only stories."""
    dpo.load_rows("--dataset", str(real_data / "pref_polite.jsonl")).select(range(300)).to_json(tmp_path / "rows.jsonl")
    run = dict(model=str(real_data / "stories260K-hf"), dataset=str(tmp_path / "rows.jsonl"), max_length=256, max_steps=10, batch_size=16)
    run |= dict(learning_rate=1e-3, eval_fraction=0.25, show=0)
    dpo.main(dpo.Args(**run, **flags, output_dir=str(tmp_path / "run")))
    last = lines_of(tmp_path / "run")[-1]
    assert last["eval_rewards/accuracies"] > 0.6 and last["eval_rewards/margins"] > 0
