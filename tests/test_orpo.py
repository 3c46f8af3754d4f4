"""orpo.py: its loss against closed forms. Batches and runs against its equations are in test_preferences.py."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dpo import f64, walks
from test_plumbing import jsonl, talk

import orpo
from orpo import Row

slow = pytest.mark.slow


def args_of(**flags) -> orpo.Args:
    return orpo.Args(**dict(model="", dataset="") | flags)


# ---- the loss


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
    pairs = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
    trained = trained or [[True] * n for n in lengths]
    return Row([1, 4], [[2] * n for n in lengths], trained, dict(pairs=pairs, scores=scores))


def pair(n: int, m: int) -> Row:
    return ranking([n, m], [1.0, 0.0])


def batch(rows: list, logps, entropy=None, is_argmax=None, **flags) -> dict:
    entropy = torch.zeros_like(logps) if entropy is None else entropy
    is_argmax = torch.zeros_like(logps) > 0 if is_argmax is None else is_argmax
    return orpo.orpo_batch(args_of(**flags), rows, logps, entropy, is_argmax)


def numbers(logged: dict) -> dict:
    return {name: value.item() for name, value in logged.items()}


# ---- rows, and --nll-scope all


def read(tokenizer, row, max_length=512) -> Row:
    (row,) = orpo.preference_rows(tokenizer, max_length, row, Counter())
    return row


WAY = talk("Which way?")


def test_the_end_of_the_answer_counts_in_both_terms(tiny_tokenizer):
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


# ---- whole runs


def test_whole_prompts_are_shown_though_they_are_trained(tiny_model_dir, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", walks(5))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0, max_steps=1)
    orpo.main(orpo.Args(**flags, nll_scope="all", output_dir=str(tmp_path / "run")))
    assert capsys.readouterr().out.count("Walk 0!<|end|><|assistant|>'\n    -> ") == 1
