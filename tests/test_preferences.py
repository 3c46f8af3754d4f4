"""dpo.py, orpo.py and rpo.py against their equations, written down a second time: batches of hand-made rows, and whole
runs against Hugging Face's models."""

import json
from collections import Counter
from functools import partial
from itertools import permutations

import pytest
import torch
from test_dpo import base_dir, by_transformers, is_near, walks  # noqa: F401
from test_plumbing import jsonl, lines_of, tokenizer_of
from test_rpo import scores_by_transformers
from torch.distributions import Bernoulli, kl_divergence
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM

import dpo
import orpo
import rpo


def by_dpo(args, margin, *_) -> dict:
    if args.loss == "ipo":
        return dict(preference_loss=(margin / args.beta - 1 / (2 * args.beta)) ** 2)
    smoothing = args.label_smoothing
    return dict(preference_loss=(1 - smoothing) * softplus(-margin) + smoothing * softplus(margin))


def by_rpo(args, margin, gap, *_) -> dict:
    """Equal rewards have no better answer, and a tie is no win."""
    target = torch.tensor(args.eta * gap, dtype=torch.float64)
    policy, reward = Bernoulli(logits=margin), Bernoulli(logits=target)
    losses = {"backward-kl": kl_divergence(reward, policy), "forward-kl": kl_divergence(policy, reward)}
    loss = losses.get(args.distance, (margin - target) ** 2)
    found = dict(preference_loss=loss, target_gap=target, gap_error=(margin - target).abs())
    return found | {"rewards/accuracies": float(margin > 0 and gap > 0)}


def by_orpo(args, margin, gap, better, worse) -> dict:
    """better, worse: log P of the two answers, the mean over their tokens."""
    ratio = (better - torch.log(1 - better.exp())) - (worse - torch.log(1 - worse.exp()))
    return dict(log_odds_chosen=ratio, log_odds_ratio=-softplus(-ratio))


def definition(script, args, rows: list, values: list, refs: list, nlls=None) -> dict:
    """What is logged of the rows, summed over them.

    values: of each row, of each of its answers, log-probabilities, entropies and whether the likeliest; refs: the
    reference's log-probabilities; nlls: of each row, where its prompt is trained too."""
    total, mean = Counter(), lambda x: x.double().mean()
    for number, (row, answers, reference) in enumerate(zip(rows, values, refs, strict=True)):
        scores, pairs = row.extra["scores"], row.extra["pairs"]
        marks = row.extra.get("content") or [[1.0] * len(logps) for logps, *_ in answers]
        counted = [torch.tensor(mark, dtype=torch.float64) for mark in marks]
        logps = [(mark * answer[0]).sum() for mark, answer in zip(counted, answers)]
        if script is orpo:
            logps = [x / mark.sum() for x, mark in zip(logps, counted)]
            rewards = [args.odds_ratio_coef * x for x in logps]
        else:
            gains = [x - (mark * ref).sum().detach() for x, mark, ref in zip(logps, counted, reference)]
            if script is dpo and args.loss == "ipo":
                gains = [x / mark.sum() for x, mark in zip(gains, counted)]
            rewards = [args.beta * x for x in gains]
        for i, j in pairs:
            margin = rewards[i] - rewards[j]
            found = {
                "rewards/chosen": rewards[i],
                "rewards/rejected": rewards[j],
                "rewards/margins": margin,
                "rewards/accuracies": float(margin > 0 or logps[i] > logps[j] and script is orpo),
                "logps/chosen": logps[i],
                "logps/rejected": logps[j],
                "entropy": mean(answers[i][1]),
                "mean_token_accuracy": mean(answers[i][2]),
            }
            own = {dpo: by_dpo, orpo: by_orpo, rpo: by_rpo}[script]
            found |= own(args, margin, scores[i] - scores[j], logps[i], logps[j])
            total.update({name: value / len(pairs) for name, value in found.items()})
        best = scores.index(max(scores))
        total["nll_loss"] += nlls[number] if nlls else -mean(answers[best][0])
    if script is orpo:
        total["loss"] = total["nll_loss"] - args.odds_ratio_coef * total["log_odds_ratio"]
    else:
        total["loss"] = total["preference_loss"] + args.nll_coef * total["nll_loss"]
    return dict(total)


def floats(metrics: dict, share=1.0) -> dict:
    return {name: share * torch.as_tensor(value).item() for name, value in metrics.items()}


BATCHES = [  # script, flags, whether the last token of an answer is format, which counts in the likelihood only
    (dpo, dict(), False),
    (dpo, dict(beta=0.5, label_smoothing=0.2, nll_coef=0.2), True),
    (dpo, dict(loss="ipo"), False),
    (dpo, dict(loss="ipo", beta=0.7, nll_coef=0.3), True),
    *((orpo, dict(odds_ratio_coef=coef), False) for coef in (0.0, 0.1, 2.0)),
    *((rpo, dict(distance=distance), False) for distance in ("backward-kl", "forward-kl", "squared")),
    *((rpo, dict(distance=d, beta=0.7, eta=2.0, nll_coef=0.5), False) for d in ("backward-kl", "squared")),
]


