"""orpo.py: its loss against closed forms and against Hugging Face's models, and what it does to the chosen and the rejected answers."""

import itertools
import json
import math
from collections import Counter

import orpo
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from orpo import Row
from test_plumbing import in_child, jsonl, killed_at_rename, lasting, lines_of, on_ranks, refused, same_run, snapshot, talk, tokenizer_of
from test_plumbing import weights_of
from test_reward_model import walks
from transformers import AutoModelForCausalLM, AutoTokenizer

f64 = lambda *values: torch.tensor(values, dtype=torch.float64, requires_grad=True)

# ------------------------------------------------------------------------------------------------------------------------ the loss


@given(st.floats(-8, math.log10(700)))
def test_log1mexp(magnitude):
    """log(1 - e^x) = log(2 e^(x/2) sinh(-x/2)), which loses nothing near 0; far from it, -e^x and a half of its square."""
    x = -(10**magnitude)
    exact = math.log(2 * math.sinh(-x / 2)) + x / 2 if x > -20 else -math.exp(x) - math.exp(2 * x) / 2
    if x <= -1e-6:
        assert orpo.log1mexp(f64(x)).item() == pytest.approx(exact, rel=1e-12)
        assert orpo.log1mexp(torch.tensor([x])).item() == pytest.approx(exact, rel=1e-5, abs=1e-37)
    else:
        assert orpo.log1mexp(f64(x)).item() == pytest.approx(math.log(1e-6), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bug16_a_certain_or_an_impossible_answer_has_finite_loss_and_gradient(dtype):
    values = [0.0, -1e-8, -1e-3, -30.0, -1e4]
    for pair in itertools.product(values, values):
        better, worse = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in pair)
        loss = orpo.odds_ratio_loss(orpo.log_odds_ratio(better, worse))
        gradients = torch.autograd.grad(loss, (better, worse))
        assert all(torch.isfinite(v) for v in (loss, *gradients)), pair
        assert gradients[0] <= 0 <= gradients[1], pair


LOG = math.log
WORKED = [  # METHODS.md A6.5: mean log-probabilities of better and worse, log odds ratio, L_OR, and the whole loss at lambda = 0.1
    (LOG(0.6), LOG(0.3), 1.252763, 0.251314, 0.535957),
    (LOG(0.5), LOG(0.5), 0.0, 0.693147, 0.762462),
    (-0.4, -1.5, 1.957150, 0.132133, 0.413213),
]


@pytest.mark.parametrize("better, worse, ratio, loss, total", WORKED)
def test_odds_ratio_loss(better, worse, ratio, loss, total):
    found = orpo.log_odds_ratio(f64(better), f64(worse))
    assert found.item() == pytest.approx(ratio, abs=1e-6) and orpo.odds_ratio_loss(found).item() == pytest.approx(loss, abs=1e-6)
    assert terms([pair(1, 1)], f64(better, worse))[0].item() == pytest.approx(total, abs=1e-6)


def test_the_gradient_is_minus_delta_times_h():
    """Eqs. 8 to 10 but for their sign; METHODS.md A6.5."""
    better, worse = f64(-0.4), f64(-1.5)
    loss = lambda w, l: orpo.odds_ratio_loss(orpo.log_odds_ratio(w, l))
    gradients = [g.item() for g in torch.autograd.grad(loss(better, worse), (better, worse))]
    p, q = math.exp(-0.4), math.exp(-1.5)
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert delta == pytest.approx(0.123776, abs=1e-6)
    assert gradients == pytest.approx([-delta / (1 - p), delta / (1 - q)], abs=1e-12)
    assert gradients == pytest.approx([-0.375442, 0.159326], abs=1e-6)
    for x in (-1e-3, -0.1, -0.7, -5.0, -25.0):  # on both sides of -log 2, where log1mexp changes its form
        assert torch.autograd.gradcheck(loss, (f64(x), f64(-1.5)), eps=1e-7) and torch.autograd.gradcheck(loss, (f64(-0.4), f64(x)), eps=1e-7)


