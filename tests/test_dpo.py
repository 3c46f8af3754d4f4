"""dpo.py: its losses against worked numbers, its options in whole runs. Its equations are in test_preferences.py.

Also the blocks `preferences` and `reference`, which other scripts share with it.
"""

import copy
import gc
import math
import os
import shutil
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TEMPLATE
from test_plumbing import (
    CPU,
    TEMPLATES,
    dressed,  # noqa: F401
    every_template,
    in_child,
    jsonl,
    lines_of,
    on_ranks,
    refused,
    talk,
    tokenizer_of,
    weights_of,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dpo
import orpo
import reward_model
import rpo
from dpo import Row

slow = pytest.mark.slow


def f64(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def args_of(**flags) -> dpo.Args:
    return dpo.Args(**dict(model="", dataset="") | flags)


# ---- the losses


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slope(loss, at: float) -> float:
    h = f64(at)
    return torch.autograd.grad(loss(h).sum(), h)[0].item()


WORKED = [  # at h = 1.5
    (lambda h: dpo.dpo_loss(h, 0.1), 0.62095705, -0.04625702),
    (lambda h: dpo.dpo_loss(h, 0.1, 0.1), 0.63595705, -0.03625702),
    (lambda h: dpo.dpo_loss(h, 0.5), 0.38687101, -0.16041065),
    (lambda h: dpo.dpo_loss(h, 0.5, 0.1), 0.46187101, -0.11041065),
    (lambda h: dpo.ipo_loss(h, 0.1), 12.25, 2 * (1.5 - 5)),
    (lambda h: dpo.ipo_loss(h, 0.5), 0.25, 2 * (1.5 - 1)),
]


@pytest.mark.parametrize("loss, value, gradient", WORKED)
def test_losses_of_worked_examples(loss, value, gradient):
    assert loss(f64(1.5)).item() == pytest.approx(value, abs=1e-8)
    assert slope(loss, 1.5) == pytest.approx(gradient, abs=1e-8)


def bandit_loss(logps, ref_logps, better: int, worse: int, **flags):
    """The loss of one pair of actions, each an answer of one token, as `dpo_batch` computes it."""
    places = torch.tensor([better, worse])
    extra = dict(pairs=[(0, 1)], scores=[1.0, 0.0], ref_logps=ref_logps[places])
    logps, row = logps[places], Row([1], [[better], [worse]], [[True], [True]], extra)
    return dpo.dpo_batch(args_of(**flags), [row], logps, -logps.detach(), logps > -1)["loss"]


@pytest.mark.parametrize(
    "beta, best", [(1.0, [0.35995554, 0.58707636, 0.0529681]), (0.5, [0.1822301, 0.80790504, 0.00986486])]
)
def test_dpo_is_least_at_its_closed_form(beta, best):
    """All pairs, labelled with Bradley-Terry's probabilities: the best policy is ref exp(r / beta) / Z (eq. 4)."""
    ref, reward = f64(0.5, 0.3, 0.2).detach(), f64(1.0, 2.0, 0.0).detach()

    def gradient(policy):
        logits, loss = policy.log().requires_grad_(), 0
        for i, j in [(i, j) for i in range(3) for j in range(3) if i != j]:
            probability = torch.sigmoid(reward[i] - reward[j])
            loss = loss + probability * bandit_loss(logits.log_softmax(-1), ref.log(), i, j, beta=beta)
        return torch.autograd.grad(loss, logits)[0].abs().max().item()

    closed = ref * (reward / beta).exp()
    closed /= closed.sum()
    assert closed.tolist() == pytest.approx(best, abs=1e-6)
    assert gradient(closed) < 1e-9 and gradient(ref.clone()) > 0.01


@pytest.mark.parametrize("loss, value", [("sigmoid", -logsigmoid(-0.1)), ("ipo", (-1 - 5) ** 2)])
def test_an_answer_of_format_tokens_only_leaves_the_loss_finite(loss, value):
    """One that was cut behind its header, for example: nothing of it counts in h."""
    extra = dict(pairs=[(0, 1)], scores=[1.0, 0.0], content=[[0.0, 0.0], [1.0]], ref_logps=f64(0, -2).detach())
    row, logps = Row([1], [[2, 2], [2]], [[True] * 2, [True]], extra), f64(-1, -2, -1)
    logged = dpo.dpo_batch(args_of(loss=loss), [row], logps, -logps.detach(), logps > -1)
    assert logged["loss"].item() == pytest.approx(value)
    assert all(math.isfinite(x.item()) for x in logged.values())
    assert torch.autograd.grad(logged["loss"], logps)[0][:2].tolist() == [0, 0]


# ---- online merging


STEP, TAU = f64(0.02, -0.01, 0.005, -0.03).detach(), f64(0.5, 0.4, -0.2, 0.1).detach()


def test_the_mask_of_the_largest_entries():
    largest = lambda x, share: dpo.keep_mask(x, share, True, None)
    assert largest(STEP, 0.5).tolist() == [1, 0, 0, 1] and largest(TAU, 0.5).tolist() == [1, 1, 0, 0]
    assert largest(STEP.view(2, 2), 1.0).tolist() == [[1, 1], [1, 1]]
    assert largest(STEP, 1e-9).tolist() == [0, 0, 0, 1]  # at least one


def test_ondare_and_onties_by_hand():
    """Kept entries are not rescaled, and the weights are applied before the larger is chosen where the signs differ."""
    dare = dpo.online_merge(STEP, TAU, torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 0, 0]), 0.1, False)
    ties = dpo.online_merge(STEP, TAU, torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1, 0, 0]), 0.1, True)
    assert dare.tolist() == pytest.approx([0.068, 0.04, 0.0045, -0.027], abs=1e-12)
    assert ties.tolist() == pytest.approx([0.068, 0.04, 0, -0.027], abs=1e-12)
    step, tau = f64(-0.3, -0.03, 0.3, 0.0, 0.3), f64(0.5, 0.5, 0.5, 0.5, 0.0)
    merged = dpo.online_merge(step, tau, torch.ones(5), torch.ones(5), 0.1, True)
    assert merged.tolist() == pytest.approx([-0.27, 0.05, 0.32, 0.05, 0.27], abs=1e-12)


