"""grpo.py: its equations against worked numbers and brute force, process supervision, and whole runs in this process.

The blocks that it shares with others have test files of their own.
"""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, REPO, f64, killed, near
from test_plumbing import equal, jsonl, lasting, lines_of, on_ranks, refused, talk, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from grpo import Reward, Row


def args_of(**flags) -> grpo.Args:
    return grpo.Args(**dict(model="", dataset="", rewards=()) | flags)


# ---- equations, in numbers

GROUPS = [  # worked numbers: rewards, by the population's deviation, by the sample's, by none
    ([1, 0, 0, 0], [1.732051, *[-0.57735] * 3], [1.5, -0.5, -0.5, -0.5], [0.75, -0.25, -0.25, -0.25]),
    ([0.2, 0.8, 0.5], [-1.224745, 1.224745, 0], [-1, 1, 0], [-0.3, 0.3, 0]),
    ([2, 1, 1, 0], [1.414214, 0, 0, -1.414214], [1.224745, 0, 0, -1.224745], [1, 0, 0, -1]),
]


@pytest.mark.parametrize("rewards, population, sample, none", GROUPS)
def test_advantages_of_a_group(rewards, population, sample, none):
    for scale, expected in dict(population=population, sample=sample, none=none).items():
        near(grpo.group_advantages(f64(rewards), scale, 0.0), [expected])
    near(grpo.group_advantages(f64(rewards, [5.0] * len(rewards)), epsilon=0.0)[0], sample)  # each row by itself
    deviation = f64(rewards).std(1).item()
    near(grpo.group_advantages(f64(rewards)), [[a * deviation / (deviation + 1e-4) for a in sample]])


@pytest.mark.parametrize("size", [3, 7, 12, 64])
def test_equal_rewards_give_advantages_of_exactly_zero(size):
    """Also where rounding makes the mean of equal numbers another number: AdamW would make a step of any remainder."""
    rewards = torch.tensor([0.1, 0.3, 0.7, 1.1, 1 / 3, 2.2, 0.0, 1.0, -5.5]).repeat(size, 1).T
    assert not grpo.group_advantages(rewards).any() and not grpo.group_advantages(rewards, "none").any()
    assert not torch.cat(grpo.step_advantages(list(rewards[0].split([1, size - 1])))).any()


def test_advantages_of_steps():
    rewards = [f64(0.1, 0.7, 0.9), f64(0.3, 0.2)]
    expected = dict(
        population=[1.236795, 2.343400, 1.497172, -1.236795, -0.781133],
        sample=[1.106223, 2.096001, 1.339112, -1.106223, -0.698667],
        none=[-0.34 + 0.26 + 0.46, 0.26 + 0.46, 0.46, -0.14 - 0.24, -0.24],
    )
    for scale, values in expected.items():
        a, b = grpo.step_advantages(rewards, scale, 0.0)
        near(a, values[:3])
        near(b, values[3:])


KL = [(-1, -1.2, 0.018731), (-1, -0.5, 0.148721), (-1, -1, 0.0), (math.log(0.6), math.log(0.5), 0.01565489)]


@pytest.mark.parametrize("logp, ref, kl", KL)
def test_kl_of_a_token(logp, ref, kl):
    near(grpo.kl_estimate(f64(logp), f64(ref)), [kl])


CLIPPED = [(1.25, 1, 1.25), (1.3, 1, 1.28), (0.7, 1, 0.7), (1.3, -1, -1.3), (0.7, -1, -0.8), (0.9, -1, -0.9)]


@pytest.mark.parametrize("ratio, advantage, objective", CLIPPED)
def test_a_clipped_token_has_no_gradient(ratio, advantage, objective):
    logp = f64(math.log(ratio) - 2).requires_grad_()
    found = grpo.clipped_objective(logp, f64(-2), f64(advantage), 0.2, 0.28)
    near(found.detach(), [objective])
    is_clipped = objective != ratio * advantage
    near(torch.autograd.grad(found.sum(), logp)[0], [0.0 if is_clipped else ratio * advantage])


NORMALISED = [  # weights of both answers, their loss, weight of the second where the first does not count
    ("response", [0.25, 0.125], 0.0, 1 / 4),
    ("token", [1 / 6, 1 / 6], 1 / 3, 1 / 4),
    ("constant", [1 / 16, 1 / 16], 0.125, 1 / 8),
]


