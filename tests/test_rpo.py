"""rpo.py: its three distances against closed forms, where its rewards come from, and what its runs leave."""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import reward_model
import rpo
import torch
from conftest import FAMILIES, tiny_config
from rpo import Row
from test_orpo import by_transformers, f64, first_gradient, logged, similar_pairs
from test_plumbing import CPU, dressed, in_child, jsonl, killed_at_rename, lasting, lines_of, on_ranks, refused, same_run  # noqa: F401
from test_plumbing import snapshot, talk, tokenizer_of, weights_of
from test_reward_model import walks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

DISTANCES = ("backward-kl", "forward-kl", "squared")
every_distance = pytest.mark.parametrize("distance", DISTANCES)

# ------------------------------------------------------------------------------------------------------------------------ the loss

TABLE = [  # METHODS.md B2: h, g, beta, eta; loss by each distance; its gradient of h
    (1.5, 0.3, 0.1, 1, (0.00276818, 0.00278372, 0.0225), (-0.00370127, -0.00372899, -0.03)),
    (1.5, 2.6, 0.1, 1, (0.37992323, 0.58398452, 6.0025), (-0.03934317, -0.06090676, -0.49)),
    (3.0, 0.3, 0.1, 1, (0, 0, 0), (0, 0, 0)),
    (0, 1, 0.2, 1, (0.11094407, 0.12011451, 1), (-0.04621172, -0.05, -0.4)),
    (1.5, 1, 1, 1, (0.02262230, 0.02063565, 0.25), (0.08651590, 0.07457323, 1.0)),
]


@pytest.mark.parametrize("h, g, beta, eta, losses, slopes", TABLE)
def test_rpo_loss(h, g, beta, eta, losses, slopes):
    for distance, loss, slope in zip(DISTANCES, losses, slopes):
        gap = f64(h)
        value = rpo.rpo_loss(gap, f64(g), beta, eta, distance)
        value.backward()
        assert value.item() == pytest.approx(loss, abs=1e-6) and gap.grad.item() == pytest.approx(slope, abs=1e-6), distance
        assert torch.autograd.gradcheck(lambda x: rpo.rpo_loss(x, f64(g).detach(), beta, eta, distance), f64(h), eps=1e-6)
        assert rpo.rpo_loss(f64(h), f64(g / 4), beta, 4 * eta, distance).item() == pytest.approx(loss, abs=1e-6)  # only eta g counts
        assert rpo.rpo_loss(f64(-h), f64(-g), beta, eta, distance).item() == pytest.approx(loss, abs=1e-6)  # either answer may be called the first


GRID = torch.tensor([-8.0, -1.0, -0.2, 0.0, 0.3, 2.5, 9.0], dtype=torch.float64)


def test_bug17_the_kl_is_that_of_two_coins():
    bernoulli = lambda logits: torch.distributions.Bernoulli(logits=logits)
    h, g = (x.flatten() for x in torch.meshgrid(GRID, GRID, indexing="ij"))
    target, policy = bernoulli(2 * g), bernoulli(0.5 * h)
    kl = torch.distributions.kl_divergence
    assert torch.allclose(rpo.rpo_loss(h, g, 0.5, 2.0, "backward-kl"), kl(target, policy), atol=1e-12)  # the target first: the paper's
    assert torch.allclose(rpo.rpo_loss(h, g, 0.5, 2.0, "forward-kl"), kl(policy, target), atol=1e-12)
    assert rpo.rpo_loss(h, g, 0.5, 2.0).equal(rpo.rpo_loss(h, g, 0.5, 2.0, "backward-kl")) and rpo.Args.distance == "backward-kl"


@every_distance
def test_bug17_the_gradient_pulls_beta_h_towards_eta_g_and_ends_there(distance):
    """So equal rewards pull h to 0, from either side."""
    for g, h, beta, eta in itertools.product(GRID, GRID, (0.1, 1.0), (0.5, 2.0)):
        gap = h.clone().requires_grad_()
        rpo.rpo_loss(gap, g, beta, eta, distance).backward()
        assert (gap.grad > 0, gap.grad < 0) == (beta * h > eta * g, beta * h < eta * g)
        best = (eta * g / beta).requires_grad_()
        rpo.rpo_loss(best, g, beta, eta, distance).backward()
        assert best.grad.item() == pytest.approx(0, abs=1e-9) == rpo.rpo_loss(best, g, beta, eta, distance).item()


@every_distance
@pytest.mark.parametrize("h, g", [(0.0, 1e3), (1e3, -1e3), (-1e4, 0.0), (1e4, 1e4)])
def test_extreme_gaps_are_finite(distance, h, g):
    """Both logits far beyond where s(x) is 0 or 1 in float32."""
    gap = torch.tensor([h], requires_grad=True)
    loss = rpo.rpo_loss(gap, torch.tensor([g]), 1.0, 1.0, distance)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gap.grad) and loss >= 0


