"""rpo.py: its three distances against closed forms, where its rewards come from, and what its runs leave.

The blocks that read preferences and that compute the reference's log-probabilities are tested in test_dpo.py.
"""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from test_dpo import another, by_transformers, f64, first_gradient, short_answers, walks  # noqa: F401
from test_orpo import logged, numbers, similar_pairs
from test_plumbing import (
    CPU,
    dressed,  # noqa: F401
    jsonl,
    lasting,
    lines_of,
    refused,
    talk,
    tokenizer_of,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rpo
from rpo import Row

slow = pytest.mark.slow
DISTANCES = ("backward-kl", "forward-kl", "squared")
every_distance = pytest.mark.parametrize("distance", DISTANCES)


def args_of(**flags) -> rpo.Args:
    """Arguments for functions that read neither the model's name nor the data set's."""
    return rpo.Args(**dict(model="", dataset="") | flags)


# ------------------------------------------------------------------------------------------------------------ the loss

TABLE = [  # h, g, beta, eta; the loss by each distance; its gradient of h
    (1.5, 0.3, 0.1, 1, (0.00276818, 0.00278372, 0.0225), (-0.00370127, -0.00372899, -0.03)),
    (1.5, 2.6, 0.1, 1, (0.37992323, 0.58398452, 6.0025), (-0.03934317, -0.06090676, -0.49)),
    (0, 1, 0.2, 1, (0.11094407, 0.12011451, 1), (-0.04621172, -0.05, -0.4)),
    (1.5, 1, 1, 1, (0.02262230, 0.02063565, 0.25), (0.08651590, 0.07457323, 1.0)),
]


@pytest.mark.parametrize("h, g, beta, eta, losses, slopes", TABLE)
def test_losses_of_worked_examples(h, g, beta, eta, losses, slopes):
    for distance, loss, slope in zip(DISTANCES, losses, slopes):
        of = lambda h, g, eta=eta: rpo.rpo_loss(h, f64(g).detach(), beta, eta, distance)
        gap = f64(h)
        value = of(gap, g)
        value.backward()
        assert (value.item(), gap.grad.item()) == (pytest.approx(loss, abs=1e-6), pytest.approx(slope, abs=1e-6))
        assert torch.autograd.gradcheck(lambda x: of(x, g), f64(h), eps=1e-6)
        assert of(f64(h), g / 4, 4 * eta).item() == pytest.approx(loss, abs=1e-6)  # only eta g counts
        assert of(f64(-h), -g).item() == pytest.approx(loss, abs=1e-6)  # either answer may be called the first


GRID = torch.tensor([-8.0, -1.0, -0.2, 0.0, 0.3, 2.5, 9.0], dtype=torch.float64)


def test_the_kl_is_that_of_two_coins():
    """The paper's has the target first."""
    bernoulli = lambda logits: torch.distributions.Bernoulli(logits=logits)
    h, g = (x.flatten() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
    target, policy = bernoulli(2 * g), bernoulli(0.5 * h)
    kl = torch.distributions.kl_divergence
    assert torch.allclose(rpo.rpo_loss(h, g, 0.5, 2.0, "backward-kl"), kl(target, policy), atol=1e-12)
    assert torch.allclose(rpo.rpo_loss(h, g, 0.5, 2.0, "forward-kl"), kl(policy, target), atol=1e-12)
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
    """Both logits far beyond where s(x) is 0 or 1 in float32."""
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


# ------------------------------------------------------------------------------------------ the loss of a batch of rows


def rewarded(lengths: list, rewards: list, ref_logps: list) -> Row:
    """A row of answers of so many tokens with all their pairs, ties too, the better one first."""
    order = lambda i, j: (rewards[i], -i) > (rewards[j], -j)
    pairs = [(i, j) for i, j in itertools.permutations(range(len(rewards)), 2) if order(i, j)]
    extra = dict(pairs=pairs, scores=rewards, ref_logps=torch.tensor(ref_logps, dtype=torch.float64))
    return Row([1], [[i] * n for i, n in enumerate(lengths)], [[True] * n for n in lengths], extra)


def batch(rows: list, logps, entropy=None, is_argmax=None, **flags) -> dict:
    """What rpo_batch returns."""
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


def by_definition(rows: list, values: list, refs: list, distance="backward-kl", beta=0.1, eta=1.0, nll_coef=0.0):
    """RPO word for word, in floats: what is logged of a batch, summed over its rows.

    values: of each row, of each of its answers (log-probabilities, entropies, whether the likeliest); refs: the sums of
    the reference's log-probabilities."""
    s, mean = lambda x: 1 / (1 + math.exp(-x)), lambda x: sum(x) / len(x)
    kl = lambda b, a: s(b) * math.log(s(b) / s(a)) + s(-b) * math.log(s(-b) / s(-a))
    distance_of = {
        "backward-kl": lambda a, b: kl(b, a),
        "forward-kl": lambda a, b: kl(a, b),
        "squared": lambda a, b: (a - b) ** 2,
    }[distance]
    total = Counter()
    for row, answers, ref in zip(rows, values, refs, strict=True):
        r, implicit = row.extra["scores"], [beta * (sum(x[0]) - before) for x, before in zip(answers, ref, strict=True)]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if (r[i], -i) > (r[j], -j)]
        pairs = [(i, j) for i, j in pairs if row.responses[i] != row.responses[j]]
        for i, j in pairs:
            a, b = implicit[i] - implicit[j], eta * (r[i] - r[j])
            each = {
                "loss": distance_of(a, b),
                "preference_loss": distance_of(a, b),
                "target_gap": b,
                "gap_error": abs(a - b),
                "rewards/chosen": implicit[i],
                "rewards/rejected": implicit[j],
                "rewards/margins": a,
                "rewards/accuracies": a > 0 and b > 0,  # equal rewards have no better answer, and a tie is no win
                "logps/chosen": sum(answers[i][0]),
                "logps/rejected": sum(answers[j][0]),
                "entropy": mean(answers[i][1]),
                "mean_token_accuracy": mean(answers[i][2]),
            }
            total.update({name: value / len(pairs) for name, value in each.items()})
        nll = -mean(answers[r.index(max(r))][0])
        total.update(dict(nll_loss=nll, loss=nll_coef * nll))
    return dict(total)


@every_distance
@pytest.mark.parametrize("flags", [dict(), dict(beta=0.7, eta=2.0, nll_coef=0.5)], ids=str)
def test_a_batch_is_the_sum_over_its_prompts(distance, flags):
    """Whatever their sizes: a prompt with six pairs counts as much as one with a single pair; ties are pairs too."""
    sizes, rewards = ([3, 1, 4, 2], [2, 5], [1, 3, 2]), ([1.0, 2.5, -1.0, 1.0], [0.2, 0.7], [0.5, 0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    random = lambda n: -torch.rand(n, generator=generator, dtype=torch.float64)
    refs = [[random(n).sum().item() for n in lengths] for lengths in sizes]
    rows = [rewarded(*parts) for parts in zip(sizes, rewards, refs)]
    parts = [[(random(n), random(n), random(n) < -0.5) for n in lengths] for lengths in sizes]
    values = [[[x.tolist() for x in answer] for answer in answers] for answers in parts]
    logps, entropy, top = (torch.cat([answer[k] for answers in parts for answer in answers]) for k in range(3))
    flags = dict(distance=distance) | flags
    found = numbers(batch(rows, logps, entropy, top, **flags))
    assert found == pytest.approx(by_definition(rows, values, refs, **flags), rel=1e-6, abs=1e-6)
    loss = lambda x: batch(rows, x, entropy, top, **flags)["loss"]
    assert torch.autograd.gradcheck(loss, logps.requires_grad_(), atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the rewards


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


def with_head(folder, out, tokenizer, labels=1, model=None, shift=None) -> str:
    """A sequence classifier with a random head, on the body of a checkpoint or of a new model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = AutoModelForSequenceClassification
        model = model or auto.from_pretrained(folder, num_labels=labels)
        torch.nn.init.normal_(model.score.weight, std=0.2)
    if shift:
        model.config.score_shift = shift
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def scoring_dir(tiny_model_dir, tmp_path_factory):
    """A reward model with a shift. Read only."""
    folder = tiny_model_dir("llama")
    return with_head(folder, tmp_path_factory.mktemp("reward") / "rm", tokenizer_of(folder), shift=1.5)


def changed(folder, out, **config):
    """A copy of a reward model with another configuration."""
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
    """The model's scores less the expected ones."""
    return torch.cat([torch.tensor(a) - torch.tensor(b) for a, b in zip(data[rpo.MODEL_SCORES], expected, strict=True)])


def test_the_reward_models_scores(scoring_dir, tmp_path, capsys):
    """The same as transformers alone gives; another shift moves all of them, and no difference."""
    rows = walks(5, seed=3)
    expected = [scores_by_transformers(scoring_dir, row["prompt"], row["completions"]) for row in rows]
    size = torch.tensor(sum(expected, [])).abs().max()
    assert torch.tensor(sum(expected, [])).std() > 0.01
    for limit in (1, 10**5):
        data = scored(scoring_dir, rows, tokens_per_forward=limit)
        assert difference(data, expected).abs().max() < 1e-5 * size
        assert "scores the answers of 5 of the 5 rows of --dataset" in capsys.readouterr().out
    assert data.remove_columns(rpo.MODEL_SCORES).to_list() == rows
    moved = difference(scored(changed(scoring_dir, tmp_path / "moved", score_shift=-3.0), rows), expected)
    assert moved == pytest.approx(4.5, rel=1e-4)


def test_a_reward_model_with_another_tokenizer(dressed, tmp_path):  # noqa: F811
    """It reads the answers in its own tokens, with its own template and its own end of a turn."""
    tokenizer = copy.deepcopy(dressed("chatml"))
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    folder, rows = with_head(None, tmp_path / "other", tokenizer, model=model), walks(4)
    expected = [scores_by_transformers(folder, row["prompt"], row["completions"]) for row in rows]
    assert difference(scored(folder, rows), expected).abs().max() < 1e-4 * torch.tensor(sum(expected, [])).abs().max()


def test_a_row_too_long_for_the_reward_model_is_dropped(scoring_dir, tmp_path, tiny_tokenizer, capsys):
    rows = [PAIR, PAIR | dict(rejected="up, right, " * 30), PAIR | dict(chosen="No.")]
    data = scored(changed(scoring_dir, tmp_path / "small", max_position_embeddings=64), rows)
    assert "of 2 of the 3 rows of --dataset" in capsys.readouterr().out
    assert [scores is None for scores in data[rpo.MODEL_SCORES]] == [False, True, False]
    with pytest.raises(rpo.Drop, match="too long for the reward model"):
        read(tiny_tokenizer, data[1])
    assert read(tiny_tokenizer, data[2]).extra["scores"] == data[2][rpo.MODEL_SCORES]


def test_what_the_reward_models_template_refuses_is_dropped(scoring_dir, tmp_path, tiny_tokenizer):
    strict = changed(scoring_dir, tmp_path / "strict")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "strict" / "chat_template.jinja").write_text(refusal + tiny_tokenizer.chat_template)
    system = [dict(role="system", content="Be brief."), *talk("Which way?")]
    first, second = scored(strict, [PAIR, PAIR | dict(prompt=system)])
    assert read(tiny_tokenizer, first)
    with pytest.raises(rpo.Drop, match="template"):
        read(tiny_tokenizer, second)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on 21 rankings, some with ties, 5 a step, so that the last step of an epoch has one."""
    rows = [row | dict(scores=[min(score, 1) / 4 for score in row["scores"]]) for row in walks(21)]
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", rows)
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0)
    flags |= dict(batch_size=5, epochs=2, learning_rate=1e-3, nll_coef=0.1)
    return flags | dict(tokens_per_forward=90, save_every=3)


KINDS = ["plain", "reference", "reward model"]


@pytest.fixture(scope="module")
def of_kind(short_run, scoring_dir, tmp_path_factory):
    """of_kind(kind): flags of short_run, alone, with another model for the reference, or with a reward model."""
    reference = another(short_run["model"], tmp_path_factory.mktemp("reference") / "other", noise=0.05)
    more = {
        "plain": {},
        "reference": dict(reference=reference),
        "reward model": dict(reward_model=scoring_dir, eta=3.0),
    }
    return lambda kind: short_run | more[kind]


@pytest.fixture(scope="module")
def whole(of_kind, tmp_path_factory):
    """whole(kind) -> the output directory of a run of that kind, never interrupted. Read only."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / "whole"
            rpo.main(rpo.Args(**of_kind(kind), output_dir=str(made[kind])))
        return made[kind]

    return make


def rows_of(flags: dict) -> list:
    """The rows of a run, with their rewards."""
    tokenizer, rows = tokenizer_of(flags["model"]), [json.loads(line) for line in open(flags["dataset"])]
    if flags.get("reward_model"):
        for row in rows:
            row[rpo.MODEL_SCORES] = scores_by_transformers(flags["reward_model"], row["prompt"], row["completions"])
    return [read(tokenizer, row) for row in rows]


@torch.no_grad()
def metrics_by_transformers(folder, rows: list, flags: dict) -> dict:
    """What is logged of the rows, by models that are loaded with transformers alone."""
    folders = folder, flags.get("reference") or flags["model"]
    models = [AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager").eval() for f in folders]
    values, refs = ([by_transformers(model, row) for row in rows] for model in models)
    values = [[[x.tolist() for x in answer] for answer in answers] for answers in values]
    refs = [[logps.sum().item() for logps, *_ in answers] for answers in refs]
    options = {k: v for k, v in flags.items() if k in ("distance", "beta", "eta", "nll_coef")}
    return {name: value / len(rows) for name, value in by_definition(rows, values, refs, **options).items()}


def near(line: dict, expected: dict, prefix="", but=()):
    """But for the accuracies before the first step without another reference: there, gaps are 0 but for rounding."""
    expected = {k: v for k, v in expected.items() if k not in but}
    assert logged(line, expected, prefix) == pytest.approx(expected, rel=1e-4, abs=1e-3)


TIED = ["rewards/accuracies"]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_the_models(kind, of_kind, whole):
    """At the first step, of its rows under --model; at the last evaluation, of all rows under the saved weights. The
    reference has not moved."""
    flags = of_kind(kind)
    (first, *_, last), rows = lines_of(whole(kind)), rows_of(flags)
    batch = rpo.batch_rows(rows, args_of(batch_size=5), 0)
    near(first, metrics_by_transformers(flags["model"], batch, flags), but=() if kind == "reference" else TIED)
    near(last, metrics_by_transformers(whole(kind), rows, flags), "eval_")
    assert last["step"] == 10 and abs(last["eval_rewards/margins"]) > 0.01


GRADIENTS = [dict(nll_coef=0.5), dict(distance="forward-kl"), dict(distance="squared", eta=2.0)]


@pytest.mark.parametrize("change", GRADIENTS, ids=str)
def test_the_gradient_is_that_of_the_mean_over_prompts(change, of_kind, monkeypatch, tmp_path):
    """By transformers and torch.distributions."""
    flags = of_kind("reference") | dict(batch_size=21, eval_dataset="", save_every=0, nll_coef=0.0, beta=0.3, eta=1.0)
    flags |= change
    auto, eager = AutoModelForCausalLM, dict(attn_implementation="eager")
    models = [auto.from_pretrained(flags[name], **eager).eval() for name in ("model", "reference")]
    total, rows, coin = 0, rows_of(flags), lambda x: torch.distributions.Bernoulli(logits=x)
    for row in rows:
        (ours, ref), r, own = [by_transformers(model, row) for model in models], row.extra["scores"], 0
        gains = [a[0].sum() - b[0].sum().detach() for a, b in zip(ours, ref)]
        for i, j in row.extra["pairs"]:
            a, b = 0.3 * (gains[i] - gains[j]), torch.tensor(flags["eta"] * (r[i] - r[j]), dtype=torch.float64)
            kl = torch.distributions.kl_divergence
            others = {"forward-kl": kl(coin(a), coin(b)), "squared": (a - b) ** 2}
            own += others.get(flags.get("distance"), kl(coin(b), coin(a)))
        total += own / len(row.extra["pairs"]) - flags["nll_coef"] * ours[r.index(max(r))][0].mean()
    (total / len(rows)).backward()
    expected = torch.cat([p.grad.flatten() for p in models[0].parameters()])
    gradient = first_gradient(rpo, monkeypatch, **flags, output_dir=str(tmp_path / "run"))
    assert (gradient - expected).abs().max() < 2e-4 * expected.abs().max()
    assert lines_of(tmp_path / "run")[0]["loss"] == pytest.approx(total.item() / len(rows), rel=1e-4, abs=1e-4)


@every_distance
def test_a_near_tie_stays_near(distance, tiny_model_dir, tmp_path):
    """Trained for long on a few pairs with small and large gaps, one of them against its label: beta h comes to eta g
    and stays there."""
    gaps = [0.1, -0.2, 0.0, 1.0, 0.5, 0.05]
    data = jsonl(tmp_path / "rows.jsonl", [row | dict(margin=gap) for row, gap in zip(similar_pairs(6), gaps)])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_fraction=0, eval_dataset=data)
    flags |= dict(batch_size=6, epochs=60, learning_rate=3e-3, beta=0.2, distance=distance)
    rpo.main(rpo.Args(**flags, output_dir=str(tmp_path / "run")))
    first, *_, last = lines_of(tmp_path / "run")
    size = sum(map(abs, gaps)) / 6
    assert first["gap_error"] == pytest.approx(size, abs=1e-5) and first["target_gap"] == pytest.approx(size, abs=1e-5)
    assert last["eval_gap_error"] < 0.1 * size and last["eval_rewards/accuracies"] >= 5 / 6
    assert last["eval_rewards/margins"] == pytest.approx(size, rel=0.1)


def test_rankings_need_no_scores_where_a_reward_model_gives_them(of_kind, tmp_path, capsys):
    """And where they have some, these count for nothing."""
    flags, lines = of_kind("reward model") | dict(max_steps=1, save_every=0, eval_dataset=""), {}
    rows = [json.loads(line) for line in open(flags["dataset"])]
    bare = [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    other = [row | dict(scores=[-score for score in row["scores"]]) for row in rows]
    for name, data in dict(bare=bare, other=other).items():
        data = jsonl(tmp_path / f"{name}.jsonl", data)
        rpo.main(rpo.Args(**flags | dict(dataset=data), output_dir=str(tmp_path / name)))
        (lines[name],) = lasting(tmp_path / name)
    assert lines["bare"] == lines["other"] and lines["bare"]["target_gap"] > 0.01
    for option in ("dataset", "eval_dataset"):
        bad = of_kind("plain") | {option: str(tmp_path / "bare.jsonl")}
        said = refused(rpo, capsys, **bad, output_dir=str(tmp_path / "run"))
        assert f"--{option.replace('_', '-')}" in said and "21 dropped: no column says by how much" in said


def test_a_condition_needs_a_reward_model(short_run, tmp_path, capsys):
    said = refused(rpo, capsys, **short_run, condition="kinds.json", output_dir=str(tmp_path / "run"))
    assert "--condition" in said and "--reward-model" in said


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name, number", [("kwise_xstest.jsonl", 3), ("pref_polite.jsonl", 16)])
def test_real_rankings_and_pairs(name, number, real_data, tmp_path, capsys):
    """Five answers with many ties, and pairs with a margin: the last evaluation is what transformers finds."""
    folder, rows = real_data / "stories260K-hf", []
    data = rpo.load_rows("--dataset", str(real_data / name), "train").select(range(number))
    data = [row | (dict(margin=0.5) if "polite" in name else {}) for row in data]
    for row in data:
        try:
            rows.append(read(tokenizer_of(folder), row, 256))
        except rpo.Drop:
            pass
    data = jsonl(tmp_path / "rows.jsonl", data)
    flags = dict(model=str(folder), dataset=data, eval_fraction=0, eval_dataset=data, batch_size=len(rows))
    flags |= dict(epochs=3, learning_rate=1e-5, beta=0.05, max_length=256)
    rpo.main(rpo.Args(**flags, output_dir=str(tmp_path / "run")))
    assert f"{len(rows)} rows from {number}" in capsys.readouterr().out and len(rows) > 2
    first, *_, last = lines_of(tmp_path / "run")
    expected = metrics_by_transformers(tmp_path / "run", rows, flags)
    assert logged(last, expected, "eval_") == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert last["eval_preference_loss"] < first["preference_loss"]
