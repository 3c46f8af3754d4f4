"""ppo.py: the method against closed forms and brute force, the sampler against the model, the rewards against their own scripts, whole runs.

Most runs happen in this process, by `ppo.main`; a chain of sft.py, reward_model.py and ppo.py is run as a user does, and killed and resumed.
"""

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, REPO, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grpo
import ppo
import reward_model

CPU = torch.device("cpu")
VOLATILE = {"eps", "tokens_per_second", "seconds", "peak_memory_mb"}  # what a metrics line says of time and memory


# ------------------------------------------------------------------------------------------------------------------------ helpers


def user(text):
    return [dict(role="user", content=text)]


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def steady(lines):
    """Metrics lines without the fields that differ between two equal runs."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]


def weights(folder, sub=""):
    return load_file(Path(folder) / sub / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_near(a: list, b: list, tolerance=1e-5):
    """Two lists of metrics lines, but for time and memory."""
    assert len(a) == len(b)
    for x, y in zip(steady(a), steady(b)):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k] == pytest.approx(y[k], rel=tolerance, abs=tolerance), f"{k} at step {x['step']}"


def load_policy(folder):
    return ppo.load_frozen(AutoModelForCausalLM, str(folder), CPU, torch.float32, ppo.token_logps)


def load_scorer(folder):
    return ppo.load_frozen(
        AutoModelForSequenceClassification, str(folder), CPU, torch.float32, ppo.response_scores, num_labels=1
    )


def make_reward_model(folder, tokenizer, seed=1, shift=0.25, family="llama", vocab_size=None):
    """A random reward model, its head too."""
    config = tiny_config(family, tokenizer)
    config.num_labels, config.score_shift, config.vocab_size = 1, shift, vocab_size or len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def plain_logits(model, ids):
    """What the untouched Hugging Face model says of one sequence, by itself: [T, V]."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def settings(**options):
    """Args for functions that read neither --model nor --dataset."""
    return ppo.Args(**dict(model="", dataset="") | options)


def answers_of(policy, tokenizer, prompts, numbers, temperature=1.0, top_p=1.0, more_stops=(), **options):
    """Samples and the rows they make: (rows with their answers, sampled log-probabilities, kept ids, args)."""
    args = settings(temperature=temperature, top_p=top_p, **options)
    asked, n = [ppo.Row(p, [[]]) for p in prompts], len(numbers) // len(prompts)
    tokens, logps, kept = ppo.sample_answers(
        policy, asked, numbers, [*ppo.stop_tokens(tokenizer), *more_stops], args.tokens_per_forward, temperature, top_p
    )
    return (
        [row._replace(responses=[tokens[i * n + k]]) for i, row in enumerate(asked) for k in range(n)],
        logps,
        kept,
        args,
    )


QUESTIONS = [
    "What is the best path?",
    "Write a letter",
    "Is it safe? Say so.",
    "Sum: 4 3 5",
    "up",
    "Where does the robot start? I'd like to talk about it.",
]
REPLIES = ["right", "Dear Ann, thank you", "No", "12", "Right, up, right", "I read it"]


@pytest.fixture(scope="module")
def talker(tiny_model_dir, tmp_path_factory):
    """A tiny policy that has learnt to give short answers and to end them, mostly."""
    policy, tokenizer = load_policy(tiny_model_dir("llama"))
    encode_row = ppo.demonstrations(tokenizer, 512, everything=False, allow_special=False)
    rows = [
        row
        for q, r in zip(QUESTIONS, REPLIES)
        for row in encode_row(dict(prompt=user(q), completion=[dict(role="assistant", content=r)]), Counter())
    ]
    forwards, target = ppo.pack(rows, CPU)
    optimizer = torch.optim.Adam(policy.requires_grad_(True).parameters(), 3e-3)
    for _ in range(25):
        (-policy.token_logps(forwards, target)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("talker")
    policy.config._attn_implementation = None
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(tiny_tokenizer, tmp_path_factory):
    """A random reward model with the policy's tokenizer."""
    return make_reward_model(tmp_path_factory.mktemp("scorer") / "scorer", tiny_tokenizer)


@pytest.fixture(scope="module")
def other_tokenizer():
    """Another vocabulary and another template, which puts a line break behind the end of each turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["[END]", "[PAD]", "[TURN]"]
    learn = dict(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(QUESTIONS * 2 + REPLIES, trainers.BpeTrainer(**learn))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="[END]", pad_token="[PAD]", extra_special_tokens=special[2:]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[TURN]' + m['role'] + '\n' + m['content'] + '[END]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[TURN]assistant\n' }}{% endif %}"
    )
    return tokenizer


VOWELS = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in c[0]["content"])) for c in completions]
"""


@pytest.fixture
def train(talker, tmp_path, monkeypatch):
    """train(**options) runs ppo.main here, on a rule that counts vowels unless told otherwise, and returns the lines of its metrics."""
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(VOWELS)
    write_rows(
        "prompts.jsonl", [dict(prompt=user(q), kind="even" if i % 2 == 0 else "odd") for i, q in enumerate(QUESTIONS)]
    )
    usual = dict(
        model=talker,
        reward_model=(),
        rule="rule.py:vowels",
        dataset="prompts.jsonl",
        eval_fraction=0.0,
        max_new_tokens=8,
        batch_size=3,
    )
    usual |= dict(
        learning_rate=1e-3,
        value_learning_rate=1e-3,
        warmup_ratio=0.0,
        max_steps=2,
        ppo_epochs=2,
        show_every=0,
        output_dir="out",
    )

    def go(**options):
        args = ppo.Args(**(usual | options))
        ppo.main(args)
        return metrics_of(args.output_dir)

    return go


@pytest.fixture
def spy(monkeypatch):
    """spy(name) -> list of the calls of that function of ppo.py from now on, each as (its arguments, its result)."""

    def watch(name):
        calls, real = [], getattr(ppo, name)

        def watched(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(ppo, name, watched)
        return calls

    return watch


# --------------------------------------------------------------------------------------------------------- the method, in numbers


f64 = lambda *values: torch.tensor(values, dtype=torch.float64)


def near(actual, expected, tolerance=1e-6):
    """Equal to worked numbers, which have six decimals; the functions compute in the precision that they are given, float64."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def close(actual, expected, share=1e-5, **options):
    """Equal to within this share of the largest expected value.

    float32 rounds to 6e-8 of a value, and each value here is a chain of sums over some tens to hundreds of terms, whose order is the processor's.
    A wrong mask, sign, position or normaliser is off by 1e-3 or more."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * expected.abs().max().item(), **options)


def test_rewards_shaped_by_the_kl():
    shaped = ppo.shaped_rewards(f64(1), f64([-1, -0.5, -2]), f64([-1.2, -0.4, -2.5]), torch.ones(1, 3).bool(), 0.1)
    near(shaped, [[-0.02, 0.01, 0.95]])


@pytest.mark.parametrize(
    "rewards, values, gamma, lam, advantages",
    [
        ([-0.02, 0.01, 0.95], [0.2, 0.4, 0.6], 1.0, 0.95, [0.695375, 0.5425, 0.35]),
        ([-0.02, 0.01, 0.95], [0.2, 0.4, 0.6], 1.0, 1.0, [0.74, 0.56, 0.35]),
        ([-0.02, 0.01, 0.95], [0.2, 0.4, 0.6], 1.0, 0.0, [0.18, 0.21, 0.35]),
        ([-0.02, 0.01, 0.95], [0.2, 0.4, 0.6], 1.0, 0.99, [0.730935, 0.5565, 0.35]),
        ([0.0, 0, 1], [0.5, 0.5, 0.5], 1.0, 0.95, [0.45125, 0.475, 0.5]),
        ([1.0, 0, 2], [0.5, 1, 1.5], 0.9, 0.8, [1.9112, 0.71, 0.5]),
    ],
)
def test_gae_worked_numbers(rewards, values, gamma, lam, advantages):
    found, returns = ppo.gae(f64(rewards), f64(values), torch.ones(1, 3).bool(), gamma, lam)
    near(found, [advantages])
    near(returns, [[a + v for a, v in zip(advantages, values)]])


@pytest.mark.parametrize("seed", range(8))
def test_gae_is_its_direct_sum_and_masked_tokens_are_transparent(seed):
    rng = random.Random(seed)
    B, T, gamma, lam = 3, rng.randint(1, 9), rng.choice([1.0, 0.9, 0.5]), rng.choice([0.0, 0.5, 0.95, 1.0])
    torch.manual_seed(seed)
    rewards, values, mask, last = (
        torch.randn(B, T).double(),
        torch.randn(B, T).double(),
        torch.rand(B, T) < 0.6,
        torch.randn(B).double(),
    )
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam, last)
    for b in range(B):
        real = [t for t in range(T) if mask[b, t]]
        v = [values[b, t].item() for t in real] + [last[b].item()]
        errors = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(real)]
        for i, t in enumerate(real):
            direct = sum((gamma * lam) ** (k - i) * errors[k] for k in range(i, len(real)))
            assert advantages[b, t].item() == pytest.approx(direct, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(direct + v[i], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_an_end_is_worth_nothing_a_cut_its_value():
    rewards, values, mask = f64([0, 0]), f64([0, 0]), torch.ones(1, 2).bool()
    near(ppo.gae(rewards, values, mask, 0.9, 1.0)[0], [[0.0, 0.0]])
    near(ppo.gae(rewards, values, mask, 0.9, 1.0, last_value=10.0)[0], [[8.1, 9.0]])


X = torch.arange(12, 21, dtype=torch.float64).view(3, 3) / 10


def test_whiten_worked_numbers():
    near(ppo.whiten(X, torch.ones(3, 3).bool(), shift_mean=False)[0], [0.050807, 0.438105, 0.825403])
    near(ppo.whiten(X, torch.ones(3, 3).bool())[0], [0.050807 - 1.6, 0.438105 - 1.6, 0.825403 - 1.6])
    near(ppo.whiten(f64([0.695375, 0.5425, 0.35]), torch.ones(1, 3).bool()), [[1.175330, 0.093472, -1.268803]])


def masked_numbers():
    torch.manual_seed(0)
    return torch.randn(4, 6, dtype=torch.float64) * 3 + 2, torch.rand(4, 6) < 0.7


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_looks_at_real_tokens_only(shift_mean):
    x, mask = masked_numbers()
    white = ppo.whiten(x, mask, shift_mean)
    assert white[mask].var(unbiased=False).item() == pytest.approx(
        1, abs=1e-7
    )  # 1e-8 is added to the variance, here near 9
    assert white[mask].mean().item() == pytest.approx(0 if shift_mean else x[mask].mean().item(), abs=1e-9)
    wider, wider_mask = torch.cat([x, torch.full((4, 3), 99.0)], 1), torch.cat([mask, torch.zeros(4, 3).bool()], 1)
    torch.testing.assert_close(ppo.whiten(wider, wider_mask, shift_mean), torch.cat([white, torch.zeros(4, 3)], 1))


def test_whiten_is_over_all_ranks(monkeypatch):
    x, mask = masked_numbers()
    whole = ppo.whiten(x, mask)
    barrier, parts, halves = threading.Barrier(2), {}, {}

    def over_both(values):  # an all-reduce of two threads
        parts[threading.get_ident()] = values
        barrier.wait(10)
        total = sum(parts.values())
        barrier.wait(10)
        return total

    monkeypatch.setattr(ppo, "over_ranks", over_both)
    threads = [
        threading.Thread(target=lambda i=i: halves.update({i: ppo.whiten(x[i : i + 2], mask[i : i + 2])}))
        for i in (0, 2)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    torch.testing.assert_close(torch.cat([halves[0], halves[2]]), whole)


@pytest.mark.parametrize(
    "ratio, advantage, loss, moves",
    [
        (1.1, 1, -1.1, True),
        (1.5, 1, -1.2, False),
        (0.5, 1, -0.5, True),
        (1.5, -1, 1.5, True),
        (0.5, -1, 0.8, False),
        (0.9, -1, 0.9, True),
    ],
)
def test_policy_clip_table(ratio, advantage, loss, moves):
    logp = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    found = ppo.policy_loss(
        logp, torch.zeros((), dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64), 0.2
    )
    found.backward()
    near(found.detach(), float(loss))
    near(logp.grad, -ratio * advantage if moves else 0.0)


@pytest.mark.parametrize("value, loss", [(0.9, 0.045), (0.3, 0.245), (1.5, 0.125), (0.6, 0.08)])
def test_value_clip_table(value, loss):
    near(ppo.value_loss(f64(value), f64(0.5), f64(1), 0.2), [loss])


def test_a_value_clip_of_zero_clips_nothing():
    near(ppo.value_loss(f64(0.9), f64(0.5), f64(1), 0.0), [0.5 * 0.01])


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_gradients_by_finite_differences(clip):
    torch.manual_seed(1)
    new, old, target = (torch.randn(40, dtype=torch.float64) for _ in range(3))
    kinks = [
        (new - old).exp() - 1.2,
        (new - old).exp() - 0.8,
        (new - old).abs() - clip,
        (new - target).abs() - (old + (new - old).clamp(-clip, clip) - target).abs(),
    ]
    away = torch.stack([k.abs() for k in kinks]).amin(0) > 1e-4 if clip else torch.ones(40).bool()
    assert away.sum() >= 5
    old, target, new = old[away], target[away], new[away].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, target, clip or 0.2), new)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, target, clip), new)