def test_limits():
    """METHODS.md B2: a huge reward gap is DPO, a gap of ln 9 is cDPO at 0.1 less the label's entropy, a squared one half is IPO."""
    h, beta = 1.5, 0.1
    dpo = math.log1p(math.exp(-beta * h))
    assert rpo.rpo_loss(f64(h), f64(30), beta, 1.0).item() == pytest.approx(dpo, abs=1e-6) == pytest.approx(0.62095705, abs=1e-6)
    smooth, entropy = 0.9 * dpo + 0.1 * math.log1p(math.exp(beta * h)), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert rpo.rpo_loss(f64(h), f64(math.log(9)), beta, 1.0).item() == pytest.approx(smooth - entropy, abs=1e-9)
    assert smooth - entropy == pytest.approx(0.31087407, abs=1e-6)
    assert rpo.rpo_loss(f64(h), f64(0.25), beta, 2.0, "squared").item() == pytest.approx(beta**2 * (h - 1 / (2 * beta)) ** 2, abs=1e-9)


def test_implicit_gap():
    """METHODS.md B2: log-probabilities -10 and -12, the reference's -11 and -11.5."""
    logps, ref, first, second = f64(-10, -12, -3), f64(-11, -11.5, -3), torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2])
    assert rpo.implicit_gap(logps, ref, first, second).tolist() == pytest.approx([1.5, -1.5, 1.0])


def rewarded(lengths: list, rewards: list, ref_logps: list) -> Row:
    """A row of answers of so many tokens with all their pairs, ties too, the better one first."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(rewards)), 2) if rewards[i] > rewards[j] or rewards[i] == rewards[j] and i < j]
    extra = dict(pairs=pairs, scores=rewards, ref_logps=torch.tensor(ref_logps, dtype=torch.float64))
    return Row([1], [[2] * n for n in lengths], [[True] * n for n in lengths], extra)


def terms(rows: list, logps, entropy=None, top=None, **flags):
    """The loss of rpo_terms and what it logs, by name."""
    entropy, top = torch.zeros_like(logps) if entropy is None else entropy, torch.zeros_like(logps) > 0 if top is None else top
    loss, seen = rpo.rpo_terms(rpo.Args(**flags), rows, logps, entropy, top)
    return loss, dict(zip(rpo.LOGGED, seen.tolist(), strict=True))


@pytest.mark.parametrize("policy", ["the reference", "another"])
def test_squared_over_all_pairs_is_reinforce_leave_one_out(policy):
    """METHODS.md B2: the sum over the pairs of K samples has the gradient -2 beta eta (K-1) sum A_i grad log pi_i, with the rewards
    r - (beta / eta) log(pi / ref), each less the mean of the others'. The loss is the mean over the pairs."""
    K, beta, eta, rewards, sampled = 4, 0.3, 1.7, [1.0, 2.0, 3.0, 6.0], [0, 2, 5, 1]
    logits = f64(0.3, -0.2, 0.5, 0.1, -1.0, 0.7)
    other = logits.detach() if policy == "the reference" else f64(0.1, 0.4, -0.5, 0.3, 0.2, 0.0).detach()
    logps, ref = logits.log_softmax(-1)[sampled], other.log_softmax(-1)[sampled]
    row = rewarded([1] * K, rewards, ref.tolist())
    flags = dict(beta=beta, eta=eta, distance="squared")
    (gradient,) = torch.autograd.grad(terms([row], logps, **flags)[0] * len(row.extra["pairs"]), logits, retain_graph=True)
    r = torch.tensor(rewards, dtype=torch.float64) - beta / eta * (logps - ref).detach()
    advantage = r - (r.sum() - r) / (K - 1)
    (expected,) = torch.autograd.grad(-2 * beta * eta * (K - 1) * (advantage * logps).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-6) and gradient.abs().max() > 0.1
    if policy == "the reference":
        assert advantage.tolist() == pytest.approx([-8 / 3, -4 / 3, 0, 4])


def by_definition(rows: list, values: list, refs: list, distance="backward-kl", beta=0.1, eta=1.0, nll_coef=0.0, nll_sum=False) -> dict:
    """RPO word for word, in floats: what is logged of a batch, summed over its rows.

    values: of each row, of each of its answers (log-probabilities, entropies, whether the likeliest); refs: the reference's, summed."""
    total, s = Counter({name: 0.0 for name in rpo.LOGGED}), lambda x: 1 / (1 + math.exp(-x))
    kl = lambda b, a: s(b) * math.log(s(b) / s(a)) + (1 - s(b)) * math.log((1 - s(b)) / (1 - s(a)))
    mean = lambda x: sum(x) / len(x)
    for row, answers, ref in zip(rows, values, refs, strict=True):
        r, implicit = row.extra["scores"], [beta * (sum(logps) - before) for (logps, *_), before in zip(answers, ref, strict=True)]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if r[i] > r[j] or r[i] == r[j] and i < j]
        pairs = [(i, j) for i, j in pairs if row.responses[i] != row.responses[j] or len(set(map(tuple, row.responses))) == 1]
        for i, j in pairs:
            a, b = implicit[i] - implicit[j], eta * (r[i] - r[j])
            loss = dict(zip(DISTANCES, (kl(b, a), kl(a, b), (a - b) ** 2)))[distance]
            logps, entropies, tops = answers[i]
            each = {
                "loss": loss,
                "preference_loss": loss,
                "target_gap": b,
                "gap_error": abs(a - b),
                "rewards/margins": a,
                "rewards/accuracies": a > 0 and b > 0,
            }
            each |= {"rewards/chosen": implicit[i], "rewards/rejected": implicit[j], "logps/chosen": sum(logps), "logps/rejected": sum(answers[j][0])}
            total.update({k: v / len(pairs) for k, v in (each | dict(entropy=mean(entropies), mean_token_accuracy=mean(tops))).items()})
        logps = answers[r.index(max(r))][0]
        nll = -sum(logps) if nll_sum else -mean(logps)
        total.update(dict(nll_loss=nll, loss=nll_coef * nll))
    return dict(total)


