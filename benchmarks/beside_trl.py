"""Every script beside TRL: the same rows in the same batches, one core, float32, both sides in turn, several times.

    pip install -e '.[bench]'
    python benchmarks/beside_trl.py                                    every method but PPO, on data from the hub
    python benchmarks/beside_trl.py --methods dpo --repeats 3          one of them
    python benchmarks/beside_trl.py --pairs hh.jsonl --questions gsm8k.jsonl       data from files
    pip install --no-deps --target older trl==1.12.0                   the last TRL with a PPOTrainer
    PYTHONPATH=older python benchmarks/beside_trl.py --methods ppo

Two methods have no counterpart in TRL. rpo.py is measured beside its DPOTrainer, which makes the same passes over the
same pairs; rlaif.py beside a judge as one would write it with transformers: both orders of a pair in padded batches,
and the logits of two letters.

Seconds are measured twice: of the whole process, from its start to its end, and after its imports (loading, tokenising
and DPO's pass of the reference included). Memory is the peak, less what the process holds after its imports. TRL runs
in every setting that might be its fastest; from the second repeat on, in the one that was. The medians, with their
ranges, go to benchmarks/RESULTS.md, in place of what stood there under the same heading.
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
DPO_SETTINGS = {
    "padding": {},
    "precomputed": dict(precompute_ref_log_probs=True),
    "both": dict(precompute_ref_log_probs=True, padding_free=True, max_length=None),
}
SETTINGS = {  # of TRL, for each method; the first one is its default
    "sft": {
        "padding": {},
        "padding-free": dict(padding_free=True, max_length=None),
        "packing": dict(packing=True, per_device_train_batch_size=8),
    },
    "reward_model": {"padding": {}},
    "dpo": DPO_SETTINGS,
    "orpo": {"padding": {}},
    "rpo": DPO_SETTINGS,
    "ppo": {"PPOTrainer of 1.12": {}},
    "rlaif": {"padded batches": {}},
    "grpo": {"generate": {}, "continuous batching": dict(use_transformers_continuous_batching=True)},
}


def memory() -> int:
    """The peak so far, in MB; getrusage would begin at what the parent process held."""
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def rule(prompts, completions, **columns) -> list:
    """A reward that costs nothing, the same on both sides."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


# ------------------------------------------------------------------------------------------- one side, in a process


def ours(method: str, model: str, data: str, out: str):
    """A generator that imports at its first step and works at its second."""
    script = importlib.import_module(method)
    flags = dict(dataset=data, output_dir=out, tokens_per_forward=4096)
    if method == "rlaif":
        flags |= dict(judge=model, orders="average", min_mass=0.0, tie_margin=0.0)
    else:
        flags |= dict(model=model, epochs=1, learning_rate=3e-4, lr_schedule="constant", eval_fraction=0.0)
    if method == "grpo":
        flags |= dict(batch_size=8, num_generations=8, max_new_tokens=64, kl_coef=0.0)
        flags |= dict(max_length=512, rewards=(f"{__file__}:rule",))
    elif method == "ppo":
        flags |= dict(batch_size=64, max_new_tokens=64, max_length=512, ppo_epochs=1, num_minibatches=1)
        flags |= dict(rewards=(f"{model}-reward",), value_model=f"{model}-reward", value_learning_rate=3e-4)
    elif method != "rlaif":
        flags |= dict(batch_size=16, max_length=512, tokens_per_forward=2048)
    yield
    script.main((script.LabelArgs if method == "rlaif" else script.Args)(**flags))


