"""These scripts beside TRL 1.16: the same rows in the same batches, one core, float32, both sides in turn, several times.

    pip install -e '.[bench]'
    python benchmarks/beside_trl.py                                        every method but PPO, on HH-RLHF and GSM8K from the hub
    python benchmarks/beside_trl.py --methods dpo --repeats 5              one of them
    python benchmarks/beside_trl.py --pairs hh.jsonl --questions gsm8k.jsonl       from files
    pip install --no-deps --target older trl==1.12.0                       an older one, which has a PPOTrainer
    PYTHONPATH=older python benchmarks/beside_trl.py --methods ppo

Two methods have no counterpart there and stand beside the nearest: rpo.py beside its DPOTrainer, which makes the same passes over the same
pairs; rlaif.py beside a judge as one would write it with transformers: both orders of a pair in padded batches, the logits of two letters.

Seconds are those of a whole process less its imports: loading, tokenising and, for DPO, the reference's pass included. Memory is the peak above
what the process holds after its imports. TRL runs in every setting that might be its fastest, and is compared at the one that was. The
medians, with the range, go to benchmarks/RESULTS.md, in place of what stood there under the same heading.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
SETTINGS = {  # of TRL, for each method; the first one is its default
    "sft": {
        "padding": {},
        "padding-free": dict(padding_free=True, max_length=None),
        "packing": dict(packing=True, per_device_train_batch_size=8),
    },
    "reward_model": {"padding": {}},
    "dpo": {
        "padding": {},
        "precomputed": dict(precompute_ref_log_probs=True),
        "both": dict(precompute_ref_log_probs=True, padding_free=True, max_length=None),
    },
    "orpo": {"padding": {}},
    "rpo": {},
    "ppo": {"PPOTrainer of 1.12": {}},
    "rlaif": {"padded batches": {}},
    "grpo": {"generate": {}, "continuous batching": dict(use_transformers_continuous_batching=True)},
}
SETTINGS["rpo"] = SETTINGS["dpo"]


def memory() -> int:
    """The peak so far, in MB; getrusage would begin at what the parent process held."""
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def rule(prompts, completions, **columns) -> list:
    """A reward that costs nothing, the same on both sides."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


# --------------------------------------------------------------------------------------------------------------- one side, in a process


def ours(method: str, model: str, data: str, out: str):
    script = importlib.import_module(method)
    flags = dict(
        model=model,
        dataset=data,
        epochs=1,
        batch_size=16,
        learning_rate=3e-4,
        lr_schedule="constant",
        eval_fraction=0.0,
    )
    flags |= dict(max_length=512, tokens_per_forward=2048, output_dir=out)
    if method == "grpo":
        flags |= dict(batch_size=8, num_generations=8, max_new_tokens=64, kl_coef=0.0, tokens_per_forward=4096)
        flags |= dict(rewards=(f"{__file__}:rule",))
    elif method == "ppo":
        flags |= dict(batch_size=64, max_new_tokens=64, tokens_per_forward=4096, rewards=(f"{model}-reward",))
        flags |= dict(value_model=f"{model}-reward", value_learning_rate=3e-4, ppo_epochs=1, num_minibatches=1)
    if method == "rlaif":
        flags = dict(
            judge=model,
            dataset=data,
            output_dir=out,
            orders="average",
            min_mass=0.0,
            tie_margin=0.0,
            tokens_per_forward=4096,
        )
    yield
    script.main((script.LabelArgs if method == "rlaif" else script.Args)(**flags))


