"""Nothing is lost, whichever script, rank or moment.

Runs killed at random moments and resumed equal the uninterrupted run, bit for bit. One, two and four ranks give the
same run, as do other settings of the memory options, and nearly so bfloat16. A run that began on one number of ranks
continues on another. A rank that dies takes the run down with it.
"""

import importlib
import json
import math
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_plumbing import equal, in_child, jsonl, lines_of, on_ranks

SCRIPTS = "sft reward_model ppo dpo orpo rpo grpo".split()
every_script = pytest.mark.parametrize("script", SCRIPTS)
slow = pytest.mark.slow

RULE = """
import os, signal

def letters(prompts, completions, **columns):
    return [len(set(c[-1]["content"])) / 10 for c in completions]

def once(prompts, completions, **columns):
    \"\"\"From the second checkpoint on, the process that finds a file named `die` removes it and dies.\"\"\"
    try:
        if not os.path.exists("run/checkpoint-2"):
            raise FileNotFoundError
        os.remove("die")
    except FileNotFoundError:
        return letters(prompts, completions)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def row_for(script: str, i: int) -> dict:
    message = lambda role, text: [dict(role=role, content=text + " up" * (i * i % 13) + f" {i}")]
    prompt = message("user", f"Which way is {'up right down left here'.split()[i % 5]}?")
    chosen, rejected = message("assistant", "It is one."), message("assistant", "Two.")
    if script == "sft":
        return dict(messages=prompt + chosen)
    if script in ("ppo", "grpo"):
        return dict(prompt=prompt, answer=str(i))
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, score_chosen=1.0, score_rejected=0.0)


@pytest.fixture(scope="module")
def flags_of(tiny_model_dir, scorer, tmp_path_factory):
    """flags_of(script, family): ten steps on eleven training rows, in batches of 5, 5 and 1, with evaluations and
    checkpoints at every third step. Sampled answers have different lengths."""
    folder = tmp_path_factory.mktemp("storm")
    (folder / "rule.py").write_text(RULE)

    def flags(script: str, family: str = "llama") -> dict:
        data = jsonl(folder / f"{script}.jsonl", [row_for(script, i) for i in range(13)])
        common = dict(model=str(tiny_model_dir(family)), dataset=data, eval_fraction=0.15, seed=3)
        common |= dict(batch_size=5, epochs=4, max_steps=10, save_every=3, eval_every=3)
        common |= dict(learning_rate=1e-3, tokens_per_forward=150)
        sampled = dict(max_new_tokens=12, rewards=(scorer, f"{folder / 'rule.py'}:letters"))
        more = dict(
            ppo=sampled | dict(value_learning_rate=1e-3, num_minibatches=2, ppo_epochs=2),
            grpo=sampled | dict(num_generations=3, num_iterations=2, reference_every=4),
            dpo=dict(optimizer="ondare", merge_base=str(tiny_model_dir(family)), merge_weight=0.1),
            rpo=dict(reward_model=scorer),
        )
        return common | more.get(script, {})

    return flags


# what differs between equal runs: times, memory, and the names of directories
CHANGING = set("tokens_per_second eps step_time seconds peak_memory_mb date output_dir resume args".split())


def content(file: Path):
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True) | dict(seconds=0)
    if file.suffix in (".json", ".jsonl") and file.name not in ("tokenizer.json", "tokenizer_config.json"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        return [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in lines]
    return None if file.suffix == ".png" else file.read_bytes()


def same_files(ours: Path, theirs: Path):
    """Both have the same files with the same content, bit for bit; but for times and pictures."""
    names, other = ({str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} for out in (ours, theirs))
    assert names == other
    for name in sorted(names):
        assert equal(content(ours / name), content(theirs / name)), name


@pytest.fixture(scope="module")
def whole(flags_of, tmp_path_factory):
    """whole(script, family) -> the output directory of a run without interruption, and its duration. Read only."""
    made = {}

    def make(script: str, family: str = "llama") -> tuple:
        if (script, family) not in made:
            out, module = tmp_path_factory.mktemp("whole") / script, importlib.import_module(script)
            args, start = module.Args(**flags_of(script, family), output_dir=str(out)), time.monotonic()
            assert in_child(module.main, args) == 0
            made[script, family] = out, time.monotonic() - start
            assert len(lines_of(out)) == 10
            assert {f"checkpoint-{n}" for n in (3, 6, 9)} <= {file.name for file in out.iterdir()}
        return made[script, family]

    return make


@pytest.mark.parametrize("storm", [0, *(pytest.param(storm, marks=slow) for storm in range(1, 17))])
@every_script
def test_killed_at_three_moments_and_resumed(script, storm, flags_of, whole, tmp_path):
    """While it loads, prepares data, trains, evaluates, saves or finishes. In sft.py GPT-2 has dropout."""
    finished, seconds = whole(script, "gpt2")
    module, moments = importlib.import_module(script), random.Random(100 * storm + SCRIPTS.index(script))
    args = module.Args(**flags_of(script, "gpt2"), output_dir=str(tmp_path / "run"), resume=True)
    ends = []
    while -9 not in ends:  # again, and earlier, if the machine has become so fast that no kill came in time
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ends, before = [], {}
        for _ in range(3):
            ends.append(in_child(module.main, args, kill_after=moments.uniform(0.05, 1) * seconds))
            checkpoints = list(tmp_path.glob("run/checkpoint-*"))
            files = {checkpoint.name: (checkpoint / "state.pt").stat().st_ino for checkpoint in checkpoints}
            assert before.items() <= files.items(), "it has not continued, but begun again"
            before = files
            for checkpoint in checkpoints:  # each is complete
                torch.load(checkpoint / "state.pt", weights_only=True)
                load_file(checkpoint / "model.safetensors")
        seconds /= 2
    assert set(ends) <= {-9, 0}
    assert in_child(module.main, args) == 0
    same_files(tmp_path / "run", finished)


def near(ours: Path, theirs: Path):
    """Two runs are equal but for rounding.

    Sums in another order differ by some 1e-6 of their size. AdamW divides a gradient by its own size, so that where a
    gradient is hardly more than rounding, a weight differs by a share of a step, 1e-3: a few weights by a fifth of it,
    all together by a hundredth."""
    lines, expected = lines_of(ours), lines_of(theirs)
    assert len(lines) == len(expected)
    size = {}
    for name, value in (pair for line in expected for pair in line.items()):
        size[name] = max(1.0, size.get(name, 1.0), abs(value))
    for a, b in zip(lines, expected):
        assert a.keys() == b.keys()
        for name in a.keys() - CHANGING:
            assert a[name] == pytest.approx(b[name], abs=TOLERANCE.get(name, 1e-5) * size[name]), (b["step"], name)
    for file in theirs.rglob("*.safetensors"):
        weights, expected = load_file(ours / file.relative_to(theirs)), load_file(file)
        assert weights.keys() == expected.keys()
        for name in weights:
            difference = weights[name] - expected[name]
            assert difference.abs().max() < 2e-4 and difference.square().mean().sqrt() < 1e-5, name


TOLERANCE = {"val/explained_variance": 5e-4}  # it divides by a small variance


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=slow)])
@every_script
def test_ranks_are_one_process(script, world, flags_of, whole, tmp_path):
    """In batches of 5, 5 and 1 rows, ranks have unequal shares, or none."""
    finished, _ = whole(script)
    on_ranks(importlib.import_module(script), world, **flags_of(script), output_dir=str(tmp_path / "many"))
    near(tmp_path / "many", finished)


@pytest.mark.parametrize("change", [dict(tokens_per_forward=10**6), dict(gradient_checkpointing=True)], ids=str)
@every_script
def test_memory_options_change_rounding_only(script, change, flags_of, whole, tmp_path):
    finished, _ = whole(script)
    module = importlib.import_module(script)
    assert in_child(module.main, module.Args(**flags_of(script) | change, output_dir=str(tmp_path / "run"))) == 0
    near(tmp_path / "run", finished)


@every_script
def test_bfloat16_is_nearly_float32(script, flags_of, whole, tmp_path):
    """In a group of one rank, as a GPU would train: the first step's loss, and weights that are saved as they came.
    Where answers are sampled, they may differ from the first step on."""
    finished, _ = whole(script)
    module, out = importlib.import_module(script), tmp_path / "run"
    args = module.Args(**flags_of(script) | dict(dtype="bfloat16", max_steps=3, save_every=2), output_dir=str(out))
    assert in_child(module.main, args) == 0
    (ours, *_), (theirs, *_) = lines_of(out), lines_of(finished)
    assert ours.keys() == theirs.keys() and all(math.isfinite(x) for line in lines_of(out) for x in line.values())
    if script not in ("ppo", "grpo"):
        assert [ours[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [theirs[name] for name in ("loss", "grad_norm")], rel=0.2
        )
    else:
        assert max(value for name, value in ours.items() if "logp_difference" in name) < 0.1
    for folder in (out, out / "checkpoint-2"):
        assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=slow), pytest.param(2, 4, marks=slow)])
@every_script
def test_resumed_on_another_number_of_ranks(script, before, after, flags_of, whole, tmp_path):
    finished, _ = whole(script)
    module, out = importlib.import_module(script), tmp_path / "run"
    flags = flags_of(script) | dict(output_dir=str(out))

    def go(ranks: int, **more):
        if ranks > 1:
            on_ranks(module, ranks, **flags, **more)
        else:
            assert in_child(module.main, module.Args(**flags, **more)) == 0

    go(before)
    for path in out.iterdir():  # as if it had been killed shortly after the second checkpoint
        if path.is_file() and path.name not in ("args.json", "metrics.jsonl"):
            path.unlink()
    shutil.rmtree(out / "checkpoint-9")
    args = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps(args | dict(finished=False)))
    written = (out / "checkpoint-6/state.pt").stat().st_mtime_ns
    go(after, resume=True)
    assert (out / "checkpoint-6/state.pt").stat().st_mtime_ns == written, "it has begun again"
    near(out, finished)


@pytest.mark.parametrize("script", ["ppo", pytest.param("grpo", marks=slow)])
def test_a_rank_that_dies_takes_the_run_down(script, flags_of, torchrun, tmp_path):
    flags, words = flags_of(script) | dict(output_dir="run", save_every=1), []
    flags["rewards"] = tuple(source.replace(":letters", ":once") for source in flags["rewards"])
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    (tmp_path / "die").touch()
    done = torchrun(script, 2, *words, cwd=tmp_path, check=False, timeout=180)
    assert done.returncode and re.search(rf"exitcode\s*: -{int(signal.SIGKILL)}", done.stderr)
    assert not (tmp_path / "die").exists() and not (tmp_path / "run/model.safetensors").exists()
    assert "resuming run after step" in torchrun(script, 2, *words, "--resume", cwd=tmp_path).stdout
    assert len(lines_of(tmp_path / "run")) == 10
    assert json.loads((tmp_path / "run/args.json").read_text())["finished"]