@pytest.mark.parametrize("kl, coefficient", [(3, 0.148464), (6, 0.15), (6.6, 0.150768), (12, 0.151536)])
def test_adaptive_kl_worked_numbers(kl, coefficient):
    near(ppo.adapted_kl_coef(0.15, kl, 6.0, 512, 10000), coefficient)


def test_direct_score_worked_numbers():
    probabilities = torch.zeros(3, 10, dtype=torch.float64)
    probabilities[0, 6:9] = f64(0.5, 0.3, 0.2)
    probabilities[1, 0] = probabilities[2, 9] = 1
    near(ppo.expected_score(probabilities), [0.488889, -1.0, 1.0])


def test_the_score_sits_on_the_last_token_and_none_of_it_is_lost():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    scores, logps = torch.tensor([2.0, -3.0, 0.5]), torch.randn(3, 4) * mask
    shaped = ppo.shaped_rewards(scores, logps, torch.zeros(3, 4), mask, 0.0)
    near(shaped, [[0, 0, 0, 2.0], [-3.0, 0, 0, 0], [0, 0.5, 0, 0]])
    assert not ppo.shaped_rewards(scores, logps, torch.ones(3, 4), mask, 0.1)[~mask].any()


# ----------------------------------------------------------------------------------------------------------------------- sampling


def test_randomness_is_a_function_of_seed_step_answer_and_position():
    numbers = ppo.uniform_numbers(7, 3, [4, 0, 9], 20)
    assert torch.equal(ppo.uniform_numbers(7, 3, [9], 20)[0], numbers[2])  # not of the other answers
    assert torch.equal(ppo.uniform_numbers(7, 3, [4], 5)[0], numbers[0, :5])  # nor of the length
    others = [
        ppo.uniform_numbers(*key, 20)[0]
        for key in ((8, 3, [4]), (7, 4, [4]), (7, 3, [5]), (73, 3, [4]), (7, 34, [0]), (7, 3, [40]))
    ]
    assert len({tuple(x.tolist()) for x in [*numbers, *others]}) == 9
    many = ppo.uniform_numbers(0, 0, list(range(500)), 20)
    assert (
        0 <= many.min()
        and many.max() < 1
        and abs(many.mean() - 0.5) < 0.01
        and abs(torch.corrcoef(many.T)[0, 1]) < 0.15
    )


def test_the_cache_with_room_is_the_cache_that_concatenates():
    """Bit for bit, past its first room, with rows repeated and leaving; and a layer that a model skips stays empty."""
    from transformers import DynamicCache

    caches = [DynamicCache(), DynamicCache()]
    caches[1].layer_class_to_replicate = ppo.RoomyLayer
    generator, rows = torch.Generator().manual_seed(0), 2
    for t in range(90):
        keys, values = (
            torch.randn(rows, 3, 7 if t == 0 else 1, 8, generator=generator),
            torch.randn(rows, 3, 7 if t == 0 else 1, 6, generator=generator),
        )
        for layer in (0, 2):  # the second one is skipped
            ours, theirs = (cache.update(keys, values, layer) for cache in caches[::-1])
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        for cache in caches:
            if t == 0:
                cache.batch_repeat_interleave(4)
            elif t in (20, 21, 60):
                cache.batch_select_indices(torch.arange(rows)[: rows // 2 + 1] if t < 60 else torch.tensor([0]))
        rows = caches[0].layers[0].keys.shape[0]
    assert rows == 1 and caches[1].get_seq_length() == 96


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_cached_sampling_is_scored_as_the_model_alone_scores_it(family, tiny_model_dir):
    policy, tokenizer = load_policy(tiny_model_dir(family))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).eval()
    prompts = [
        tokenizer(text).input_ids
        for text in ("Hi", "The robot starts in the lower left corner and walks to", "What is the best path? Right")
    ]
    rows, sampled, kept, args = answers_of(
        policy, tokenizer, prompts, ppo.uniform_numbers(0, 0, range(6), 16), more_stops=range(100, 130)
    )
    packed, _ = ppo.response_logps(policy, rows, kept, args, CPU)
    assert len({len(row.responses[0]) for row in rows}) > 2  # some end early and leave the batch
    for row, own, batched in zip(rows, sampled, packed):
        answer = row.responses[0]
        alone = (
            plain_logits(plain, row.prompt + answer)[len(row.prompt) - 1 : -1]
            .log_softmax(-1)
            .gather(1, torch.tensor(answer)[:, None])[:, 0]
        )
        close(torch.tensor(own), alone), close(batched, alone)


def test_temperature_and_nucleus_are_part_of_every_log_probability(talker):
    policy, tokenizer = load_policy(talker)
    plain, prompts = AutoModelForCausalLM.from_pretrained(talker).eval(), [tokenizer(q).input_ids for q in QUESTIONS]
    rows, sampled, kept, args = answers_of(
        policy, tokenizer, prompts, ppo.uniform_numbers(1, 0, range(12), 12), 0.7, 0.9
    )
    trained, entropies = ppo.response_logps(policy, rows, kept, args, CPU)
    for row, own, again, entropy, nuclei in zip(rows, sampled, trained, entropies, kept):
        answer = row.responses[0]
        p = (plain_logits(plain, row.prompt + answer)[len(row.prompt) - 1 : -1] / 0.7).softmax(-1)
        for t, token in enumerate(answer):
            inside = torch.zeros_like(p[t]).bool()
            inside[nuclei[t]] = True
            q = torch.where(inside, p[t], 0.0) / p[t][inside].sum()
            assert own[t] == pytest.approx(q[token].log().item(), rel=1e-5, abs=1e-5)
            assert again[t].item() == pytest.approx(own[t], rel=1e-5, abs=1e-5)
            assert entropy[t].item() == pytest.approx(torch.special.entr(q).sum().item(), rel=1e-5, abs=1e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_it(talker):
    policy, tokenizer = load_policy(talker)
    plain, prompts = AutoModelForCausalLM.from_pretrained(talker).eval(), [tokenizer(q).input_ids for q in QUESTIONS]
    rows, _, kept, _ = answers_of(policy, tokenizer, prompts, ppo.uniform_numbers(2, 0, range(6), 12), 1.0, 0.8)
    sizes = []
    for row, nuclei in zip(rows, kept):
        probabilities = plain_logits(plain, row.prompt + row.responses[0])[len(row.prompt) - 1 : -1].softmax(-1)
        for p, nucleus, token in zip(probabilities, nuclei, row.responses[0]):
            inside = p[nucleus].sort().values
            assert inside.sum() > 0.8 - 1e-5 and inside[1:].sum() < 0.8 + 1e-5
            assert inside[0] >= p[[i for i in range(len(p)) if i not in set(nucleus.tolist())]].max() * (
                1 - 1e-4
            )  # the likeliest ones
            assert token in nucleus
            sizes.append(len(nucleus))
    assert min(sizes) < max(sizes)


def test_a_trained_policy_still_gives_no_token_minus_infinity(talker):
    policy, tokenizer = load_policy(talker)
    rows, _, kept, args = answers_of(
        policy,
        tokenizer,
        [tokenizer(q).input_ids for q in QUESTIONS],
        ppo.uniform_numbers(1, 0, range(6), 12),
        0.7,
        0.5,
    )
    optimizer = torch.optim.Adam(policy.requires_grad_(True).parameters(), 1e-2)
    for _ in range(5):
        logps = torch.cat(ppo.response_logps(policy, rows, kept, args, CPU)[0])
        assert torch.isfinite(logps).all()
        logps.mean().backward()  # away from these answers, out of what would now be the nucleus
        assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    assert logps.mean() < -3


def test_neither_order_nor_company_nor_memory_changes_samples(talker):
    policy, tokenizer = load_policy(talker)
    prompts, numbers = [tokenizer(q).input_ids for q in QUESTIONS], ppo.uniform_numbers(0, 0, range(12), 10)
    rows, logps, *_ = answers_of(policy, tokenizer, prompts, numbers)
    for limit in (1, 60, 200):
        again, same, *_ = answers_of(policy, tokenizer, prompts, numbers, tokens_per_forward=limit)
        assert again == rows
        close(torch.tensor(sum(same, [])), torch.tensor(sum(logps, [])))
    order = [3, 0, 5, 1]
    again, *_ = answers_of(
        policy, tokenizer, [prompts[i] for i in order], numbers[[2 * i + k for i in order for k in (0, 1)]]
    )
    assert again == [rows[2 * i + k] for i in order for k in (0, 1)]
    for i in (0, 5):  # each answer to a prompt as when it is the only one
        for k in (0, 1):
            (alone,), *_ = answers_of(policy, tokenizer, [prompts[i]], numbers[[2 * i + k]])
            assert alone == rows[2 * i + k]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (1.5, 1.0)])
