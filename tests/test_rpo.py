"""rpo.py: its three distances against closed forms, and where its rewards come from. Batches and runs against its
equations are in test_preferences.py.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from conftest import make_reward_model
from datasets import Dataset
from test_dpo import f64, walks
from test_plumbing import (
    CPU,
    dressed,  # noqa: F401
    jsonl,
    lasting,
    refused,
    talk,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rpo
from rpo import Row

slow = pytest.mark.slow
DISTANCES = ("backward-kl", "forward-kl", "squared")
every_distance = pytest.mark.parametrize("distance", DISTANCES)


def args_of(**flags) -> rpo.Args:
    return rpo.Args(**dict(model="", dataset="") | flags)


# ---- the loss


WORKED = [  # distance, beta, eta, loss and its gradient of h, at h = 1.5 and g = 0.3
    ("backward-kl", 0.1, 1, 0.00276818, -0.00370127),
    ("forward-kl", 0.1, 1, 0.00278372, -0.00372899),
    ("squared", 0.1, 1, 0.0225, -0.03),
]


@pytest.mark.parametrize("distance, beta, eta, loss, slope", WORKED)
def test_losses_of_worked_examples(distance, beta, eta, loss, slope):
    gap = f64(1.5)
    value = rpo.rpo_loss(gap, f64(0.3).detach(), beta, eta, distance)
    value.backward()
    assert (value.item(), gap.grad.item()) == (pytest.approx(loss, abs=1e-6), pytest.approx(slope, abs=1e-6))


GRID = torch.tensor([-8.0, -1.0, -0.2, 0.0, 0.3, 2.5, 9.0], dtype=torch.float64)


def test_the_distances_are_those_of_two_coins():
    """The paper's KL has the target first. Only eta g counts, and either answer may be called the first."""
    bernoulli, kl = lambda logits: torch.distributions.Bernoulli(logits=logits), torch.distributions.kl_divergence
    h, g = (x.flatten() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
    target, policy = bernoulli(2 * g), bernoulli(0.5 * h)
    expected = {"backward-kl": kl(target, policy), "forward-kl": kl(policy, target), "squared": (0.5 * h - 2 * g) ** 2}
    for distance, losses in expected.items():
        for same in ((h, g, 0.5, 2.0), (h, g / 4, 0.5, 8.0), (-h, -g, 0.5, 2.0)):
            assert torch.allclose(rpo.rpo_loss(*same, distance), losses, atol=1e-12)
    assert rpo.rpo_loss(h, g, 0.5, 2.0).equal(rpo.rpo_loss(h, g, 0.5, 2.0, "backward-kl"))
    assert rpo.Args.distance == "backward-kl"


@every_distance
def test_the_gradient_pulls_beta_h_towards_eta_g_and_ends_there(distance):
    """So equal rewards pull h to 0, from either side."""
    for g, h, beta, eta in itertools.product(GRID, GRID, (0.1, 1.0), (0.5, 2.0)):
        gap, best = h.clone().requires_grad_(), (eta * g / beta).requires_grad_()
        rpo.rpo_loss(gap, g, beta, eta, distance).backward()
        assert (gap.grad > 0, gap.grad < 0) == (beta * h > eta * g, beta * h < eta * g)
        least = rpo.rpo_loss(best, g, beta, eta, distance)
        least.backward()
        assert best.grad.item() == pytest.approx(0, abs=1e-9) == least.item()


@every_distance
@pytest.mark.parametrize("h, g", [(0.0, 1e3), (1e3, -1e3), (-1e4, 0.0), (1e4, 1e4)])
def test_extreme_gaps_are_finite(distance, h, g):
    gap = torch.tensor([h], requires_grad=True)
    loss = rpo.rpo_loss(gap, torch.tensor([g]), 1.0, 1.0, distance)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gap.grad) and loss >= 0


