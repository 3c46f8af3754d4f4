"""orpo.py: its loss against closed forms and Hugging Face's models, and what runs do to chosen and rejected answers.

The blocks that read preferences are tested in test_dpo.py, those that compute log-probabilities in test_sft.py.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dpo import by_transformers, f64, first_gradient, short_answers, walks  # noqa: F401
from test_plumbing import jsonl, lines_of, talk, tokenizer_of
from transformers import AutoModelForCausalLM

import orpo
from orpo import Row

slow = pytest.mark.slow


def args_of(**flags) -> orpo.Args:
    """Arguments for functions that read neither the model's name nor the data set's."""
    return orpo.Args(**dict(model="", dataset="") | flags)


# ------------------------------------------------------------------------------------------------------------ the loss


@given(st.floats(-8, math.log10(700)))
def test_log1mexp(magnitude):
    """log(1 - e^x) = log(2 e^(x/2) sinh(-x/2)), which loses nothing near 0; far from 0, -e^x less half its square."""
    x = torch.tensor(-(10**magnitude)).item()  # a float32
    exact = math.log(2 * math.sinh(-x / 2)) + x / 2 if x > -20 else -math.exp(x) - math.exp(2 * x) / 2
    if x <= -1e-6:
        assert orpo.log1mexp(f64(x)).item() == pytest.approx(exact, rel=1e-12)
        assert orpo.log1mexp(torch.tensor([x])).item() == pytest.approx(exact, rel=1e-6, abs=1e-37)
    else:
        assert orpo.log1mexp(f64(x)).item() == pytest.approx(math.log(1e-6), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_or_an_impossible_answer_has_a_finite_loss_and_gradient(dtype):
    values = [0.0, -1e-8, -1e-3, -30.0, -1e4]
    for pair in itertools.product(values, values):
        better, worse = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in pair)
        loss = orpo.odds_ratio_loss(orpo.log_odds_ratio(better, worse))
        gradients = torch.autograd.grad(loss, (better, worse))
        assert all(torch.isfinite(v) for v in (loss, *gradients)), pair
        assert gradients[0] <= 0 <= gradients[1], pair


WORKED = [  # mean log-probabilities of better and worse, log odds ratio, L_OR, and the whole loss at lambda = 0.1
    (math.log(0.6), math.log(0.3), 1.252763, 0.251314, 0.535957),
    (math.log(0.5), math.log(0.5), 0.0, 0.693147, 0.762462),
    (-0.4, -1.5, 1.957150, 0.132133, 0.413213),
]


@pytest.mark.parametrize("better, worse, ratio, loss, total", WORKED)
def test_odds_ratio_loss_of_worked_examples(better, worse, ratio, loss, total):
    found = orpo.log_odds_ratio(f64(better), f64(worse))
    assert found.item() == pytest.approx(ratio, abs=1e-6)
    assert orpo.odds_ratio_loss(found).item() == pytest.approx(loss, abs=1e-6)
    assert batch([pair(1, 1)], f64(better, worse))["loss"].item() == pytest.approx(total, abs=1e-6)


def test_the_gradient_is_minus_delta_times_h():
    """Eqs. 8 to 10 but for their sign."""
    better, worse = f64(-0.4), f64(-1.5)
    loss = lambda w, l: orpo.odds_ratio_loss(orpo.log_odds_ratio(w, l))
    gradients = [g.item() for g in torch.autograd.grad(loss(better, worse), (better, worse))]
    p, q = math.exp(-0.4), math.exp(-1.5)
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert delta == pytest.approx(0.123776, abs=1e-6)
    assert gradients == pytest.approx([-delta / (1 - p), delta / (1 - q)], abs=1e-12)
    assert gradients == pytest.approx([-0.375442, 0.159326], abs=1e-6)
    for x in (-1e-3, -0.1, -0.7, -5.0, -25.0):  # on both sides of -log 2, where log1mexp changes its form
        assert torch.autograd.gradcheck(loss, (f64(x), f64(-1.5)), eps=1e-7)
        assert torch.autograd.gradcheck(loss, (f64(-0.4), f64(x)), eps=1e-7)


def ranking(lengths: list, scores: list, trained=None) -> Row:
    """A row of answers of these lengths, with all pairs of unequal scores."""
    pairs = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
    trained = trained or [[True] * n for n in lengths]
    return Row([1, 4], [[2] * n for n in lengths], trained, dict(pairs=pairs, scores=scores))


def pair(n: int, m: int) -> Row:
    """A pair of a better answer of n tokens and a worse one of m."""
    return ranking([n, m], [1.0, 0.0])


def batch(rows: list, logps, entropy=None, is_argmax=None, **flags) -> dict:
    """What orpo_batch returns."""
    entropy = torch.zeros_like(logps) if entropy is None else entropy
    is_argmax = torch.zeros_like(logps) > 0 if is_argmax is None else is_argmax
    return orpo.orpo_batch(args_of(**flags), rows, logps, entropy, is_argmax)


def numbers(logged: dict) -> dict:
    return {name: value.item() for name, value in logged.items()}


def by_definition(rows: list, values: list, coef: float) -> dict:
    """Eqs. 3 to 7 word for word, in floats: what is logged of a batch, summed over its rows.

    values: of each row, of each of its answers (log-probabilities, entropies, whether the likeliest, mean
    log-likelihood to fine-tune on)."""
    total, mean = Counter(), lambda x: sum(x) / len(x)
    for row, answers in zip(rows, values, strict=True):
        P, scores = [math.exp(mean(logps)) for logps, *_ in answers], row.extra["scores"]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(P)), 2) if scores[i] > scores[j]]
        for i, j in pairs:
            ratio = math.log(P[i] / (1 - P[i])) - math.log(P[j] / (1 - P[j]))
            loss = math.log1p(math.exp(-ratio))
            each = {
                "loss": coef * loss,
                "log_odds_ratio": -loss,
                "log_odds_chosen": ratio,
                "rewards/chosen": coef * math.log(P[i]),
                "rewards/rejected": coef * math.log(P[j]),
                "rewards/accuracies": P[i] > P[j],
                "rewards/margins": coef * math.log(P[i] / P[j]),
                "logps/chosen": mean(answers[i][0]),
                "logps/rejected": mean(answers[j][0]),
                "entropy": mean(answers[i][1]),
                "mean_token_accuracy": mean(answers[i][2]),
            }
            total.update({name: value / len(pairs) for name, value in each.items()})
        nll = -answers[scores.index(max(scores))][3]
        total.update(dict(nll_loss=nll, loss=nll))
    return dict(total)


@pytest.mark.parametrize("coef", [0.0, 0.1, 2.0])
def test_a_batch_of_rankings_is_the_sum_over_its_prompts(coef):
    """Whatever their sizes: a prompt with five pairs counts as much as one with a single pair; ties are no pairs."""
    rows = [ranking([3, 1, 4, 2], [1.0, 5.0, 0.0, 1.0]), pair(2, 5), ranking([1, 2, 2], [0.0, 2.0, 1.0])]
    generator = torch.Generator().manual_seed(0)
    number = lambda n: -3 * torch.rand(n, generator=generator).double()
    parts = [[(number(len(r)), number(len(r)), number(len(r)) < -1) for r in row.responses] for row in rows]
    values = [[(*(x.tolist() for x in answer), answer[0].mean().item()) for answer in row] for row in parts]
    logps, entropy, top = (torch.cat([answer[k] for row in parts for answer in row]) for k in range(3))
    logged = batch(rows, logps, entropy, top, odds_ratio_coef=coef)
    assert numbers(logged) == pytest.approx(by_definition(rows, values, coef), rel=1e-6)
    loss = lambda x: batch(rows, x, entropy, top, odds_ratio_coef=coef)["loss"]
    assert torch.autograd.gradcheck(loss, logps.requires_grad_(), atol=1e-6)


# ---------------------------------------------------------------------------------------------- rows, and --nll-scope all


def read(tokenizer, row, max_length=512) -> Row:
    (row,) = orpo.preference_rows(tokenizer, max_length, row, Counter())
    return row


WAY = talk("Which way?")


def test_the_end_of_the_answer_counts_in_both_terms(tiny_tokenizer):
    """As much as any other token, in the likelihood and in the odds."""
    row = read(tiny_tokenizer, dict(prompt=WAY, chosen="Up.", rejected="Right, then up."))
    n, m = map(len, row.responses)
    assert [r[-1] for r in row.responses] == [tiny_tokenizer.eos_token_id] * 2 and all(map(all, row.trained))
    logps = f64(*[-0.4] * n, *[-1.5] * m)
    for coef in (0.0, 0.1):
        (gradient,) = torch.autograd.grad(batch([row], logps, odds_ratio_coef=coef)["loss"], logps)
        expected = [(-1 - coef * 0.375442) / n] * n + [coef * 0.159326 / m] * m
        assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("is_long", [True, False])
def test_train_prompt(is_long, tiny_tokenizer):
    """The prompt is trained once, before the best answer, and not its first token; the odds are of the answers alone."""
    plain = ranking([1, 3, 2], [0.0, 2.0, 1.0])._replace(prompt=[1])
    if is_long:
        plain = read(tiny_tokenizer, dict(prompt=WAY, completions=["Up.", "Right, then up.", "No"], scores=[0, 2, 1]))
    row = orpo.train_prompt(plain)
    assert len(row.prompt) == 1
    assert [row.prompt + r for r in row.responses] == [plain.prompt + r for r in plain.responses]
    head = len(plain.prompt) - 1
    assert row.trained == [[is_best] * head + [True] * len(plain.responses[i]) for i, is_best in enumerate([0, 1, 0])]
    a, b, c = (torch.linspace(-1, -2 - i, len(r), dtype=torch.float64) for i, r in enumerate(plain.responses))
    before = torch.linspace(-3, -4, head, dtype=torch.float64)
    with_prompt = torch.cat([a, before, b, c])
    whole = numbers(batch([row], with_prompt, -with_prompt, with_prompt > -2.5))
    without = torch.cat([a, b, c])
    apart = numbers(batch([plain], without, -without, without > -2.5))
    nll = -torch.cat([before, b]).mean().item()
    expected = apart | dict(nll_loss=nll, loss=apart["loss"] - apart["nll_loss"] + nll)
    assert whole == pytest.approx(expected, rel=1e-9) and (nll != apart["nll_loss"]) == is_long


def test_the_likelihood_is_of_the_best_answer_that_the_cut_leaves(tiny_tokenizer):
    """A ranking's best, cut before the assistant's turn in it, is in no pair, and nothing of it is trained."""
    best = [dict(role="user", content="up " * 40), dict(role="assistant", content="So.")]
    data = dict(prompt=WAY, completions=["No", best, "Up."], scores=[0, 2, 1])
    row = read(tiny_tokenizer, data, max_length=30)
    n, m = map(len, row.responses)
    logged = batch([row], f64(*[-1.5] * n, *[-0.4] * m))
    assert numbers({k: logged[k] for k in ("nll_loss", "loss")}) == pytest.approx(dict(nll_loss=0.4, loss=0.413213))
    with_prompt = f64(*[-1.5] * n, *[-0.4] * (len(row.prompt) - 1 + m))
    assert batch([orpo.train_prompt(row)], with_prompt)["nll_loss"].item() == pytest.approx(0.4)


# ------------------------------------------------------------------------------------- the same by Hugging Face's models


def fine_tuning_loss(model, row: Row, scope: str):
    """Hugging Face's own loss on the best answer, or on the prompt too."""
    best = row.extra["scores"].index(max(row.extra["scores"]))
    labels = [-100] * len(row.prompt) if scope == "response" else row.prompt
    ids, labels = (torch.tensor([start + row.responses[best]]) for start in (row.prompt, labels))
    return model(ids, labels=labels).loss