def judge(model: str, data: str):
    """A pair is asked about in both orders; the better answer is the one whose letter the judge finds more probable in the mean."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rlaif

    yield
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy, question, asked = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
        rlaif.REQUESTS["compare"],
        [],
    )
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[-1] for letter in "AB"]
    for row in load_dataset("json", data_files=data, split="train"):
        for a, b in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            text = question.format(principle=rlaif.REQUESTS["principle"], talk=row["prompt"], a=a, b=b)
            asked.append(
                tokenizer.apply_chat_template(
                    [dict(role="user", content=text)], add_generation_prompt=True, tokenize=False
                )
            )
    asked.sort(key=len)  # so that a batch holds little padding
    for i in range(0, len(asked), 16):
        batch = tokenizer(asked[i : i + 16], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            policy(**batch, logits_to_keep=1).logits[:, -1, letters].softmax(-1)


def trl(method: str, model: str, data: str, out: str, setting: str):
    os.environ |= dict(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1")
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if method == "rlaif":
        yield from judge(model, data)
        return
    if method == "ppo":
        try:
            from trl.experimental.ppo import PPOConfig as Config
            from trl.experimental.ppo import PPOTrainer as Trainer
        except ImportError:
            sys.exit("this TRL has no PPOTrainer; see the top of this file for one that has")
    elif method == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        import trl as library

        name = dict(sft="SFT", reward_model="Reward", dpo="DPO", rpo="DPO", grpo="GRPO")[method]
        Config, Trainer = getattr(library, f"{name}Config"), getattr(library, f"{name}Trainer")
    yield
    auto, options = (
        (AutoModelForSequenceClassification, dict(num_labels=1))
        if method == "reward_model"
        else (AutoModelForCausalLM, {})
    )
    load = lambda: auto.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa", **options)
    flags = dict(
        output_dir=out,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    flags |= dict(
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    flags |= dict(logging_steps=1, seed=0, disable_tqdm=True, optim="adamw_torch")
    data = load_dataset("json", data_files=data, split="train")
    if method == "grpo":
        flags |= dict(
            per_device_train_batch_size=64, num_generations=8, max_completion_length=64, temperature=1.0, beta=0.0
        )
    elif method == "ppo":
        flags |= dict(
            per_device_train_batch_size=64,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=64,
            total_episodes=len(data),
            temperature=1.0,
        )
        flags |= dict(stop_token="eos", num_sample_generations=0)
        tokenizer = AutoTokenizer.from_pretrained(model)
        data = data.map(
            lambda row: dict(input_ids=tokenizer(row["prompt"]).input_ids), remove_columns=data.column_names
        )
    else:
        flags |= dict(max_length=512)
    arguments = dict(model=load(), args=Config(**flags | SETTINGS[method][setting]), train_dataset=data)
    if method in ("dpo", "rpo"):
        arguments |= dict(ref_model=load())
    if method == "grpo":
        arguments |= dict(reward_funcs=rule)
    if method == "ppo":
        scorer = lambda: AutoModelForSequenceClassification.from_pretrained(
            f"{model}-reward", num_labels=1, dtype=torch.float32
        )
        arguments |= dict(
            ref_model=load(), reward_model=scorer(), value_model=scorer(), eval_dataset=data.select(range(8))
        )
    Trainer(
        **arguments,
        processing_class=AutoTokenizer.from_pretrained(
            model, padding_side="left" if method in ("grpo", "ppo") else "right"
        ),
    ).train()


def side(who: str, *arguments):
    """One side's work in this process: prints seconds and memory, both above those of the imports."""
    import torch

    torch.set_num_threads(1)
    work = (ours if who == "ours" else trl)(*arguments)
    next(work)
    clock, before = time.time(), memory()
    next(work, None)
    print(json.dumps(dict(seconds=time.time() - clock, memory=memory() - before)))


# ------------------------------------------------------------------------------------------------------------------------ both sides


def as_text(prompt, answer) -> tuple:
    """A conversation and its answer as HH-RLHF writes them."""
    if isinstance(prompt, list):
        prompt = (
            "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in prompt)
            + "\n\nAssistant:"
        )
        answer = " " + answer[0]["content"]
    return prompt, answer