def test_limits():
    """A huge gap of rewards is DPO, one of ln 9 is cDPO at 0.1 less the label's entropy, a squared one of 1/2 is IPO."""
    h, beta = 1.5, 0.1
    dpo = math.log1p(math.exp(-beta * h))
    assert rpo.rpo_loss(f64(h), f64(30), beta, 1.0).item() == pytest.approx(dpo, abs=1e-6)
    smooth, entropy = 0.9 * dpo + 0.1 * math.log1p(math.exp(beta * h)), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    cdpo = rpo.rpo_loss(f64(h), f64(math.log(9)), beta, 1.0).item()
    assert cdpo == pytest.approx(smooth - entropy, abs=1e-9) == pytest.approx(0.31087407, abs=1e-6)
    ipo = rpo.rpo_loss(f64(h), f64(0.25), beta, 2.0, "squared").item()
    assert ipo == pytest.approx(beta**2 * (h - 1 / (2 * beta)) ** 2, abs=1e-9)


# ---- the loss of a batch of rows


def rewarded(lengths: list, rewards: list, ref_logps: list) -> Row:
    """A row of answers of so many tokens with all their pairs, ties too, the better one first."""
    order = lambda i, j: (rewards[i], -i) > (rewards[j], -j)
    pairs = [(i, j) for i, j in itertools.permutations(range(len(rewards)), 2) if order(i, j)]
    extra = dict(pairs=pairs, scores=rewards, ref_logps=torch.tensor(ref_logps, dtype=torch.float64))
    return Row([1], [[i] * n for i, n in enumerate(lengths)], [[True] * n for n in lengths], extra)


def batch(rows: list, logps, entropy=None, is_argmax=None, **flags) -> dict:
    entropy = torch.zeros_like(logps) if entropy is None else entropy
    is_argmax = torch.zeros_like(logps) > 0 if is_argmax is None else is_argmax
    return rpo.rpo_batch(args_of(**flags), rows, logps, entropy, is_argmax)


@every_distance
def test_it_is_least_at_the_optimum_of_rl(distance):
    """All pairs of three actions: the policy ref exp(eta r / beta) / Z has no gradient, another has one."""
    ref, rewards, beta, eta = f64(0.5, 0.3, 0.2).detach(), [1.0, 2.0, 0.0], 0.6, 1.5
    row = rewarded([1, 1, 1], rewards, ref.log().tolist())

    def gradient(policy):
        logits = policy.log().requires_grad_()
        loss = batch([row], logits.log_softmax(-1), beta=beta, eta=eta, distance=distance)["loss"]
        return torch.autograd.grad(loss, logits)[0].abs().max().item()

    best = ref * (eta * f64(*rewards).detach() / beta).exp()
    assert gradient(best / best.sum()) < 1e-7 and gradient(ref.clone()) > 0.01  # rewards are float32


@pytest.mark.parametrize("policy", ["the reference", "another"])
def test_squared_over_all_pairs_is_reinforce_leave_one_out(policy):
    """The sum over the pairs of K samples has the gradient -2 beta eta (K-1) sum A_i grad log pi_i, with the rewards
    r - (beta / eta) log(pi / ref), each less the mean of the others'. The loss is the mean over the pairs."""
    K, beta, eta, rewards, sampled = 4, 0.3, 1.7, [1.0, 2.0, 3.0, 6.0], [0, 2, 5, 1]
    logits = f64(0.3, -0.2, 0.5, 0.1, -1.0, 0.7)
    other = logits.detach() if policy == "the reference" else f64(0.1, 0.4, -0.5, 0.3, 0.2, 0.0).detach()
    logps, ref = logits.log_softmax(-1)[sampled], other.log_softmax(-1)[sampled]
    row = rewarded([1] * K, rewards, ref.tolist())
    loss = batch([row], logps, beta=beta, eta=eta, distance="squared")["loss"] * len(row.extra["pairs"])
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    r = torch.tensor(rewards, dtype=torch.float64) - beta / eta * (logps - ref).detach()
    advantage = r - (r.sum() - r) / (K - 1)
    (expected,) = torch.autograd.grad(-2 * beta * eta * (K - 1) * (advantage * logps).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-6) and gradient.abs().max() > 0.1
    if policy == "the reference":
        assert advantage.tolist() == pytest.approx([-8 / 3, -4 / 3, 0, 4])


# ---- the rewards


def read(tokenizer, row, max_length=512) -> Row:
    (row,) = rpo.preference_rows(tokenizer, max_length, row, Counter(), rpo.rewards_of)
    return row