def pair(n: int, m: int) -> Row:
    """A pair of a better answer of n tokens and a worse one of m."""
    return ranking([n, m], [1.0, 0.0])


def ranking(lengths: list, scores: list, trained=None) -> Row:
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    return Row([1, 4], [[2] * n for n in lengths], trained or [[True] * n for n in lengths], dict(pairs=pairs, scores=scores))


def terms(rows: list, logps, entropy=None, top=None, **flags):
    """The loss of orpo_terms and what it logs, by name."""
    entropy, top = torch.zeros_like(logps) if entropy is None else entropy, torch.zeros_like(logps) > 0 if top is None else top
    loss, seen = orpo.orpo_terms(orpo.Args(**flags), rows, logps, entropy, top)
    return loss, dict(zip(orpo.LOGGED, seen.tolist(), strict=True))


def test_bug15_the_mean_over_tokens_not_the_sum():
    better, worse = [-0.2, -0.4, -0.6], [-1.0, -2.0]
    once = terms([pair(3, 2)], f64(*better, *worse))[0].item()
    assert once == pytest.approx(0.413213, abs=1e-6)
    assert terms([pair(6, 2)], f64(*better, *better, *worse))[0].item() == pytest.approx(once, abs=1e-12)
    assert terms([pair(3, 6)], f64(*better, *worse * 3))[0].item() == pytest.approx(once, abs=1e-12)


def by_definition(rows: list, values: list, coef: float) -> dict:
    """Eqs. 3 to 7 word for word, in floats: what is logged of a batch, summed over its rows.

    values: of each row, of each of its answers (log-probabilities, entropies, whether the likeliest, mean log-likelihood to fine-tune on)."""
    total = Counter({name: 0.0 for name in orpo.LOGGED})
    mean = lambda x: sum(x) / len(x)
    for row, answers in zip(rows, values, strict=True):
        P, scores = [math.exp(mean(logps)) for logps, *_ in answers], row.extra["scores"]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(P)), 2) if scores[i] > scores[j]]
        for i, j in pairs:
            ratio = math.log(P[i] / (1 - P[i])) - math.log(P[j] / (1 - P[j]))
            logps, entropies, tops, _ = answers[i]
            each = {"log_odds_chosen": ratio, "log_odds_ratio": -math.log1p(math.exp(-ratio)), "loss": coef * math.log1p(math.exp(-ratio))}
            each |= {"rewards/chosen": coef * math.log(P[i]), "rewards/rejected": coef * math.log(P[j]), "rewards/accuracies": P[i] > P[j]}
            each |= {"rewards/margins": coef * math.log(P[i] / P[j]), "logps/chosen": mean(logps), "logps/rejected": mean(answers[j][0])}
            total.update({k: v / len(pairs) for k, v in (each | dict(entropy=mean(entropies), mean_token_accuracy=mean(tops))).items()})
        nll = -answers[scores.index(max(scores))][3]
        total.update(dict(nll_loss=nll, loss=nll))
    return dict(total)


def test_a_batch_of_rankings_is_the_sum_over_its_prompts():
    """Whatever their sizes: a prompt with five pairs counts as much as one with a single pair; ties are no pairs."""
    rows = [ranking([3, 1, 4, 2], [1.0, 5.0, 0.0, 1.0]), pair(2, 5), ranking([1, 2, 2], [0.0, 2.0, 1.0])]
    generator = torch.Generator().manual_seed(0)
    parts = [[[-3 * torch.rand(n, generator=generator).double() for _ in range(3)] for n in map(len, row.responses)] for row in rows]
    values = [[(a.tolist(), b.tolist(), (c < -1).tolist(), a.mean().item()) for a, b, c in answers] for answers in parts]
    logps, entropy, top = (torch.cat([answer[k] for answers in parts for answer in answers]) for k in range(3))
    for coef in (0.0, 0.1, 2.0):
        loss, seen = terms(rows, logps, entropy, top < -1, odds_ratio_coef=coef)
        assert seen == pytest.approx(by_definition(rows, values, coef), rel=1e-6) and loss.item() == pytest.approx(seen["loss"])