@pytest.mark.parametrize("normalise, weights, loss, alone", NORMALISED)
def test_normalisers(normalise, weights, loss, alone):
    """An answer of 2 tokens with advantage 1, and one of 4 with -1; at most 8."""
    lengths, advantages = f64(2, 4), f64(1, 1, -1, -1, -1, -1)
    found = grpo.answer_weights(lengths, f64(1, 1), normalise, 8)
    near(found, weights)
    by_token, logps = found.repeat_interleave(lengths.long()), torch.randn(6, dtype=torch.float64).requires_grad_()
    result = grpo.grpo_loss(logps, logps.detach(), None, advantages, by_token, args_of())
    near(result.detach(), loss)
    near(torch.autograd.grad(result, logps)[0], (-advantages * by_token).tolist())
    near(grpo.answer_weights(lengths, f64(0, 1), normalise, 8), [0, alone])
    near(grpo.answer_weights(lengths[None], f64([0, 1]), normalise, 8), [[0, alone]])  # any shape
    assert not grpo.answer_weights(lengths, f64(0, 0), normalise, 8).any()


def test_overlong_penalty():
    table = {16384: 0.0, 18432: -0.5, 20480: -1.0, 20481: -1.0, 7: 0.0}
    near(grpo.overlong_penalty(torch.tensor(list(table)), 20480, 4096), list(table.values()))


@pytest.mark.parametrize("n, correct", [(8, 0), (8, 8), (6, 4)])
def test_pass_at_k(n, correct):
    right = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert grpo.pass_at_k(correct, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))


MAJORITIES = [  # votes (r: right, -: none), k, share
    ("rrwx", 4, 1),
    ("rwwx", 4, 0),
    ("rwrw", 4, 0.5),  # ties count as their share of right votes
    ("rwx", 3, 1 / 3),
    ("rwwrrwxx", 2, (0.5 + 0.5 + 0.5 + 0) / 4),  # the mean over disjoint parts
    ("rrwww", 2, (1 + 0) / 2),  # what is left over does not vote
    ("--r-", 4, 1),  # no answer is no vote
    ("--w-", 4, 0),
    ("----", 4, 0),
    ("rwrr", 1, 0.75),
]


@pytest.mark.parametrize("votes, k, share", MAJORITIES)
def test_majority_of_votes_and_ties(votes, k, share):
    right = [vote == "r" for vote in votes]
    assert grpo.majority_at_k([None if v == "-" else v for v in votes], right, k) == pytest.approx(share)


# ---- a batch of rows


def token_row(numbers: list, **values) -> Row:
    extra = dict(slots=torch.tensor(numbers)) | {name: torch.tensor(x) for name, x in values.items()}
    return Row([1], [[2] * len(numbers)], [[True] * len(numbers)], extra)


def test_metrics_and_loss_of_a_batch():
    """Three tokens of answer 2, one of answer 0; the ratios are 1.5, 0.5, 1 and 1.5."""
    shift, kl = math.log(1.5), lambda gap: math.exp(gap) - gap - 1
    rows = [
        token_row([2, 2, 2], advantages=[1.0, -1.0, 1.0], old_logps=[-2.0, -2.0, -2.0], sampled_logps=[-2.0, -2.5, -2]),
        token_row([0], advantages=[-1.0], old_logps=[-3.0], sampled_logps=[-3.25]),
    ]
    for row, gaps in zip(rows, ([0.1, 0.0, -0.2], [0.3])):
        ratios = dict(zip((3, 1), ([shift, math.log(0.5), 0.0], [shift])))[len(gaps)]
        row.extra["logps"] = row.extra["old_logps"] + torch.tensor(ratios)
        row.extra["ref_logps"] = row.extra["logps"] + torch.tensor(gaps)
    logps = torch.cat([row.extra["logps"] for row in rows])
    weights, args = torch.tensor([0.5, 9.0, 0.25]), args_of(kl_coef=0.1, clip_high=0.28)
    found = {k: float(v) for k, v in grpo.grpo_batch(args, rows, logps, torch.tensor([1.0, 2, 3, 4]), weights).items()}
    kls = [kl(0.1), kl(0.0), kl(-0.2), kl(0.3)]
    objective = [1.28, -0.8, 1.0, -1.5]  # clipped, clipped, inside, beyond the clip on the side that does not matter
    loss = -sum(w * (o - 0.1 * k) for w, o, k in zip((0.25, 0.25, 0.25, 0.5), objective, kls))
    assert found == pytest.approx(
        {
            "loss": loss,
            "entropy": 10.0,
            "kl": sum(kls),
            "clip_ratio/low_mean": 1.0,
            "clip_ratio/high_mean": 1.0,
            "clip_ratio/region_mean": 2.0,
            "sampling/sampling_logp_difference/mean": 0.75,
            "sampling/sampling_logp_difference/max": 0.5,
        },
        abs=1e-5,
    )


def test_with_one_update_the_old_policy_is_the_policy():
    """And a row without reference has a loss that is finite whatever the policy says of it."""
    logps = torch.tensor([-300.0], requires_grad=True)
    row = token_row([0], advantages=[0], sampled_logps=[0])
    logged = grpo.grpo_batch(args_of(), [row], logps, torch.zeros(1), torch.ones(1))
    (logged["loss"] * 0.0).backward()
    assert logps.grad.item() == 0 and all(torch.isfinite(x) for x in logged.values()) and logged["kl"] == 0