@torch.no_grad()
def metrics_by_transformers(folder, rows: list, coef: float, scope: str) -> dict:
    """What is logged of the rows, by a model that is loaded with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    values = []
    for row in rows:
        likelihood = -fine_tuning_loss(model, row, scope).item()  # of the best answer, and asked of no other
        values.append([(*(x.tolist() for x in answer), likelihood) for answer in by_transformers(model, row)])
    return {name: value / len(rows) for name, value in by_definition(rows, values, coef).items()}


def logged(line: dict, names, prefix="") -> dict:
    return {name: line[prefix + name] for name in names}


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on 21 prompts, 5 a step, so that the last step of an epoch has one."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", walks(21))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0)
    flags |= dict(batch_size=5, epochs=2, learning_rate=1e-3, odds_ratio_coef=0.5)
    return flags | dict(tokens_per_forward=90, save_every=3)


def rows_of(flags: dict) -> list:
    tokenizer = tokenizer_of(flags["model"])
    return [read(tokenizer, json.loads(line)) for line in open(flags["dataset"])]


GRADIENTS = [("llama", "response", 0.5), ("llama", "all", 0.0), ("nemotron", "all", 0.5)]


@pytest.mark.parametrize("family, scope, coef", GRADIENTS)
def test_metrics_and_gradient_are_those_of_the_models(
    family, scope, coef, short_run, tiny_model_dir, monkeypatch, tmp_path
):
    """At the first step, of its rows under --model; at the last evaluation, of all rows under the saved weights. Also
    where rows are padded (Nemotron). With coefficient 0 the gradient is that of Hugging Face's own loss."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), nll_scope=scope, odds_ratio_coef=coef)
    flags |= dict(batch_size=21, epochs=1)
    out, rows = tmp_path / "run", rows_of(flags)
    gradient = first_gradient(orpo, monkeypatch, **flags, output_dir=str(out))
    (line,) = lines_of(out)
    for folder, prefix in ((flags["model"], ""), (out, "eval_")):
        expected = metrics_by_transformers(folder, rows, coef, scope)
        assert logged(line, expected, prefix) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(flags["model"], attn_implementation="eager").eval()
    total, log_odds = 0, lambda p: (p / (1 - p)).log()
    for row in rows:
        P, pairs = [logps.mean().exp() for logps, *_ in by_transformers(model, row)], row.extra["pairs"]
        losses = [torch.nn.functional.softplus(log_odds(P[j]) - log_odds(P[i])) for i, j in pairs]
        total += (fine_tuning_loss(model, row, scope) + coef * sum(losses) / len(pairs)) / len(rows)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).abs().max() < 2e-4 * expected.abs().max()