def test_an_answer_left_without_trained_tokens_by_the_cut_is_dropped(tiny_tokenizer):
    """A ranking's best, cut before the assistant's turn in it, is in no pair, and the likelihood is that of the best that is left."""
    best = [dict(role="user", content="up " * 40), dict(role="assistant", content="So.")]
    row = read(tiny_tokenizer, dict(prompt=talk("Which way?"), completions=["No", best, "Up."], scores=[0, 2, 1]), max_length=30)
    assert len(row.responses) == 2 and row.extra["pairs"] == [(1, 0)] and all(map(any, row.trained))
    n, m = map(len, row.responses)
    logps = f64(*[-1.5] * n, *[-0.4] * m)
    assert terms([row], logps)[0].item() == pytest.approx(0.413213, abs=1e-6) == terms([row], logps)[1]["loss"]
    with_prompt = f64(*[-1.5] * n, *[-0.4] * (len(row.prompt) - 1 + m))
    assert terms([orpo.with_prompt(row)], with_prompt)[1]["nll_loss"] == pytest.approx(0.4)


def test_only_trained_tokens_count():
    """Of an answer of several turns, the user's tokens have no log-probability among those given."""
    marks = [[True, False, True], [True, True]]
    assert terms([ranking([3, 2], [1, 0], marks)], f64(-0.2, -0.6, -1, -2))[0].item() == pytest.approx(0.413213, abs=1e-6)


# --------------------------------------------------------------------------------------------- rows, and Hugging Face's likelihoods


def read(tokenizer, row, **flags) -> Row:
    (row,) = orpo.preferences(orpo.Args(**flags), tokenizer, flags.get("max_length", 512))(row, Counter())
    return row


def by_transformers(model, row: Row) -> list:
    """Of each answer alone: log-probabilities, entropies, and whether the likeliest, of its trained tokens."""
    found = []
    for response, trained in zip(row.responses, row.trained):
        logits = model(torch.tensor([row.prompt + response])).logits[0, len(row.prompt) - 1 : -1][torch.tensor(trained)].double()
        p, target = logits.softmax(-1), torch.tensor(response)[torch.tensor(trained)]
        found.append((p.gather(-1, target[:, None])[:, 0].log(), -(p * p.log()).sum(-1), logits.argmax(-1) == target))
    return found


def fine_tuning_loss(model, row: Row, scope: str):
    """Hugging Face's own loss on the best answer."""
    best = row.extra["scores"].index(max(row.extra["scores"]))
    ids = row.prompt + row.responses[best]
    hidden = [-100] * len(row.prompt) if scope == "response" else row.prompt
    return model(torch.tensor([ids]), labels=torch.tensor([hidden + row.responses[best]])).loss


def loss_by_transformers(model, rows: list, coef: float, scope: str):
    """The mean over the rows, with its graph."""
    total = 0
    for row in rows:
        total += fine_tuning_loss(model, row, scope)
        P, pairs = [logps.mean().exp() for logps, *_ in by_transformers(model, row)], row.extra["pairs"]
        total += coef * sum(torch.nn.functional.softplus(-((P[i] / (1 - P[i])).log() - (P[j] / (1 - P[j])).log())) for i, j in pairs) / len(pairs)
    return total / len(rows)


