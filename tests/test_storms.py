"""Nothing is lost, whichever script, rank or moment: runs killed at random moments and resumed are the uninterrupted run, bit for bit; one, two and
four ranks are one process; a run begun on so many ranks goes on on another number; a rank that dies takes the run down with it."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults import SCRIPTS, rows_for
from test_plumbing import equal, in_child, jsonl, lines_of, on_ranks

RULE = """
import os, signal

def letters(prompts, completions, **columns):
    return [len(set(c[-1]["content"])) / 10 for c in completions]

def once(prompts, completions, **columns):  # where a file named `die` lies, its reader takes it away, and dies; not before the second checkpoint
    try:
        if not os.path.exists("run/checkpoint-2"):
            raise FileNotFoundError
        os.remove("die")
    except FileNotFoundError:
        return letters(prompts, completions)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def model_that_scores(tiny_model_dir, tmp_path_factory):
    """A random reward model, for the scripts that want one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir("llama"), num_labels=1)
        model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir("llama")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def flags_of(tiny_model_dir, model_that_scores, tmp_path_factory):
    """flags_of(script, family): ten steps on eleven rows of uneven length, with evaluations, checkpoints at every third step, and a last step of an
    epoch that has one row; the samplers' answers are of different lengths."""
    folder = tmp_path_factory.mktemp("storm")
    (folder / "rule.py").write_text(RULE)

    def flags(script: str, family: str = "llama") -> dict:
        rows = rows_for(script, 10) + rows_for(script, 3)
        for i, row in enumerate(rows):
            for name in ("messages", "chosen", "prompt"):
                if name in row:
                    row[name] = [m | dict(content=m["content"] + " up" * (i * i % 13) + f" {i}") for m in row[name]]
        data = jsonl(folder / f"{script}.jsonl", rows)
        common = dict(model=str(tiny_model_dir(family)), dataset=data, eval_fraction=0.15, batch_size=5, epochs=4, max_steps=10, save_every=3, seed=3)
        common |= dict(learning_rate=1e-3, tokens_per_forward=150, eval_every=4)
        sample = dict(max_new_tokens=12, rule=f"{folder / 'rule.py'}:letters", reward_model=(model_that_scores,))
        more = dict(
            ppo=sample | dict(value_learning_rate=1e-3, num_minibatches=2, ppo_epochs=2, top_p=0.95),
            grpo=sample | dict(num_generations=3, num_iterations=2, reference_every=4, match=""),
            dpo=dict(max_new_tokens=4, show=1),
            orpo=dict(max_new_tokens=4, show=1),
            rpo=dict(max_new_tokens=4, show=1, k=2, reward_model=model_that_scores),
        )
        known = importlib.import_module(script).Args.__dataclass_fields__
        return {name: value for name, value in (common | more.get(script, {})).items() if name in known}

    return flags


TIMES = ("tokens_per_second", "eps", "step_time", "seconds", "peak_memory_mb")