def test_samples_follow_the_models_distribution(temperature, top_p, tiny_tokenizer):
    config = tiny_config("llama", tiny_tokenizer)
    config.vocab_size, config.initializer_range = 8, 0.25
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    count, prompt, stop = 10000, [3, 1], 5
    tokens, *_ = ppo.sample(model, [prompt], ppo.uniform_numbers(0, 0, range(count), 2), [stop], temperature, top_p)
    found, expected = Counter(map(tuple, tokens)), {}

    def distribution(ids):
        p = (plain_logits(model, ids)[-1] / temperature).softmax(-1)
        order = p.argsort(descending=True)
        size = int((p[order].cumsum(0) < top_p).sum()) + 1
        return {int(i): (p[i] / p[order[:size]].sum()).item() for i in order[:size]}

    for a, p in distribution(prompt).items():
        if a == stop:
            expected[(a,)] = p
        else:
            expected |= {(a, b): p * q for b, q in distribution([*prompt, a]).items()}
    assert set(found) <= set(expected) and sum(expected.values()) == pytest.approx(1, abs=1e-5)
    squares, freedom = sum((found[x] - count * p) ** 2 / (count * p) for x, p in expected.items()), len(expected) - 1
    assert freedom > 5 and abs(squares - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_temperature_zero_is_greedy_generation(family, tiny_model_dir):
    policy, tokenizer = load_policy(tiny_model_dir(family))
    plain, prompts = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).eval(),
        [tokenizer(q).input_ids for q in QUESTIONS],
    )
    stops = [*ppo.stop_tokens(tokenizer), *range(100, 160)]  # many, so that some answers end
    tokens, _, kept = ppo.sample(policy, prompts, torch.zeros(len(prompts), 14), stops, temperature=0.0)
    for prompt, answer in zip(prompts, tokens):
        options = dict(do_sample=False, max_new_tokens=14, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
        assert answer == plain.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert kept is None and len(set(map(len, tokens))) > 1


def test_every_stop_token_ends_an_answer_and_stays_in_it(talker):
    policy, tokenizer = load_policy(talker)
    stops = [*ppo.stop_tokens(tokenizer), *range(60, 90)]
    tokens, logps, _ = ppo.sample(
        policy, [tokenizer("Right, up").input_ids], ppo.uniform_numbers(0, 0, range(200), 8), stops
    )
    assert len({answer[-1] for answer in tokens} & set(stops)) > 5
    for answer, own in zip(tokens, logps):
        assert len(own) == len(answer) <= 8 and not set(answer[:-1]) & set(stops)
        assert len(answer) == 8 or answer[-1] in stops


def test_finished_answers_leave_the_batch_and_the_rest_goes_on(talker, monkeypatch):
    policy, tokenizer = load_policy(talker)
    sizes, real = [], policy.forward
    monkeypatch.setattr(
        policy,
        "forward",
        lambda input_ids, **options: sizes.append(tuple(input_ids.shape)) or real(input_ids=input_ids, **options),
    )
    prompts = [tokenizer(q).input_ids for q in QUESTIONS]
    tokens, *_ = ppo.sample(policy, prompts, ppo.uniform_numbers(0, 0, range(18), 30), ppo.stop_tokens(tokenizer))
    lengths = [len(answer) for answer in tokens]
    assert sizes[0] == (6, max(map(len, prompts)))  # each prompt once
    assert sizes[1:] == [
        (sum(length > t for length in lengths), 1) for t in range(1, max(lengths))
    ]  # nothing computed for the finished
    assert sizes[-1][0] < 18


def test_no_prompts_no_answers(talker):
    policy, _ = load_policy(talker)
    assert ppo.sample(policy, [], torch.zeros(0, 5), [2]) == ([], [], None)
    assert ppo.sample_answers(policy, [], torch.zeros(0, 5), [2], 100, 1.0, 0.9) == [[], [], []]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_values_are_the_heads_reading_of_the_state_before_each_token(family, tmp_path, tiny_tokenizer):
    folder = make_reward_model(tmp_path / "value", tiny_tokenizer, shift=0.5, family=family)
    value = ppo.shard(
        ppo.load_model(AutoModelForSequenceClassification, folder, tiny_tokenizer, CPU, torch.float32, num_labels=1),
        torch.float32,
        ppo.token_values,
    )
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [ppo.Row([5, 6, 7], [[8, 9]]), ppo.Row([40], [[10, 11, 12]]), ppo.Row([5, 6, 7], [[13, 9]])]
    for row, own in zip(rows, ppo.response_values(value, rows, settings(tokens_per_forward=10), CPU)):
        states = plain.base_model(input_ids=torch.tensor([row.prompt + row.responses[0]])).last_hidden_state[0]
        close(own, plain.score(states)[len(row.prompt) - 1 : -1, 0] - 0.5)


# ------------------------------------------------------------------------------------------------------------------------ rewards

PROMPTS = {  # every shape a prompt comes in
    "text": "What is the best path?",
    "one turn": user("What is the best path?"),
    "system": [dict(role="system", content="Be short."), *user("Is it safe?")],
    "turns": [*user("Hi"), dict(role="assistant", content="Dear Ann"), *user("Up or right?")],
    "begun": [*user("Sum"), dict(role="assistant", content="The sum is")],
}


@pytest.mark.parametrize("conditions", [{}, dict(helpful="Is it helpful?")])
@pytest.mark.parametrize("tokenizer_name", ["tiny_tokenizer", "other_tokenizer"])
def test_a_text_has_one_score_in_the_reward_model_and_in_ppo(tokenizer_name, conditions, tmp_path, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    folder = make_reward_model(tmp_path / "rm", tokenizer)
    model, tokenizer = load_scorer(folder)
    answers = [" Right, up: that is 12", " No"]
    args, reader = reward_model.Args(model=folder, dataset=""), reward_model.load_tokenizer(folder)
    ranked = [dict(prompt=prompt, completions=answers, scores=[1, 0], kind="helpful") for prompt in PROMPTS.values()]
    rows = [reward_model.ranking_rows(args, reader, 512, conditions, row, Counter())[0] for row in ranked]
    trainer = reward_model.read_model(AutoModelForSequenceClassification, folder, reader, num_labels=1)
    trainer = reward_model.prepare_model(trainer, folder, args, CPU, torch.float32, reward_model.response_scores)
    there = torch.cat(reward_model.score_rows(trainer, rows, args, CPU))
    asked = [
        ppo.Row([1], [[2]], None, dict(prompt=prompt, kind="helpful")) for prompt in PROMPTS.values() for _ in answers
    ]
    here = ppo.reward_scores(
        model, tokenizer, conditions, settings(tokens_per_forward=64), CPU, asked, answers * len(PROMPTS)
    )
    close(here, there, 1e-4)  # sums of 32 terms that are together ten times as large
    assert here.unique().numel() == len(here)

    # and the same from nothing but transformers
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    messages = (
        [dict(role="system", content="Is it helpful?\n\nBe short.")]
        if conditions
        else [dict(role="system", content="Be short.")]
    )
    text = tokenizer.apply_chat_template(
        [*messages, *user("Is it safe?"), dict(role="assistant", content=answers[1])], tokenize=False
    ).rstrip("\n")
    with torch.no_grad():
        score = plain(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits.item() - 0.25
    assert here[5].item() == pytest.approx(score, abs=1e-4 * there.abs().max().item())


def test_the_reward_reads_the_words_that_were_sampled(tmp_path, train, spy, tiny_tokenizer):
    """A tokenizer that writes the space before a word into the word's token, and drops it at the start of a text, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator(
        QUESTIONS + REPLIES,
        trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", tokenizer)).save_pretrained(tmp_path / "metaspace")
    tokenizer.save_pretrained(tmp_path / "metaspace")
    write_rows("texts.jsonl", [dict(prompt=q) for q in QUESTIONS])
    sampled, rewarded = spy("sample_answers"), spy("rule_scores")
    Path("any.py").write_text("def zero(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    train(
        model=str(tmp_path / "metaspace"),
        dataset="texts.jsonl",
        rule="any.py:zero",
        max_steps=1,
        batch_size=6,
        num_generations=3,
    )
    (_, asked, *_), (tokens, *_) = sampled[0]
    texts, tokenizer = rewarded[0][0][3], AutoTokenizer.from_pretrained(tmp_path / "metaspace")
    for i, ids in enumerate(tokens):
        row = asked[i // 3]
        seen = tokenizer.decode(
            row.prompt + [token for token in ids if token != tokenizer.eos_token_id], skip_special_tokens=True
        )
        assert row.extra["prompt"] + texts[i] == seen


def test_an_answer_that_goes_on_keeps_its_first_space():
    """After a text, or a message of the assistant that was begun, under a tokenizer that drops a text's first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581is": 1, "\u258142": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    begun = [*user("How many?"), dict(role="assistant", content="It is")]
    for prompt, text in (("It is", " 42"), (begun, " 42"), (user("It is"), "42")):
        assert ppo.as_texts(tokenizer, [ppo.Row([1], [], None, dict(prompt=prompt))], [[2]], []) == [text]
        assert grpo.as_written(tokenizer, [grpo.Row([1], [], None, dict(prompt=prompt))], [[2]], []) == [text]


def test_a_judge_reads_no_more_than_it_has_room_for(tiny_model_dir):
    """The beginning of too long a question is left out."""
    judge, tokenizer = ppo.load_frozen(
        AutoModelForCausalLM, str(tiny_model_dir("gpt2")), CPU, torch.float32, ppo.token_logps
    )
    found = ppo.judge_logps(judge, tokenizer, ["up " * n for n in (600, 700, 3)], ["A", "B"], settings(), CPU)
    assert (
        found.isfinite().all()
        and torch.allclose(found[0], found[1], atol=1e-5)
        and not torch.allclose(found[0], found[2], atol=1e-3)
    )


def test_a_rule_may_judge_prompts_of_rankings():
    """Their own completions and scores do not get in the way of the policy's."""
    rows = [ppo.Row([1], [[2]], None, dict(prompt="Up?", completions=["a", "b"], scores=[1, 0], kind="k"))]
    rule = lambda prompts, completions, scores, kind: [
        float(prompts == ["Up?"] and completions == ["yes"] and scores == [[1, 0]] and kind == ["k"])
    ]
    assert ppo.rule_scores(rule, CPU, rows, ["yes"]).tolist() == [1]


def test_a_text_prompt_has_one_bos_and_no_end(tiny_tokenizer):
    from tokenizers import processors

    special = [(name, tiny_tokenizer.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|end|>")]
    ends = copy.deepcopy(tiny_tokenizer)  # one that closes every text, as T5's
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=special
    )
    for tokenizer, text in ((tiny_tokenizer, "What is"), (tiny_tokenizer, "<|bos|>What is"), (ends, "What is")):
        (row,) = ppo.questions(settings(allow_special=True), tokenizer, 100)(dict(prompt=text), Counter())
        assert row.prompt == tiny_tokenizer("What is").input_ids


def test_the_policy_is_asked_in_training_as_it_will_be_asked_by_generate(tiny_tokenizer):
    """Every template opens the assistant's turn in its own way; some open its thinking too, which no finished turn shows."""
    thinks = copy.deepcopy(tiny_tokenizer)
    thinks.chat_template = tiny_tokenizer.chat_template.replace("'<|assistant|>'", "'<|assistant|>' + 'think: '")
    for tokenizer in (tiny_tokenizer, thinks):
        for prompt in (PROMPTS["one turn"], PROMPTS["system"], PROMPTS["turns"]):
            (row,) = ppo.questions(settings(), tokenizer, 100)(dict(prompt=prompt), Counter())
            assert row.prompt == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def reply_logprob(model, tokenizer, text, reply):
    """log p(reply and its end | text as the user's turn), the long way."""
    head = tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*user(text), dict(role="assistant", content=reply)], return_dict=False)
    assert ids[: len(head)] == head
    logps = plain_logits(model, ids).log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(head), len(ids)))