@torch.no_grad()
def metrics_by_transformers(folder, rows: list, coef: float, scope: str) -> dict:
    """What is logged of the rows, by a model that is loaded with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    values = []
    for row in rows:
        likelihood = -fine_tuning_loss(model, row, scope).item()  # of the best answer, and asked of no other
        values.append([(*(x.tolist() for x in answer), likelihood) for answer in by_transformers(model, row)])
    return {name: value / len(rows) for name, value in by_definition(rows, values, coef).items()}


def test_the_end_of_the_answer_counts_in_both_terms(tiny_tokenizer):
    """As much as any other token, which the authors' code leaves out of the likelihood; and the odds take in no position beyond it."""
    row = read(tiny_tokenizer, dict(prompt=talk("Which way?"), chosen="Up.", rejected="Right, then up."))
    n, m = map(len, row.responses)
    assert [r[-1] for r in row.responses] == [tiny_tokenizer.eos_token_id] * 2 and all(map(all, row.trained))
    logps = f64(*[-0.4] * n, *[-1.5] * m)
    for coef in (0.0, 0.1):
        (gradient,) = torch.autograd.grad(terms([row], logps, odds_ratio_coef=coef)[0], logps)
        assert gradient.tolist() == pytest.approx([(-1 - coef * 0.375442) / n] * n + [coef * 0.159326 / m] * m, abs=1e-6)


@pytest.mark.parametrize("long", [True, False])
def test_with_prompt(long, tiny_tokenizer):
    """The prompt is trained once, before the best answer; the odds are those of the answers alone."""
    prompt = talk("Which way?") if long else ""
    plain = read(tiny_tokenizer, dict(prompt=prompt, completions=["Up.", "Right, then up.", "No"], scores=[0, 2, 1])) if long else ranking(
        [1, 3, 2], [0.0, 2.0, 1.0])._replace(prompt=[1])  # fmt: skip
    row = orpo.with_prompt(plain)
    assert [row.prompt + r for r in row.responses] == [plain.prompt + r for r in plain.responses]
    head = len(plain.prompt) - 1
    assert row.trained == [[best] * head + [True] * len(r) for best, r in zip((False, True, False), plain.responses)]
    a, b, c = (torch.linspace(-1, -2 - i, len(r), dtype=torch.float64) for i, r in enumerate(plain.responses))
    before = torch.linspace(-3, -4, head, dtype=torch.float64)
    whole, apart = terms([row], torch.cat([a, before, b, c]), nll_scope="all")[1], terms([plain], torch.cat([a, b, c]))[1]
    nll = -torch.cat([before, b]).mean().item()
    assert whole["nll_loss"] == pytest.approx(nll) and whole["loss"] == pytest.approx(apart["loss"] - apart["nll_loss"] + nll)
    assert {k: v for k, v in whole.items() if k not in ("loss", "nll_loss")} == pytest.approx(
        {k: v for k, v in apart.items() if k not in ("loss", "nll_loss")}
    )


def test_with_prompt_keeps_the_marks_of_several_turns(tiny_tokenizer):
    chosen = [dict(role="assistant", content="Up."), *talk("Why?", "So.")]
    plain = read(tiny_tokenizer, dict(prompt=talk("Which way?"), chosen=chosen, rejected="No."))
    row = orpo.with_prompt(plain)
    assert not all(plain.trained[0]) and row.trained[0] == [True] * (len(plain.prompt) - 1) + plain.trained[0]
    content = [0.0] * (len(plain.prompt) - 1) + [1.0] * sum(plain.trained[0])
    assert row.extra["content"] == [content, [1.0] * len(plain.responses[1])]


# --------------------------------------------------------------------------------------------------------------------------- runs


def usable(k: int, n: int, seed=0) -> list:
    """Rankings with something to compare."""
    return [row for row in walks(n, k, seed) if len(set(row["scores"])) > 1]


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on rankings of 3: 21 rows and 5 a step, so that the last step of an epoch has one."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", usable(3, 40)[:21])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=5, learning_rate=1e-3, eval_fraction=0.0, eval_dataset=data)
    return flags | dict(tokens_per_forward=90, save_every=2, epochs=2, odds_ratio_coef=0.5, max_new_tokens=4, show=1)


@pytest.fixture(scope="module", params=["response", "all"])
def finished(request, short_run, tmp_path_factory):
    """(output directory, flags) of short_run, with either scope of the likelihood. Read only."""
    out, flags = tmp_path_factory.mktemp("runs") / request.param, short_run | dict(nll_scope=request.param)
    assert in_child(orpo.main, orpo.Args(**flags, output_dir=str(out))) == 0
    return out, flags


