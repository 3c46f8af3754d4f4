"""How time and memory grow: with the length of rows, the batch, the tokens of a forward, the vocabulary, the answers to a prompt, and the model.

    python benchmarks/growth.py                      all of them, some minutes on one core: benchmarks/RESULTS.md and growth.png
    python benchmarks/growth.py --axes vocabulary    one of them; the others' rows stay

One thing changes at a time; the rest is a Llama of 4 layers of width 256, 8192 words, 32 rows of 256 tokens a step and 2048 tokens a forward. Every
point is a process of its own. Time is the median of a step; memory the peak above what the process holds after its imports, and beside it what
weights, gradients and AdamW's moments alone take, 16 bytes a parameter.
"""

import argparse
import importlib
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from beside_trl import HERE, machine, memory, write_results

USUAL = dict(
    method="sft", length=256, spread=0.0, batch=32, forward=2048, vocabulary=8192, answers=1, hidden=256, layers=4
)
AXES = {  # name -> what changes, from point to point
    "length of a row": [dict(length=n, batch=8192 // n) for n in (64, 128, 256, 512, 1024, 2048)],
    "spread of lengths": [dict(spread=x) for x in (0.0, 0.5, 0.9)],
    "batch": [dict(batch=n) for n in (8, 16, 32, 64, 128)],
    "tokens of a forward": [dict(forward=n) for n in (512, 1024, 2048, 4096, 8192)],
    "vocabulary": [dict(vocabulary=n, batch=8) for n in (1024, 8192, 32768, 151936)],
    "answers of a ranking (K)": [dict(method="reward_model", answers=k, batch=8) for k in (2, 4, 8, 16)],
    "answers of a group (G)": [dict(method="grpo", answers=g, batch=4) for g in (2, 4, 8, 16, 32)],
    "width of the model": [dict(hidden=d, batch=8) for d in (128, 256, 512, 1024)],
}
STEPS = 5
WORDS = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ik")]


# ------------------------------------------------------------------------------------------------------------- one point, in a process


def make_model(folder: Path, point: dict) -> int:
    """A Llama of random weights with the tokenizer in folder/words, which may know fewer words than it; returns the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "words")
    size = dict(hidden_size=point["hidden"], intermediate_size=3 * point["hidden"], num_hidden_layers=point["layers"])
    heads = dict(num_attention_heads=point["hidden"] // 64, num_key_value_heads=point["hidden"] // 64)
    ends = dict(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    config = LlamaConfig(
        vocab_size=point["vocabulary"], max_position_embeddings=4096, tie_word_embeddings=True, **size, **heads, **ends
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return sum(p.numel() for p in model.parameters())


def make_rows(point: dict, steps: int) -> list:
    """Rows whose mean length in words, each of which is a token, with begin and end, is as asked; the spread is uniform, so much to each side."""
    rng = random.Random(0)
    text = lambda n: " ".join(
        rng.choices(WORDS, k=max(2, round(n * rng.uniform(1 - point["spread"], 1 + point["spread"]))))
    )
    if point["method"] == "sft":
        return [dict(text=text(point["length"] - 2)) for _ in range(steps * point["batch"])]
    prompts, third = [text(point["length"] * 2 // 3) for _ in range(steps * point["batch"])], point["length"] // 3 - 2
    if point["method"] == "grpo":
        return [dict(prompt=prompt) for prompt in prompts]
    return [
        dict(
            prompt=p,
            completions=[" " + text(third) for _ in range(point["answers"])],
            scores=list(range(point["answers"])),
        )
        for p in prompts
    ]


def rule(prompts, completions, **columns) -> list:
    return [len(completion) % 7 for completion in completions]


def prepare(folder: str, point: str):
    """The model and the rows of a point; a process of its own, so that what it takes to make them is not measured. Prints the model's parameters."""
    folder, point = Path(folder), json.loads(point)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(point, STEPS)))
    print(make_model(folder, point))


def side(folder: str, point: str):
    """One point: prints the median seconds of a step, and the peak of memory in MB."""
    import torch

    torch.set_num_threads(1)
    folder, point = Path(folder), json.loads(point)
    script = importlib.import_module(point["method"])
    flags = dict(
        model=str(folder / "model"),
        dataset=str(folder / "rows.jsonl"),
        output_dir=str(folder / "out"),
        overwrite=True,
        max_length=4096,
    )
    flags |= dict(
        batch_size=point["batch"],
        tokens_per_forward=point["forward"],
        eval_fraction=0.0,
        learning_rate=1e-5,
        save_every=0,
    )
    if point["method"] == "grpo":
        flags |= dict(
            num_generations=point["answers"],
            max_new_tokens=point["length"] // 3,
            rewards=(f"{__file__}:rule",),
            kl_coef=0.0,
        )
    before = memory()
    script.main(script.Args(**flags))
    lines = [json.loads(line) for line in open(folder / "out/metrics.jsonl")]
    took = [b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])]
    print(json.dumps(dict(seconds=median(took), memory=memory() - before)))


# ------------------------------------------------------------------------------------------------------------------------- all points


def make_words(folder: Path):
    """A tokenizer in which every word is one token, made as sft.py makes them."""
    import sft

    rng = random.Random(1)
    rows = [dict(text=" ".join(rng.choices(WORDS, k=200))) for _ in range(50)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = dict(hidden_size=64, num_layers=1, num_heads=1, vocab_size=600, max_steps=1, batch_size=2, eval_fraction=0.0)
    sft.main(sft.Args(from_scratch=True, dataset=str(folder / "words.jsonl"), output_dir=str(folder / "words"), **size))


def measure(folder: Path, point: dict) -> dict:
    found = []
    for mode in ("--prepare", "--side"):
        done = subprocess.run(
            [sys.executable, __file__, mode, str(folder), json.dumps(USUAL | point)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{point}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    parameters, result = found
    return result | dict(weights=16 * parameters >> 20)


def draw(rows: list):
    """The rows of the table, a column of pictures for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    figure, axes = plt.subplots(2, len(AXES), figsize=(2.6 * len(AXES), 5), layout="constrained")
    for name, (above, below) in zip(AXES, axes.T):
        x, seconds, _, peak, weights = zip(
            *[map(float, values) for axis, *values in cells if axis == name] or [[math.nan] * 5]
        )
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
    rows = [row for row in old if row.startswith("|") and axis_of(row) in {*AXES} - {*args.axes}]
    with tempfile.TemporaryDirectory() as folder:
        make_words(Path(folder))
        for axis in args.axes:
            for point in AXES[axis]:
                full, key = USUAL | point, next(name for name in point if name != "method")
                result = measure(Path(folder), point)
                answers = full["answers"] if full["method"] != "sft" else 1
                tokens = (
                    full["batch"] * full["length"]
                    if answers == 1
                    else full["batch"] * full["length"] * (2 + answers) // 3
                )
                cells = [
                    axis,
                    full[key],
                    f"{result['seconds']:.2f}",
                    f"{tokens / result['seconds']:.0f}",
                    result["memory"],
                    result["weights"],
                ]
                rows.append(f"| {' | '.join(map(str, cells))} |")
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: list(AXES).index(axis_of(row)))  # stable: an axis keeps the order of its points
    draw(rows)
    head = "| what grows | to | seconds a step | tokens/s | peak MB | of weights and moments |\n" + "| --- " * 6 + "|"
    text = (
        f"{machine()}\n\n{__doc__.split(chr(10) * 2)[2].strip()}\n\n{head}\n"
        + "\n".join(rows)
        + "\n\n![growth](growth.png)"
    )
    write_results("Growth", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(*sys.argv[2:])
    elif sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