@pytest.mark.parametrize(
    "packs, limit, parts",
    [
        (True, 99, [[0, 1, 2], [3]]),
        (True, 9, [[0, 1], [2], [3]]),
        (True, 1, [[0], [1], [2], [3]]),
        (False, 21, [[0, 1, 2], [3]]),
        (False, 20, [[0, 1], [2], [3]]),
    ],
)
def test_answers_to_one_prompt_share_it_in_rows_that_fit(packs, limit, parts):
    """A prompt of 3 tokens and answers of 2, 4 and 4; an equal prompt at another place is another group. An answer
    that is too long for a forward pass is a row of its own."""
    responses = [[10 * k + i for i in range(n)] for k, n in enumerate((2, 4, 4, 2))]
    answers = []
    for k, ids in enumerate(responses):
        extra = {name: torch.tensor(ids) for name in ("slots", "sampled_logps", "advantages")} | dict(place=k // 3)
        answers.append(Row([1, 2, 3], [ids], [[k % 2 > 0] * len(ids)], extra))
    rows = grpo.share_prompts(answers, limit, packs)
    assert [row.responses for row in rows] == [[responses[k] for k in part] for part in parts]
    for row, part in zip(rows, parts):
        assert row.prompt == [1, 2, 3] and row.trained == [answers[k].trained[0] for k in part]
        assert row.extra.pop("place") == part[0] // 3
        assert all(values.tolist() == sum(row.responses, []) for values in row.extra.values()) and len(row.extra) == 3


# ---- process supervision

STEPS = [  # the pieces in which an answer is written, its text at the end of each step, and the tokens of each
    (["a", "\n", "b", "\n", "c"], ["a\n", "a\nb\n", "a\nb\nc"], [2, 2, 1]),
    (["a", "\n"], ["a\n"], [2]),  # nothing follows the last separator
    (["a", "\n", "\n", "b"], ["a\n\n", "a\n\nb"], [3, 1]),  # between two separators there is no step
    (["\n", "a", "\n", "b"], ["\na\n", "\na\nb"], [3, 1]),  # nothing stands before the first one
    (["<think>", "x\ny", "</think>", "a", "\n", "b"], ["<think>x\ny</think>a\n", "<think>x\ny</think>a\nb"], None),
    (["<think>", "x", "\n", "y"], ["<think>x\ny"], None),  # thinking that never ended is one step
]


def prompt_row(text="Hi") -> Row:
    return Row([1], [[]], [[]], dict(prompt=talk(text), kind=""))


@pytest.mark.parametrize("pieces, texts, counts", STEPS)
@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_is_cut_into_steps(pieces, texts, counts, ended, tiny_tokenizer):
    ids = [i for piece in pieces for i in tiny_tokenizer(piece, add_special_tokens=False).input_ids]
    stops = grpo.stop_tokens(tiny_tokenizer)
    found, lengths = grpo.cut_into_steps(tiny_tokenizer, prompt_row(), ids + stops[:1] * ended, stops, "\n")
    assert found == texts and len(lengths) == len(texts) and sum(lengths) == len(ids) + ended
    assert counts is None or lengths == [*counts[:-1], counts[-1] + ended]
    for text, end in zip(texts[:-1], itertools.accumulate(lengths)):
        assert tiny_tokenizer.decode(ids[:end]) == text


def test_every_token_has_the_advantage_of_its_step(tiny_tokenizer):
    """Each step is scored as the answer stands then; two groups, each normalised by itself."""
    stops, seen = grpo.stop_tokens(tiny_tokenizer), []
    write = lambda text: tiny_tokenizer(text, add_special_tokens=False).input_ids + stops[:1]
    table = {"a": 0.1, "a\nb": 0.7, "a\nb\nc": 0.9, "x": 0.3, "x\ny": 0.2}

    def score(rows, texts, ids):
        seen.extend(zip([row.extra["prompt"][0]["content"] for row in rows], texts))
        assert [tiny_tokenizer.decode(i).replace("<|end|>", "").strip() for i in ids] == texts
        return torch.tensor([table.get(text, 5.0) for text in texts])

    answers = []
    for place, texts in {0: ["a\nb\nc", "x\ny"], 4: ["k\nk", "k"]}.items():
        answers += [Row([1], [write(text)], None, dict(prompt_row=prompt_row(str(place)))) for text in texts]
    rewards = [Reward("rule", 1.0, score)]
    args = args_of(step_separator="\n", scale="population", num_generations=2)
    found = grpo.process_advantages(rewards, tiny_tokenizer, answers, stops, args)
    first = [("0", text) for text in ("a", "a\nb", "a\nb\nc", "x", "x\ny")]
    assert seen == first + [("4", text) for text in ("k", "k\nk", "k")]
    expected = [1.236795] * 2 + [2.343400] * 2 + [1.497172] * 2 + [-1.236795] * 2 + [-0.781133] * 2
    near(found[:10], expected, 2e-3)  # the deviation has 1e-4 added
    assert found[10:].tolist() == [0.0] * 6
    assert not len(grpo.process_advantages(rewards, tiny_tokenizer, [], stops, args))  # a rank without groups


def test_thinking_length(tiny_tokenizer):
    count = lambda text: len(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    thought, begun = "<think>up, right, up</think>", "<think>"
    assert grpo.thinking_length(tiny_tokenizer, thought + "12", count(thought + "12")) == count(thought + "12") - count(
        "12"
    )
    assert grpo.thinking_length(tiny_tokenizer, begun + "12", count(begun + "12")) == count(begun + "12")
    assert grpo.thinking_length(tiny_tokenizer, "12", 2) == 0


# ---- whole runs

RULES = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in c[0]["content"])) for c in completions]