def rows_of(flags: dict) -> list:
    tokenizer = tokenizer_of(flags["model"])
    return [read(tokenizer, json.loads(line)) for line in open(flags["dataset"])]


def logged(line: dict, names, prefix="") -> dict:
    return {name: line[prefix + name] for name in names}


def test_bug29_the_saved_model_is_the_trained_one(finished):
    """Every metric of the last evaluation is what transformers alone makes of the directory; the generation config ends answers."""
    out, flags = finished
    (*_, last), rows = lines_of(out), rows_of(flags)
    expected = metrics_by_transformers(out, rows, 0.5, flags["nll_scope"])
    assert logged(last, orpo.LOGGED, "eval_") == pytest.approx(expected, abs=2e-4)
    assert last["step"] == 10 and last["epoch"] == 2.0 and last["loss"] < lines_of(out)[0]["loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert tokenizer.chat_template == tokenizer_of(flags["model"]).chat_template


def test_a_step_is_of_the_rows_picked_for_it(finished):
    (out, flags), rows = finished, rows_of(finished[1])
    expected = metrics_by_transformers(flags["model"], [rows[i] for i in orpo.pick(21, 5, 0, 0)], 0.5, flags["nll_scope"])
    assert logged(lines_of(out)[0], orpo.LOGGED) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, short_run, tiny_model_dir, tmp_path):
    """The first step's metrics are those that transformers alone finds, and the second step's loss is another."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), batch_size=21, max_steps=2, eval_dataset="", nll_scope="all", save_every=0)
    orpo.main(orpo.Args(**flags, output_dir=str(tmp_path / "run")))
    first, second = lines_of(tmp_path / "run")
    assert logged(first, orpo.LOGGED) == pytest.approx(metrics_by_transformers(flags["model"], rows_of(flags), 0.5, "all"), abs=2e-3)
    assert second["loss"] < first["loss"]


def first_gradient(script, monkeypatch, **flags) -> torch.Tensor:
    """The gradient of a run's first step, as the optimiser gets it."""
    seen = []

    def spy(model, *rest):
        seen.append(torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]))
        return real(model, *rest)

    with monkeypatch.context() as patch:
        real = script.take_step
        patch.setattr(script, "take_step", spy)
        script.main(script.Args(**flags, max_steps=1))
    return seen[0]


