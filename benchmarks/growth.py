"""How time and memory grow with the length of rows, the batch, the vocabulary, the data, the model, and so on.

    python benchmarks/growth.py                      every axis, about an hour on one core
    python benchmarks/growth.py --axes vocabulary    one of them; the others' rows stay

Results: benchmarks/RESULTS.md and growth.png.

One thing changes at a time; the rest is a Llama of 4 layers of width 256, 8192 words, 32 rows of 256 tokens a step and
2048 tokens a forward. Every point is a process of its own. A step's time is the median; "first step" is the time from
the end of the imports to the first batch: reading and tokenising the data, and loading the model. "Checkpoint" is the
time to write one, with the optimiser's state. Memory is the peak above what the process holds after its imports; the
column beside it is what weights, gradients and AdamW's moments take, 16 bytes a parameter.
"""

import argparse
import importlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from beside_trl import HERE, machine, memory, write_results

USUAL = dict(method="sft", length=256, spread=0.0, batch=32, forward=2048, vocabulary=8192, answers=1, hidden=256)
USUAL |= dict(rows=0)  # as many as the steps need
AXES = {  # name -> what changes, from point to point
    "length of a row": [dict(length=n, batch=8192 // n) for n in (64, 128, 256, 512, 1024, 2048)],
    "spread of lengths": [dict(spread=x) for x in (0.0, 0.5, 0.9)],
    "batch": [dict(batch=n) for n in (8, 16, 32, 64, 128)],
    "tokens of a forward": [dict(forward=n) for n in (512, 1024, 2048, 4096, 8192)],
    "vocabulary": [dict(vocabulary=n, batch=8) for n in (1024, 8192, 32768, 151936)],
    "conversations": [dict(rows=n, batch=8) for n in (1000, 10_000, 100_000)],
    "answers of a ranking (K)": [dict(method="reward_model", answers=k, batch=8) for k in (2, 4, 8, 16)],
    "answers of a group (G)": [dict(method="grpo", answers=g, batch=4) for g in (2, 4, 8, 16, 32)],
    "width of the model": [dict(hidden=d, batch=8) for d in (128, 256, 512, 1024)],
}
HEADS = ["what grows", "to", "first step (s)", "seconds a step", "tokens/s", "checkpoint (s)", "peak MB"]
HEADS += ["of weights and moments"]
STEPS = 5
WORDS = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ik")]


# ------------------------------------------------------------------------------------------- one point, in a process


def make_model(folder: Path, point: dict) -> int:
    """Writes a Llama of random weights with the tokenizer of folder/words; returns the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "words")
    width, heads = point["hidden"], point["hidden"] // 64
    size = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=heads)
    size |= dict(vocab_size=point["vocabulary"], max_position_embeddings=4096, tie_word_embeddings=True)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**size, **special))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return sum(p.numel() for p in model.parameters())


def make_rows(point: dict) -> list:
    """Rows of the mean length asked for; a word is a token. The spread is uniform, so much to each side."""
    rng, count = random.Random(0), point["rows"] or STEPS * point["batch"]

    def text(n: int) -> str:
        n = round(n * rng.uniform(1 - point["spread"], 1 + point["spread"]))
        return " ".join(rng.choices(WORDS, k=max(2, n)))

    if point["rows"]:
        roles = ("user", "assistant") * 2
        turn = point["length"] // 4 - 5
        return [dict(messages=[dict(role=role, content=text(turn)) for role in roles]) for _ in range(count)]
    if point["method"] == "sft":
        return [dict(text=text(point["length"] - 2)) for _ in range(count)]
    third, answers = point["length"] // 3, range(point["answers"])
    rows = [dict(prompt=text(2 * third)) for _ in range(count)]
    if point["method"] == "reward_model":
        for row in rows:
            row.update(completions=[" " + text(third - 2) for _ in answers], scores=list(answers))
    return rows


def rule(prompts, completions, **columns) -> list:
    return [len(completion) % 7 for completion in completions]


def prepare(folder: str, point: str):
    """Writes a point's model and rows, in a process whose memory is not measured; prints the number of parameters."""
    folder, point = Path(folder), json.loads(point)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(point)))
    print(make_model(folder, point))