def merging(optimizer: str, keep: float, weight: float, tau=1.0, seed=0):
    """A layer of 40 x 50 and a function that makes one merged step of AdamW on it; returns the layer's change."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer, gradient = torch.nn.Linear(50, 40, bias=False), torch.randn(40, 50)
    adam = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    if optimizer != "adamw":
        args = args_of(optimizer=optimizer, merge_keep=keep, merge_weight=weight, seed=seed)
        dpo.merge_online(args, adam, [tau * torch.ones(40, 50)])

    def step():
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        adam.step()
        return layer.weight.detach() - before

    return step


def test_ondare_keeps_a_random_share_new_at_each_step():
    """Of the step and of tau apart, the same for a seed; the moments of AdamW are those of whole steps."""
    step, again, other = (merging("ondare", 0.3, 0.0, seed=seed) for seed in (0, 0, 1))
    first, second = step(), step()
    assert 0.25 < (first != 0).float().mean() < 0.35 and not torch.equal(first != 0, second != 0)
    assert torch.equal(again(), first) and not torch.equal(other() != 0, first != 0)
    whole = merging("adamw", 1.0, 0.0)
    for merged in (first, second):
        assert torch.allclose(merged[merged != 0], whole()[merged != 0], rtol=1e-3, atol=0)
    tau_only, both = merging("ondare", 0.3, 1.0)(), merging("ondare", 0.3, 0.5)()
    assert 0.25 < (tau_only != 0).float().mean() < 0.35
    assert torch.allclose(tau_only[tau_only != 0], torch.tensor(1.0))
    assert (both != 0).float().mean() == pytest.approx(1 - 0.7**2, abs=0.05)  # one mask for both would give 0.3


def test_onties_keeps_the_largest_of_the_step_and_of_tau_apart():
    tau = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    for weight, whole in ((0.0, merging("adamw", 1.0, 0.0)()), (1.0, tau)):
        kept = merging("onties", 0.3, weight, tau)() != 0
        assert kept.sum() == 600 and whole[kept].abs().min() >= whole[~kept].abs().max()


@pytest.mark.parametrize("optimizer", ["ondare", "onties"])
def test_merging_nothing_is_adamw_to_the_last_bit(optimizer):
    merged, adam = merging(optimizer, 1.0, 0.0), merging("adamw", 1.0, 0.0)
    assert all(torch.equal(merged(), adam()) for _ in range(3))


# ---- reading preferences


def read(tokenizer, row, notes=None, max_length=512, rewards_of=None) -> Row:
    notes = Counter() if notes is None else notes
    (row,) = dpo.preference_rows(tokenizer, max_length, row, notes, rewards_of)
    return row


def texts(tokenizer, row: Row):
    return tokenizer.decode(row.prompt), [tokenizer.decode(r) for r in row.responses]


SPOKEN = ("human", "Which way?"), ("gpt", "Up."), ("gpt", "Right.")
GOOD, BAD = ([dict(role="assistant", content=text)] for text in ("Up.", "Right."))
WAY, HH = talk("Which way?"), "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Which way?\n\nAssistant:"
SHAREGPT, UP, RIGHT = ([{"from": role, "value": text}] for role, text in SPOKEN)
CHAT = ("<|bos|><|user|>Which way?<|end|><|assistant|>", ["Up.<|end|>", "Right.<|end|>"])
TEXT = ("<|bos|>Which way?", [" Up.<|end|>", " Right.<|end|>"])
SEVERAL_TURNS = (CHAT[0], ["Up.<|end|><|user|>Why?<|end|><|assistant|>So.<|end|>", "Right.<|end|>"])
LAYOUTS = [
    (dict(prompt="Which way?", chosen=" Up.", rejected=" Right."), TEXT),
    (dict(prompt="Which way?", chosen=GOOD, rejected=BAD), CHAT),
    (dict(chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),
    (dict(chosen=SHAREGPT + UP, rejected=SHAREGPT + RIGHT), CHAT),
    (dict(prompt=WAY, chosen=WAY + GOOD, rejected=WAY + BAD), CHAT),  # the prompt once more
    (dict(chosen=f"{HH} Up.", rejected=f"{HH} Right."), (f"<|bos|>{HH}", TEXT[1])),  # HH-RLHF
    (dict(chosen=f"{HH} Up, so.", rejected=f"{HH} Up."), (f"<|bos|>{HH}", [" Up, so.<|end|>", " Up.<|end|>"])),
    (dict(prompt=WAY, completions=[GOOD, BAD], scores=[0.5, 0.1]), CHAT),
    (dict(prompt=WAY, chosen=GOOD + talk("Why?", "So."), rejected=BAD), SEVERAL_TURNS),
]


@pytest.mark.parametrize("row, expected", LAYOUTS, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_every_layout(row, expected, tiny_tokenizer, tmp_path):
    """reward_model.py, too, gives a pair, and trains no tokens."""
    (data, _) = dpo.load_rows("--dataset", jsonl(tmp_path / "rows.jsonl", [row, dict.fromkeys(row)]), "train")
    args = reward_model.Args(model="", dataset="")
    (ranked,) = reward_model.ranking_rows(args, tiny_tokenizer, 512, {}, data, Counter())
    for row in (read(tiny_tokenizer, data), ranked):
        assert texts(tiny_tokenizer, row) == expected and [pair[:2] for pair in row.extra["pairs"]] == [(0, 1)]
        better, worse = row.extra.get("scores") or row.extra["ranks"]
        assert better > worse and list(map(len, row.trained)) == list(map(len, row.responses))


def test_a_ranking_has_all_pairs_of_unequal_score(tiny_tokenizer):
    notes, ranking = Counter(), dict(prompt=WAY, completions=["a", "b", " ", "c", "a"], scores=[0.5, 2, 9, 0.5, 1])
    row = read(tiny_tokenizer, ranking, notes)
    assert row.extra == dict(pairs=[(1, 0), (1, 2), (1, 3), (3, 2)], scores=[0.5, 2, 0.5, 1])
    assert notes["pairs"] == 4 and notes["answers dropped: empty"] == 1
    chosen, rejected, share, best = (values.tolist() for values in dpo.pair_indices([row, row], CPU))
    assert chosen == [1, 1, 1, 3, 5, 5, 5, 7] and rejected == [0, 2, 3, 2, 4, 6, 7, 6]
    assert share == [0.25] * 8 and best == [1, 5]


def test_long_answers_are_cut_and_prompts_never(tiny_tokenizer):
    row, notes = dict(prompt=" up" * 19, chosen=" right" * 39, rejected=" the" * 29), Counter()
    assert list(map(len, read(tiny_tokenizer, row, max_length=500).responses)) == [40, 30]
    kept = read(tiny_tokenizer, row, notes, max_length=50)
    assert len(kept.prompt) == 20 and list(map(len, kept.responses)) == [30, 30] == list(map(len, kept.trained))
    assert notes["answers cut at --max-length"] == 1
    assert [r[-1] in dpo.stop_tokens(tiny_tokenizer) for r in kept.responses] == [False, True]
    assert list(map(len, read(tiny_tokenizer, row, max_length=21).responses)) == [1, 1]
    for limit in (20, 5):
        with pytest.raises(dpo.Drop, match="prompt beyond --max-length"):
            read(tiny_tokenizer, row, max_length=limit)


@pytest.mark.parametrize("rewards_of, pairs", [(None, [(0, 1)]), (lambda row: [-s for s in row["scores"]], [(1, 0)])])
def test_an_answer_left_without_trained_tokens_by_the_cut_is_dropped(rewards_of, pairs, tiny_tokenizer):
    """Cut within the user's turn before the assistant's, with its score; the other answers still teach."""
    best = [dict(role="user", content="up " * 40), dict(role="assistant", content="So.")]
    row, options = dict(prompt=WAY, completions=[best, "Up.", "No"], scores=[2, 1, 0]), dict(rewards_of=rewards_of)
    kept = read(tiny_tokenizer, row, max_length=30, **options)
    assert kept.extra == dict(pairs=pairs, scores=[-1.0, 0.0] if rewards_of else [1.0, 0.0])
    assert len(kept.responses) == 2 == len(kept.trained) and all(map(any, kept.trained))
    with pytest.raises(dpo.Drop, match="nothing to compare"):
        read(tiny_tokenizer, dict(prompt=WAY, completions=[best, "Up."], scores=[2, 1]), max_length=30, **options)


USELESS = [
    (dict(chosen=WAY + GOOD, rejected=WAY + GOOD), "nothing to compare"),
    (dict(prompt=WAY, completions=["b", "c"]), "nothing to compare"),
    (dict(prompt=WAY, chosen=[], rejected=BAD), "nothing to compare"),
    (dict(prompt=WAY, chosen="up " * 40, rejected="up " * 40 + "right"), "nothing to compare"),  # alike where cut
    (dict(prompt="", chosen=GOOD, rejected=BAD), "empty prompt"),
]


@pytest.mark.parametrize("row, why", USELESS, ids=lambda value: str(value)[:70])
def test_rows_that_are_dropped(row, why, tiny_tokenizer):
    with pytest.raises(dpo.Drop, match=why):
        read(tiny_tokenizer, row, max_length=30)


# ---- format tokens


def marked(tokenizer, row: dict, **options) -> list:
    row = read(tokenizer, row, **options)
    dpo.mark_format(tokenizer, [row])
    found = []
    for response, trained, content in zip(row.responses, row.trained, row.extra["content"], strict=True):
        tokens = [t for t, keep in zip(response, trained) if keep]
        parts = [[t for t, c in zip(tokens, content, strict=True) if c == mark] for mark in (1.0, 0.0)]
        found.append(tuple(map(tokenizer.decode, parts)))
    return found


SEVERAL = dict(prompt=talk("Which way?", "Up.", "Why?"), chosen=GOOD + talk("Why?", "So."), rejected=BAD)


@every_template
def test_an_end_of_turn_is_format(name, dressed):  # noqa: F811
    """The generation prompt holds the header, so that an answer has none of its own; in later turns too."""
    one_turn = name == "glm"  # its turns have no end of their own
    row = dict(prompt=WAY, chosen=GOOD, rejected=BAD) if one_turn else SEVERAL
    (up, up_end), (right, right_end) = marked(dressed(name), row)
    end = TEMPLATES[name][3]
    assert (right.strip(), right_end.strip()) == ("Right.", end)
    assert (up.replace(" ", ""), up_end.strip()) == (("Up.", end) if one_turn else ("Up.So.", end * 2))


NO_PROMPT = TEMPLATE.split("{% if add_generation_prompt %}")[0]  # published templates have no generation prompt too
PADS = "('<|pad|><|pad|>' if message['role'] == 'assistant' else '') + message['content']"
THINKS = TEMPLATE.replace("message['content']", PADS)


@pytest.mark.parametrize("template, header", [(NO_PROMPT, "<|assistant|>"), (THINKS, "<|pad|><|pad|>")])
def test_what_stands_before_an_answer_is_format(template, header, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assert marked(tokenizer, SEVERAL) == [("Up.So.", f"{header}<|end|>" * 2), ("Right.", f"{header}<|end|>")]
    short = dict(prompt=WAY, chosen="12", rejected="21")
    limit = len(read(tokenizer, short).prompt) + header.count("<") + 1  # cut behind the first token of its content
    assert marked(tokenizer, short, max_length=limit) == [("1", header), ("2", header)]
    begun = dict(prompt=talk("Count.", "one,"), chosen=" two", rejected=" ten")  # its header is in the prompt
    assert marked(tokenizer, begun) == [(" two", "<|end|>"), (" ten", "<|end|>")]


# ---- reference


def is_near(ours, theirs, tolerance=1e-5) -> bool:
    return bool((ours.double() - theirs.double()).abs().max() <= tolerance * theirs.abs().max())


def by_transformers(model, row: Row) -> list:
    """Of each answer alone: log-probabilities, entropies, and whether the likeliest, of its trained tokens."""
    found = []
    for response, trained in zip(row.responses, row.trained):
        trained = torch.tensor(trained)
        logits = model(torch.tensor([row.prompt + response])).logits[0, len(row.prompt) - 1 : -1][trained].double()
        logps, target = logits.log_softmax(-1), torch.tensor(response)[trained]
        entropy = -(logps.exp() * logps).sum(-1)
        found.append((logps.gather(-1, target[:, None])[:, 0], entropy, logits.argmax(-1) == target))
    return found


def loaded(folder, **flags):
    return dpo.load_model(
        AutoModelForCausalLM, str(folder), tokenizer_of(folder), args_of(**flags), CPU, torch.float32, dpo.token_logps
    )


@torch.no_grad()
@pytest.mark.parametrize("limit", [60, 9999])
def test_reference_log_probabilities_are_in_the_order_of_the_rows(limit, base_dir, tiny_model_dir):
    """Although forwards take rows by length. The reference is the policy itself, or another model."""
    folder = tiny_model_dir("llama")
    rows = [read(tokenizer_of(folder), row) for row in walks(7)]
    for reference in ("", base_dir):
        inputs = (tokenizer_of(folder), args_of(tokens_per_forward=limit, reference=reference), CPU, torch.float32)
        dpo.set_reference_logps(rows, dpo.reference_logps(loaded(folder), rows, dpo.response_sums, *inputs))
        model = AutoModelForCausalLM.from_pretrained(reference or folder, attn_implementation="eager").eval()
        for row in rows:
            expected = [logps.sum().item() for logps, *_ in by_transformers(model, row)]
            assert row.extra["ref_logps"].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
def test_the_reference_is_asked_about_the_rows_of_the_steps_only(steps):
    """In the order of the data set, whatever the order in which the steps take them."""
    rows, args = [object() for _ in range(10)], args_of(batch_size=3, seed=1)
    trained_on = {id(row) for step in range(steps) for row in dpo.batch_rows(rows, args, step)}
    assert dpo.rows_of_steps(rows, args, steps) == [row for row in rows if id(row) in trained_on]


# ---- whole runs


def walks(n: int, seed=0) -> list:
    """Pairs and rankings by how often an answer says `up`; everything else in them is noise."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    noise = lambda: [("right", "left")[number(0, 2)] for _ in range(number(1, 8))]
    rows = []
    for i in range(n):
        answers = [" ".join(["up"] * (j + 1) + noise()) for j in range(2 + i % 2)]
        rows.append(dict(prompt=talk(f"Walk {i % 7}!"), completions=answers, scores=list(range(len(answers)))))
    return rows