def lively(prompts, completions, number, **columns):  # tells the answers to some prompts apart only
    return [v * (n % 3 == 0) for v, n in zip(vowels(prompts, completions), number)]

def column(prompts, completions, truth, **columns):
    return list(truth)

def same(prompts, completions, **columns):
    return [0.1] * len(prompts)

def letter(prompts, completions, **columns):
    return [c[0]["content"].startswith("No") for c in completions]

def no_letter(prompts, completions, number, **columns):  # says of half of the prompts whether an answer is right
    return [float(not c[0]["content"]) if n % 2 else None for c, n in zip(completions, number)]
"""


@pytest.fixture
def train(talker, tmp_path, monkeypatch):
    """train(**flags) runs grpo.main here, on a rule that counts vowels unless told otherwise, and returns the lines of
    its metrics. train(2, **flags): on two ranks. train.usual: the flags of every run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "draw_curves", lambda *args: None)  # it would take longer than the rest of a run
    Path("rules.py").write_text(RULES)
    jsonl(Path("prompts.jsonl"), [dict(prompt=talk(q), number=i, answer="12") for i, q in enumerate(QUESTIONS)])
    usual = dict(model=talker, rewards=("rules.py:vowels",), dataset="prompts.jsonl", eval_fraction=0.0)
    usual |= dict(max_new_tokens=8, batch_size=3, num_generations=3, learning_rate=1e-3, warmup_ratio=0.0)
    usual |= dict(max_steps=2, epochs=4, output_dir="out")

    def go(ranks=0, **flags):
        flags = usual | flags
        if ranks:
            on_ranks(grpo, ranks, **flags)
        else:
            grpo.main(grpo.Args(**flags))
        return lines_of(flags["output_dir"])

    go.usual = usual
    return go


def write_by_hand(monkeypatch, write):
    """Sampling gives the ids that write(prompt ids, number of the answer, most tokens) returns, cut at the most."""

    def sample_answers(model, prompts, numbers, *rest, **options):
        count, answers = Counter(), []
        for prompt in map(tuple, prompts):
            answers.append(write(list(prompt), count[prompt], numbers.shape[1])[: numbers.shape[1]])
            count[prompt] += 1
        return answers, [[0.0] * len(ids) for ids in answers]

    monkeypatch.setattr(grpo, "sample_answers", sample_answers)


def unmoved(folder, before) -> bool:
    return equal(weights_of(folder), weights_of(before))


def test_a_reference_that_differs_at_the_first_step_is_refused(train, monkeypatch, capsys):
    real = grpo.load_reference

    def load(*args):
        reference = real(*args)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.2)
        return reference

    monkeypatch.setattr(grpo, "load_reference", load)
    assert "the KL to the reference is" in refused(grpo, capsys, **train.usual)