def timeless(value):
    """A JSON value without what measures time or memory, or names its own folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in (*TIMES, "output_dir", "resume", "args")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(file: Path):
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True) | dict(seconds=0)
    if file.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in file.read_text().splitlines()]
    return timeless(json.loads(file.read_text())) if file.suffix == ".json" else None if file.suffix == ".png" else file.read_bytes()


def same_files(ours: Path, theirs: Path):
    """The same files of the same content, bit for bit, but for times and pictures."""
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) for folder in (ours, theirs)]
    assert names[0] == names[1]
    for name in names[0]:
        assert equal(content(ours / name), content(theirs / name)), name


@pytest.fixture(scope="module")
def whole(flags_of, tmp_path_factory):
    """whole(script, family) -> the output directory of a run never interrupted, and the seconds that it took. Read only."""
    made = {}

    def make(script: str, family: str = "llama") -> tuple:
        if (script, family) not in made:
            out, module, start = tmp_path_factory.mktemp("whole") / script, importlib.import_module(script), time.monotonic()
            assert in_child(module.main, module.Args(**flags_of(script, family), output_dir=str(out))) == 0
            made[script, family] = out, time.monotonic() - start
            assert len(lines_of(out)) == 10 and {f"checkpoint-{n}" for n in (3, 6, 9)} <= {file.name for file in out.iterdir()}
        return made[script, family]

    return make


@pytest.mark.parametrize("storm", [0, *(pytest.param(storm, marks=pytest.mark.slow) for storm in range(1, 17))])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_three_moments_and_resumed(script, storm, flags_of, whole, tmp_path):
    """While it loads, prepares data, trains, evaluates, saves or finishes. (sft.py draws random numbers in every forward, for GPT-2's dropout.)"""
    finished, seconds = whole(script, "gpt2")
    module, moments = importlib.import_module(script), random.Random(100 * storm + SCRIPTS.index(script))
    args = module.Args(**flags_of(script, "gpt2"), output_dir=str(tmp_path / "run"), resume=True)
    ends = []
    while -9 not in ends:  # again, and earlier, should the machine have become so fast that no kill came in time
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ends, old = [], {}
        for _ in range(3):
            ends.append(in_child(module.main, args, kill_after=moments.uniform(0.05, 1) * seconds))
            kept = {checkpoint.name: (checkpoint / "state.pt").stat().st_ino for checkpoint in tmp_path.glob("run/checkpoint-*")}
            assert all(kept.get(name) == number for name, number in old.items())  # it goes on from there, and does not begin again
            old = kept
            for checkpoint in tmp_path.glob("run/checkpoint-*"):  # what has the name is whole
                torch.load(checkpoint / "state.pt", weights_only=True), load_file(checkpoint / "model.safetensors")
        seconds /= 2
    assert set(ends) <= {-9, 0}
    assert in_child(module.main, args) == 0
    same_files(tmp_path / "run", finished)


def near(ours: list, theirs: list):
    """The same curves, to 1e-5 of each value's size over the run (or of 1, where it is smaller)."""
    assert len(ours) == len(theirs)
    size = {name: max([1.0, *(abs(line[name]) for line in theirs if name in line)]) for line in theirs for name in line}
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name in a.keys() - set(TIMES):
            assert a[name] == pytest.approx(b[name], abs=TOLERANCE.get(name, 1e-5) * size[name]), (b["step"], name)


TOLERANCE = {"val/explained_variance": 1e-4}  # it divides by a small variance


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_are_one_process(script, world, flags_of, whole, tmp_path):
    """Batches of 5, 5 and 1 rows: ranks have unequal shares, or none."""
    finished, _ = whole(script)
    on_ranks(importlib.import_module(script), world, **flags_of(script), output_dir=str(tmp_path / "many"))
    near(lines_of(tmp_path / "many"), lines_of(finished))
    close_weights(tmp_path / "many", finished)


def close_weights(ours: Path, theirs: Path):
    for file in theirs.rglob("*.safetensors"):
        a, b = load_file(ours / file.relative_to(theirs)), load_file(file)
        assert a.keys() == b.keys()
        for name in a:
            # AdamW divides a gradient by its own size, and so makes the rounding of small ones as large as a share of a step
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_on_another_number_of_ranks(script, before, after, flags_of, whole, tmp_path):
    """The same rows in the same order, and the same curve."""
    finished, _ = whole(script)
    module, flags = importlib.import_module(script), flags_of(script) | dict(output_dir=str(tmp_path / "run"))
    go = lambda ranks, **more: on_ranks(module, ranks, **flags, **more) if ranks > 1 else in_child(module.main, module.Args(**flags, **more))
    go(before)
    back_to_checkpoint(tmp_path / "run", 6)
    written = lambda: (tmp_path / "run/checkpoint-6/state.pt").stat().st_mtime_ns
    first = written()
    assert not go(after, resume=True)
    assert written() == first  # it went on from there
    near(lines_of(tmp_path / "run"), lines_of(finished))
    close_weights(tmp_path / "run", finished)


def back_to_checkpoint(out: Path, step: int):
    """A finished run as if it had been killed shortly after that checkpoint."""
    for path in out.iterdir():
        if path.is_file() and path.name not in ("args.json", "metrics.jsonl"):
            path.unlink()
        elif path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
            os.system(f"rm -r '{path}'")
    kept = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps(kept | dict(finished=False)))


@pytest.mark.parametrize("script", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_rank_that_dies_takes_the_run_down(script, flags_of, torchrun, tmp_path):
    """And the same command goes on with --resume."""
    flags = flags_of(script) | dict(output_dir="run", save_every=1)
    flags["rule"] = flags["rule"].replace("letters", "once")
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value]))]
    out, start = tmp_path / "run", time.monotonic()
    (tmp_path / "die").touch()
    done = torchrun(script, 2, *words, cwd=tmp_path, check=False, timeout=180)
    assert done.returncode and re.search(rf"exitcode\s*: -{int(signal.SIGKILL)}", done.stderr) and not (tmp_path / "die").exists()
    assert time.monotonic() - start < 150 and not (out / "model.safetensors").exists()
    assert "resuming run after step" in torchrun(script, 2, *words, "--resume", cwd=tmp_path).stdout
    assert len(lines_of(out)) == 10 and json.loads((out / "args.json").read_text())["finished"]