PAIR = dict(prompt=talk("Which way?"), chosen="Up.", rejected="Right.")
SCORES = dict(score_chosen=1.0, score_rejected=2.0)
SOURCES = {  # columns -> rewards of chosen and rejected (of a margin, only their difference counts); pairs, better first
    "score_": (dict(score_chosen=3.5, score_rejected=1.5), [3.5, 1.5], [(0, 1)]),
    "_reward": (dict(chosen_reward=-1, rejected_reward=-4), [-1.0, -4.0], [(0, 1)]),
    "margin": (dict(margin=0.25), [0.25, 0.0], [(0, 1)]),
    "margin below 0": (dict(margin=-0.25), [-0.25, 0.0], [(1, 0)]),
    "margin and scores": (dict(margin=9.0, score_chosen=1.0, score_rejected=0.5), [1.0, 0.5], [(0, 1)]),
    "margin, scores missing": (dict(margin=9.0, score_chosen=1.0, score_rejected=None), [9.0, 0.0], [(0, 1)]),
    "against the label": (SCORES, [1.0, 2.0], [(1, 0)]),
    "a tie": (dict(score_chosen=2.0, score_rejected=2.0), [2.0, 2.0], [(0, 1)]),
    "a reward model's": (SCORES | {rpo.MODEL_SCORES: [0.5, -0.5]}, [0.5, -0.5], [(0, 1)]),
}


@pytest.mark.parametrize("columns, rewards, pairs", SOURCES.values(), ids=SOURCES)
def test_where_the_rewards_of_a_pair_come_from(columns, rewards, pairs, tiny_tokenizer):
    """They decide which answer is the better one, whatever the label says."""
    row = read(tiny_tokenizer, PAIR | columns)
    assert row.extra == dict(pairs=pairs, scores=rewards) and tiny_tokenizer.decode(row.responses[0]) == "Up.<|end|>"


def test_a_ranking_has_all_its_pairs_and_ties(tiny_tokenizer):
    """Also one of a reward model; the pair of two equal texts is none, and an empty answer leaves with its reward."""
    row = dict(prompt="a", completions=[" b", " c", " ", " d", " b"], scores=[0.5, 2, 9, 0.5, 1])
    found = read(tiny_tokenizer, row).extra
    assert sorted(found["pairs"]) == [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)] and found["scores"] == [0.5, 2, 0.5, 1]
    found = read(tiny_tokenizer, row | {rpo.MODEL_SCORES: [4.0, 3.0, 9.0, 2.0, 4.0]}).extra
    assert sorted(found["pairs"]) == [(0, 1), (0, 2), (1, 2), (3, 1), (3, 2)] and found["scores"] == [4, 3, 2, 4]


NO_REWARDS = [
    dict(),
    dict(score_chosen=1.0, score_rejected=None),
    dict(score_chosen=math.nan, score_rejected=1.0),
    dict(chosen_reward=1.0),
    dict(margin=None),
    dict(margin=math.inf),
]


@pytest.mark.parametrize("columns", NO_REWARDS, ids=str)
def test_a_pair_without_rewards_is_dropped(columns, tiny_tokenizer):
    with pytest.raises(rpo.Drop, match="no column says by how much"):
        read(tiny_tokenizer, PAIR | columns)


def changed(folder, out, **config):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(out)


@torch.no_grad()
def scores_by_transformers(folder, prompt, answers: list) -> list:
    """Of each answer alone, rendered by the folder's own template, less the shift."""
    model, scores = AutoModelForSequenceClassification.from_pretrained(folder).eval(), []
    tokenizer, shift = AutoTokenizer.from_pretrained(folder), getattr(model.config, "score_shift", 0.0)
    for answer in answers:
        messages = [*prompt, dict(role="assistant", content=answer)]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        scores.append(model(ids).logits.item() - shift)
    return scores


def scored(folder, rows: list, **flags):
    """The data set that add_scores makes of rows."""
    args = args_of(reward_model=str(folder), **flags)
    return rpo.add_scores(args, CPU, torch.float32, "--dataset", Dataset.from_list(rows))


def difference(data, expected: list):
    return torch.cat([torch.tensor(a) - torch.tensor(b) for a, b in zip(data[rpo.MODEL_SCORES], expected, strict=True)])