def make_work(folder: Path, pairs: str, questions: str, steps: int) -> dict:
    """A tokenizer, a Llama of 3.7 M parameters and a reward model of it; pairs of less than 480 tokens, and questions: files by method, of so many
    steps each."""
    import reward_model
    import sft

    lines = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for row in sft.load_rows("--pairs", pairs, "train"):
        prompt = row.get("prompt") or row["chosen"][:-1]
        (prompt, chosen), (_, rejected) = (
            as_text(prompt, row[name][-1:] if isinstance(row[name], list) else row[name])
            for name in ("chosen", "rejected")
        )
        found.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, score_chosen=1.0, score_rejected=0.0))
        if len(found) == 2000:
            break
    lines("all.jsonl", [dict(text=row["prompt"] + row["chosen"]) for row in found])
    size = dict(hidden_size=256, num_layers=4, num_heads=4, vocab_size=2048, max_steps=1, batch_size=4)
    sft.main(
        sft.Args(
            from_scratch=True,
            dataset=str(folder / "all.jsonl"),
            output_dir=str(folder / "model"),
            eval_fraction=0.0,
            **size,
        )
    )
    tokenizer = sft.load_tokenizer(str(folder / "model"))
    length = lambda text: len(tokenizer(text).input_ids)
    kept = [
        row
        for row in found
        if row["chosen"] != row["rejected"]
        and length(row["prompt"]) + max(length(row["chosen"]), length(row["rejected"])) < 480
    ]
    kept = kept[: 16 * steps]
    lines("pairs.jsonl", kept)
    reward_model.main(
        reward_model.Args(
            model=str(folder / "model"),
            dataset=str(folder / "pairs.jsonl"),
            output_dir=str(folder / "model-reward"),
            max_steps=1,
            batch_size=4,
            eval_fraction=0.0,
        )
    )
    lines("text.jsonl", [dict(text=row["prompt"] + row["chosen"]) for row in kept])
    asked = sft.load_rows("--questions", questions, "train").select(range(8 * max(1, steps // 2)))
    lines(
        "prompts.jsonl",
        [dict(prompt=row.get("question") or as_text(row["prompt"], [dict(content="")])[0]) for row in asked],
    )
    lines(
        "many.jsonl", [json.loads(line) for line in open(folder / "prompts.jsonl")] * 8
    )  # for ppo, of as many answers as grpo
    files = dict(
        sft="text",
        reward_model="pairs",
        dpo="pairs",
        orpo="pairs",
        rpo="pairs",
        rlaif="pairs",
        ppo="many",
        grpo="prompts",
    )
    return {method: str(folder / f"{name}.jsonl") for method, name in files.items()}


def run(*arguments) -> dict:
    command = [sys.executable, __file__, "--side", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(values: list, digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write_results(heading: str, text: str):
    """The text under its heading in RESULTS.md, in place of what stood there."""
    file = HERE / "RESULTS.md"
    parts = (file.read_text() if file.exists() else "# Results\n").split("\n## ")
    kept = [part for part in parts if not part.startswith(heading + "\n")]
    file.write_text("\n## ".join([*kept, f"{heading}\n\n{text}"]).rstrip("\n") + "\n")


def kept_rows(heading: str, rows: list) -> list:
    """The rows of a table that stands under the heading, those of the same script replaced by the new ones."""
    file, name = HERE / "RESULTS.md", lambda row: row.split("|")[1]
    old = file.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines() if file.exists() else []
    return [row for row in old if ".py |" in row and name(row) not in map(name, rows)] + rows


def machine() -> str:
    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    have = lambda package: importlib.util.find_spec(package) is not None
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("torch", "transformers", "trl")
        if have(package)
    )
    return f"{datetime.date.today()}, one core of {os.cpu_count()}, {name}; Python {platform.python_version()}, {versions}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=list(SETTINGS), default=[name for name in SETTINGS if name != "ppo"]
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--steps", type=int, default=16, help="of 16 rows; for grpo half as many, of 8 prompts x 8 answers of 64 tokens"
    )
    parser.add_argument("--pairs", default="Anthropic/hh-rlhf", help="preference data: hub id or file")
    parser.add_argument("--questions", default="openai/gsm8k:main", help="prompts: hub id or file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = make_work(Path(folder), args.pairs, args.questions, args.steps)
        for method in args.methods:
            found = {}
            for i in range(args.repeats):  # in turn, so that a machine that changes its pace changes it for all
                for who in ("ours", *SETTINGS[method]):
                    out = f"{folder}/{method}-{who}-{i}".replace(" ", "-")
                    arguments = (method, f"{folder}/model", files[method], out)
                    result = run("ours", *arguments) if who == "ours" else run("trl", *arguments, who)
                    found.setdefault(who, []).append(result)
                    print(f"{method:<13} {who:<20} {result['seconds']:7.1f} s {result['memory']:6} MB", flush=True)
            seconds, peaks = (
                {who: [r[key] for r in results] for who, results in found.items()} for key in ("seconds", "memory")
            )
            best = min(SETTINGS[method], key=lambda who: median(seconds[who]))
            ratio = [b / a for a, b in zip(seconds["ours"], seconds[best])]
            others = ", ".join(f"{who} {median(seconds[who]):.1f} s" for who in SETTINGS[method] if who != best)
            cells = [
                f"{method}.py",
                shown(seconds["ours"]),
                shown(seconds[best]),
                shown(ratio, 2),
                shown(peaks["ours"], 0),
                shown(peaks[best], 0),
            ]
            cells += [
                f"{median(peaks['ours']) / max(1, median(peaks[best])):.2f}",
                f"{best} ({others})" if others else best,
            ]
            rows.append(f"| {' | '.join(cells)} |")
    heading = f"Beside TRL {importlib.metadata.version('trl')}"
    rows = kept_rows(heading, rows)
    head = (
        "| script | seconds | TRL | times as fast | MB | TRL | times the memory | TRL's setting |\n"
        + "| --- " * 8
        + "|"
    )
    pairs, questions = Path(args.pairs).name, Path(args.questions).name
    half = max(1, args.steps // 2)
    work = f"{args.steps} steps of 16 rows of {pairs}; grpo.py: {half} of 8 prompts of {questions} x 8 answers; ppo.py: {half} of 64 prompts x 1;"
    work += " at most 64 tokens."
    text = (
        f"{machine()}\n\n{work} Medians of {args.repeats} runs of each side in turn, and the range.\n\n{head}\n"
        + "\n".join(rows)
    )
    write_results(heading, text)
    print(f"\n{text}\n\nwritten to {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