@pytest.mark.parametrize("normalise", ["response", "token", "constant"])
def test_the_first_gradients_are_those_of_a_naive_implementation(
    normalise, train, spy, gradients, talker, tiny_model_dir
):
    """Two minibatches, a temperature, another reference, answers cut off and masked: every index in the loop counts."""
    gradients = gradients(grpo)
    reference, sampled, scored = str(tiny_model_dir("llama")), spy(grpo, "sample_answers"), spy(grpo, "total_reward")
    flags = dict(normalise=normalise, temperature=0.8, num_minibatches=2, batch_size=5, kl_coef=0.3)
    flags |= dict(reference=reference, mask_truncated=True, max_steps=1, tokens_per_forward=60, max_new_tokens=5)
    train(**flags)
    (_, prompts, *_), (answers, _) = sampled[0]
    rewards = scored[0][1][0].view(5, 3)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantages = advantages.flatten().tolist()
    policy, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (talker, reference))
    chosen = [place * 3 + k for place in next(grpo.minibatches(5, 1, 2, 0, 0)) for k in range(3)]
    whole = [i for i in chosen if answers[i][-1] == 2]
    assert 0 < len(whole) < len(chosen)
    loss = 0.0
    for i in whole:
        prompt, ids = prompts[i], answers[i]
        states, own = slice(len(prompt) - 1, len(prompt) + len(ids) - 1), []
        for model in (policy, other):
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, states] / 0.8
            own.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
        ratio, gap = (own[0] - own[0].detach()).exp(), own[1].detach() - own[0]
        tokens = sum(len(answers[j]) for j in whole)
        scale = dict(response=len(ids) * len(whole), token=tokens, constant=5 * len(whole))[normalise]
        loss = loss - (ratio * advantages[i] - 0.3 * (gap.exp() - gap - 1)).sum() / scale
    loss.backward()
    direct = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    scale = max(g.abs().max().item() for g in direct.values())
    assert direct.keys() == gradients[0].keys() and len(gradients) == 2 and scale > 1e-3
    for name in direct:
        near(gradients[0][name], direct[name], 1e-4 * scale)


def test_groups_without_spread_are_kept_or_skipped(train, talker, tiny_model_dir):
    flags = dict(rewards=("rules.py:same",), reference=str(tiny_model_dir("llama")), kl_coef=0.5, max_steps=1)
    train(**flags, output_dir="keep")
    (line,) = train(**flags, output_dir="skip", zero_spread="skip")
    assert not unmoved("keep", talker) and unmoved("skip", talker) and line["grad_norm"] == 0 and line["loss"] == 0


def test_skipped_groups_are_in_no_mean(train, spy):
    batches = spy(grpo, "grpo_batch")
    (line,) = train(rewards=("rules.py:lively",), zero_spread="skip", batch_size=6, max_steps=1, max_new_tokens=4)
    used = [weights[torch.cat([row.extra["slots"] for row in rows])] for (_, rows, _, _, weights), _ in batches]
    used = torch.cat(used)
    assert line["frac_reward_zero_std"] == pytest.approx(4 / 6)
    assert used.sum().item() == pytest.approx(1, abs=1e-5) and (used > 0).all()


def test_resampling_replaces_groups_without_spread(train, spy):
    flags = dict(rewards=("rules.py:lively",), zero_spread="resample", max_steps=3, temperature=1.5)
    sampled, advantages, numbers = (
        spy(grpo, "sample_answers"),
        spy(grpo, "group_advantages"),
        spy(grpo, "uniform_numbers"),
    )
    lines = train(**flags)
    drawn = [(step, answer) for (_, step, answers, _), _ in numbers for answer in answers]
    assert len(set(drawn)) == len(drawn)  # each time with other randomness
    calls = [len(prompts) / 3 for (_, prompts, *_), _ in sampled]
    assert calls[0] == max(calls) == 3 and len(calls) > 3 and min(calls) < 3  # only the groups to replace
    trained = [rewards for (rewards, *_), _ in advantages]
    at_first = round(sum(3 - 3 * line["frac_reward_zero_std"] for line in lines))  # of the prompts as they came
    assert sum((r.amax(1) > r.amin(1)).sum().item() for r in trained) > at_first and len(trained) == 3
    for line in lines:  # both over the same answers
        assert line["reward"] == pytest.approx(line["rewards/lively/mean"])
    assert sum(line["resampled"] for line in lines) * 3 == pytest.approx(sum(calls) - 9)
    train(**flags, output_dir="again")
    assert lasting("out") == lasting("again") and unmoved("out", "again")


def test_resampling_gives_up_where_no_prompt_has_spread(train, spy, talker):
    sampled = spy(grpo, "sample_answers")
    (line,) = train(rewards=("rules.py:same",), zero_spread="resample", kl_coef=0.0, max_steps=1)
    assert len(sampled) == 5 and line["frac_reward_zero_std"] == 1 and line["resampled"] == 4
    assert line["grad_norm"] == 0 and unmoved("out", talker)


def test_cut_off_answers_can_be_left_out(train, monkeypatch, talker, capsys):
    a, x = AutoTokenizer.from_pretrained(talker)(["a", "x"], add_special_tokens=False).input_ids
    two_of_three = lambda prompt, k, most: [a + x * most, x * most, a + a + [2]][k]
    write_by_hand(monkeypatch, two_of_three)
    for mask in (True, False):
        (line,) = train(mask_truncated=mask, max_steps=1, max_new_tokens=5, output_dir=f"mask{mask}")
        lengths = {name: line[f"completions/{name}_length"] for name in ("mean", "min", "max")}
        assert lengths == pytest.approx(dict(mean=13 / 3, min=3, max=5))
        assert line["completions/clipped_ratio"] == pytest.approx(2 / 3)
        said = capsys.readouterr().out
        assert "67% of the answers run into --max-new-tokens 5" in said and said.count("(cut off)") == 2
    assert not unmoved("maskTrue", "maskFalse")
    write_by_hand(monkeypatch, lambda prompt, k, most: (a if k else x) * most)
    (line,) = train(mask_truncated=True, max_steps=1, max_new_tokens=5, output_dir="none")  # nothing left
    assert line["grad_norm"] == 0 and unmoved("none", talker)