def test_the_reward_models_scores(scorer, tmp_path, capsys):
    """The same as transformers alone gives; another shift moves all of them, and no difference."""
    rows = walks(5, seed=3)
    expected = [scores_by_transformers(scorer, row["prompt"], row["completions"]) for row in rows]
    size = torch.tensor(sum(expected, [])).abs().max()
    assert torch.tensor(sum(expected, [])).std() > 0.01
    for limit in (1, 10**5):
        data = scored(scorer, rows, tokens_per_forward=limit)
        assert difference(data, expected).abs().max() < 1e-5 * size
        assert "scores the answers of 5 of the 5 rows of --dataset" in capsys.readouterr().out
    assert data.remove_columns(rpo.MODEL_SCORES).to_list() == rows
    moved = difference(scored(changed(scorer, tmp_path / "moved", score_shift=-3.0), rows), expected)
    assert moved == pytest.approx(3.25, rel=1e-4)


def test_a_reward_model_with_another_tokenizer(dressed, tmp_path):  # noqa: F811
    """It reads the answers in its own tokens, with its own template and its own end of a turn."""
    folder, rows = make_reward_model(tmp_path / "other", dressed("chatml")), walks(4)
    expected = [scores_by_transformers(folder, row["prompt"], row["completions"]) for row in rows]
    assert difference(scored(folder, rows), expected).abs().max() < 1e-4 * torch.tensor(sum(expected, [])).abs().max()


def test_a_row_too_long_for_the_reward_model_is_dropped(scorer, tmp_path, tiny_tokenizer, capsys):
    rows = [PAIR, PAIR | dict(rejected="up, right, " * 30), PAIR | dict(chosen="No.")]
    data = scored(changed(scorer, tmp_path / "small", max_position_embeddings=64), rows)
    assert "of 2 of the 3 rows of --dataset" in capsys.readouterr().out
    assert [scores is None for scores in data[rpo.MODEL_SCORES]] == [False, True, False]
    with pytest.raises(rpo.Drop, match="too long for the reward model"):
        read(tiny_tokenizer, data[1])
    assert read(tiny_tokenizer, data[2]).extra["scores"] == data[2][rpo.MODEL_SCORES]


def test_what_the_reward_models_template_refuses_is_dropped(scorer, tmp_path, tiny_tokenizer):
    strict = changed(scorer, tmp_path / "strict")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "strict" / "chat_template.jinja").write_text(refusal + tiny_tokenizer.chat_template)
    system = [dict(role="system", content="Be brief."), *talk("Which way?")]
    first, second = scored(strict, [PAIR, PAIR | dict(prompt=system)])
    assert read(tiny_tokenizer, first)
    with pytest.raises(rpo.Drop, match="template"):
        read(tiny_tokenizer, second)


# ---- whole runs


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on 21 rankings, some with ties, 5 a step, so that the last step of an epoch has one."""
    rows = [row | dict(scores=[min(score, 1) / 4 for score in row["scores"]]) for row in walks(21)]
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", rows)
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0)
    return flags | dict(batch_size=5, epochs=2, learning_rate=1e-3, nll_coef=0.1, tokens_per_forward=90)


def test_rankings_need_no_scores_where_a_reward_model_gives_them(short_run, scorer, tmp_path, capsys):
    flags, lines = short_run | dict(reward_model=scorer, eta=3.0, max_steps=1, eval_dataset=""), {}
    rows = [json.loads(line) for line in open(flags["dataset"])]
    bare = [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    other = [row | dict(scores=[-score for score in row["scores"]]) for row in rows]
    for name, data in dict(bare=bare, other=other).items():
        data = jsonl(tmp_path / f"{name}.jsonl", data)
        rpo.main(rpo.Args(**flags | dict(dataset=data), output_dir=str(tmp_path / name)))
        (lines[name],) = lasting(tmp_path / name)
    assert lines["bare"] == lines["other"] and lines["bare"]["target_gap"] > 0.01
    for option in ("dataset", "eval_dataset"):
        bad = short_run | {option: str(tmp_path / "bare.jsonl")}
        said = refused(rpo, capsys, **bad, output_dir=str(tmp_path / "run"))
        assert f"--{option.replace('_', '-')}" in said and "21 dropped: no column says by how much" in said


def test_a_condition_needs_a_reward_model(short_run, tmp_path, capsys):
    said = refused(rpo, capsys, **short_run, condition="kinds.json", output_dir=str(tmp_path / "run"))
    assert "--condition" in said and "--reward-model" in said