def another(folder, out, noise=0.02, seed=1) -> str:
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
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0)
    return flags | dict(batch_size=5, epochs=2, learning_rate=1e-3, tokens_per_forward=150, save_every=3)


@pytest.fixture(scope="module")
def base_dir(tiny_model_dir, tmp_path_factory):
    """A stand-in for the checkpoint that `llama` was fine-tuned from, and for another reference."""
    return another(tiny_model_dir("llama"), tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("script", [dpo, rpo])
def test_a_reference_that_computes_something_else_is_refused(
    script, pairs_run, base_dir, monkeypatch, tmp_path, capsys
):
    """Unless another model is named: then the first loss is not known."""
    real = script.set_reference_logps
    shifted = lambda rows, ref_logps: real(rows, ref_logps + 9 * torch.arange(len(ref_logps)) % 5)
    monkeypatch.setattr(script, "set_reference_logps", shifted)
    flags = pairs_run | dict(output_dir=str(tmp_path / "run"))
    assert "the preference loss is" in (said := refused(script, capsys, **flags)) and "before the first update" in said
    script.main(script.Args(**flags, reference=base_dir, overwrite=True))


def merge_on_ranks(flags: dict):
    """Three merged steps on random gradients, the same on every rank; saves the whole weights.

    The layers have an uneven number of rows, one of them a single row."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.Linear(7, 1))
    gradients = [[torch.randn(p.shape) for p in model.parameters()] for _ in range(3)]
    tau = [torch.randn(p.shape) for p in model.parameters()]
    if world > 1:
        dist.init_process_group("gloo")
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    like = lambda x, p: distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = args_of(optimizer=flags["optimizer"], merge_keep=0.5, merge_weight=0.01)
    dpo.merge_online(args, adam, [like(t, p) for t, p in zip(tau, model.parameters())])
    for step in gradients:
        for p, g in zip(model.parameters(), step):
            p.grad = like(g, p)
        adam.step()
    weights = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    if rank == 0:
        torch.save(weights, flags["out"])


@pytest.mark.parametrize("optimizer", ["ondare", "onties"])
def test_merging_on_ranks_keeps_the_entries_of_whole_weights(optimizer, tmp_path):
    script = SimpleNamespace(Args=dict, main=merge_on_ranks)
    on_ranks(script, 3, optimizer=optimizer, out=str(tmp_path / "many"))
    assert in_child(merge_on_ranks, dict(optimizer=optimizer, out=str(tmp_path / "one"))) == 0
    ours, theirs = (torch.load(tmp_path / name) for name in ("many", "one"))
    assert len(ours) == 4 and all(is_near(a, b, 1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "optimizer, family, other", [("onties", "gpt2", False), ("ondare", "mixtral", False), ("ondare", "llama", True)]
)
def test_merging_with_weight_1_adds_what_the_reference_has_learnt(
    optimizer, family, other, short_run, tiny_model_dir, tmp_path
):
    """At every step, and nothing else. Also where embeddings are tied (GPT-2), where an expert had no token (Mixtral),
    and where the policy is another model than the reference."""
    source, base = str(tiny_model_dir(family)), another(tiny_model_dir(family), tmp_path / "base")
    reference = another(source, tmp_path / "reference", seed=5) if other else source
    flags = short_run | dict(model=source, reference=reference, eval_dataset="", max_steps=3, save_every=0)
    flags |= dict(optimizer=optimizer, merge_base=base, merge_keep=1.0, merge_weight=1.0)
    dpo.main(dpo.Args(**flags, output_dir=str(tmp_path / "run")))
    start, tuned, base, end = map(weights_of, (source, reference, base, tmp_path / "run"))
    assert all(torch.allclose(end[k], start[k] + 3 * (tuned[k] - base[k]), atol=1e-5) for k in start)


# ---- what all scripts that read preferences must do


@pytest.fixture(scope="module")
def pairs_run(tiny_model_dir, tmp_path_factory):
    """Flags of a short run, for any of the scripts, on 12 pairs of which three each share a prompt."""
    rows = [dict(prompt=talk(f"Walk {i % 4}!"), chosen=f"up {i}", rejected=f"right {i % 3}") for i in range(12)]
    data = jsonl(tmp_path_factory.mktemp("pairs") / "rows.jsonl", [row | dict(margin=0.5) for row in rows])
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, batch_size=3, max_steps=1)
    return flags | dict(learning_rate=1e-3, eval_fraction=0.25)


LEARNING = {"dpo": (dpo, {}), "orpo": (orpo, {}), "rpo": (rpo, {}), "reward_model": (reward_model, {})}
LEARNING |= {"onties": (dpo, dict(optimizer="onties", merge_weight=1e-4))}


@pytest.mark.parametrize("name", LEARNING)
def test_a_simple_preference_is_learnt(name, base_dir, tiny_model_dir, tmp_path):
    script, more = LEARNING[name]
    rows = [
        dict(prompt=talk(f"Walk {i}!"), chosen=f"up {i % 5}", rejected=f"right {i % 3}", margin=1) for i in range(80)
    ]
    flags = dict(model=str(tiny_model_dir("llama")), dataset=jsonl(tmp_path / "rows.jsonl", rows), eval_fraction=0.2)
    flags |= dict(epochs=3, batch_size=16, learning_rate=3e-3, eval_every=4)
    flags |= more | (dict(merge_base=base_dir) if more else {})
    script.main(script.Args(**flags, output_dir=str(tmp_path / "run")))
    first, *_, last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    right = "eval_accuracy" if script is reward_model else "eval_rewards/accuracies"
    assert last[right] > 0.9 and last["eval_loss"] < first["eval_loss"]


FREED = [
    (dpo, ["reference"]),
    (dpo, ["merge_base"]),
    (rpo, ["reward_model", "reference"]),
]


@pytest.mark.parametrize("script, others", FREED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_one_model_is_in_memory_while_training(script, others, pairs_run, base_dir, monkeypatch, tmp_path):
    with torch.random.fork_rng():
        AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1).save_pretrained(tmp_path / "rm")
    tokenizer_of(base_dir).save_pretrained(tmp_path / "rm")
    models, policies, load, step = [], [], script.prepare_model, script.take_step

    def loads(*arguments, **options):
        model = load(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    def steps(model, *rest):
        policies.append([ref() is model for ref in models if ref() is not None])
        return step(model, *rest)

    monkeypatch.setattr(script, "prepare_model", loads)
    monkeypatch.setattr(script, "take_step", steps)
    flags = pairs_run | {name: str(tmp_path / "rm") if name == "reward_model" else base_dir for name in others}
    flags |= dict(optimizer="ondare") if "merge_base" in others else {}
    gc.disable()  # else Python may happen to collect in time; the script may collect by itself
    try:
        script.main(script.Args(**flags, output_dir=str(tmp_path / "run")))
    finally:
        gc.enable()
    assert policies == [[True]] and len(models) == (2 if others == ["reference"] else 3)


# ---- bad input


BAD_ARGUMENTS = [
    dict(loss="ipo", label_smoothing=0.1),
    dict(label_smoothing=0.5),
    dict(optimizer="ondare"),
    dict(merge_base="."),
    dict(beta=0.0),
    dict(merge_keep=0.0),
    dict(merge_keep=1.5),
    dict(merge_weight=1.5),
]


@pytest.mark.parametrize("flags", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_refused(flags, short_run, tmp_path, capsys):
    said = refused(dpo, capsys, **short_run | flags, output_dir=str(tmp_path / "run"))
    *_, name = flags
    assert f"--{name.replace('_', '-')}" in said


def test_a_merge_base_of_another_shape_is_refused(short_run, tiny_model_dir, tmp_path, capsys):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    del other.model.layers[1:]
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path / "other")
    tokenizer_of(tiny_model_dir("llama")).save_pretrained(tmp_path / "other")
    flags = short_run | dict(optimizer="ondare", merge_base=str(tmp_path / "other"), output_dir=str(tmp_path / "run"))
    assert "--merge-base" in refused(dpo, capsys, **flags) and not (tmp_path / "run").exists()


# ---- real data


@pytest.mark.parametrize("name", ["hh_rlhf.jsonl.gz", "kwise_xstest.jsonl"])
def test_real_preferences(name, real_data, tmp_path, capsys):
    data = dpo.load_rows("--dataset", str(real_data / name), "train").select(range(20))
    data.to_json(tmp_path / "rows.jsonl")
    model, limit, rows, notes = str(real_data / "stories260K-hf"), 300, [], Counter()
    for row in data:
        try:
            rows += dpo.preference_rows(tokenizer_of(model), limit, row, notes)
        except dpo.Drop:
            pass
    assert 5 < len(rows) < 20 and notes["answers cut at --max-length"] > 0
    assert all(len(row.prompt + response) <= limit for row in rows for response in row.responses)
    flags = dict(model=model, dataset=str(tmp_path / "rows.jsonl"), max_length=limit, max_steps=2, batch_size=4)
    dpo.main(dpo.Args(**flags, eval_fraction=0.2, mask_format_tokens=True, output_dir=str(tmp_path / "run")))
    said, (first, last) = capsys.readouterr().out, lines_of(tmp_path / "run")
    assert f"{len(rows)} rows from 20" in said and f"{notes['pairs']} pairs" in said
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and math.isfinite(last["eval_loss"])