def test_long_answers_cost_something(train, monkeypatch, spy):
    write_by_hand(monkeypatch, lambda prompt, k, most: [40] * (3 + 2 * k) + [2])  # 4, 6 and 8 tokens
    advantages = spy(grpo, "group_advantages")
    flags = dict(rewards=("rules.py:same",), max_steps=1, eval_fraction=0.17, eval_samples=3)
    (line,) = train(**flags, overlong_cache=4)
    for (rewards, *_), _ in advantages:
        near(rewards, [[0.1, 0.1 - 0.5, 0.1 - 1]] * 3)
    assert line["reward"] == pytest.approx(0.1 - 0.5) and line["frac_reward_zero_std"] == 0
    assert line["rewards/same/mean"] == pytest.approx(0.1) == line["eval_reward"]  # it is not held against a policy


def test_without_a_kl_there_is_no_reference(train, spy):
    models = spy(grpo, "read_model")
    (line,) = train(kl_coef=0.0, max_steps=1)
    assert len(models) == 1 and line["kl"] == 0
    train(max_steps=1, output_dir="with")
    assert len(models) == 3 and not any(p.requires_grad for p in models[2][1].parameters())


def test_the_reference_follows(train):
    kl = lambda **flags: [line["kl"] for line in train(**flags, max_steps=4, learning_rate=3e-3)]
    fixed, every, other = kl(), kl(reference_every=1, output_dir="every"), kl(reference_every=2, output_dir="other")
    assert max(every) < 1e-9 < min(fixed[1:])
    assert other[:2] == fixed[:2] and other[2] < 1e-9 < min(other[1], other[3])
    assert not (Path("every") / "reference").exists() and not unmoved("every", train.usual["model"])


def test_max_kl_stops_and_saves(train, talker, capsys):
    lines = train(max_kl=1e-3, max_steps=8, learning_rate=1e-2, eval_fraction=0.2, epochs=9)
    assert 1 < len(lines) < 8 and lines[-1]["kl"] > 1e-3 and all(line["kl"] <= 1e-3 for line in lines[:-1])
    assert "eval_reward" in lines[-1] and f"stopped after step {len(lines)}" in capsys.readouterr().out
    assert not unmoved("out", talker) and json.loads(Path("out/args.json").read_text())["finished"]


def test_a_policy_learns_what_is_rewarded(train):
    flags = dict(batch_size=6, num_generations=8, max_steps=14, epochs=14, kl_coef=0.0)
    rewards = [line["reward"] for line in train(**flags, learning_rate=3e-3)]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3]), rewards


# ---- evaluation, votes


def test_answers_vote_by_what_they_say_after_their_thinking(train, monkeypatch, talker):
    """Three answers to each of two prompts, and to one without an answer to compare with."""
    said = ["<think>12</think>7", "It is 12.", "<think>7</think>12", "No", "<think>12</think>No", "12"] + ["12"] * 3
    tokenizer = AutoTokenizer.from_pretrained(talker)
    questions, ids = ["One?", "Two?", "Three?"], tokenizer(said, add_special_tokens=False).input_ids

    def write(prompt, k, most):
        which = [i for i, question in enumerate(questions) if question in tokenizer.decode(prompt)]
        return ids[3 * which[0] + k] + [2] if which else [2]

    write_by_hand(monkeypatch, write)
    held_out = [dict(prompt=talk(question), answer="12.0" if i < 2 else None) for i, question in enumerate(questions)]
    flags = dict(eval_dataset=jsonl(Path("held.jsonl"), held_out), rewards=("match:number",), eval_samples=3)
    (line,) = train(**flags, max_steps=1, max_new_tokens=30)
    # right are two of three answers, then one beside two that say no number
    expected = {"eval_pass@1": 1 / 2, "eval_pass@2": 5 / 6, "eval_majority@1": 1 / 2, "eval_majority@2": (0.5 + 0) / 2}
    assert {k: line[k] for k in line if "@" in k} == pytest.approx(expected)
    assert line["eval_reward"] == pytest.approx(3 / 9)
    assert 0 < line["eval_completions/mean_thinking_length"] < line["eval_completions/mean_length"]
    report = json.loads(Path("out/report.json").read_text())
    kinds = {kind: {str(k): line[f"eval_{kind}@{k}"] for k in (1, 2)} for kind in ("pass", "majority")}
    assert report == kinds and Path("out/test_time.png").read_bytes().startswith(b"\x89PNG")