def side(folder: str, point: str):
    """Trains at one point and prints what it took."""
    import torch

    torch.set_num_threads(1)
    folder, point = Path(folder), json.loads(point)
    script, clock, before, times = importlib.import_module(point["method"]), time.perf_counter(), memory(), {}
    forwards, save_checkpoint = script.forwards, script.save_checkpoint

    def watched_forwards(*args, **kwargs):
        times.setdefault("first", time.perf_counter() - clock)
        return forwards(*args, **kwargs)

    def watched_save(*args, **kwargs):
        start = time.perf_counter()
        save_checkpoint(*args, **kwargs)
        times["checkpoint"] = time.perf_counter() - start

    script.forwards, script.save_checkpoint = watched_forwards, watched_save
    flags = dict(model=str(folder / "model"), dataset=str(folder / "rows.jsonl"), output_dir=str(folder / "out"))
    flags |= dict(overwrite=True, max_length=4096, batch_size=point["batch"], tokens_per_forward=point["forward"])
    flags |= dict(eval_fraction=0.0, learning_rate=1e-5, max_steps=STEPS, save_every=STEPS - 1)
    if point["method"] == "grpo":
        flags |= dict(num_generations=point["answers"], max_new_tokens=point["length"] // 3, kl_coef=0.0)
        flags |= dict(rewards=(f"{__file__}:rule",))
    script.main(script.Args(**flags))
    seconds = [json.loads(line)["seconds"] for line in open(folder / "out/metrics.jsonl")]
    took = [b - a for a, b in zip(seconds, seconds[1:])]
    print(json.dumps(times | dict(seconds=median(took), memory=memory() - before)))


# ------------------------------------------------------------------------------------------------------- all points


def make_words(folder: Path):
    """A tokenizer in which every word is one token, made by sft.py."""
    import sft

    rng = random.Random(1)
    rows = [dict(text=" ".join(rng.choices(WORDS, k=200))) for _ in range(50)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = dict(hidden_size=64, num_layers=1, num_heads=1, vocab_size=600, max_steps=1, batch_size=2, eval_fraction=0.0)
    sft.main(sft.Args(from_scratch=True, dataset=str(folder / "words.jsonl"), output_dir=str(folder / "words"), **size))


def measure(folder: Path, point: dict) -> dict:
    found = []
    for mode in ("--prepare", "--side"):
        command = [sys.executable, __file__, mode, str(folder), json.dumps(USUAL | point)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{point}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    parameters, result = found
    return result | dict(weights=16 * parameters >> 20)


def draw(rows: list):
    """The table's rows as pictures, a column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    figure, axes = plt.subplots(2, len(AXES), figsize=(2.6 * len(AXES), 5), layout="constrained")
    for name, (above, below) in zip(AXES, axes.T):
        points = [map(float, values) for axis, *values in cells if axis == name] or [[math.nan] * 7]
        x, first, seconds, _, _, peak, weights = zip(*points)
        if name == "conversations":
            above.plot(x, first, "o-", label="seconds to the first step")
            above.legend()
        else:
            above.plot(x, seconds, "o-")
        below.plot(x, peak, "o-", label="peak")
        below.plot(x, weights, "--", color="grey", label="weights, moments")
        above.set(title=name, ylim=0)
        below.set(ylim=0)
    axes[0, 0].set(ylabel="seconds a step")
    axes[1, 0].set(ylabel="MB above the imports")
    axes[1, 0].legend()
    figure.savefig(HERE / "growth.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    args = parser.parse_args()
    results, axis_of = HERE / "RESULTS.md", lambda row: row.split("|")[1].strip()
    old = results.read_text().partition("## Growth\n")[2].partition("\n## ")[0].splitlines() if results.exists() else []
    old = [row for row in old if row.count("|") == len(HEADS) + 1]  # an earlier version had fewer columns
    rows = [row for row in old if axis_of(row) in {*AXES} - {*args.axes}]
    with tempfile.TemporaryDirectory() as folder:
        make_words(Path(folder))
        for axis in args.axes:
            for point in AXES[axis]:
                full, what = USUAL | point, next(name for name in point if name != "method")
                result = measure(Path(folder), point)
                tokens = full["batch"] * full["length"]
                if full["method"] != "sft":  # two thirds are prompt
                    tokens = tokens * (2 + full["answers"]) // 3
                cells = [axis, full[what], f"{result['first']:.1f}", f"{result['seconds']:.2f}"]
                cells += [f"{tokens / result['seconds']:.0f}", f"{result['checkpoint']:.1f}"]
                cells += [result["memory"], result["weights"]]
                rows.append(f"| {' | '.join(map(str, cells))} |")
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: list(AXES).index(axis_of(row)))  # stable: an axis keeps the order of its points
    draw(rows)
    table = "\n".join([f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|", *rows])
    explanation = __doc__.split("\n\n")[3].strip()
    write_results("Growth", f"{machine()}\n\n{explanation}\n\n{table}\n\n![growth](growth.png)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(*sys.argv[2:])
    elif sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