@pytest.mark.parametrize("family, scope, coef", [
    ("llama", "response", 0.5), ("llama", "all", 0.5), ("llama", "all", 0.0), ("nemotron", "response", 0.0), ("nemotron", "all", 0.5),
])  # fmt: skip
def test_bug04_the_gradient_is_that_of_the_mean_over_prompts(family, scope, coef, short_run, tiny_model_dir, monkeypatch, tmp_path):
    """However the rows are split into forwards, with gradient checkpointing too, and where rows cannot lie end to end (Nemotron); with
    coefficient 0 it is that of Hugging Face's own loss on the best answers."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), batch_size=21, nll_scope=scope, odds_ratio_coef=coef, eval_dataset="")
    model = AutoModelForCausalLM.from_pretrained(flags["model"], attn_implementation="eager").eval()
    loss = loss_by_transformers(model, rows_of(flags), coef, scope)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for i, change in enumerate((dict(tokens_per_forward=10**5), dict(tokens_per_forward=1), dict(gradient_checkpointing=True))):
        gradient = first_gradient(orpo, monkeypatch, **flags | change, output_dir=str(tmp_path / str(i)))
        assert (gradient - expected).abs().max() < 2e-4 * expected.abs().max(), change
        assert lines_of(tmp_path / str(i))[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
        if family == "nemotron":  # always one sequence a forward
            break


def test_tokens_per_forward_changes_no_step(finished, tmp_path):
    out, flags = finished
    orpo.main(orpo.Args(**flags | dict(tokens_per_forward=10**5), output_dir=str(tmp_path / "run")))
    for ours, theirs in zip(lasting(tmp_path / "run"), lasting(out), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("family, scope", [("llama", "all"), ("nemotron", "response")])
def test_bug04_ranks_change_nothing(family, scope, short_run, tiny_model_dir, tmp_path):
    """The last step of an epoch has one row, so that a rank has none; metrics, weights and files are those of one process."""
    flags = short_run | dict(model=str(tiny_model_dir(family)), max_steps=5, eval_every=2, nll_scope=scope)
    on_ranks(orpo, 2, **flags, output_dir=str(tmp_path / "many"))
    orpo.main(orpo.Args(**flags, output_dir=str(tmp_path / "one")))
    for ours, theirs in zip(lasting(tmp_path / "many"), lasting(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = weights_of(tmp_path / "many"), weights_of(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert snapshot(tmp_path / "many").keys() == snapshot(tmp_path / "one").keys()


@pytest.mark.parametrize("number", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 5, 6, 9))])
def test_bug28_killed_before_a_rename_and_resumed(number, finished, tmp_path):
    out, flags = finished
    args = orpo.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, orpo, args, number) == -9
    assert in_child(orpo.main, args) == 0
    same_run(tmp_path / "run", out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.4, 0.7])
def test_bug28_killed_and_resumed(moment, finished, tmp_path):
    out, flags = finished
    args = orpo.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    in_child(orpo.main, args, kill_after=moment * lines_of(out)[-1]["seconds"])
    assert in_child(orpo.main, args) == 0
    same_run(tmp_path / "run", out)


def test_bfloat16(short_run, tmp_path):
    """FSDP's mixed precision on one rank: near the float32 run."""
    for dtype in ("bfloat16", "float32"):
        args = orpo.Args(**short_run | dict(max_steps=3), dtype=dtype, output_dir=str(tmp_path / dtype))
        assert in_child(orpo.main, args) == 0
    for ours, theirs in zip(lines_of(tmp_path / "bfloat16"), lines_of(tmp_path / "float32"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.03)


def test_one_model_is_loaded(short_run, monkeypatch, tmp_path):
    """And no reference beside it."""
    loaded, real = [], orpo.load_model
    monkeypatch.setattr(orpo, "load_model", lambda *args, **options: loaded.append(real(*args, **options)) or loaded[-1])
    orpo.main(orpo.Args(**short_run | dict(max_steps=1), output_dir=str(tmp_path / "run")))
    assert len(loaded) == 1 and {p.name for p in (tmp_path / "run").glob("**/model*.safetensors")} == {"model.safetensors"}


def similar_pairs(n: int) -> list:
    """Pairs that share most of what they say."""
    ways = ["up up right", "right up up", "up right up", "right right up"]
    return [dict(prompt=talk(f"Walk {i}!"), chosen=f"I go {ways[i % 4]}, yes.", rejected=f"I go {ways[i % 4]}, no.") for i in range(n)]


def test_fine_tuning_raises_the_rejected_answers_too_and_the_odds_ratio_parts_them(tiny_model_dir, tmp_path):
    """The paper's figure 3, and its ablation of lambda."""
    flags = dict(model=str(tiny_model_dir("llama")), dataset=jsonl(tmp_path / "rows.jsonl", similar_pairs(24)), eval_fraction=0.25, eval_every=1)
    flags |= dict(epochs=12, batch_size=9, learning_rate=5e-3, show=0)
    ends = {}
    for coef in (0.0, 5.0):
        orpo.main(orpo.Args(**flags, odds_ratio_coef=coef, output_dir=str(tmp_path / str(coef))))
        lines = lines_of(tmp_path / str(coef))
        ends[coef] = [{name: line[f"eval_{name}"] for name in orpo.LOGGED} for line in (lines[0], lines[-1])]
    for first, last in ends.values():
        assert last["logps/chosen"] > first["logps/chosen"] + 2 and last["nll_loss"] < first["nll_loss"]
    (first, plain), (_, parted) = ends[0.0], ends[5.0]
    assert plain["logps/rejected"] > first["logps/rejected"] + 2  # with the chosen ones, which is what they begin with
    assert parted["logps/rejected"] < plain["logps/rejected"] - 0.5 and parted["rewards/accuracies"] == 1.0
    assert parted["log_odds_chosen"] > plain["log_odds_chosen"] + 1 and parted["log_odds_ratio"] > -0.2


# ---------------------------------------------------------------------------------------------------------------------- bad input

OK = dict(prompt="a", completions=["b", "c"], scores=[1.0, 0.0])
BAD_ROWS = {  # rows -> what the message must say
    "a score that is missing": ([OK, OK, OK | dict(scores=[1.0, None])], "row 2"),
    "a score that is no number": ([OK, OK | dict(scores=[1.0, math.nan])], "row 1"),
    "other columns": ([dict(text="a")], "chosen"),
    "no rejected": ([dict(prompt="a", chosen="b")], "rejected"),
    "completions without scores": ([dict(prompt="a", completions=["b", "c"])], "scores"),
    "nothing usable": ([OK | dict(scores=[1.0, 1.0])], "nothing to compare"),
}


@pytest.mark.parametrize("rows, says", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("option", ["dataset", "eval_dataset"])
def test_bad_rows_are_refused(option, rows, says, short_run, tmp_path, capsys):
    orpo.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = refused(orpo, capsys, **short_run | {option: str(tmp_path / "rows.parquet")}, output_dir=str(tmp_path / "run"))
    assert f"--{option.replace('_', '-')}" in said and says in said


@pytest.mark.parametrize("flags", [
    dict(odds_ratio_coef=-0.1), dict(odds_ratio_coef=math.nan), dict(batch_size=0), dict(epochs=0), dict(max_length=0),
    dict(eval_fraction=1.0), dict(model="no/such/model"), dict(dataset="nowhere.jsonl"), dict(eval_dataset="nowhere.jsonl"),
    dict(max_grad_norm=0.0),
], ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))  # fmt: skip
def test_bad_arguments_are_refused(flags, short_run, tmp_path, capsys):
    said = refused(orpo, capsys, **short_run | flags, output_dir=str(tmp_path / "run"))
    ((name, value),) = flags.items()
    assert f"--{name.replace('_', '-')}" in said or str(value) in said
    assert not (tmp_path / "run" / "args.json").exists()


def test_a_loss_that_is_no_number_ends_the_run(short_run, tmp_path, capsys):
    assert "lower the learning rate" in refused(orpo, capsys, **short_run | dict(learning_rate=1e30), output_dir=str(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["hh_rlhf.jsonl.gz", "hh_rlhf_raw_implicit.jsonl", "pref_polite.jsonl"])
def test_real_pairs(name, real_data, tmp_path, capsys):
    """Message lists, HH-RLHF's strings with the prompt inside, and short pairs: the first step is what transformers alone finds."""
    folder = real_data / "stories260K-hf"
    data = list(orpo.load_rows("--dataset", str(real_data / name)).select(range(9)))
    tokenizer, rows = tokenizer_of(folder), []
    for row in data:
        try:
            rows.append(read(tokenizer, row))
        except orpo.Drop:
            pass
    flags = dict(model=str(folder), dataset=jsonl(tmp_path / "rows.jsonl", data), eval_fraction=0, batch_size=len(rows), epochs=3)
    orpo.main(orpo.Args(**flags, learning_rate=2e-3, output_dir=str(tmp_path / "run")))
    assert f"{len(rows)} rows from 9" in capsys.readouterr().out and len(rows) > 3
    lines = lines_of(tmp_path / "run")
    assert logged(lines[0], orpo.LOGGED) == pytest.approx(metrics_by_transformers(folder, rows, 0.1, "response"), rel=1e-4, abs=1e-3)
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"] - 0.05