def test_whole_prompts_are_shown_though_they_are_trained(short_run, tmp_path, capsys):
    orpo.main(orpo.Args(**short_run | dict(max_steps=1, nll_scope="all"), output_dir=str(tmp_path / "run")))
    assert capsys.readouterr().out.count("Walk 0!<|end|><|assistant|>'\n    -> ") == 1


def similar_pairs(n: int) -> list:
    """Pairs that share most of what they say."""
    ways = ["up up right", "right up up", "up right up", "right right up"]
    texts = [(f"Walk {i}!", f"I go {ways[i % 4]}") for i in range(n)]
    return [dict(prompt=talk(prompt), chosen=f"{text}, yes.", rejected=f"{text}, no.") for prompt, text in texts]


def test_fine_tuning_raises_the_rejected_answers_too_and_the_odds_ratio_parts_them(tiny_model_dir, tmp_path):
    """The paper's figure 3, and its ablation of lambda."""
    data = jsonl(tmp_path / "rows.jsonl", similar_pairs(24))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_fraction=0.25, eval_every=12)
    flags |= dict(epochs=12, batch_size=9, learning_rate=5e-3)
    ends = {}
    for coef in (0.0, 5.0):
        orpo.main(orpo.Args(**flags, odds_ratio_coef=coef, output_dir=str(tmp_path / str(coef))))
        first, *_, last = lines_of(tmp_path / str(coef))
        assert last["eval_logps/chosen"] > first["logps/chosen"] + 2 and last["eval_nll_loss"] < first["nll_loss"]
        ends[coef] = last
    plain, parted = ends[0.0], ends[5.0]
    assert plain["eval_logps/rejected"] > first["logps/rejected"] + 2  # they begin as the chosen ones do
    assert parted["eval_logps/rejected"] < plain["eval_logps/rejected"] - 0.5
    assert parted["eval_rewards/accuracies"] == 1.0 and parted["eval_log_odds_ratio"] > -0.2
    assert parted["eval_log_odds_chosen"] > plain["eval_log_odds_chosen"] + 1