VERIFIABLE = [  # rewards, the one that says which answers are right
    (("rules.py:vowels", "rules.py:no_letter=0", "rules.py:letter"), "no_letter"),  # the first of 0 and 1
    (("match:number", "rules.py:no_letter"), "match"),
    (("rules.py:vowels", "format", "SCORER"), None),
    (("rules.py:nothing", "rules.py:letter"), "letter"),  # one that never applies says nothing
]


@pytest.mark.parametrize("rewards, name", VERIFIABLE)
def test_the_first_reward_that_says_right_or_wrong_is_counted(rewards, name, train, scorer, monkeypatch, spy):
    """pass@1 is the mean of that reward. The others may return any number."""
    with open("rules.py", "a") as f:
        f.write("\ndef nothing(prompts, completions, **columns):\n    return [None] * len(prompts)\n")
    rewards = tuple(scorer if source == "SCORER" else source for source in rewards)
    a, no = AutoTokenizer.from_pretrained(train.usual["model"])(["oa12", "No 7"], add_special_tokens=False).input_ids
    write_by_hand(monkeypatch, lambda prompt, k, most: [[2], a + [2], no + [2]][(k + len(prompt)) % 3])
    scored = spy(grpo, "total_reward")
    (line,) = train(rewards=rewards, eval_fraction=0.5, eval_samples=4, max_steps=1)
    assert "eval_reward" in line and any("@" in k for k in line) == (name is not None)
    assert Path("out/report.json").exists() == Path("out/test_time.png").exists() == (name is not None)
    if name:
        values = scored[-1][1][1][name]
        assert (
            line["eval_pass@1"] == pytest.approx(values[~values.isnan()].mean().item()) and 0 < line["eval_pass@1"] < 1
        )


def test_evaluations_are_at_their_steps_and_use_the_same_randomness(train):
    lines = train(
        rewards=("match:number",), eval_fraction=0.4, eval_every=2, max_steps=5, learning_rate=0.0, eval_samples=4
    )
    assert ["eval_pass@4" in line for line in lines] == [False, True, False, True, True]
    assert "eval_pass@8" not in lines[-1]
    evaluated = [{k: v for k, v in line.items() if k.startswith("eval_")} for line in lines if "eval_reward" in line]
    assert evaluated[0] == evaluated[1] == evaluated[2] and evaluated[0]["eval_completions/mean_length"] > 1


# ---- thinking budgets