def judge(model: str, data: str):
    """Asks about a pair in both orders; the better answer is the one whose letter is more probable in the mean."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rlaif

    yield
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[-1] for letter in "AB"]
    question, principle, asked = rlaif.REQUESTS["compare"], rlaif.REQUESTS["principle"], []
    for row in load_dataset("json", data_files=data, split="train"):
        for a, b in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            text = question.format(principle=principle, talk=row["prompt"], a=a, b=b)
            messages = [dict(role="user", content=text)]
            asked.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    asked.sort(key=len)  # so that a batch holds little padding
    for i in range(0, len(asked), 16):
        batch = tokenizer(asked[i : i + 16], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            policy(**batch, logits_to_keep=1).logits[:, -1, letters].softmax(-1)


def trl(method: str, model: str, data: str, out: str, setting: str):
    """`ours` with TRL's trainer."""
    os.environ |= dict(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1")
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if method == "rlaif":
        yield from judge(model, data)
        return
    name = dict(reward_model="Reward", rpo="DPO").get(method, method.upper())
    library = importlib.import_module(f"trl.experimental.{method}" if method in ("orpo", "ppo") else "trl")
    if not hasattr(library, f"{name}Trainer"):
        sys.exit(f"this TRL has no {name}Trainer; the top of this file names one that has")
    Config, Trainer = getattr(library, f"{name}Config"), getattr(library, f"{name}Trainer")
    yield

    def policy():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")

    def scorer(source: str):
        options = dict(num_labels=1, dtype=torch.float32, attn_implementation="sdpa")
        return AutoModelForSequenceClassification.from_pretrained(source, **options)

    flags = dict(output_dir=out, num_train_epochs=1, learning_rate=3e-4, lr_scheduler_type="constant", warmup_steps=0)
    flags |= dict(weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", seed=0, bf16=False, use_cpu=True)
    flags |= dict(gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1)
    flags |= dict(disable_tqdm=True, per_device_train_batch_size=64 if method in ("grpo", "ppo") else 16)
    rows = load_dataset("json", data_files=data, split="train")
    side = "left" if method in ("grpo", "ppo") else "right"
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side=side)
    if method == "grpo":
        flags |= dict(num_generations=8, max_completion_length=64, temperature=1.0, beta=0.0)
    elif method == "ppo":
        flags |= dict(num_mini_batches=1, num_ppo_epochs=1, response_length=64, total_episodes=len(rows))
        flags |= dict(temperature=1.0, stop_token="eos", num_sample_generations=0)
        tokenised = lambda row: dict(input_ids=tokenizer(row["prompt"]).input_ids)
        rows = rows.map(tokenised, remove_columns=rows.column_names)
    else:
        flags |= dict(max_length=512)
    arguments = dict(model=scorer(model) if method == "reward_model" else policy(), train_dataset=rows)
    arguments |= dict(args=Config(**flags | SETTINGS[method][setting]), processing_class=tokenizer)
    if method in ("dpo", "rpo", "ppo"):
        arguments |= dict(ref_model=policy())
    if method == "grpo":
        arguments |= dict(reward_funcs=rule)
    if method == "ppo":
        arguments |= dict(reward_model=scorer(f"{model}-reward"), value_model=scorer(f"{model}-reward"))
        arguments |= dict(eval_dataset=rows.select(range(8)))
    Trainer(**arguments).train()


def side(who: str, *arguments):
    """One side's work in this process: prints seconds and memory, both above those of the imports."""
    import torch

    torch.set_num_threads(1)
    work = (ours if who == "ours" else trl)(*arguments)
    next(work)
    clock, before = time.time(), memory()
    next(work, None)
    print(json.dumps(dict(seconds=time.time() - clock, memory=memory() - before)))


# ------------------------------------------------------------------------------------------------------- both sides


def as_text(prompt, answer) -> tuple:
    """A conversation and its answer as HH-RLHF writes them."""
    if isinstance(prompt, list):
        turns = [f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in prompt]
        prompt, answer = "".join(turns) + "\n\nAssistant:", " " + answer[0]["content"]
    return prompt, answer


def make_work(folder: Path, pairs: str, questions: str, steps: int) -> dict:
    """Writes a tokenizer, a Llama of 3.7 M parameters, a reward model of it, pairs of less than 480 tokens, and
    questions, of so many steps. Returns the file of each method."""
    import reward_model
    import sft

    def write(name: str, rows: list) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    found, every = [], sft.load_rows("--pairs", pairs, "train")
    for row in every.select(range(min(len(every), 2000))):
        prompt = row.get("prompt") or row["chosen"][:-1]
        answers = [row[name][-1:] if isinstance(row[name], list) else row[name] for name in ("chosen", "rejected")]
        (prompt, chosen), (_, rejected) = (as_text(prompt, answer) for answer in answers)
        found.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, score_chosen=1.0, score_rejected=0.0))
    model, short = str(folder / "model"), dict(max_steps=1, batch_size=4, eval_fraction=0.0)
    texts = write("all.jsonl", [dict(text=row["prompt"] + row["chosen"]) for row in found])
    size = dict(hidden_size=256, num_layers=4, num_heads=4, vocab_size=2048)
    sft.main(sft.Args(from_scratch=True, dataset=texts, output_dir=model, **size, **short))
    tokenizer, kept = sft.load_tokenizer(model), []
    for row in found:
        prompt, *answers = (len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected"))
        if row["chosen"] != row["rejected"] and prompt + max(answers) < 480 and len(kept) < 16 * steps:
            kept.append(row)
    files = dict.fromkeys(("reward_model", "dpo", "orpo", "rpo", "rlaif"), write("pairs.jsonl", kept))
    options = dict(dataset=files["dpo"], output_dir=f"{model}-reward", **short)
    reward_model.main(reward_model.Args(model=model, **options))
    files["sft"] = write("text.jsonl", [dict(text=row["prompt"] + row["chosen"]) for row in kept])
    asked = sft.load_rows("--questions", questions, "train").select(range(8 * max(1, steps // 2)))
    prompts = [row.get("question") or as_text(row["prompt"], [dict(content="")])[0] for row in asked]
    files["grpo"] = write("prompts.jsonl", [dict(prompt=prompt) for prompt in prompts])
    files["ppo"] = write("many.jsonl", [dict(prompt=prompt) for prompt in prompts] * 8)  # as many answers as grpo
    return files


def run(*arguments) -> dict:
    command, environment = [sys.executable, __file__, "--side", *map(str, arguments)], os.environ | {}
    with tempfile.TemporaryDirectory() as cache:  # new, since TRL keeps tokenised rows and reference log-probabilities
        environment |= dict(OMP_NUM_THREADS="1", WANDB_MODE="disabled", HF_DATASETS_CACHE=cache)
        clock = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        whole = time.time() - clock
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | dict(whole=whole)


def compare(method: str, model: str, data: str, out: str, repeats: int) -> str:
    """Runs both sides in turn, so that a machine that changes its pace changes it for both; returns a table's row."""
    found = {who: [] for who in ("ours", *SETTINGS[method])}
    sides = list(found)
    for i in range(repeats):
        for who in sides:
            target = f"{out}-{who}-{i}".replace(" ", "-")
            setting = () if who == "ours" else (who,)
            result = run("trl" if setting else "ours", method, model, data, target, *setting)
            found[who].append(result)
            cells = f"{result['seconds']:7.1f} s, whole {result['whole']:7.1f} s {result['memory']:6} MB"
            print(f"{method:<13} {who:<20} {cells}", flush=True)
        best = min(SETTINGS[method], key=lambda who: found[who][0]["seconds"])
        sides = ["ours", best]
    values = {key: {who: [r[key] for r in found[who]] for who in found} for key in ("seconds", "whole", "memory")}
    cells = [f"{method}.py"]
    for key in ("seconds", "whole"):
        mine, theirs = values[key]["ours"], values[key][best]
        cells += [shown(mine), shown(theirs), shown([b / a for a, b in zip(mine, theirs)], 2)]
    mine, theirs = values["memory"]["ours"], values["memory"][best]
    cells += [shown(mine, 0), shown(theirs, 0), f"{median(mine) / max(1, median(theirs)):.2f}"]
    others = [f"{who} {median(values['seconds'][who]):.1f} s" for who in SETTINGS[method] if who != best]
    return f"| {' | '.join(cells)} | {best} ({', '.join(others)}) |".replace(" ()", "")


def shown(values: list, digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write_results(heading: str, text: str):
    """The text under its heading in RESULTS.md, in place of what stood there."""
    file = HERE / "RESULTS.md"
    parts = (file.read_text() if file.exists() else "# Results\n").split("\n## ")
    kept = [part for part in parts if not part.startswith(heading + "\n")]
    file.write_text("\n## ".join([*kept, f"{heading}\n\n{text}"]).rstrip("\n") + "\n")


def kept_rows(heading: str, row: str) -> list:
    """The rows of the table under the heading, that of the same script replaced by the new one."""
    file, name = HERE / "RESULTS.md", row.split("|")[1]
    old = file.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines() if file.exists() else []
    old = [line for line in old if ".py |" in line and line.count("|") == row.count("|")]
    return [line for line in old if line.split("|")[1] != name] + [row]


def machine() -> str:
    """The date, the processor and the versions, as a sentence."""
    lines = open("/proc/cpuinfo").read().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = [name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    core = f"one core of {os.cpu_count()}, {name}"
    return f"{datetime.date.today()}, {core}; Python {platform.python_version()}, {versions}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name in SETTINGS if name != "ppo"]
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=every)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=8, help="of 16 rows; half as many of 64 answers for grpo and ppo")
    parser.add_argument("--pairs", default="Anthropic/hh-rlhf", help="preference data: hub id or file")
    parser.add_argument("--questions", default="openai/gsm8k:main", help="prompts: hub id or file")
    args = parser.parse_args()
    heading = f"Beside TRL {importlib.metadata.version('trl')}"
    pairs, questions, half = Path(args.pairs).name, Path(args.questions).name, max(1, args.steps // 2)
    work = f"{args.steps} steps of 16 rows of {pairs}; grpo.py: {half} of 8 prompts of {questions} x 8 answers of at "
    work += f"most 64 tokens; ppo.py: {half} of 64 answers. Medians of {args.repeats} runs of each side in turn, and "
    work += "the range."
    heads = "script | seconds | TRL | times as fast | whole process | TRL | times as fast | MB | TRL | share"
    head = f"| {heads} | TRL's setting |\n{'| --- ' * 11}|"
    with tempfile.TemporaryDirectory() as folder:
        files = make_work(Path(folder), args.pairs, args.questions, args.steps)
        for method in args.methods:
            row = compare(method, f"{folder}/model", files[method], f"{folder}/{method}", args.repeats)
            rows = "\n".join(kept_rows(heading, row))
            write_results(heading, f"{machine()}\n\n{work}\n\n{head}\n{rows}")
            print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