@every_distance
@pytest.mark.parametrize("flags", [dict(), dict(beta=0.7, eta=2.0, nll_coef=0.5), dict(beta=0.3, nll_coef=0.1, nll_sum=True)])
def test_a_batch_is_the_sum_over_its_prompts(distance, flags):
    """Whatever their sizes: a prompt with six pairs counts as much as one with a single pair; ties are pairs, with g = 0."""
    sizes, rewards = ([3, 1, 4, 2], [2, 5], [1, 3, 2]), ([1.0, 2.5, -1.0, 1.0], [0.2, 0.7], [0.5, 0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    random = lambda n: -torch.rand(n, generator=generator, dtype=torch.float64)
    refs = [[random(n).sum().item() for n in lengths] for lengths in sizes]
    rows = [rewarded(*parts) for parts in zip(sizes, rewards, refs)]
    rows = [row._replace(responses=[[i, *r[1:]] for i, r in enumerate(row.responses)]) for row in rows]
    parts = [[(random(n), random(n), random(n) < -0.5) for n in lengths] for lengths in sizes]
    logps, entropy, top = (torch.cat([answer[k] for answers in parts for answer in answers]) for k in range(3))
    loss, seen = terms(rows, logps, entropy, top, distance=distance, **flags)
    expected = by_definition(rows, [[[x.tolist() for x in a] for a in answers] for answers in parts], refs, distance, **flags)
    assert seen == pytest.approx(expected, rel=1e-6, abs=1e-7) and loss.item() == pytest.approx(seen["loss"])


@pytest.mark.parametrize("rewards, logps, right", [([2, 1], (-1, -2), 1), ([2, 1], (-2, -1), 0), ([1, 1], (-1, -2), 0), ([2, 1], (-1, -1), 0)])
def test_a_pair_is_right_where_the_better_answer_wins(rewards, logps, right):
    """Equal rewards have no better answer, and a tie is no win."""
    assert terms([rewarded([1, 1], list(map(float, rewards)), [0.0, 0.0])], f64(*logps))[1]["rewards/accuracies"] == right


def test_an_unknown_distance_is_none():
    with pytest.raises(ValueError, match="backward-kl, forward-kl or squared"):
        rpo.rpo_loss(f64(1), f64(1), 0.1, 1.0, "reverse-kl")


# --------------------------------------------------------------------------------------------------------------------- the rewards


def read(tokenizer, row, **flags) -> Row:
    (row,) = rpo.preferences(rpo.Args(**flags), tokenizer, flags.get("max_length", 512), rpo.given_rewards)(row, Counter())
    return row


PAIR = dict(prompt=talk("Which way?"), chosen="Up.", rejected="Right.")
SOURCES = {  # columns -> the rewards of chosen and rejected (of a margin, only their difference counts), and the pairs, better first
    "score_": (dict(score_chosen=3.5, score_rejected=1.5), [3.5, 1.5], [(0, 1)]),
    "_reward": (dict(chosen_reward=-1, rejected_reward=-4), [-1.0, -4.0], [(0, 1)]),
    "margin": (dict(margin=0.25), [0.25, 0.0], [(0, 1)]),
    "margin below 0": (dict(margin=-0.25), [-0.25, 0.0], [(1, 0)]),
    "margin and scores": (dict(margin=9.0, score_chosen=1.0, score_rejected=0.5), [1.0, 0.5], [(0, 1)]),
    "margin in place of missing scores": (dict(margin=9.0, score_chosen=1.0, score_rejected=None), [9.0, 0.0], [(0, 1)]),
    "rewards against the label": (dict(score_chosen=1.0, score_rejected=2.0), [1.0, 2.0], [(1, 0)]),
    "a tie": (dict(score_chosen=2.0, score_rejected=2.0), [2.0, 2.0], [(0, 1)]),
    "a reward model's": (dict(score_chosen=1.0, score_rejected=2.0) | {rpo.MODEL_REWARDS: [0.5, -0.5]}, [0.5, -0.5], [(0, 1)]),
}


@pytest.mark.parametrize("columns, rewards, pairs", SOURCES.values(), ids=SOURCES)
def test_bug17_where_the_rewards_of_a_pair_come_from(columns, rewards, pairs, tiny_tokenizer):
    """They decide which answer is the better one, whatever the label says."""
    row = read(tiny_tokenizer, PAIR | columns)
    assert row.extra == dict(pairs=pairs, scores=rewards) and tiny_tokenizer.decode(row.responses[0]) == "Up.<|end|>"


def test_a_ranking_has_all_its_pairs_and_ties(tiny_tokenizer):
    """Also one of a reward model; the pair of two equal texts is none, and an empty answer leaves with its reward."""
    row = dict(prompt="a", completions=[" b", " c", " ", " d", " b"], scores=[0.5, 2, 9, 0.5, 1])
    found = read(tiny_tokenizer, row)
    assert sorted(found.extra["pairs"]) == [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)] and found.extra["scores"] == [0.5, 2, 0.5, 1]
    found = read(tiny_tokenizer, row | {rpo.MODEL_REWARDS: [4.0, 3.0, 9.0, 2.0, 4.0]})
    assert sorted(found.extra["pairs"]) == [(0, 1), (0, 2), (1, 2), (3, 1), (3, 2)] and found.extra["scores"] == [4, 3, 2, 4]


@pytest.mark.parametrize("columns", [
    dict(score_chosen=1.0, score_rejected=None), dict(score_chosen=math.nan, score_rejected=1.0), dict(margin=None), dict(margin=math.nan), dict(),
    dict(chosen_reward=1.0), dict(score_chosen=math.inf, score_rejected=1.0), dict(chosen_reward=1.0, rejected_reward=-math.inf),
    dict(margin=math.inf),
])  # fmt: skip
def test_a_pair_without_rewards_is_dropped(columns, tiny_tokenizer):
    with pytest.raises(rpo.Drop, match="no reward"):
        read(tiny_tokenizer, PAIR | columns)


@pytest.fixture(scope="module")
def scoring_dir(tiny_model_dir, tmp_path_factory):
    """A reward model after two steps of reward_model.py, whose scores are larger than such a model's. Read only."""
    folder = tmp_path_factory.mktemp("reward")
    flags = dict(
        model=str(tiny_model_dir("llama")), dataset=jsonl(folder / "rows.jsonl", walks(12, 3)), max_steps=2, batch_size=6, learning_rate=0.05
    )
    assert in_child(reward_model.main, reward_model.Args(**flags, eval_fraction=0, output_dir=str(folder / "rm"))) == 0
    return folder / "rm"


@torch.no_grad()
def scores_by_transformers(folder, prompt, answers: list) -> list:
    """Of each answer alone, rendered by the folder's own template, less the shift."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template([*prompt, dict(role="assistant", content=a)], tokenize=False).rstrip("\n") for a in answers]
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    return [model(x).logits.item() - getattr(model.config, "score_shift", 0.0) for x in ids]


def scored(folder, rows: list, **flags):
    args, sets = rpo.Args(reward_model=str(folder), **flags), {"--dataset": rpo.Dataset.from_list(rows)}
    return rpo.add_rewards(args, sets, CPU, torch.float32)["--dataset"]


def with_shift(folder, shift: float, target):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.score_shift = shift
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def test_bug19_the_reward_models_scores(scoring_dir, tmp_path):
    """The same as transformers alone gives; another shift moves all of them, and no difference."""
    rows = walks(5, 3, seed=3)
    expected = [scores_by_transformers(scoring_dir, row["prompt"], row["completions"]) for row in rows]
    assert json.loads((scoring_dir / "config.json").read_text())["score_shift"] != 0 and torch.tensor(expected).std() > 0.01
    for limit in (1, 10**5):
        found = scored(scoring_dir, rows, tokens_per_forward=limit)
        assert torch.tensor(found[rpo.MODEL_REWARDS]).sub(torch.tensor(expected)).abs().max() < 1e-5
    assert found.remove_columns(rpo.MODEL_REWARDS).to_list() == rows
    moved = torch.tensor(scored(with_shift(scoring_dir, -3.0, tmp_path / "moved"), rows)[rpo.MODEL_REWARDS])
    assert (moved - torch.tensor(expected)).std() < 1e-5 < (moved - torch.tensor(expected)).abs().min()


def test_bug19_a_reward_model_with_another_tokenizer(dressed, tmp_path):  # noqa: F811
    """It reads the answers in its own tokens, with its own template and its own end of a turn."""
    tokenizer = copy.deepcopy(dressed("chatml"))
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    rows = walks(4, 2)
    expected = [scores_by_transformers(tmp_path / "other", row["prompt"], row["completions"]) for row in rows]
    assert torch.tensor(scored(tmp_path / "other", rows)[rpo.MODEL_REWARDS]).sub(torch.tensor(expected)).abs().max() < 1e-4


def test_all_data_sets_are_scored_by_one_loaded_model(scoring_dir, monkeypatch, capsys):
    loaded, real = [], rpo.load_frozen
    monkeypatch.setattr(rpo, "load_frozen", lambda *args, **options: loaded.append(args) or real(*args, **options))
    rows = {"--dataset": walks(3, 2), "--eval-dataset": walks(2, 3, seed=1)}
    sets = rpo.add_rewards(rpo.Args(reward_model=str(scoring_dir)), {k: rpo.Dataset.from_list(v) for k, v in rows.items()}, CPU, torch.float32)
    said = capsys.readouterr().out
    for option, data in sets.items():
        expected = [scores_by_transformers(scoring_dir, row["prompt"], row["completions"]) for row in rows[option]]
        assert [r == pytest.approx(e, abs=1e-5) for r, e in zip(data[rpo.MODEL_REWARDS], expected, strict=True)] == [True] * len(rows[option])
        assert f"of the {len(data)} rows of {option}" in said
    assert list(sets) == list(rows) and len(loaded) == 1


def test_a_row_too_long_for_the_reward_model_is_dropped(scoring_dir, tmp_path, tiny_tokenizer, capsys):
    small = tmp_path / "small"
    with_shift(scoring_dir, 0.0, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=64)))
    rows = [PAIR, PAIR | dict(rejected="up, right, " * 30), PAIR | dict(chosen="No.")]
    data = scored(small, rows)
    assert "2 of the 3 rows of --dataset" in capsys.readouterr().out and [r is None for r in data[rpo.MODEL_REWARDS]] == [False, True, False]
    encode_row = rpo.preferences(rpo.Args(), tiny_tokenizer, 512, rpo.given_rewards)
    assert len(rpo.prepare("--dataset", data, tiny_tokenizer, encode_row)) == 2 and "1 dropped: " in capsys.readouterr().out


def test_what_the_reward_models_template_refuses_is_dropped(scoring_dir, tmp_path, tiny_tokenizer):
    with_shift(scoring_dir, 0.0, tmp_path / "strict")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny_tokenizer.chat_template
    (tmp_path / "strict" / "chat_template.jinja").write_text(template)
    first, second = scored(tmp_path / "strict", [PAIR, PAIR | dict(prompt=[dict(role="system", content="Be brief."), *talk("Which way?")])])
    assert read(tiny_tokenizer, first)
    with pytest.raises(rpo.Drop, match="template"):
        read(tiny_tokenizer, second)


# --------------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def other_dir(tiny_model_dir, tmp_path_factory):
    """A reference that is another model than tiny_model_dir("llama"), of the same tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("reference") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(tiny_config("llama", tokenizer_of(tiny_model_dir("llama")))).save_pretrained(folder)
    tokenizer_of(tiny_model_dir("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on rankings of 3: 21 rows and 5 a step, so that the last step of an epoch has one."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", [row | dict(scores=[s / 4 for s in row["scores"]]) for row in walks(21, 3)])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=5, learning_rate=1e-3, eval_fraction=0.0, eval_dataset=data)
    return flags | dict(tokens_per_forward=90, save_every=2, epochs=2, max_new_tokens=4, show=1, nll_coef=0.1)


KINDS = ["plain", "reference", "reward model"]


@pytest.fixture(scope="module")
def of_kind(short_run, other_dir, scoring_dir):
    """of_kind(kind): flags of short_run, alone, with another model for the reference, or with a reward model."""
    more = {"plain": {}, "reference": dict(reference=str(other_dir)), "reward model": dict(reward_model=str(scoring_dir), eta=3.0)}
    return lambda kind: short_run | more[kind]


@pytest.fixture(scope="module", params=KINDS)
def finished(request, of_kind, tmp_path_factory):
    """(output directory, flags) of a run of that kind. Read only."""
    out, flags = tmp_path_factory.mktemp("runs") / "whole", of_kind(request.param)
    assert in_child(rpo.main, rpo.Args(**flags, output_dir=str(out))) == 0
    return out, flags


def rows_of(flags: dict) -> list:
    """The rows of a run, with their rewards."""
    tokenizer, rows = tokenizer_of(flags["model"]), [json.loads(line) for line in open(flags["dataset"])]
    if "reward_model" in flags:
        for row in rows:
            row[rpo.MODEL_REWARDS] = scores_by_transformers(flags["reward_model"], row["prompt"], row["completions"])
    return [read(tokenizer, row) for row in rows]


@torch.no_grad()
def metrics_by_transformers(folder, rows: list, flags: dict) -> dict:
    """What is logged of the rows, by models that are loaded with transformers alone."""
    models = [AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager").eval() for f in (folder, flags.get("reference") or flags["model"])]
    values, refs = ([by_transformers(model, row) for row in rows] for model in models)
    values = [[[x.tolist() for x in answer] for answer in answers] for answers in values]
    refs = [[logps.sum().item() for logps, *_ in answers] for answers in refs]
    options = {k: v for k, v in flags.items() if k in ("distance", "beta", "eta", "nll_coef", "nll_sum")}
    return {name: value / len(rows) for name, value in by_definition(rows, values, refs, **options).items()}


def test_bug29_the_saved_model_is_the_trained_one(finished):
    """Every metric of the last evaluation is what transformers alone makes of the directory and of the reference, which has not moved."""
    out, flags = finished
    (*_, last), rows = lines_of(out), rows_of(flags)
    assert logged(last, rpo.LOGGED, "eval_") == pytest.approx(metrics_by_transformers(out, rows, flags), abs=1e-3)
    assert last["step"] == 10 and abs(last["eval_rewards/margins"]) > 0.01  # bug14: the reference is not the policy of the moment
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert tokenizer.chat_template == tokenizer_of(flags["model"]).chat_template


def test_a_step_is_of_the_rows_picked_for_it(finished):
    (out, flags), rows = finished, rows_of(finished[1])
    names = [name for name in rpo.LOGGED if name != "rewards/accuracies"]  # without a reference, of gaps of 0 but for rounding
    expected = metrics_by_transformers(flags["model"], [rows[i] for i in rpo.pick(21, 5, 0, 0)], flags)
    assert logged(lines_of(out)[0], names) == pytest.approx(logged(expected, names), abs=1e-3)


def test_a_finished_run_is_the_model_and_reference_of_a_next_round(finished, tmp_path):
    out, flags = finished
    flags = flags | dict(model=str(out), reference="", max_steps=1, batch_size=21)
    rpo.main(rpo.Args(**flags, output_dir=str(tmp_path / "next")))
    (line,) = lines_of(tmp_path / "next")
    names = [name for name in rpo.LOGGED if name != "rewards/accuracies"]  # of gaps of 0 but for rounding
    expected = metrics_by_transformers(out, rows_of(flags), flags)
    assert logged(line, names) == pytest.approx(logged(expected, names), abs=1e-3) and line["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", [f if f in FAMILIES[::3] else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_bug12_the_first_loss_is_the_distance_from_0(family, tiny_model_dir, tmp_path, short_run):
    """Of all rewards alike, whatever the family; the second step has another loss."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), batch_size=21, max_steps=2, eval_dataset="", save_every=0, nll_coef=0.0)
    distance = DISTANCES[FAMILIES.index(family) // 3 % 3]
    rpo.main(rpo.Args(**flags, distance=distance, output_dir=str(tmp_path / "run")))
    first, second = lines_of(tmp_path / "run")
    s, total = lambda x: 1 / (1 + math.exp(-x)), 0.0
    for row in rows_of(flags):
        gaps = [row.extra["scores"][i] - row.extra["scores"][j] for i, j in row.extra["pairs"]]
        to_zero = {
            "backward-kl": lambda g: s(g) * math.log(2 * s(g)) + s(-g) * math.log(2 * s(-g)),
            "forward-kl": lambda g: -0.5 * math.log(4 * s(g) * s(-g)),
            "squared": lambda g: g * g,
        }[distance]
        total += sum(map(to_zero, gaps)) / len(gaps) / 21
    assert first["preference_loss"] == pytest.approx(total, abs=1e-5) == pytest.approx(first["loss"], abs=1e-5) and total > 0.01
    assert first["gap_error"] == pytest.approx(first["target_gap"], abs=1e-4) and first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(second["preference_loss"] - first["preference_loss"]) > 1e-6


@pytest.mark.parametrize("change", [
    dict(nll_coef=0.5), dict(distance="forward-kl"), dict(distance="squared", eta=2.0), dict(nll_coef=0.01, nll_sum=True),
])  # fmt: skip
def test_bug04_the_gradient_is_that_of_the_mean_over_prompts(change, of_kind, monkeypatch, tmp_path):
    """However the rows are split into forwards, with gradient checkpointing too; by transformers and torch.distributions."""
    flags = of_kind("reference") | dict(batch_size=21, eval_dataset="", nll_coef=0.0, beta=0.3, eta=1.0) | change
    models = [AutoModelForCausalLM.from_pretrained(flags[name], attn_implementation="eager").eval() for name in ("model", "reference")]
    total, rows, coin = 0, rows_of(flags), lambda x: torch.distributions.Bernoulli(logits=x)
    for row in rows:
        (ours, ref), r, own = [by_transformers(model, row) for model in models], row.extra["scores"], 0
        for i, j in row.extra["pairs"]:
            h = ours[i][0].sum() - ours[j][0].sum() - (ref[i][0].sum() - ref[j][0].sum()).detach()
            a, b = 0.3 * h, torch.tensor(flags["eta"] * (r[i] - r[j]), dtype=torch.float64)
            kl = torch.distributions.kl_divergence
            own += {"forward-kl": kl(coin(a), coin(b)), "squared": (a - b) ** 2}.get(flags.get("distance"), kl(coin(b), coin(a)))
        best = ours[r.index(max(r))][0]
        total += own / len(row.extra["pairs"]) - flags["nll_coef"] * (best.sum() if "nll_sum" in flags else best.mean())
    (total / len(rows)).backward()
    expected = torch.cat([p.grad.flatten() for p in models[0].parameters()])
    for i, split in enumerate((dict(tokens_per_forward=10**5), dict(tokens_per_forward=1), dict(gradient_checkpointing=True))):
        gradient = first_gradient(rpo, monkeypatch, **flags | split, output_dir=str(tmp_path / str(i)))
        assert (gradient - expected).abs().max() < 2e-4 * expected.abs().max(), split
        assert lines_of(tmp_path / str(i))[0]["loss"] == pytest.approx(total.item() / len(rows), abs=1e-4)


def test_tokens_per_forward_changes_no_step(finished, tmp_path):
    out, flags = finished
    rpo.main(rpo.Args(**flags | dict(tokens_per_forward=10**5), output_dir=str(tmp_path / "run")))
    for ours, theirs in zip(lasting(tmp_path / "run"), lasting(out), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("kind, family", [("plain", "nemotron"), ("reference", "llama"), ("reward model", "llama")])
def test_bug04_ranks_change_nothing(kind, family, of_kind, tiny_model_dir, tmp_path):
    """The last step of an epoch has one row, so that a rank has none; metrics, weights and files are those of one process."""
    flags = of_kind(kind) | dict(model=str(tiny_model_dir(family)), max_steps=5, eval_every=2)
    on_ranks(rpo, 2, **flags, output_dir=str(tmp_path / "many"))
    rpo.main(rpo.Args(**flags, output_dir=str(tmp_path / "one")))
    for ours, theirs in zip(lasting(tmp_path / "many"), lasting(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = weights_of(tmp_path / "many"), weights_of(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert snapshot(tmp_path / "many").keys() == snapshot(tmp_path / "one").keys()


@pytest.mark.parametrize("number", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 5, 6, 9))])
def test_bug28_killed_before_a_rename_and_resumed(number, finished, tmp_path):
    """The reference goes on being what it was: the first model, not the one that is resumed."""
    out, flags = finished
    args = rpo.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, rpo, args, number) == -9
    assert in_child(rpo.main, args) == 0
    same_run(tmp_path / "run", out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.4, 0.7])
def test_bug28_killed_and_resumed(moment, finished, tmp_path):
    out, flags = finished
    args = rpo.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    in_child(rpo.main, args, kill_after=moment * lines_of(out)[-1]["seconds"])
    assert in_child(rpo.main, args) == 0
    same_run(tmp_path / "run", out)


@pytest.mark.parametrize("option", ["reference", "reward_model"])
def test_bug28_another_model_under_the_same_name_is_another_run(option, of_kind, other_dir, scoring_dir, tmp_path, capsys):
    kind = option.replace("_", " ")
    source = with_shift(scoring_dir, 0.0, tmp_path / "read") if option == "reward_model" else tmp_path / "read"
    if option == "reference":
        AutoModelForCausalLM.from_pretrained(other_dir).save_pretrained(source), tokenizer_of(other_dir).save_pretrained(source)
    flags = of_kind(kind) | {option: str(source)} | dict(max_steps=1, output_dir=str(tmp_path / "run"))
    rpo.main(rpo.Args(**flags))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert f"content of {option} was" in refused(rpo, capsys, **flags, resume=True)


def test_bfloat16(of_kind, tmp_path):
    """FSDP's mixed precision on one rank, with all three models: near the float32 run."""
    for dtype in ("bfloat16", "float32"):
        flags = of_kind("reward model") | dict(max_steps=3, reference=of_kind("reference")["reference"])
        assert in_child(rpo.main, rpo.Args(**flags, dtype=dtype, output_dir=str(tmp_path / dtype))) == 0
    for ours, theirs in zip(lines_of(tmp_path / "bfloat16"), lines_of(tmp_path / "float32"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.1) and ours["target_gap"] == pytest.approx(theirs["target_gap"], abs=0.1)


@every_distance
def test_a_near_tie_stays_near(distance, tiny_model_dir, tmp_path):
    """Trained for long on a few pairs with small and large gaps, one of them against its label: beta h comes to eta g and stays there."""
    gaps = [0.1, -0.2, 0.0, 1.0, 0.5, 0.05]
    data = jsonl(tmp_path / "rows.jsonl", [row | dict(margin=gap) for row, gap in zip(similar_pairs(6), gaps)])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_fraction=0, eval_dataset=data, batch_size=6, epochs=60, learning_rate=3e-3)
    rpo.main(rpo.Args(**flags, beta=0.2, distance=distance, show=0, output_dir=str(tmp_path / "run")))
    first, *_, last = lines_of(tmp_path / "run")
    size = sum(map(abs, gaps)) / 6
    assert first["gap_error"] == pytest.approx(size, abs=1e-5) == first["target_gap"] and last["eval_gap_error"] < 0.1 * size
    assert last["eval_rewards/margins"] == pytest.approx(size, rel=0.1) and last["eval_rewards/accuracies"] >= 5 / 6


# ---------------------------------------------------------------------------------------------------------------------- bad input

OK = dict(prompt="a", completions=["b", "c"], scores=[1.0, 0.0])
BAD_ROWS = {  # rows -> what the message must say
    "a score that is missing": ([OK, OK, OK | dict(scores=[1.0, None])], "row 2"),
    "other columns": ([dict(text="a")], "chosen and rejected"),
    "pairs without rewards": ([dict(prompt="a", chosen="b", rejected="c")], "--reward-model"),
    "half of the rewards": ([dict(prompt="a", chosen="b", rejected="c", score_chosen=1.0)], "score_rejected"),
    "no reward in any row": ([dict(prompt="a", chosen="b", rejected="c", margin=math.nan)], "1 dropped: no reward"),
    "nothing usable": ([OK | dict(completions=["b", "b"])], "nothing to compare"),
}


@pytest.mark.parametrize("rows, says", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("option", ["dataset", "eval_dataset"])
def test_bad_rows_are_refused(option, rows, says, short_run, tmp_path, capsys):
    rpo.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = refused(rpo, capsys, **short_run | {option: str(tmp_path / "rows.parquet")}, output_dir=str(tmp_path / "run"))
    assert f"--{option.replace('_', '-')}" in said and says in said


def test_rankings_need_no_scores_where_a_reward_model_gives_them(of_kind, tmp_path, capsys):
    """And where they have some, these count for nothing."""
    flags, lines = of_kind("reward model") | dict(max_steps=1, save_every=0, eval_dataset=""), {}
    rows = [json.loads(line) for line in open(flags["dataset"])]
    bare = [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    null, other = ([row | dict(scores=scores) for row in bare] for scores in (None, [0, -1, -2]))
    for name, data in dict(whole=rows, bare=bare, null=null, other=other).items():
        data = jsonl(tmp_path / f"{name}.jsonl", data)
        rpo.main(rpo.Args(**flags | dict(dataset=data), output_dir=str(tmp_path / name)))
        (lines[name],) = lasting(tmp_path / name)
    assert lines["whole"] == lines["bare"] == lines["null"] == lines["other"] and lines["bare"]["target_gap"] > 0.01
    said = refused(rpo, capsys, **of_kind("plain") | dict(dataset=str(tmp_path / "bare.jsonl")), output_dir=str(tmp_path / "run"))
    assert "--dataset" in said and "scores" in said


def test_some_rows_without_rewards_are_dropped_and_counted(short_run, tmp_path, capsys):
    rows = [row | dict(margin=None if i % 3 else 0.5) for i, row in enumerate(similar_pairs(9))]
    flags = short_run | dict(dataset=jsonl(tmp_path / "rows.jsonl", rows), eval_dataset="", max_steps=1)
    rpo.main(rpo.Args(**flags, output_dir=str(tmp_path / "run")))
    assert "3 rows from 9; 3 pairs, 6 dropped: no reward" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    dict(beta=0.0), dict(beta=-1.0), dict(eta=-1.0), dict(eta=math.inf), dict(nll_coef=-1.0), dict(batch_size=0), dict(model="no/such/model"),
    dict(max_grad_norm=0.0), dict(reference="no/such/reference"), dict(reward_model="no/such/judge"),
    dict(dataset="nowhere.jsonl"), dict(eval_dataset="nowhere.jsonl"),
], ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))  # fmt: skip
def test_bad_arguments_are_refused(flags, short_run, tmp_path, capsys):
    said = refused(rpo, capsys, **short_run | flags, output_dir=str(tmp_path / "run"))
    ((name, value),) = flags.items()
    assert f"--{name.replace('_', '-')}" in said or str(value) in said
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.parametrize("labels", [None, 3])
def test_what_is_no_reward_model_is_refused(labels, short_run, tiny_model_dir, tmp_path, capsys):
    """A language model, whose new head would be random; a classifier of three labels."""
    folder = tiny_model_dir("llama")
    if labels:
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).save_pretrained(tmp_path / "three")
        tokenizer_of(folder).save_pretrained(tmp_path / "three")
        folder = tmp_path / "three"
    said = refused(rpo, capsys, **short_run | dict(reward_model=str(folder)), output_dir=str(tmp_path / "run"))
    assert "--reward-model" in said and "not a reward model" in said


def test_a_reference_that_reads_other_tokens_is_refused(short_run, dressed, tmp_path, capsys):  # noqa: F811
    tokenizer = copy.deepcopy(dressed("chatml"))
    AutoModelForCausalLM.from_config(tiny_config("llama", tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "other tokens" in refused(rpo, capsys, **short_run | dict(reference=str(tmp_path / "other")), output_dir=str(tmp_path / "run"))


def test_rows_that_are_all_too_long_for_the_reward_model_are_refused(of_kind, scoring_dir, tmp_path, capsys):
    small = with_shift(scoring_dir, 0.0, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=4)))
    said = refused(rpo, capsys, **of_kind("plain") | dict(reward_model=str(small)), output_dir=str(tmp_path / "run"))
    assert "21 dropped" in said and "reward model" in said


# ---------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name, number", [
    ("kwise_xstest.jsonl", 3), pytest.param("kwise_oasst.jsonl", 18, marks=pytest.mark.slow), ("pref_polite.jsonl", 16),
])  # fmt: skip
def test_real_rankings_and_pairs(name, number, real_data, tmp_path, capsys):
    """Five answers with many ties, up to nine, and pairs with a margin: after three steps the last evaluation is what transformers finds."""
    folder = real_data / "stories260K-hf"
    data = rpo.load_rows("--dataset", str(real_data / name)).select(range(number))
    data = [row | (dict(margin=0.5) if "polite" in name else {}) for row in data]
    tokenizer, rows = tokenizer_of(folder), []
    for row in data:
        try:
            rows.append(read(tokenizer, row))
        except rpo.Drop:
            pass
    data = jsonl(tmp_path / "rows.jsonl", data)
    flags = dict(model=str(folder), dataset=data, eval_fraction=0, eval_dataset=data, batch_size=len(rows), epochs=3, learning_rate=1e-5, beta=0.05)
    rpo.main(rpo.Args(**flags, show=0, output_dir=str(tmp_path / "run")))
    assert f"{len(rows)} rows from {number}" in capsys.readouterr().out and len(rows) > 2
    first, *_, last = lines_of(tmp_path / "run")
    assert logged(last, rpo.LOGGED, "eval_") == pytest.approx(metrics_by_transformers(tmp_path / "run", rows, flags), rel=1e-3, abs=1e-2)
    assert first["gap_error"] == pytest.approx(first["target_gap"], abs=1e-4) and last["eval_preference_loss"] < first["preference_loss"]
