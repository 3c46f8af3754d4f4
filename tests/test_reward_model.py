"""reward_model.py: its losses against closed forms, how it reads rankings, its scores and metrics, and whole runs."""

import itertools
import json
import math
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plumbing import CPU, in_child, jsonl, killed_at_rename, lines_of, refused, same_run, talk, tokenizer_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward_model as rm
from reward_model import Row


def f64(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def args_of(**flags) -> rm.Args:
    """Arguments for functions that read neither the model's name nor the data set's."""
    return rm.Args(**dict(model="", dataset="") | flags)


# ---- the losses


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def ranked(k: int, ranks=None, probability=1.0) -> Row:
    """A row of k answers, the best first, with all its pairs."""
    ranks = ranks or list(range(k, 0, -1))
    pairs = [(w, l, probability, float(ranks[w] - ranks[l])) for w in range(k) for l in range(k) if ranks[w] > ranks[l]]
    return Row([1], [[2]] * k, [[True]] * k, dict(pairs=pairs, ranks=[float(rank) for rank in ranks], kind="all"))


def loss_of(scores, *rows, **flags):
    return rm.ranking_loss(args_of(**flags), list(rows) or [ranked(len(scores))], scores)


def mean_over_pairs(scores, of=lambda a, b: -logsigmoid(a - b)) -> float:
    """The mean of of(better, worse) over all pairs of scores, the best first."""
    pairs = list(itertools.combinations(scores.tolist(), 2))
    return sum(of(a, b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("gap, loss", [(1, 0.313262), (0, 0.693147), (-1, 1.313262), (1.6, 0.18390074)])
def test_pair_loss(gap, loss):
    assert rm.pair_loss(f64(gap), f64(0.0)).item() == pytest.approx(loss, abs=1e-6)
    assert rm.pair_loss(f64(gap + 2.0), f64(0.0), 2.0).item() == pytest.approx(loss, abs=1e-6)  # with a margin of 2


def test_a_ranking_is_the_mean_over_its_pairs():
    scores = f64(2, 1, 0.5, -1)
    loss = loss_of(scores)
    loss.backward()
    assert loss.item() == pytest.approx(0.227613, abs=1e-6)
    assert scores.grad.tolist() == pytest.approx([-0.083132, -0.037967, 0.062923, 0.058176], abs=1e-6)


def test_a_batch_is_the_sum_over_its_rankings():
    """A prompt with six pairs counts as much as one with a single pair; a tie is no pair. Margins count if asked for."""
    scores, rows = f64(2, 1, 0.5, -1, 0.3, 0.9, 1, 1, 0), [ranked(4), ranked(2), ranked(3, [2, 0, 2])]
    each = [0.227613, -logsigmoid(-0.6), -(logsigmoid(0) + logsigmoid(-1)) / 2]
    assert loss_of(scores, *rows).item() == pytest.approx(sum(each), abs=1e-6)
    wide = loss_of(f64(1, 0, 2), ranked(3, [5, 2, 1]), use_margin=True).item()
    assert wide == pytest.approx(-(logsigmoid(1 - 3) + logsigmoid(-1 - 4) + logsigmoid(-2 - 1)) / 3, abs=1e-6)


FOCAL = [(2, 0.056837, 0.007214), (1, 0.289318, 0.090632), (0, 1, 0.693147), (-1, 1, 1.313262)]


@pytest.mark.parametrize("gap, factor, loss", FOCAL)
def test_focal_loss(gap, factor, loss):
    ours = rm.focal_pair_loss(f64(gap), f64(0)).item()
    assert ours == pytest.approx(loss, abs=1e-6) and ours == pytest.approx(-factor * logsigmoid(gap), abs=1e-5)
    assert loss_of(f64(gap, 0), loss="focal").item() == pytest.approx(loss, abs=1e-6)


EDGE = -math.log(0.001) - math.log(9.999)  # scores outside are clamped just inside
BARRIER = [(0, -3.218876, 0), (2, -3.044522, 0.190476), (4, -2.197225, 0.888889), (5, EDGE, 0), (100, EDGE, 0)]


@pytest.mark.parametrize("x, barrier, slope", BARRIER)
def test_log_barrier(x, barrier, slope):
    """It is symmetric, with its minimum at 0."""
    scores = f64(x, -x)
    values = rm.log_barrier(scores)
    (gradient,) = torch.autograd.grad(values[0], scores)
    assert values.tolist() == pytest.approx([barrier, barrier], abs=1e-6)
    assert gradient[0].item() == pytest.approx(slope, abs=1e-6)


def test_barrier_and_score_l2_are_summed_over_the_two_scores_of_a_pair():
    """The loss may be negative."""
    assert loss_of(f64(2, 1), loss="focal", barrier=0.02).item() == pytest.approx(-0.033819, abs=2e-6)
    assert loss_of(f64(1.2, -0.4), score_l2=0.01).item() == pytest.approx(0.19990074, abs=1e-6)
    scores = f64(1, 0.5, -2)
    expected = mean_over_pairs(scores, lambda a, b: -logsigmoid(a - b) + 0.1 * (a * a + b * b))
    assert loss_of(scores, score_l2=0.1).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("p, loss", [(1, 0.313262), (0.8, 0.513262), (0.6, 0.713262)])
def test_soft_labels(p, loss):
    assert rm.pair_loss(f64(1), f64(0), p=p).item() == pytest.approx(loss, abs=1e-6)
    assert loss_of(f64(1, 0), ranked(2, probability=p)).item() == pytest.approx(loss, abs=1e-6)


def test_plackett_luce_is_a_distribution_over_rankings():
    """The probabilities of all 24 rankings of four answers sum to 1. Each is the product of its choices."""
    scores, total = f64(0.3, -1.2, 2.0, 0.7), 0.0
    for order in itertools.permutations(range(4)):  # the best first
        ranks = torch.tensor([4.0 - order.index(i) for i in range(4)])
        p = math.exp(-rm.plackett_luce_loss(scores, ranks).item())
        e = [math.exp(scores[i].item()) for i in order]
        assert p == pytest.approx(math.prod(e[j] / sum(e[j:]) for j in range(3)), rel=1e-6)
        total += p
    assert total == pytest.approx(1.0, abs=1e-6)


def test_plackett_luce_with_ties():
    """Equal ranks do not compete: each is chosen from itself and the worse ones."""
    a, b, c = scores = f64(1.0, 0.2, -0.5)
    loss = rm.plackett_luce_loss(scores, torch.tensor([2.0, 2.0, 1.0]))
    assert loss.item() == pytest.approx(rm.pair_loss(a, c).item() + rm.pair_loss(b, c).item(), abs=1e-9)
    assert rm.plackett_luce_loss(scores, torch.zeros(3)).item() == pytest.approx(0.0, abs=1e-9)


LOSSES = {
    "pairs": dict(),
    "margin": dict(use_margin=True),
    "focal": dict(loss="focal"),
    "plackett-luce": dict(loss="plackett-luce"),
    "barrier": dict(loss="focal", barrier=0.02),
    "score l2": dict(score_l2=0.01),
    "soft": dict(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_gradient_is_that_of_finite_differences(name):
    scores, row = f64(2.0, -0.3, 0.9, -1.1), ranked(4, probability=0.7 if name == "soft" else 1.0)
    assert torch.autograd.gradcheck(lambda s: loss_of(s, row, **LOSSES[name]), scores, atol=1e-6)


@given(st.lists(st.integers(-20, 20), max_size=40), st.sampled_from([(), (4,), (4, 10)]), st.integers(0, 3))
def test_length_balancing_leaves_no_bucket_uneven(differences, edges, seed):
    kept = rm.balance_lengths(differences, edges, seed)
    bucket = lambda d: sum(abs(d) >= edge for edge in edges)
    count = lambda indices: Counter((bucket(differences[i]), differences[i] > 0) for i in indices if differences[i])
    before, after = count(range(len(differences))), count(kept)
    for b in range(len(edges) + 1):
        assert after[b, True] == after[b, False] == min(before[b, True], before[b, False])
    assert {i for i, d in enumerate(differences) if d == 0} <= set(kept)
    assert kept == sorted(set(kept)) == rm.balance_lengths(differences, edges, seed)


# ---- reading rankings


def read(tokenizer, row, conditions=None, notes=None, max_length=512, **flags) -> Row:
    notes = Counter() if notes is None else notes
    (row,) = rm.ranking_rows(args_of(**flags), tokenizer, max_length, conditions or {}, row, notes)
    return row


def texts(tokenizer, row: Row):
    return tokenizer.decode(row.prompt), [tokenizer.decode(r) for r in row.responses]


GOOD, BAD = ([dict(role="assistant", content=text)] for text in ("Up.", "Right."))
WAY = talk("Which way?")


words = st.lists(st.sampled_from(["up", "right", " ", "\n\nHuman: a", "\n\nAssistant:", "."]), max_size=6).map("".join)


@given(words, words, words)
def test_a_prompt_inside_two_texts_ends_with_their_last_shared_turn(start, chosen, rejected):
    chosen, rejected = (f"\n\nHuman: a\n\nAssistant:{start}{text}" for text in (chosen, rejected))
    prompt, answers = rm.as_pair(dict(chosen=chosen, rejected=rejected))
    assert [prompt + answer for answer in answers] == [chosen, rejected] and prompt.endswith("\n\nAssistant:")
    assert "\n\nAssistant:" not in os.path.commonprefix(answers)


PARTING = [  # what two conversations share, how each continues, and how many messages are the prompt
    (talk("q"), talk("", "a")[1:], talk("", "b")[1:], 1),
    (talk("q", "a"), talk("r", "c"), talk("s", "c"), 1),  # they part at a user's turn
    (talk("q", "a", "r", "b"), talk("s", "c"), talk("t", "d"), 3),
    (talk("q", "a", "r"), talk("", "c")[1:], talk("", "d", "s", "e")[1:], 3),
    ([dict(role="system", content="s"), *talk("q", "a")], talk("r", "c"), talk("s", "c"), 2),
]


@pytest.mark.parametrize("start, chosen, rejected, n", PARTING)
def test_where_two_conversations_part(start, chosen, rejected, n):
    """Answers begin with an assistant's turn. A prompt that is given apart as well is no part of them."""
    wholes = [start + chosen, start + rejected]
    for prompt in (None, wholes[0][:n]):
        found = rm.as_pair(dict(prompt=prompt, chosen=wholes[0], rejected=wholes[1]))
        assert found == (wholes[0][:n], [whole[n:] for whole in wholes])


USELESS = {  # why a row is dropped -> such rows
    "nothing to compare": [
        dict(prompt="Which way?", chosen=" Up.", rejected=" Up."),
        dict(prompt=WAY, chosen=[], rejected=GOOD),
        dict(prompt="up " * 40, chosen="a", rejected="b"),  # too long
        dict(prompt="a", completions=["b", "c"], scores=[1, 1]),
        dict(prompt="a", completions=["b", " "], scores=[0, 1]),
        dict(prompt="a", completions=[], scores=[]),
    ],
    "empty prompt": [  # a condition is none
        dict(chosen=GOOD, rejected=BAD, kind="harmless"),
        dict(prompt="", completions=["b", "c"], scores=[1, 0]),
    ],
    "special token": [dict(prompt="a", completions=["b", "<|user|>"], scores=[1, 0])],
}


@pytest.mark.parametrize("why", USELESS)
def test_rows_that_are_dropped(why, tiny_tokenizer):
    for row in USELESS[why]:
        with pytest.raises(rm.Drop, match=why):
            read(tiny_tokenizer, row, dict(harmless="Be safe."), max_length=30)


def test_a_ranking_has_all_pairs_of_unequal_rank(tiny_tokenizer):
    """Answers 0 and 4 are one text, 0 and 3 are tied, and one answer is empty."""
    notes, ranking = Counter(), dict(prompt=WAY, completions=["b", "c", " ", "d", "b"], scores=[0.5, 2, 9, 0.5, 1])
    row = read(tiny_tokenizer, ranking, notes=notes)
    assert {pair[:2]: pair[3] for pair in row.extra["pairs"]} == {(1, 0): 1.5, (1, 2): 1.5, (1, 3): 1.0, (3, 2): 0.5}
    assert row.extra["ranks"] == [0.5, 2, 0.5, 1]
    assert notes["pairs"] == 4 and notes["answers dropped: empty"] == 1


def test_an_answer_too_long_is_dropped_and_never_cut(tiny_tokenizer):
    notes = Counter()
    row = dict(prompt="up " * 10, completions=["no", "up " * 60, "yes", "up " * 30], scores=[4, 3, 2, 1])
    kept = read(tiny_tokenizer, row, max_length=60, notes=notes)
    expected = ["no<|end|>", "yes<|end|>", "up " * 30 + "<|end|>"]
    assert [text.strip() for text in texts(tiny_tokenizer, kept)[1]] == expected
    assert [pair[:2] for pair in kept.extra["pairs"]] == [(0, 1), (0, 2), (1, 2)] and kept.extra["ranks"] == [4, 2, 1]
    assert len(kept.trained) == 3 and notes["answers dropped: beyond --max-length"] == 1
    longest = max(len(kept.prompt + r) for r in kept.responses)
    assert len(read(tiny_tokenizer, row, max_length=longest).responses) == 3
    assert len(read(tiny_tokenizer, row, max_length=longest - 1).responses) == 2


SAFE = "<|bos|><|system|>Be safe."
BRIEF = [dict(role="system", content="Be brief."), *talk("a")]
CONDITIONED = [
    (talk("a"), f"{SAFE}<|end|><|user|>a<|end|><|assistant|>"),
    (BRIEF, f"{SAFE}\n\nBe brief.<|end|><|user|>a<|end|><|assistant|>"),
    ("a", "<|bos|>Be safe.\n\na"),
]


@pytest.mark.parametrize("prompt, expected", CONDITIONED)
def test_a_condition_stands_before_the_prompts_of_its_kind_only(prompt, expected, tiny_tokenizer):
    row, conditions = dict(prompt=prompt, chosen=" b", rejected=" c"), dict(harmless="Be safe.")
    conditioned, plain = read(tiny_tokenizer, row | dict(kind="harmless"), conditions), read(tiny_tokenizer, row)
    assert texts(tiny_tokenizer, conditioned)[0] == expected and conditioned.responses == plain.responses
    assert conditioned.extra["kind"] == "harmless" and plain.extra["kind"] == "all"
    for kind in ("helpful", "", None):
        assert read(tiny_tokenizer, row | dict(kind=kind), conditions).prompt == plain.prompt


def test_margin_and_probability_are_read(tiny_tokenizer):
    row = dict(prompt="a", chosen=" b", rejected=" c")
    pairs_of = lambda **columns: read(tiny_tokenizer, row | columns).extra["pairs"]
    assert pairs_of() == [(0, 1, 1.0, 1.0)]
    assert pairs_of(margin=0.25, probability=0.8) == [(0, 1, 0.8, 0.25)] and pairs_of(margin=0.0) == [(0, 1, 1.0, 0.0)]
    assert pairs_of(score_chosen=3.5, score_rejected=1.5) == [(0, 1, 1.0, 2.0)]
    assert pairs_of(chosen_reward=3.5, rejected_reward=1.5) == [(0, 1, 1.0, 2.0)]
    swapped = read(tiny_tokenizer, row | dict(probability=0.25))
    assert texts(tiny_tokenizer, swapped)[1] == [" c<|end|>", " b<|end|>"]
    assert swapped.extra["pairs"][0][:3] == (0, 1, 0.75)  # the better one stands first


# ---- scores


@pytest.fixture(scope="module")
def scoring_dir(tiny_model_dir, tmp_path_factory):
    """scoring_dir(family) -> a reward model of that family with a random head."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("scoring") / family
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir(family), num_labels=1)
                torch.nn.init.normal_(model.score.weight)
            model.save_pretrained(made[family])
            tokenizer_of(tiny_model_dir(family)).save_pretrained(made[family])
        return made[family]

    return make


def loaded(folder):
    """A model as main prepares it, in evaluation mode."""
    name, tokenizer = str(folder), tokenizer_of(folder)
    model = rm.read_model(AutoModelForSequenceClassification, name, tokenizer, num_labels=1)
    rm.add_padding(model, tokenizer)
    if not rm.is_reward_model(name):
        torch.nn.init.zeros_(model.score.weight)
    return rm.prepare_model(model, name, args_of(), CPU, torch.float32, rm.response_scores).eval()


@torch.no_grad()
def by_hand(folder, rows: list) -> list:
    """The scores of every row's answers by Hugging Face's model, an answer at a time, less the stored shift."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    shift, logits = getattr(model.config, "score_shift", 0.0), lambda ids: model(torch.tensor([ids])).logits.item()
    return [torch.tensor([logits(row.prompt + r) - shift for r in row.responses]) for row in rows]


def is_near(ours, theirs, tolerance=1e-4) -> bool:
    """Equal up to a share of the largest value."""
    return bool((ours.double() - theirs.double()).abs().max() <= tolerance * theirs.abs().max())


def some_rankings() -> list:
    """Rankings of very different shapes; most are longer than the tiny models' sliding window."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(7, 300, (n,), generator=generator).tolist() + [2]
    rows = [(ids(n), [ids(m) for m in lengths]) for n, lengths in [(4, [3, 17, 1, 9]), (20, [8, 8]), (11, [5, 30])]]
    return [Row(prompt, responses, [[True] * len(r) for r in responses], {}) for prompt, responses in rows]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "nemotron"])
@torch.no_grad()
def test_scores_are_those_of_each_answer_alone(family, scoring_dir):
    """Packed, or padded where the model cannot follow packed rows (Nemotron)."""
    rows, model = some_rankings(), loaded(scoring_dir(family))
    expected = torch.cat(by_hand(scoring_dir(family), rows))
    assert expected.std() > 0.1 and model.packs == (family != "nemotron")
    inputs, _ = (rm.pack if model.packs else rm.pad)(rows, CPU)
    assert is_near(model.response_scores(**inputs), expected)


def test_the_head_multiplies_in_float32():
    """Where hidden states and head are bfloat16: a score near 20 would come in steps of an eighth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden, head = torch.randn(1, 6, 64).bfloat16(), torch.nn.Linear(64, 1, bias=False).bfloat16()
    head.weight.data.mul_(40)
    base, config = lambda: SimpleNamespace(last_hidden_state=hidden), SimpleNamespace(score_shift=0.5)
    model = SimpleNamespace(base_model=base, score=head, config=config)
    scores = rm.response_scores(model, {}, torch.tensor([5, 2]))
    expected = hidden[0, [5, 2]].double() @ head.weight[0].double() - 0.5
    assert scores.dtype == torch.float32 and is_near(scores, expected, 1e-5)
    assert not is_near(head(hidden[0, [5, 2]])[:, 0].float() - 0.5, expected, 1e-4)  # as bfloat16 would have it


def with_padding(source, folder, padding, unknown) -> str:
    """A copy of a checkpoint with these padding and unknown tokens. Without padding, its vocabulary has no <|pad|>."""
    shutil.copytree(source, folder)
    if padding is None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text((folder / name).read_text().replace("<|pad|>", "<|spare|>"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(pad_token=padding, unk_token=unknown)))
    return str(folder)


@pytest.mark.parametrize("padding, unknown", [("<|end|>", "<|endoftext|>"), (None, None)])
def test_the_padding_token_ends_no_answer(padding, unknown, tiny_model_dir, tmp_path):
    """Hugging Face reads the score before the padding: were that the end of turn, it would read it elsewhere.

    Where neither token serves, one is added, and the embeddings grow with the tokenizer."""
    base = with_padding(tiny_model_dir("llama"), tmp_path / "base", padding, unknown)
    data = jsonl(tmp_path / "rows.jsonl", [dict(prompt=WAY, chosen=GOOD, rejected=BAD)] * 2)
    rm.main(rm.Args(base, data, str(tmp_path / "run"), learning_rate=0.1, eval_fraction=0))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.pad_token == (unknown or "<|pad|>")
    assert model.config.pad_token_id == tokenizer.pad_token_id not in rm.stop_tokens(tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 320 + (padding == unknown)
    answers = ["Up.", "Right, then up.", "No", "I do not know the way."]
    row = read(tokenizer, dict(prompt=talk("a", "b", "Which way?"), completions=answers, scores=[3, 2, 1, 0]))
    with torch.no_grad():
        scores = loaded(tmp_path / "run").response_scores(**rm.pack([row], CPU)[0])
        for side in ("left", "right"):
            ids = [row.prompt + r for r in row.responses]
            batch = tokenizer.pad(dict(input_ids=ids), padding_side=side, return_tensors="pt")
            assert batch["attention_mask"].min() == 0
            assert is_near(model(**batch).logits[:, 0] - model.config.score_shift, scores)


def test_a_resumed_run_reads_the_same_rows_where_a_padding_token_is_added(tiny_model_dir, tmp_path, capsys):
    """A text may hold what becomes the padding token."""
    rows = [dict(prompt=talk(f"Walk {i}!"), chosen=("up", "<|pad|>")[i % 2], rejected="no") for i in range(4)]
    base = with_padding(tiny_model_dir("llama"), tmp_path / "base", None, None)
    flags = dict(model=base, dataset=jsonl(tmp_path / "rows.jsonl", rows), eval_fraction=0, batch_size=1, save_every=1)
    args = rm.Args(**flags, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_rename, rm, args, 3) == -9  # args.json and checkpoint-1 are there
    rm.main(args)
    assert "2 rows from 4" in capsys.readouterr().out and len(lines_of(tmp_path / "run")) == 2


# ---- metrics


def test_metrics_of_a_batch():
    """Sums: the loss over prompts, accuracy and margin over pairs, the reward over answers. A tie counts as wrong."""
    rows, scores = [ranked(3), ranked(2), ranked(3, [1, 0, 1])], f64(2, 2, 1, 0, 3, 5, 4, 4)
    logged = rm.ranking_batch(args_of(), rows, scores)
    gaps = [0, 1, 1, -3, 1, 0]
    assert rm.pair_gaps(rows, scores).tolist() == gaps
    expected = dict(loss=loss_of(scores, *rows).item(), accuracy=3, margin=sum(gaps), mean_reward=21)
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(expected)


def test_calibration_error():
    """Of two pairs at a confidence of 0.72 one is right: 0.22 off. Elsewhere each pair has a bin of its own."""
    gap = lambda p: math.log(p / (1 - p))
    assert rm.calibration_error([gap(0.72), -gap(0.72)]) == pytest.approx(0.22)
    assert rm.calibration_error([gap(0.62), -gap(0.92)]) == pytest.approx((0.38 + 0.92) / 2)
    assert rm.calibration_error([gap(0.75)] * 3 + [-gap(0.75)]) == pytest.approx(0.0, abs=1e-9)
    assert rm.calibration_error([1e6]) == pytest.approx(0.0, abs=1e-9)
    assert rm.calibration_error([gap(0.52), -gap(0.57)]) == pytest.approx((0.48 + 0.57) / 2)  # bins are 0.05 wide


def test_length_correlation_is_within_prompts():
    """That answers to some prompts are longer and score higher altogether does not count."""
    rows = [Row([1], [[2] * n for n in lengths], [], {}) for lengths in ((1, 3), (11, 13))]
    correlation = lambda *scores: rm.length_correlation(rows, [torch.tensor(s) for s in scores])
    assert correlation([0.0, 1.0], [5.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 0.0], [6.0, 5.0]) == pytest.approx(-1.0)
    assert correlation([0.0, 1.0], [6.0, 5.0]) == pytest.approx(0.0, abs=1e-6)
    assert correlation([0.0, 0.0], [0.0, 0.0]) == 0.0


def test_the_report_groups_pairs(tiny_tokenizer, capsys):
    """By kind, by the labelled gap (the lowest third, the highest third) and by length."""
    gaps, labels = [3.0, 2.0, 0.5, -1.0, 1.0, 1.0], [6.0, 5.0, 2.0, 1.0, 4.0, 3.0]
    rows, scores = [], [torch.tensor([gap, 0.0]) for gap in gaps]
    for i, label in enumerate(labels):
        extra = dict(pairs=[(0, 1, 1.0, label)], ranks=[label, 0.0], kind="k" if i < 2 else "all")
        rows.append(Row([1], [[2] * (1 + i % 2), [2]], [], extra))
    report = rm.print_report(rows, scores, tiny_tokenizer)
    assert (report["pairs"], report["accuracy"]) == (6, 5 / 6)
    assert report["calibration_error"] == pytest.approx(rm.calibration_error(gaps))
    assert report["length_correlation"] == pytest.approx(rm.length_correlation(rows, scores))
    groups = {name: (group["pairs"], group["accuracy"]) for name, group in report["groups"].items()}
    by_gap = {"labelled gap up to 3": (3, 2 / 3), "labelled gap from 5": (2, 1.0)}
    by_length = {"better is longer": (3, 2 / 3), "equal length": (3, 1.0)}
    assert groups == {"kind all": (4, 0.75), "kind k": (2, 1.0)} | by_gap | by_length
    worst, *_, best = report["examples"]
    assert (worst["gap"], best["gap"]) == (-1.0, 3.0) and {"prompt", "better", "worse"} <= worst.keys()
    assert "6 pairs, accuracy 0.833" in capsys.readouterr().out


# ---- whole runs


def walks(n: int, k: int, seed=0) -> list:
    """Rankings by how often an answer says `up`; everything else in them is noise. Some answers are tied."""
    generator, rows = torch.Generator().manual_seed(seed), []
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    while len(rows) < n:
        answers = [" ".join(("up", "right", "left")[number(0, 3)] for _ in range(number(2, 9))) for _ in range(k)]
        scores, kind = [answer.split().count("up") for answer in answers], ("helpful", "harmless")[len(rows) % 2]
        if len(set(scores)) > 1:
            rows.append(dict(prompt=talk(f"Walk {len(rows) % 7}!"), completions=answers, scores=scores, kind=kind))
    return rows


@pytest.fixture(scope="module")
def short_run(tiny_model_dir, tmp_path_factory):
    """Flags of a run on 21 prompts, 2 a step: 22 steps, and the last of an epoch has one prompt."""
    data = jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", walks(21, 3))
    flags = dict(model=str(tiny_model_dir("llama")), dataset=data, eval_dataset=data, eval_fraction=0.0)
    return flags | dict(batch_size=2, epochs=2, learning_rate=1e-3, tokens_per_forward=60, save_every=7)


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory):
    """The output directory of short_run, never interrupted. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    rm.main(rm.Args(**short_run, output_dir=str(out)))
    return out


def short_rows(folder) -> list:
    """The rows of short_run."""
    tokenizer = tokenizer_of(folder)
    return [read(tokenizer, row) for row in walks(21, 3)]


def shift_of(folder) -> float:
    return json.loads((Path(folder) / "config.json").read_text()).get("score_shift", 0.0)


LN2 = math.log(2)
FIRST = [
    (dict(), 4, LN2),
    (dict(loss="focal"), 4, LN2),
    (dict(loss="plackett-luce"), 4, math.log(24)),
    (dict(barrier=0.02), 2, LN2 - 2 * 0.02 * math.log(25)),
]


@pytest.mark.parametrize("flags, k, expected", FIRST)
def test_a_new_head_is_zero_and_the_first_loss_is_known(flags, k, expected, tiny_model_dir, tmp_path):
    rows = [row | dict(scores=list(range(k)), completions=[f"up {j}" for j in range(k)]) for row in walks(6, k)]
    run = dict(model=str(tiny_model_dir("qwen2")), dataset=jsonl(tmp_path / "rows.jsonl", rows), max_steps=1)
    rm.main(rm.Args(**run, eval_fraction=0, output_dir=str(tmp_path / "run"), **flags))
    (line,) = lines_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(expected, abs=1e-6)
    assert [line[name] for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")] == [0] * 5


def test_another_first_loss_than_the_known_one_is_refused(short_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.nn.init, "zeros_", torch.nn.init.normal_)
    said = refused(rm, capsys, **short_run | dict(eval_dataset=""), output_dir=str(tmp_path / "run"))
    assert "before the first update, not 0.6931" in said


def killed_at_the_report(args):
    """In a child process."""
    rm.print_report = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    rm.main(args)


def test_killed_between_the_steps_that_make_the_shift_and_resumed(short_run, finished, tmp_path):
    """It goes on from checkpoint-21 of 22 steps."""
    args = rm.Args(**short_run, output_dir=str(tmp_path / "run"), resume=True)
    assert in_child(killed_at_the_report, args) == -signal.SIGKILL
    assert in_child(rm.main, args) == 0
    same_run(tmp_path / "run", finished)
    assert shift_of(tmp_path / "run") == shift_of(finished) != 0.0


def test_the_gradient_is_that_of_the_mean_over_rankings(short_run, scoring_dir, gradients, tmp_path):
    """By Hugging Face's model, an answer at a time."""
    flags = short_run | dict(model=str(scoring_dir("llama")), batch_size=21, max_steps=1, eval_dataset="")
    model, total, seen = AutoModelForSequenceClassification.from_pretrained(flags["model"]), 0, gradients(rm)
    for row in (rows := short_rows(flags["model"])):
        scores = torch.stack([model(torch.tensor([row.prompt + r])).logits[0, 0] for r in row.responses])
        losses = [torch.nn.functional.softplus(scores[l] - scores[w]) for w, l, *_ in row.extra["pairs"]]
        total += sum(losses) / len(losses) / len(rows)
    total.backward()
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    flat = lambda grads: torch.cat([g.flatten() for g in grads])
    assert is_near(flat(seen[0].values()), flat(p.grad for p in model.parameters()))
    assert lines_of(tmp_path / "run")[0]["loss"] == pytest.approx(total.item(), rel=1e-4)


def test_metrics_and_report_are_those_of_the_saved_model(finished):
    rows = short_rows(finished)
    scores = by_hand(finished, rows)
    gaps = [[float(s[w] - s[l]) for w, l, *_ in row.extra["pairs"]] for row, s in zip(rows, scores)]
    pairs = [gap for own in gaps for gap in own]
    assert min(map(abs, pairs)) > 1e-4  # otherwise an accuracy might depend on rounding
    last, report = lines_of(finished)[-1], json.loads((finished / "report.json").read_text())
    expected = dict(
        eval_accuracy=sum(gap > 0 for gap in pairs) / len(pairs),
        eval_margin=sum(pairs) / len(pairs),
        eval_loss=sum(sum(-logsigmoid(gap) for gap in own) / len(own) for own in gaps) / len(gaps),
        eval_calibration_error=rm.calibration_error(pairs),
        eval_length_correlation=rm.length_correlation(rows, scores),
        num_tokens=2 * sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows),
        epoch=2.0,
        step=22,
    )
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert report["accuracy"] == pytest.approx(last["eval_accuracy"]) and report["pairs"] == len(pairs)


def test_the_shift_is_the_mean_score_over_the_last_tenth_of_the_steps(finished):
    """Of 22 steps the last two, with 6 and 3 answers, each scored before its step: in step 22 by checkpoint-21."""
    rows, lines = short_rows(finished), lines_of(finished)
    batches = [rm.batch_rows(rows, args_of(batch_size=2), step) for step in (20, 21)]
    counts = [sum(len(row.responses) for row in batch) for batch in batches]
    (scores,) = by_hand(finished / "checkpoint-21", batches[1])
    rewards = torch.tensor([lines[-1][f"{name}_reward"] for name in ("mean", "min", "max")])
    assert is_near(rewards, torch.stack([scores.mean(), scores.min(), scores.max()]))
    total = sum(count * line["mean_reward"] for count, line in zip(counts, lines[-2:]))
    assert counts == [6, 3] and shift_of(finished) == pytest.approx(total / 9, rel=1e-5)
    assert len({round(line["mean_reward"], 3) for line in lines[-3:]}) == 3  # other steps have other means
    assert shift_of(finished / "checkpoint-21") == 0.0


def test_a_reward_model_is_trained_further(short_run, finished, tmp_path):
    """Training begins where it stood, with its head and its shift. To the shift the new mean is added."""
    flags = short_run | dict(model=str(finished), batch_size=21, max_steps=1, learning_rate=1e-5)
    rm.main(rm.Args(**flags, output_dir=str(tmp_path / "run")))
    before, (line,) = lines_of(finished)[-1], lines_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(before["eval_loss"], rel=1e-4)
    assert line["accuracy"] == pytest.approx(before["eval_accuracy"], abs=1e-6)
    assert line["margin"] == pytest.approx(before["eval_margin"], rel=1e-3)
    rows = short_rows(finished)
    assert line["mean_reward"] == pytest.approx(torch.cat(by_hand(finished, rows)).mean().item(), rel=1e-3)
    assert shift_of(tmp_path / "run") == pytest.approx(shift_of(finished) + line["mean_reward"], rel=1e-5)
    after = torch.cat(by_hand(tmp_path / "run", rows))
    assert abs(after.mean()) < 1e-3 < abs(line["mean_reward"])  # a step at this rate moves no score further


def test_length_balancing_in_a_run(tiny_model_dir, tmp_path, capsys):
    """Of four pairs with a longer winner and two with a shorter one, two of each are left."""
    pairs = [("up " * 5, "no")] * 4 + [("no", "up " * 5)] * 2
    rows = [dict(prompt=talk(f"{i}?"), chosen=chosen, rejected=rejected) for i, (chosen, rejected) in enumerate(pairs)]
    flags = dict(model=str(tiny_model_dir("llama")), dataset=jsonl(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    rm.main(rm.Args(**flags, batch_size=1, length_buckets=(3,), output_dir=str(tmp_path / "run")))
    assert "4 of 6 pairs kept" in capsys.readouterr().out and len(lines_of(tmp_path / "run")) == 4


# ---- bad input

OK, PAIR = dict(prompt="a", completions=["b", "c"], scores=[1.0, 0.0]), dict(prompt="a", chosen="b", rejected="c")
BAD_ROWS = {  # rows, flags, what the message must say
    "a score that is missing": ([OK, OK, OK | dict(scores=[1.0, None])], {}, "row 2"),
    "a probability beyond 1": ([PAIR | dict(probability=1.7)], {}, "row 0"),
    "no margin": ([PAIR | dict(margin=1.0), PAIR | dict(margin=None)], dict(use_margin=True), "--use-margin"),
    "no pair in a bucket": ([PAIR | dict(chosen="b c d")] * 4, dict(length_buckets=(2,)), "--length-buckets"),
    "margins for focal": ([OK], dict(use_margin=True, loss="focal"), "--use-margin"),
    "pairs taken from lists": ([OK], dict(length_buckets=(3,), loss="plackett-luce"), "--length-buckets"),
}


@pytest.mark.parametrize("rows, flags, says", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_and_contradictions_are_refused(rows, flags, says, tiny_model_dir, tmp_path, capsys):
    rm.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    flags = flags | dict(model=str(tiny_model_dir("llama")), dataset=str(tmp_path / "rows.parquet"))
    said = refused(rm, capsys, **flags, output_dir=str(tmp_path / "run"))
    assert says in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, named", [(dict(loss="focal"), "--loss focal"), (dict(use_margin=True), "--use-margin")]
)
def test_soft_labels_with_a_loss_that_takes_none_are_refused(flags, named, short_run, tmp_path, capsys):
    row = dict(prompt="a", chosen=" b", rejected=" c", probability=0.8, margin=1.0)
    for option in ("dataset", "eval_dataset"):
        data = jsonl(tmp_path / "soft.jsonl", [row] * 4)
        pairs = jsonl(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "probability"}] * 4)
        given = short_run | flags | dict(dataset=pairs) | {option: data, "output_dir": str(tmp_path / "run")}
        assert f"{named} takes no soft labels" in refused(rm, capsys, **given)


def test_a_classifier_of_three_labels_is_refused(short_run, tiny_model_dir, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir("llama"), num_labels=3)
    model.save_pretrained(tmp_path / "three")
    tokenizer_of(tiny_model_dir("llama")).save_pretrained(tmp_path / "three")
    flags = short_run | dict(model=str(tmp_path / "three"))
    assert "label" in refused(rm, capsys, **flags, output_dir=str(tmp_path / "run"))


# ---- real data


def test_real_rankings(real_data, tmp_path, capsys):
    """XSTest's five answers with many ties: a row needs two answers of different score that fit."""
    data = rm.load_rows("--dataset", str(real_data / "kwise_xstest.jsonl"), "train").select(range(80))
    model, rows, pairs = str(real_data / "stories260K-hf"), 0, 0
    tokenizer = tokenizer_of(model)
    for row in data:
        head = f"<s>user: {row['prompt'][0]['content']}</s>\nassistant: "
        size = lambda text, head=head: len(tokenizer(f"{head}{text}</s>\n", add_special_tokens=False).input_ids)
        fit = [score for text, score in zip(row["completions"], row["scores"]) if text.strip() and size(text) <= 512]
        own = sum(a != b for a, b in itertools.combinations(fit, 2))
        rows, pairs = rows + (own > 0), pairs + own
    data.to_json(tmp_path / "rows.jsonl")
    rm.main(rm.Args(model, str(tmp_path / "rows.jsonl"), str(tmp_path / "run"), max_steps=2, batch_size=4))
    said = capsys.readouterr().out
    assert f"{rows} rows from {len(data)}" in said and f"{pairs} pairs" in said and 5 < rows < 80
    assert json.loads((tmp_path / "run" / "report.json").read_text())["groups"]["kind all"]["pairs"] > 0