@pytest.fixture
def budgets(talker, tmp_path, monkeypatch):
    """budgets(flags of thinking_budgets.py) -> the accuracies that it writes, on six questions with the answer 12."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPO / "recipes")
    import thinking_budgets

    jsonl(Path("held.jsonl"), [dict(prompt=talk(q), answer="12") for q in QUESTIONS])

    def go(**flags):
        usual = dict(model=talker, dataset="held.jsonl", reward="match:number", output_dir="report", max_new_tokens=30)
        thinking_budgets.main(thinking_budgets.Args(**usual | flags))
        assert Path("report/test_time.png").read_bytes().startswith(b"\x89PNG")
        return json.loads(Path("report/report.json").read_text())["thinking_budget"]

    return go


@pytest.mark.parametrize("opens", ["policy", "template", "nobody"])
def test_thinking_is_closed_at_its_budget(opens, budgets, monkeypatch, talker, tmp_path, spy):
    """A policy that thinks for ever unless it is stopped, and then knows the answer."""
    tokenizer = AutoTokenizer.from_pretrained(talker)
    if opens == "template":
        shutil.copytree(talker, tmp_path / "opens")
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|assistant|>'", "'<|assistant|><think>'")
        tokenizer.save_pretrained(tmp_path / "opens")
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids

    def write(prompt, k, most):
        if tokenizer.decode(prompt).rstrip().endswith("</think>"):
            return ids(" 12") + [2]
        if opens == "nobody":
            return ids("up") * 100
        return ids("<think>" * (opens == "policy") + "up up up up up up up") * 10

    write_by_hand(monkeypatch, write)
    scored = spy(grpo, "total_reward")
    model = talker if opens != "template" else str(tmp_path / "opens")
    assert budgets(budgets=(0, 12), model=model) == {"0": 1.0, "12": float(opens != "nobody")}
    none, some = (args[2] for args, _ in scored)
    assert set(none) <= {"<think> </think> 12", "<think></think> 12"}
    if opens == "nobody":  # an answer without thinking is not interrupted
        return
    for text in some:
        thought = text.partition("</think>")[0].partition("<think>")[2]
        assert text.count("<think>") == text.count("</think>") == 1 and text.endswith("</think> 12") and "up" in thought
        assert len(ids(thought)) <= 12 + 1  # and the space before the tag


@pytest.mark.parametrize("flags, says", [(dict(budgets=(2, 30)), "--budgets"), (dict(budgets=(-1,)), "--budgets"),
                                         (dict(budgets=(2,), reward="rules.py:vowels"), "right or wrong")])  # fmt: skip
def test_budgets_that_cannot_be_measured_are_refused(flags, says, budgets, capsys):
    Path("rules.py").write_text(RULES)
    with pytest.raises(SystemExit) as end:
        budgets(**flags)
    assert end.value.code == 2 and says in capsys.readouterr().err and not Path("report").exists()


# ---- resume


LONG = dict(batch_size=4, epochs=4, max_steps=0, num_minibatches=2, save_every=2, eval_fraction=0.17, eval_every=3)
LONG |= dict(reference_every=3, kl_coef=0.5, zero_spread="resample", rewards=("rules.py:lively",))  # eight steps
LONG |= dict(temperature=0.7, lr_schedule="cosine", num_iterations=2)


def test_a_killed_run_resumed_is_the_uninterrupted_one(train, monkeypatch, spy):
    flags = LONG
    train(**flags, output_dir="whole")
    killed(monkeypatch, grpo, "log_metrics", 6, lambda: train(**flags, output_dir="killed"))
    models = spy(grpo, "read_model")
    lines = train(**flags, output_dir="killed", resume=True)
    assert len(lines) == 8 and lasting("killed") == lasting("whole") and unmoved("killed", "whole")
    # the reference of step 3, not the one of the start
    assert models[1][0][1] == "killed/checkpoint-4/reference" and lines[3]["kl"] < 1e-2
    assert not unmoved("killed/checkpoint-4/reference", train.usual["model"])
    assert not unmoved("killed/checkpoint-4/reference", "killed/checkpoint-4")
    a, b = (torch.load(f"{name}/checkpoint-6/state.pt", weights_only=True) for name in ("whole", "killed"))
    assert equal(a | dict(seconds=0), b | dict(seconds=0))


def test_a_run_killed_while_it_writes_its_report_is_not_finished(train, monkeypatch):
    flags = dict(rewards=("match:number",), eval_fraction=0.4, save_every=1)
    train(**flags, output_dir="whole")
    killed(monkeypatch, grpo, "write_report", 1, lambda: train(**flags, output_dir="killed"))
    train(**flags, output_dir="killed", resume=True)
    assert Path("killed/report.json").read_bytes() == Path("whole/report.json").read_bytes()
    assert unmoved("killed", "whole")


# ---- ranks, families, precision

RANKED = {
    "resample": dict(
        rewards=("rules.py:lively",), batch_size=5, num_minibatches=2, num_iterations=2, eval_fraction=0.17
    )
    | dict(zero_spread="resample"),
    "steps of a reward model": dict(step_separator=" ", rewards=("SCORER", "match:number"), eval_fraction=0.17)
    | dict(reference_every=1, mask_truncated=True),
}


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_are_one(name, train, scorer):
    flags = dict(RANKED[name])
    flags["rewards"] = tuple(scorer if source == "SCORER" else source for source in flags["rewards"])
    train(**flags, output_dir="one")
    train(2, **flags, output_dir="two")
    for x, y in zip(lasting("one"), lasting("two"), strict=True):
        # of four updates in a step, those after the first follow AdamW, which enlarges the rounding of small gradients
        rel = 1e-3 if "num_iterations" in flags else 1e-5
        assert x == pytest.approx(y, rel=rel, abs=1e-5), f"step {x['step']}"
    a, b = weights_of("one"), weights_of("two")
    for weight in a:  # a fifth of one step at the learning rate 1e-3
        torch.testing.assert_close(a[weight], b[weight], rtol=0, atol=2e-4)
    reports = [path.read_text() for path in (Path("one/report.json"), Path("two/report.json")) if path.exists()]
    assert len(set(reports)) == (name == "steps of a reward model")


# ---- bad input

BAD = {  # what is wrong: (flags, what the message names)
    "a group of one": (dict(num_generations=1), "--num-generations"),
    "no room for a prompt": (dict(max_new_tokens=2048), "--max-new-tokens"),
    "no room for any prompt": (dict(max_length=10), "--dataset"),
    "a cache longer than an answer": (dict(overlong_cache=9), "--overlong-cache"),
    "a cache and steps": (dict(overlong_cache=4, step_separator="\n"), "--step-separator"),
    "a reference and no KL": (dict(kl_coef=0.0, reference="GPT2"), "--reference"),
    "a reference that is built otherwise": (dict(reference="GPT2", reference_every=1), "--reference-every"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_refused_in_one_sentence(wrong, train, tiny_model_dir, capsys):
    flags, named = BAD[wrong]
    flags = {k: str(tiny_model_dir("gpt2")) if v == "GPT2" else v for k, v in flags.items()}
    assert named in refused(grpo, capsys, **train.usual | flags) and not Path("out").exists()