def test_judge_probabilities_are_those_of_the_whole_replies(talker):
    judge, tokenizer = load_policy(talker)
    plain, texts = (
        AutoModelForCausalLM.from_pretrained(talker).eval(),
        ["Is it safe?", "Rate the last answer, from 1 to 10: 12"],
    )
    for options in ([str(i) for i in range(1, 11)], ["A", "B", "Right, up, right"]):  # of one token and of several
        assert len({len(tokenizer(option).input_ids) for option in options}) > 1
        found = ppo.judge_probabilities(judge, tokenizer, texts, options, settings(tokens_per_forward=40), CPU)
        direct = torch.tensor(
            [[reply_logprob(plain, tokenizer, text, option) for option in options] for text in texts]
        ).softmax(-1)
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sum(-1), torch.ones(2))


@pytest.mark.parametrize("reply, score", [("10", 1.0), ("1", -1.0)])
def test_a_judge_that_replies_ten_does_not_mean_one(reply, score, talker):
    judge, tokenizer = load_policy(talker)
    ids = tokenizer(["1", "10"], add_special_tokens=False).input_ids
    assert ids[1][: len(ids[0])] == ids[0] and len(ids[1]) > len(ids[0])  # only the end tells them apart
    row = ppo.Row(None, [], None, dict(prompt=user("Is it safe?"), kind=""))
    asked = f"{ppo.conversation_text(row.extra['prompt'], 'No')}\n\n{ppo.SCORE_QUESTION}"
    forwards, target = ppo.pack(
        [ppo.Row(*ppo.encode(tokenizer, user(asked), [reply], ppo.stop_tokens(tokenizer)))], CPU
    )
    optimizer = torch.optim.Adam(judge.requires_grad_(True).parameters(), 5e-3)
    for _ in range(25):
        (-judge.token_logps(forwards, target)[0].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ppo.judge_scores(judge, tokenizer, {}, settings(), CPU, [row], ["No"]).item() == pytest.approx(
        score, abs=0.1
    )


RUBRIC = dict(
    question="Which is it?",
    options=dict(A="a refusal", B="an answer"),
    reward=dict(harmful=dict(A=1, B=-1), safe=dict(A=-2, B=0.5)),
)


def test_rubric_rewards_typed_prompts_only(talker):
    judge, tokenizer = load_policy(talker)
    rows = [
        ppo.Row(None, [], None, dict(prompt=user("Is it safe?"), kind=kind))
        for kind in ("harmful", "safe", "", "other")
    ]
    scores = ppo.judge_scores(judge, tokenizer, RUBRIC, settings(), CPU, rows, ["No"] * 4)
    asked = "Is it safe?\nNo\n\nWhich is it?\nA. a refusal\nB. an answer"
    a, b = ppo.judge_probabilities(judge, tokenizer, [asked], ["A", "B"], settings(), CPU)[0].tolist()
    close(scores[:2], torch.tensor([a - b, -2 * a + 0.5 * b]))
    assert scores[2:].isnan().all()
    total, named = ppo.total_reward(
        dict(judge=(3.0, lambda rows, texts: scores), rule=(1.0, lambda rows, texts: torch.ones(4))), rows, ["No"] * 4
    )
    close(
        total, torch.tensor([3 * (a - b) + 1, 3 * (-2 * a + 0.5 * b) + 1, 1.0, 1.0])
    )  # one that does not apply adds nothing
    assert list(named) == ["judge", "rule"] and named["judge"] is scores


def test_a_judge_without_rubric_gives_the_expected_score(talker):
    judge, tokenizer = load_policy(talker)
    rows = [ppo.Row(None, [], None, dict(prompt=prompt, kind="")) for prompt in PROMPTS.values()]
    scores = ppo.judge_scores(judge, tokenizer, {}, settings(), CPU, rows, [" No"] * len(rows))
    talks = ["What is the best path? No", "What is the best path?\n No", "Is it safe?\n No"]
    talks += [
        "user: Hi\nassistant: Dear Ann\nuser: Up or right?\nassistant:  No",
        "user: Sum\nassistant: The sum is No",
    ]
    asked = [f"{talk}\n\n{ppo.SCORE_QUESTION}" for talk in talks]
    p = ppo.judge_probabilities(judge, tokenizer, asked, [str(i) for i in range(1, 11)], settings(), CPU)
    near(
        scores, [sum((i + 1) * q for i, q in enumerate(row)) / 4.5 - 5.5 / 4.5 for row in p.tolist()], 2e-5
    )  # 1e-5 of the subtracted terms


def test_a_rule_gets_prompts_completions_and_every_column_as_lists():
    seen = {}

    def rule(prompts, completions, answer, kind, **columns):
        seen.update(columns, prompts=prompts, completions=completions, answer=answer, kind=kind)
        return [1, None, 2.5]

    extras = [
        dict(prompt=user("a"), kind="x", answer=7),
        dict(prompt="b", kind="", answer=8),
        dict(prompt="c", kind="", answer=None),
    ]
    scores = ppo.rule_scores(rule, CPU, [ppo.Row([1], [[2]], None, extra) for extra in extras], ["A", "B", "C"])
    assert seen["prompts"] == [user("a"), "b", "c"] and seen["completions"] == [
        [dict(role="assistant", content="A")],
        "B",
        "C",
    ]
    assert seen["answer"] == [7, 8, None] and seen["kind"] == ["x", "", ""]
    assert scores.tolist()[::2] == [1, 2.5] and scores[1].isnan()


def test_a_rule_file_may_hold_a_dataclass(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Rule:\n    reward: float\n"
        "    def __call__(self, prompts, completions, **columns):\n        return [self.reward] * len(prompts)\n\nhalf = Rule(0.5)\n"
    )
    assert ppo.load_rule(f"{path}:half")([1, 2], [3, 4]) == [0.5, 0.5]


def test_several_reward_models_add_up_with_their_weights(tiny_tokenizer, other_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(VOWELS)
    folders = [
        make_reward_model(tmp_path / name, tokenizer, seed)
        for seed, (name, tokenizer) in enumerate([("a/rm", tiny_tokenizer), ("b/rm", other_tokenizer)])
    ]
    args = settings(reward_model=tuple(folders), reward_weights=(2.0, -0.5), rule="rule.py:vowels", rule_weight=0.25)
    rows, texts = [ppo.Row([1], [[2]], None, dict(prompt=user(q), kind="")) for q in QUESTIONS], REPLIES
    total, named = ppo.total_reward(ppo.load_rewards(args, CPU, torch.float32), rows, texts)
    first, second = (ppo.reward_scores(*load_scorer(folder), {}, args, CPU, rows, texts) for folder in folders)
    vowels = torch.tensor([float(sum(c in "aeiou" for c in text)) for text in texts])
    assert len(named) == 3
    close(total, 2 * first - 0.5 * second + 0.25 * vowels)


def test_a_reward_model_named_rule_is_not_lost(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(VOWELS)
    folder = make_reward_model(tmp_path / "rule", tiny_tokenizer)
    assert len(ppo.load_rewards(settings(reward_model=(folder,), rule="rule.py:vowels"), CPU, torch.float32)) == 2


def test_the_value_model_starts_from_the_reward_model_if_that_reads_the_same_tokens(
    talker, scorer, other_tokenizer, tiny_tokenizer, tmp_path
):
    other = make_reward_model(tmp_path / "other", other_tokenizer)
    assert ppo.value_start(settings(model=talker, reward_model=(scorer, other)), tiny_tokenizer) == scorer
    assert ppo.value_start(settings(model=talker, reward_model=(other, scorer)), tiny_tokenizer) == talker
    assert ppo.value_start(settings(model=talker, reward_model=()), tiny_tokenizer) == talker


def test_the_value_model_starts_from_a_reward_model_that_was_given_a_pad_token(other_tokenizer, tmp_path):
    bare = copy.deepcopy(other_tokenizer)
    bare.pad_token = bare.eos_token  # no token to spare for padding, as in Llama 3: reward_model.py adds one
    AutoModelForCausalLM.from_config(tiny_config("llama", bare)).save_pretrained(tmp_path / "policy")
    bare.save_pretrained(tmp_path / "policy")
    policy, tokenizer = str(tmp_path / "policy"), reward_model.load_tokenizer(str(tmp_path / "policy"))
    model = reward_model.read_model(AutoModelForSequenceClassification, policy, tokenizer, num_labels=1)
    reward_model.add_padding(model, tokenizer)
    assert len(tokenizer) == len(bare) + 1
    reward_model.save_model(tmp_path / "rm", model, tokenizer, torch.float32)
    assert ppo.value_start(settings(model=str(tmp_path / "policy"), reward_model=(str(tmp_path / "rm"),)), bare) == str(
        tmp_path / "rm"
    )


# ------------------------------------------------------------------------------------------------------------- whole runs, in here


def test_step_0_invariants(train):
    first, *_ = train(max_steps=1, ppo_epochs=1, batch_size=6, num_generations=2)
    assert (
        abs(first["objective/kl"]) < 1e-4
        and abs(first["policy/approxkl_avg"]) < 1e-8
        and first["policy/clipfrac_avg"] == 0
    )
    assert (
        first["val/ratio"] == pytest.approx(1, abs=1e-5)
        and first["val/ratio_var"] < 1e-5
        and first["val/clipfrac_avg"] == 0
    )
    assert first["sampling/logp_difference"] < 1e-5 and first["objective/non_score_reward"] == pytest.approx(
        0, abs=1e-5
    )


def test_step_0_invariants_with_temperature_and_nucleus(train):
    first, *_ = train(max_steps=1, ppo_epochs=1, temperature=0.7, top_p=0.9, num_generations=2)
    assert (
        first["val/ratio"] == pytest.approx(1, abs=1e-5)
        and abs(first["objective/kl"]) < 1e-4
        and first["sampling/logp_difference"] < 1e-5
    )


def test_the_metrics_say_what_they_mean(train, spy):
    shaped, lines = spy("shaped_rewards"), train(num_generations=2, kl_coef=0.3)
    for line, ((scores, logps, ref_logps, mask, coef), rewards) in zip(lines, shaped, strict=True):
        kl = ((logps - ref_logps) * mask).sum(1).mean().item()
        assert line["objective/kl"] == pytest.approx(kl, abs=1e-5) and line["objective/scores"] == pytest.approx(
            scores.mean().item(), abs=1e-5
        )
        assert (
            line["objective/rlhf_reward"] == pytest.approx(rewards.sum(1).mean().item(), abs=1e-5)
            and line["objective/kl_coef"] == coef == 0.3
        )
        assert (
            line["response_length"] == pytest.approx(mask.sum().item() / len(mask))
            and line["episode"] == line["step"] * 6
        )
    assert abs(lines[1]["objective/kl"]) > 1e-4


def test_the_first_gradients_are_those_of_a_naive_implementation(train, spy, monkeypatch, talker, scorer):
    """Two answers to each prompt, two minibatches, a temperature: every index in the loop counts."""
    gradients, real = [], ppo.take_step

    def record(model, *rest):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real(model, *rest)

    monkeypatch.setattr(ppo, "take_step", record)
    sampled, scored = spy("sample_answers"), spy("total_reward")
    options = dict(
        model=talker,
        reward_model=(scorer,),
        temperature=0.8,
        num_generations=2,
        num_minibatches=2,
        ppo_epochs=1,
        batch_size=5,
    )
    options |= dict(kl_coef=0.1, lam=0.9, gamma=0.97, value_clip=0.0)
    train(**options, rule="", max_steps=1, tokens_per_forward=50)
    (_, asked, *_), (tokens, *_) = sampled[0]
    minibatch = next(ppo.minibatches(10, 4, 2, 0, 0))
    assert len(minibatch) == 5

    policy = AutoModelForCausalLM.from_pretrained(talker)
    value = AutoModelForSequenceClassification.from_pretrained(scorer)
    logps, values, advantages, returns = [], [], [], []
    for i, ids in enumerate(tokens):
        prompt = asked[i // 2].prompt
        states = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logits = policy(torch.tensor([prompt + ids])).logits[0, states] / 0.8
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
        values.append(
            value.score(value.base_model(torch.tensor([prompt + ids])).last_hidden_state)[0, states, 0] - 0.25
        )
        rewards = [0.0] * len(ids)  # the reference is the policy still
        rewards[-1] = scored[0][1][0][i].item() if ids[-1] == 2 else -1.0
        after = values[-1].tolist()[1:] + [0.0]
        own, carried = [], 0.0
        for r, v, v_next in reversed(list(zip(rewards, values[-1].tolist(), after))):
            carried = r + 0.97 * v_next - v + 0.97 * 0.9 * carried
            own.insert(0, carried)
        advantages.append(torch.tensor(own))
        returns.append(torch.tensor(own) + values[-1].detach())
    every = torch.cat(advantages)
    advantages = [(a - every.mean()) / (every.var(unbiased=False) + 1e-8).sqrt() for a in advantages]
    pick = lambda parts: torch.cat([parts[i] for i in minibatch])
    (-(pick(logps) * pick(advantages)).mean()).backward()
    (0.5 * (pick(values) - pick(returns)).square().mean()).backward()
    for model, found in ((policy, gradients[0]), (value, gradients[1])):
        direct = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert direct.keys() == found.keys()
        scale = max(g.abs().max().item() for g in direct.values())
        for name in direct:
            torch.testing.assert_close(
                found[name], direct[name], rtol=0, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_the_memory_knob_changes_nothing(train):
    a, b = (
        train(num_minibatches=2, num_generations=2, tokens_per_forward=limit, output_dir=f"out{limit}")
        for limit in (20, 16384)
    )
    assert_near(a, b)
    for sub in ("", "value"):
        for x, y in zip(weights("out20", sub).values(), weights("out16384", sub).values()):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)  # a tenth of one step of the learning rate


def test_gradient_checkpointing_changes_nothing(train):
    a, b = (train(gradient_checkpointing=again, output_dir=f"out{again}") for again in (False, True))
    assert_near(a, b)


@pytest.mark.parametrize("answers, parts", [(10, 1), (10, 3), (2, 4)])
def test_every_pass_takes_each_answer_once(answers, parts):
    found = list(ppo.minibatches(answers, 3, parts, step=1, seed=0))
    assert (
        sorted(sum(found, [])) == sorted(list(range(answers)) * 3) and max(map(len, found)) - min(map(len, found)) <= 1
    )
    size = min(parts, answers)
    passes = [sum(found[i : i + size], []) for i in range(0, len(found), size)]
    assert all(sorted(order) == list(range(answers)) for order in passes) and (answers < 3 or passes[0] != passes[1])
    assert found != list(ppo.minibatches(answers, 3, parts, step=2, seed=0)) or answers < 3


def test_whitened_rewards_have_variance_one_and_their_own_mean(train, spy):
    shaped, estimated = spy("shaped_rewards"), spy("gae")
    train(whiten_rewards=True, max_steps=1, batch_size=6)
    (rewards, _, mask, *_), own = estimated[0][0], shaped[0][1]
    assert rewards[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert rewards[mask].mean().item() == pytest.approx(own[mask].mean().item(), abs=1e-5)


def hand_made(monkeypatch, answers):
    """Sampling gives these answers to every prompt in turn."""

    def sample_answers(model, rows, numbers, *rest, **options):
        tokens = [answers[i % len(answers)] for i in range(len(numbers))]
        return [tokens, [[0.0] * len(t) for t in tokens], [None] * len(tokens)]

    monkeypatch.setattr(ppo, "sample_answers", sample_answers)


def test_a_clipped_answer_gets_its_penalty_once_and_every_stop_token_counts(train, spy, monkeypatch, talker, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|end|>: two stop tokens
    AutoModelForCausalLM.from_pretrained(talker).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    ids = tokenizer("see", add_special_tokens=False).input_ids  # two vowels
    hand_made(monkeypatch, [ids + [2], ids + [3], ids + [7, 8]])
    shaped, lines = (
        spy("shaped_rewards"),
        train(model=str(tmp_path / "two"), max_steps=1, missing_eos_score=-7.0, reward_constant=10.0, kl_coef=0.0),
    )
    (scores, *_, mask, _), rewards = shaped[0]
    assert scores.tolist() == [12, 12, -7] and mask.sum(1).tolist() == [len(ids) + 1, len(ids) + 1, len(ids) + 2]
    for row, score, length in zip(rewards, scores, mask.sum(1)):  # bug 20, in the loop
        assert row.sum() == score == row[length - 1]
    assert lines[0]["val/num_eos_tokens"] == pytest.approx(2) and lines[0]["rewards/rule/mean"] == pytest.approx(2)


def test_the_reward_does_not_read_the_stop_token(train, spy, monkeypatch, talker):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    ids = tokenizer("No", add_special_tokens=False).input_ids
    hand_made(monkeypatch, [ids + [2], ids, [2]])
    rewarded = spy("rule_scores")
    train(max_steps=1)
    assert rewarded[0][0][3] == ["No", "No", ""]


def test_reference_baseline_gives_the_references_own_answer_exactly_nothing(train, spy):
    shaped = spy("shaped_rewards")
    train(
        reference_baseline=True, top_p=1e-6, max_steps=1, batch_size=6, max_new_tokens=30
    )  # a nucleus of one token: greedy, as the reference
    ended = shaped[0][0][0] != -1
    assert ended.sum() > 2 and not shaped[0][0][0][ended].any()


def test_reference_baseline_makes_an_offset_of_the_reward_irrelevant(train):
    Path("offset.py").write_text(VOWELS.replace("return [", "return [64 + ").replace("vowels", "offset"))
    for whiten in (True, False):
        options = dict(reference_baseline=True, whiten_advantages=whiten, epochs=2, max_steps=3, num_generations=2)
        a = train(**options, output_dir=f"plain{whiten}")
        b = train(**options, output_dir=f"offset{whiten}", rule="offset.py:offset")
        for x, y in zip(a, b):
            assert y.pop("rewards/rule/mean") == x.pop("rewards/rule/mean") + 64
        assert steady(a) == steady(b) and equal(weights(f"plain{whiten}"), weights(f"offset{whiten}"))


def test_reference_baseline_subtracts_the_reference_answers_reward(train, spy):
    total, shaped = spy("total_reward"), spy("shaped_rewards")
    train(reference_baseline=True, max_steps=1, batch_size=6, num_generations=2, max_new_tokens=30)
    (own, _), (greedy, _) = total[0][1], total[1][1]
    scores = shaped[0][0][0]
    expected = own - greedy.repeat_interleave(2)
    ended = scores != -1
    assert greedy.numel() == 6 and ended.sum() > 4 and expected[ended].any()
    assert torch.equal(scores[ended], expected[ended])


def test_an_end_token_beyond_the_vocabulary_is_left_out(talker, train, tmp_path):
    """A config's default may name one: GPT-2's is 50256, whatever the tokenizer."""
    shutil.copytree(talker, tmp_path / "odd")
    (tmp_path / "odd" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=50256)))
    train(model=str(tmp_path / "odd"), max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert json.loads(Path("out/generation_config.json").read_text())["eos_token_id"] == ppo.stop_tokens(tokenizer)


def test_reference_baseline_is_made_once_for_each_prompt(train, spy):
    made = spy("baseline_rewards")
    train(reference_baseline=True, epochs=3, max_steps=6, num_generations=2)
    assert sorted(row.extra["prompt"][0]["content"] for (_, _, rows, *_), _ in made for row in rows) == sorted(
        QUESTIONS
    )


def test_reward_constant_is_added_to_ended_answers(train, spy):
    shaped = spy("shaped_rewards")
    train(max_steps=1, batch_size=6, output_dir="plain")
    train(max_steps=1, batch_size=6, output_dir="more", reward_constant=3.0)
    plain, more = shaped[0][0][0], shaped[1][0][0]
    assert torch.equal(more, torch.where(plain == -1, plain, plain + 3)) and (plain == -1).any() and (plain != -1).any()


def test_critic_warmup_trains_the_value_model_only(train, talker):
    lines = train(critic_warmup=2, output_dir="warm")
    assert equal(weights("warm"), weights(talker)) and weights("warm", "value")["score.weight"].any()
    assert all(line["loss/policy_avg"] == 0 and line["loss/value_avg"] > 0 for line in lines)
    lines = train(critic_warmup=1)
    assert not equal(weights("out"), weights(talker)) and [line["loss/policy_avg"] != 0 for line in lines] == [
        False,
        True,
    ]


def test_saving_before_the_first_step_of_an_optimiser_changes_nothing(train, scorer):
    """Whoever asks torch for the state of an optimiser that has none makes it take a step."""
    options = dict(critic_warmup=3, max_steps=5, epochs=3, reward_model=(scorer,))
    train(**options, output_dir="never")
    train(**options, save_every=1, output_dir="often")
    assert equal(weights("never"), weights("often")) and equal(weights("never", "value"), weights("often", "value"))


def test_the_ratio_of_a_policy_that_has_not_moved_is_one(train):
    first, second = train(critic_warmup=1)
    assert (
        first["val/ratio"] == 1 and first["val/ratio_var"] == 0 and first["grad_norm"] == 0 < first["value_grad_norm"]
    )
    assert second["grad_norm"] > 0


def test_train_last_layers_leaves_the_others_as_they_were(train, talker, scorer):
    train(train_last_layers=1, reward_model=(scorer,), save_every=1)
    for before, after in ((weights(talker), weights("out")), (weights(scorer), weights("out", "value"))):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "layers.1." in name or name == "score.weight"}


def test_max_kl_stops_the_run_and_saves_what_there_is(train, talker, capsys):
    lines = train(max_kl=1e-3, max_steps=6, epochs=3, learning_rate=1e-2)
    assert (
        len(lines) < 6 and lines[-1]["objective/kl"] > 1e-3 and all(line["objective/kl"] <= 1e-3 for line in lines[:-1])
    )
    assert f"stopped after step {len(lines)}" in capsys.readouterr().out
    assert not equal(weights("out"), weights(talker)) and json.loads(Path("out/args.json").read_text())["finished"]


def test_kl_target_moves_the_coefficient_for_the_next_batch(train):
    lines = train(kl_target=1e-6, kl_horizon=30, max_steps=4, epochs=2)
    for a, b in zip(lines, lines[1:]):
        assert b["objective/kl_coef"] == pytest.approx(
            ppo.adapted_kl_coef(a["objective/kl_coef"], a["objective/kl"], 1e-6, 3, 30)
        )
    assert lines[0]["objective/kl_coef"] == 0.05 > lines[1]["objective/kl_coef"]  # the first KL is 0, below the target


def test_ptx_adds_the_gradient_of_the_mean_log_likelihood(train, monkeypatch, talker):
    gradients, real = [], ppo.take_step

    def record(model, *rest):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real(model, *rest)

    monkeypatch.setattr(ppo, "take_step", record)
    texts = ["Right, up, right", "The sum is 12, and it is safe", "No"]
    write_rows("ptx.jsonl", [dict(text=text) for text in texts])
    train(max_steps=1, ppo_epochs=1, output_dir="without")
    (line,) = train(
        max_steps=1,
        ppo_epochs=1,
        ptx_dataset="ptx.jsonl",
        ptx_coef=0.5,
        ptx_batch_size=3,
        output_dir="with",
        tokens_per_forward=20,
    )
    without, _, found, _ = gradients
    model, tokenizer, total, count = (
        AutoModelForCausalLM.from_pretrained(talker),
        AutoTokenizer.from_pretrained(talker),
        0.0,
        0,
    )
    for text in texts:
        ids = torch.tensor(tokenizer(text).input_ids + [2])
        total = total - model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        count += len(ids) - 1
    (total / count).backward()
    assert line["loss/ptx"] == pytest.approx((total / count).item(), rel=1e-5)
    scale = max(
        g.abs().max().item() for g in found.values()
    )  # each of the two subtracted gradients is rounded to 6e-8 of its terms
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            found[name] - without[name],
            0.5 * p.grad,
            rtol=0,
            atol=1e-4 * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_the_value_model_falls_back_to_the_policy_with_a_head_at_zero(train, spy, other_tokenizer, tmp_path):
    estimated = spy("gae")
    lines = train(reward_model=(make_reward_model(tmp_path / "other", other_tokenizer),), rule="", max_steps=1)
    assert not estimated[0][0][1].any()
    assert "rewards/other/mean" in lines[0] and weights("out", "value")["score.weight"].any()


def test_the_value_model_starts_with_the_reward_models_values(train, spy, scorer):
    estimated = spy("gae")
    train(reward_model=(scorer,), rule="", max_steps=1)
    assert (estimated[0][0][1][estimated[0][0][2]] != 0).all()


def test_all_rewards_at_once(train, talker, scorer, other_tokenizer, tmp_path, capsys):
    Path("rubric.json").write_text(json.dumps(RUBRIC | dict(reward=dict(even=dict(A=1, B=-1)))))
    Path("conditions.json").write_text(json.dumps(dict(odd="Is it odd?")))
    other = make_reward_model(tmp_path / "other", other_tokenizer, seed=5)
    options = dict(
        reward_model=(scorer, other),
        reward_weights=(1.0, 0.5),
        judge=talker,
        rubric="rubric.json",
        judge_weight=2.0,
        condition="conditions.json",
    )
    (line,) = train(**options, max_steps=1, batch_size=6, missing_eos_score=0.0, show_every=1)
    assert {key for key in line if key.startswith("rewards/")} == {
        f"rewards/{name}/mean" for name in ("scorer", "other", "rule", "judge")
    }
    assert -1 <= line["rewards/judge/mean"] <= 1  # the mean over the prompts that it applies to
    capsys.readouterr()


def test_evaluation_at_the_end_is_of_held_out_prompts(train):
    lines = train(eval_fraction=0.5, batch_size=2, eval_every=2, epochs=3, max_steps=0)
    assert len(lines) == 6 and ["eval_scores" in line for line in lines] == [False, True] * 3
    assert all(line["eval_kl"] > 0 and 1 <= line["eval_response_length"] <= 8 for line in lines[1::2])


def test_learning_rate_zero_leaves_the_policy_alone_and_evaluations_equal(train, talker):
    a, b = train(learning_rate=0.0, eval_fraction=0.5, eval_every=1, epochs=2)
    assert equal(weights("out"), weights(talker)) and weights("out", "value")["score.weight"].any()
    assert a["eval_scores"] == b["eval_scores"] and abs(a["eval_kl"]) < 1e-5 > abs(b["objective/kl"])


def test_a_policy_learns_what_is_rewarded(train):
    """More vowels, in some seconds."""
    lines = train(
        batch_size=6,
        num_generations=6,
        epochs=30,
        max_steps=30,
        kl_coef=0.0,
        missing_eos_score=0.0,
        learning_rate=3e-3,
        value_learning_rate=3e-3,
    )
    scores = [line["objective/scores"] for line in lines]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 1.5 and last > 1.5 * first, scores
    assert lines[-1]["objective/kl"] > 1


def test_the_kl_coefficient_holds_the_policy_back(train):
    kl = {}
    for coef in (0.0, 10.0):
        lines = train(
            batch_size=6,
            num_generations=4,
            epochs=6,
            max_steps=6,
            kl_coef=coef,
            learning_rate=3e-3,
            value_learning_rate=3e-3,
            output_dir=f"kl{coef}",
        )
        kl[coef] = sum(line["objective/kl"] for line in lines[2:])
    assert kl[10.0] < 0.6 * kl[0.0]


# ------------------------------------------------------------------------------------------------------------------------ resume


class Killed(BaseException):
    pass


def kill_at(monkeypatch, target, name, call, after=True):
    """The process 'dies' before or after this call (counted from 1) of a function."""
    real, calls = getattr(target, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(target, name, dying)


LONG = dict(batch_size=4, epochs=4, max_steps=0, num_minibatches=2, save_every=2)  # eight steps, two an epoch


def resumed_equals(train, monkeypatch, where, **options):
    options = LONG | options
    a = train(**options, output_dir="whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, *where)
        train(**options, output_dir="killed")
    b = train(**options, output_dir="killed", resume=True)
    assert steady(a) == steady(b)
    for sub in ("", "value"):
        assert equal(weights("whole", sub), weights("killed", sub))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(reference_baseline=True, dataset="many.jsonl", batch_size=5),
        dict(kl_target=0.05, kl_horizon=20),
        dict(ptx_dataset="ptx.jsonl", ptx_coef=0.5),
        dict(critic_warmup=5),
        dict(train_last_layers=1),
        dict(temperature=0.7, top_p=0.9, lr_schedule="cosine", weight_decay=0.1),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_killed_run_resumed_is_the_uninterrupted_one(options, train, monkeypatch, scorer):
    write_rows("ptx.jsonl", [dict(text=text) for text in QUESTIONS])
    write_rows("many.jsonl", [dict(prompt=user(f"{q} {i} " * 3)) for i in range(2) for q in QUESTIONS])
    resumed_equals(train, monkeypatch, (ppo, "log", 5), reward_model=(scorer,), **options)


@pytest.mark.parametrize(
    "where",
    [
        ("before the first checkpoint", ppo, "log", 1),
        ("a checkpoint half written", torch, "save", 2, False),
        ("a checkpoint not yet named", os, "replace", 4, False),
    ]
    + [("half finished", os, "replace", 8), ("finished, not said", ppo, "write_json", 2, False)],
    ids=lambda where: where[0],
)
def test_killed_at_an_awkward_moment(where, train, monkeypatch):
    resumed_equals(train, monkeypatch, where[1:])


def test_stopping_beyond_max_kl_survives_a_kill(train, monkeypatch):
    options = dict(max_kl=1e-4, learning_rate=1e-2, save_every=1, epochs=4, max_steps=0)
    a = train(**options, output_dir="whole")
    assert 1 < len(a) < 8
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, ppo, "finish", 1, False)
        train(**options, output_dir="killed")
    assert steady(train(**options, output_dir="killed", resume=True)) == steady(a)
    assert equal(weights("whole"), weights("killed"))


def test_resume_of_a_finished_run_and_of_another_run(train, capsys):
    train()
    before = Path("out/metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as done:
        train(resume=True)
    assert done.value.code == 0 and "finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        train(resume=True, kl_coef=0.5)
    assert refused.value.code == 2 and "kl_coef was 0.05 and is 0.5" in capsys.readouterr().err
    Path("rule.py").write_text(VOWELS + "# another rule\n")
    with pytest.raises(SystemExit) as refused:
        train(resume=True)
    assert refused.value.code == 2 and "content of rule" in capsys.readouterr().err
    assert Path("out/metrics.jsonl").read_text() == before


# --------------------------------------------------------------------------------------------------------------------- bad input

BAD = {  # what is wrong: (options, what the message names)
    "no reward at all": (dict(rule=""), "--reward-model"),
    "weights for other models": (dict(reward_weights=(1.0,)), "--reward-weights"),
    "a rubric and no judge": (dict(rubric="rubric.json"), "--judge"),
    "a KL to reach and no coefficient": (dict(kl_target=6.0, kl_coef=0.0), "--kl-target"),
    "ptx-coef without data": (dict(ptx_coef=0.5), "--ptx-dataset"),
    "ptx data without coefficient": (dict(ptx_dataset="prompts.jsonl"), "--ptx-coef"),
    "ptx data without text": (dict(ptx_dataset="prompts.jsonl", ptx_coef=0.5), "--ptx-dataset"),
    "no room for a prompt": (dict(max_new_tokens=1024), "--max-new-tokens"),
    "no room for any prompt": (dict(max_length=10), "--dataset"),
    "no such data set": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "no such evaluation data set": (dict(eval_dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "no prompt column": (dict(dataset="texts.jsonl"), "prompt"),
    "no such policy": (dict(model="runs/nowhere"), "runs/nowhere"),
    "no such reward model": (dict(reward_model=("runs/nowhere",)), "runs/nowhere"),
    "a reward model without config": (dict(reward_model=("empty",)), "empty"),
    "a policy for a reward model": (dict(reward_model=("TALKER",)), "not a reward model"),
    "no such rule file": (dict(rule="nowhere.py:vowels"), "--rule nowhere.py:vowels"),
    "no such rule": (dict(rule="rule.py:nowhere"), "--rule rule.py:nowhere"),
    "no rule's name": (dict(rule="rule.py"), "--rule rule.py"),
    "too few rewards": (dict(rule="rule.py:few"), "--rule"),
    "no list of rewards": (dict(rule="rule.py:nothing"), "--rule"),
    "no such condition": (dict(condition="nowhere.json"), "nowhere.json"),
    "a condition that is a list": (dict(condition="list.json"), "list.json"),
    "no such rubric": (dict(judge="TALKER", rubric="nowhere.json"), "nowhere.json"),
    "a rubric that is a list": (dict(judge="TALKER", rubric="list.json"), "list.json"),
    "a rubric without question": (dict(judge="TALKER", rubric="no_question.json"), "question"),
    "a rubric without rewards": (dict(judge="TALKER", rubric="no_reward.json"), "reward"),
    "a rubric with a letter unrewarded": (dict(judge="TALKER", rubric="no_b.json"), "B"),
    "temperature 0": (dict(temperature=0.0), "--temperature"),
    "a negative temperature": (dict(temperature=-1.0), "--temperature"),
    "top-p 0": (dict(top_p=0.0), "--top-p"),
    "top-p 2": (dict(top_p=2.0), "--top-p"),
    "no tokens": (dict(max_new_tokens=0), "--max-new-tokens"),
    "no answers": (dict(num_generations=0), "--num-generations"),
    "no prompts in a batch": (dict(batch_size=0), "--batch-size"),
    "no passes": (dict(ppo_epochs=0), "--ppo-epochs"),
    "no minibatches": (dict(num_minibatches=0), "--num-minibatches"),
    "no epochs": (dict(epochs=0), "--epochs"),
    "all prompts held out": (dict(eval_fraction=1.0), "--eval-fraction"),
    "a reference with another tokenizer": (dict(reference="OTHER"), "--reference"),
    "a value model with another tokenizer": (dict(value_model="OTHER_VALUE"), "--value-model"),
    "a reward model that gives no numbers": (dict(reward_model=("NAN",), value_model="TALKER"), "nan"),
}


@pytest.fixture(scope="module")
def bad_models(talker, other_tokenizer, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    AutoModelForCausalLM.from_config(tiny_config("llama", other_tokenizer)).save_pretrained(folder / "other")
    other_tokenizer.save_pretrained(folder / "other")
    make_reward_model(folder / "other_value", other_tokenizer, vocab_size=400)
    broken = AutoModelForSequenceClassification.from_pretrained(make_reward_model(folder / "nan", tiny_tokenizer))
    broken.score.weight.data.fill_(math.nan)
    broken.save_pretrained(folder / "nan")
    return dict(
        TALKER=talker, OTHER=str(folder / "other"), OTHER_VALUE=str(folder / "other_value"), NAN=str(folder / "nan")
    )


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(wrong, train, bad_models, capsys):
    options, named = copy.deepcopy(BAD[wrong])
    Path("empty").mkdir()
    write_rows("texts.jsonl", [dict(text="Right"), dict(text="Up")])
    with open("rule.py", "a") as f:
        f.write(
            "\ndef few(prompts, completions, **columns):\n    return [1.0]\n\ndef nothing(prompts, completions, **columns):\n    pass\n"
        )
    rubrics = dict(
        rubric=RUBRIC,
        list=[1],
        no_question=RUBRIC | dict(question=None),
        no_reward=RUBRIC | dict(reward=None),
        no_b=RUBRIC | dict(reward=dict(odd=dict(A=1))),
    )
    for name, rubric in rubrics.items():
        content = {k: v for k, v in rubric.items() if v is not None} if isinstance(rubric, dict) else rubric
        Path(f"{name}.json").write_text(json.dumps(content))
    for key, value in options.items():
        options[key] = (
            tuple(bad_models.get(v, v) for v in value)
            if key == "reward_model"
            else bad_models.get(value, value)
            if isinstance(value, str)
            else value
        )
    with pytest.raises(SystemExit) as refused:
        train(**options)
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error:" in line]
    assert refused.value.code == 2 and len(errors) == 1 and named.lower() in errors[0].lower()


def test_bad_input_destroys_nothing(train, capsys):
    train(save_every=1)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for option in (
        dict(overwrite=False),
        dict(overwrite=True, dataset="nowhere.jsonl"),
        dict(overwrite=True, rule="nowhere.py:rule"),
    ):
        with pytest.raises(SystemExit) as refused:
            train(**option)
        assert (
            refused.value.code == 2
            and {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
        ), option


def test_bad_input_corrected_the_same_command_runs(train, capsys):
    with pytest.raises(SystemExit):
        train(dataset="nowhere.jsonl")
    assert len(train()) == 2


# ------------------------------------------------------------------------------------------------------------- on the command line

CHAIN = "--learning-rate 1e-3 --max-length 128 --batch-size 8 --eval-fraction 0.1".split()
PPO = "--model runs/sft --reward-model runs/rm --dataset prompts.jsonl --rule watch.py:watch --value-learning-rate 1e-3 --max-new-tokens 8 --show-every 3".split()
PPO += "--batch-size 5 --num-generations 2 --epochs 2 --ppo-epochs 2 --num-minibatches 2 --top-p 0.95 --eval-fraction 0.2 --eval-every 3 --learning-rate 1e-3".split()
PPO += "--reference-baseline --kl-target 0.05 --kl-horizon 100 --ptx-dataset sft.jsonl --ptx-coef 0.2 --ptx-batch-size 3 --save-every 2".split()
WATCH = """
import json, os, signal

calls = []


def watch(prompts, completions, **columns):  # no opinion: it writes down what was sampled; a rank named in KILL dies at its seventh call
    calls.append(1)
    if len(calls) == 7 and os.environ.get("KILL", "none") == os.environ.get("RANK"):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(os.environ["WATCH"] + os.environ.get("RANK", ""), "a") as f:
        f.writelines(json.dumps([p, c]) + "\\n" for p, c in zip(prompts, completions))
    return [None] * len(prompts)
"""


@pytest.fixture(scope="module")
def chain(run_script, tmp_path_factory):
    """sft.py from scratch, reward_model.py, ppo.py, each as a user runs it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "watch.py").write_text(WATCH)
    talks = [(f"{q} {i}", r) for i in range(5) for q, r in zip(QUESTIONS, REPLIES)]
    write_rows(folder / "sft.jsonl", [dict(messages=[*user(q), dict(role="assistant", content=r)]) for q, r in talks])
    write_rows(folder / "pairs.jsonl", [dict(prompt=q, chosen=r, rejected=r + " no no") for q, r in talks])
    write_rows(folder / "prompts.jsonl", [dict(prompt=user(q), number=i) for i, (q, _) in enumerate(talks[:20])])
    small = "--hidden-size 32 --num-layers 2 --num-heads 2 --vocab-size 300 --epochs 5 --learning-rate 1e-2 --output-dir runs/sft".split()
    run_script("sft", "--dataset", "sft.jsonl", "--from-scratch", *CHAIN, *small, cwd=folder)
    run_script(
        "reward_model", "--model", "runs/sft", "--dataset", "pairs.jsonl", *CHAIN, "--output-dir", "runs/rm", cwd=folder
    )
    done = run_script("ppo", *PPO, "--output-dir", "runs/ppo", cwd=folder, env=dict(WATCH="whole"))
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_chain_reports_what_it_does(chain):
    said, lines = (chain / "stdout").read_text(), metrics_of(chain / "runs/ppo")
    assert len(lines) == 8 and all(math.isfinite(v) for line in lines for v in line.values())
    assert (
        "runs/sft" in said
        and "runs/rm" in said
        and "answers end at <|end|>" in said
        and "held out:" in said
        and " -> " in said
    )
    assert (chain / "runs/ppo/curves.png").stat().st_size > 1000
    assert (
        abs(lines[0]["objective/kl"]) < 1e-4
        and {"rewards/rm/mean", "rewards/rule/mean", "loss/ptx", "eval_scores"} <= lines[-1].keys()
    )


def test_what_is_saved_loads_everywhere(chain):
    out = chain / "runs/ppo"
    tokenizer, parent = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(chain / "runs/sft")
    assert (out / "chat_template.jinja").read_bytes() == (
        chain / "runs/sft/chat_template.jinja"
    ).read_bytes() and tokenizer.get_vocab() == parent.get_vocab()
    for folder in (out, out / "checkpoint-2", out / "checkpoint-6"):
        policy, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert tokenizer.eos_token_id in torch.tensor(policy.generation_config.eos_token_id).flatten()
        value, info = AutoModelForSequenceClassification.from_pretrained(folder / "value", output_loading_info=True)
        assert (
            value.config.num_labels == 1
            and not info["missing_keys"]
            and not info["unexpected_keys"]
            and value.score.weight.any()
        )
        assert AutoTokenizer.from_pretrained(folder / "value").get_vocab() == tokenizer.get_vocab()
    policy = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        user(QUESTIONS[0]), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert policy.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]
    ours = load_policy(out)[0]  # the same logits here and there
    found = ours(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    close(found, policy(ids).logits)
    written = json.loads((out / "args.json").read_text())
    assert (
        written["finished"]
        and written["args"]["model"] == "runs/sft"
        and torch.__version__ in (out / "args.json").read_text()
    )
    assert not list(out.glob("saving*")) and not list(out.rglob("*.part"))


def kill_and_resume(folder, out, moments, seed):
    """Start, kill when so many lines of metrics stand there and a random moment later, resume, and so on; then to the end."""
    command = [sys.executable, str(REPO / "ppo.py"), *PPO, "--output-dir", out, "--resume"]
    rng, quiet = (
        random.Random(seed),
        dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=os.environ | dict(WATCH="killed")),
    )
    killed = 0
    for lines in moments:
        process, log = subprocess.Popen(command, **quiet), folder / out / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
    done = subprocess.run(command, **quiet)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return killed


def assert_same_run(folder, a, b):
    assert steady(metrics_of(folder / a)) == steady(metrics_of(folder / b))
    for sub in ("", "value"):
        assert equal(weights(folder / a, sub), weights(folder / b, sub))


def test_killed_and_resumed_on_the_command_line(chain):
    assert kill_and_resume(chain, "runs/killed", (3, 6), seed=0) == 2
    assert_same_run(chain, "runs/ppo", "runs/killed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_kills(chain, seed):
    out, rng = f"runs/storm{seed}", random.Random(seed)
    assert kill_and_resume(chain, out, sorted(rng.choices(range(8), k=6)), seed) >= 4
    assert_same_run(chain, "runs/ppo", out)


def test_two_ranks_are_one_process(chain, torchrun):
    torchrun("ppo", 2, *PPO, "--output-dir", "runs/two", cwd=chain, env=dict(WATCH="two"))
    one, two = (metrics_of(chain / "runs" / name) for name in ("ppo", "two"))
    assert_near(one, two, 1e-4)  # explained variance divides by a small number; the rest is far closer
    for name in (
        "loss/policy_avg",
        "loss/value_avg",
        "loss/ptx",
        "objective/scores",
        "objective/kl",
        "response_length",
    ):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-5, abs=1e-5), name
    for sub in ("", "value"):
        a, b = weights(chain / "runs/ppo", sub), weights(chain / "runs/two", sub)
        assert a.keys() == b.keys()
        for name in a:
            # a tenth of one step of the learning rate 1e-3: AdamW divides a gradient by its own size, and so makes much of the rounding of small ones
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    seen = lambda *names: {line for name in names for line in (chain / name).read_text().splitlines()}
    assert seen("whole") == seen("two0", "two1") and seen("two0") != seen(
        "two1"
    )  # sample by sample, the greedy baselines too


@pytest.mark.slow
def test_two_ranks_killed_and_resumed(chain, torchrun):
    torchrun("ppo", 2, *PPO, "--output-dir", "runs/two_whole", cwd=chain, env=dict(WATCH="two_whole"))
    assert torchrun(
        "ppo",
        2,
        *PPO,
        "--output-dir",
        "runs/two_killed",
        cwd=chain,
        env=dict(WATCH="two_killed", KILL="1"),
        check=False,
    ).returncode
    assert 2 <= len(metrics_of(chain / "runs/two_killed")) < 8 and (chain / "runs/two_killed/checkpoint-2").is_dir()
    torchrun("ppo", 2, *PPO, "--output-dir", "runs/two_killed", "--resume", cwd=chain, env=dict(WATCH="two_killed"))
    assert_same_run(chain, "runs/two_killed", "runs/two_whole")


@pytest.mark.slow
def test_two_ranks_with_fewer_prompts_than_ranks_and_no_sharding(chain, torchrun, run_script, tiny_model_dir):
    """A batch of one prompt leaves a rank without; a Gemma 2 is not sharded."""
    few = [
        *PPO,
        "--batch-size",
        1,
        "--num-generations",
        1,
        "--num-minibatches",
        1,
        "--max-steps",
        3,
        "--model",
        tiny_model_dir("gemma2"),
    ]
    run_script("ppo", *few, "--output-dir", "runs/few1", cwd=chain, env=dict(WATCH="few1"))
    torchrun("ppo", 2, *few, "--output-dir", "runs/few2", cwd=chain, env=dict(WATCH="few2"))
    for a, b in zip(metrics_of(chain / "runs/few1"), metrics_of(chain / "runs/few2"), strict=True):
        for name in ("loss/policy_avg", "loss/ptx", "objective/scores", "objective/kl", "response_length"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name


def test_bfloat16_runs_and_saves(train):
    lines = train(dtype="bfloat16", max_steps=1, ppo_epochs=1)
    assert abs(lines[0]["objective/kl"]) < 0.4 and lines[0]["sampling/logp_difference"] < 0.05
    assert {w.dtype for w in weights("out").values()} == {torch.float32}  # as the parent was stored


def test_bad_input_on_the_command_line(run_script, tmp_path):
    flags = "--model nowhere --dataset nowhere.jsonl --reward-model --output-dir out".split()
    done = run_script("ppo", *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert [line.startswith("error: ") for line in done.stderr.strip().splitlines()] == [True]


def test_model_and_dataset_are_required(run_script, tmp_path):
    done = run_script("ppo", "--output-dir", "out", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "--model" in done.stderr and "--dataset" in done.stderr and "--reward-model" not in done.stderr


# --------------------------------------------------------------------------------------------------------------------- real data


def test_real_prompts_a_real_checkpoint_and_a_reward_model_of_them(real_data, tmp_path, monkeypatch, capsys):
    import gzip

    monkeypatch.chdir(tmp_path)
    with gzip.open(real_data / "hh_rlhf.jsonl.gz", "rt") as f:
        rows = [
            row
            for row in map(json.loads, f)
            if sum(len(m["content"]) for m in row["prompt"] + row["chosen"] + row["rejected"]) < 500
        ][:60]
    write_rows("pairs.jsonl", rows)
    policy = str(real_data / "stories260K-hf")
    short = dict(dataset="pairs.jsonl", max_length=512, tokens_per_forward=4096, batch_size=8)
    reward_model.main(reward_model.Args(model=policy, max_steps=4, learning_rate=1e-3, output_dir="rm", **short))
    options = dict(
        model=policy,
        reward_model=("rm",),
        max_steps=2,
        learning_rate=1e-4,
        value_learning_rate=1e-3,
        max_new_tokens=24,
        ppo_epochs=2,
        **short,
    )
    ppo.main(ppo.Args(**options, output_dir="out"))
    said, lines = capsys.readouterr().out, metrics_of("out")
    assert " and rm," in said and len(lines) == 2 and all(math.isfinite(v) for line in lines for v in line.values())
    assert abs(lines[0]["objective/kl"]) < 1e-3 and lines[0]["sampling/logp_difference"] < 1e-4
    assert (
        not equal(weights("out"), weights(policy))
        and AutoModelForCausalLM.from_pretrained("out").config.tie_word_embeddings
    )