@pytest.mark.parametrize("script, flags, marked", BATCHES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_batch_is_the_sum_over_its_prompts(script, flags, marked):
    """A prompt with five pairs counts as much as one with a single pair; ties are pairs in RPO only."""
    args, generator = script.Args(model="", dataset="", **flags), torch.Generator().manual_seed(0)
    number = lambda n: -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    rows, values, refs = [], [], []
    for scores, lengths in (([1.0, 5.0, 0.0, 1.0], [3, 1, 4, 2]), ([2.0, 0.5], [2, 5]), ([0.0, 2.0, 1.0], [1, 2, 2])):
        values.append([(number(n).requires_grad_(), number(n), number(n) < -1) for n in lengths])
        refs.append([number(n) for n in lengths])
        marks = [[1.0] * (n - 1) + [float(n == 1 or not marked)] for n in lengths]
        is_pair = lambda i, j, r=scores: r[i] > r[j] or (script is rpo and r[i] == r[j] and i < j)
        extra = dict(pairs=[two for two in permutations(range(len(scores)), 2) if is_pair(*two)], scores=scores)
        extra |= dict(content=marks) if marked else {}
        extra["ref_logps"] = torch.stack([torch.tensor(mark).double() @ ref for mark, ref in zip(marks, refs[-1])])
        rows.append(script.Row([1], [[2] * n for n in lengths], [[True] * n for n in lengths], extra))
    answers = sum(values, [])
    found = getattr(script, f"{script.__name__}_batch")(args, rows, *map(torch.cat, zip(*answers)))
    expected = definition(script, args, rows, values, refs)
    assert floats(found) == pytest.approx(floats(expected), rel=1e-6, abs=1e-6)
    logps = [answer[0] for answer in answers]
    for ours, theirs in zip(*(torch.autograd.grad(logged["loss"], logps) for logged in (found, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


RUNS = {  # name -> script, family, flags
    "dpo": (dpo, "llama", dict(beta=0.5)),
    "dpo, ipo": (dpo, "llama", dict(loss="ipo", nll_coef=0.5)),
    "dpo, a reference": (dpo, "llama", dict(beta=0.5, reference="BASE", mask_format_tokens=True)),
    "orpo": (orpo, "llama", dict(odds_ratio_coef=0.5)),
    "orpo, fine-tuning": (orpo, "llama", dict(nll_scope="all", odds_ratio_coef=0.0)),
    "orpo, padded": (orpo, "nemotron", dict(nll_scope="all", odds_ratio_coef=0.5)),
    "rpo": (rpo, "llama", dict(nll_coef=0.5)),
    "rpo, a reference": (rpo, "llama", dict(reference="BASE", distance="forward-kl", beta=0.3, nll_coef=0.1)),
    "rpo, a reward model": (rpo, "llama", dict(reference="BASE", reward_model="SCORER", distance="squared", eta=3.0)),
}


@pytest.mark.parametrize("name", RUNS)
def test_metrics_and_gradient_are_those_of_the_models(
    name,
    tiny_model_dir,
    base_dir,  # noqa: F811
    scorer,
    gradients,
    tmp_path,
):
    """Of the step's prompts before it, and of the saved weights after it; the reference has not moved. With coefficient
    0, ORPO's gradient is that of Hugging Face's own loss."""
    script, family, flags = RUNS[name]
    known, model, out = dict(BASE=base_dir, SCORER=scorer), str(tiny_model_dir(family)), tmp_path / "run"
    flags = {key: known.get(value, value) for key, value in flags.items()}
    examples = [row | dict(scores=[min(score, 1) / 4 for score in row["scores"]]) for row in walks(21)]
    data = jsonl(tmp_path / "rows.jsonl", examples if script is rpo else walks(21))
    args = script.Args(model=model, dataset=data, **flags)
    run = dict(model=model, dataset=data, eval_dataset=data, eval_fraction=0.0, batch_size=21, epochs=1)
    run |= dict(learning_rate=1e-3, tokens_per_forward=90, output_dir=str(out))
    seen = gradients(script)
    script.main(script.Args(**run, **flags))
    (line,), (gradient,) = lines_of(out), seen
    gradient = torch.cat([g.flatten() for g in gradient.values()])

    tokenizer, rows = tokenizer_of(model), []
    read = partial(script.preference_rows, tokenizer, 512)
    for row in map(json.loads, open(data)):
        if "reward_model" in flags:
            row[rpo.MODEL_SCORES] = scores_by_transformers(scorer, row["prompt"], row["completions"])
        rows += read(row, Counter(), rpo.rewards_of) if script is rpo else read(row, Counter())
    if flags.get("mask_format_tokens"):
        dpo.mark_format(tokenizer, rows)
    folders = (flags.get("reference") or model, out, model)
    models = [AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager").eval() for f in folders]
    values = [[by_transformers(each, row) for row in rows] for each in models]
    refs = [[answer[0] for answer in answers] for answers in values[0]]
    for prefix, policy, answers in (("eval_", models[1], values[1]), ("", models[2], values[2])):
        nlls = [fine_tuning_loss(policy, row) for row in rows] if flags.get("nll_scope") == "all" else None
        total = definition(script, args, rows, answers, refs, nlls)
        expected = floats(total, 1 / len(rows))
        if not prefix and script is not orpo and "reference" not in flags:
            del expected["rewards/accuracies"]  # all gaps are 0 but for rounding
        assert {k: line[prefix + k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    (total["loss"] / len(rows)).backward()
    theirs = torch.cat([p.grad.flatten() for p in models[2].parameters()])
    assert is_near(gradient, theirs, 2e-4) and (script is orpo or abs(line["eval_rewards/margins"]) > 1e-3)


def fine_tuning_loss(model, row):
    """Hugging Face's own loss on the prompt and the best answer."""
    ids = torch.tensor([row.prompt + row.responses[row.extra["scores"].index(max(row.extra["scores"]))]])
    return model(ids, labels=ids).loss
