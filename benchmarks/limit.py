"""How near every training script comes to the machine's rate of matrix multiplications, and what else takes time.

    python benchmarks/limit.py                                                    data from the hub
    python benchmarks/limit.py --pairs hh.jsonl --questions gsm8k.jsonl           data from files

The work is that of beside_trl.py; it takes some minutes on one core. FLOPs are counted operator by operator, for the
steps alone, without the start-up. Seconds are those of the script's own log, from a run of its own; where the time
goes is measured by the profiler, in a third run. Sampling is measured beside its own floor, the multiplications of its
forward passes at the limit; the rate of [64, 256] x [256, 768] shows how far decoding's shapes are from the limit.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from beside_trl import machine, make_work, ours, write_results

METHODS = ("sft", "reward_model", "dpo", "orpo", "rpo", "grpo", "ppo")
KINDS = {  # how an operator's name begins, by kind; the first kind that fits counts, else "elementwise"
    "matmul": "mm addmm bmm linear matmul baddbmm",
    "attention": "_scaled_dot_product scaled_dot_product",
    "optimiser": "_fused_adam _foreach linalg_vector_norm",
    "vocabulary": "_log_softmax logsumexp amax special_entr gather cumsum searchsorted",
    "copies": "copy_ cat index clone stack embedding contiguous repeat",
}
HEADS = [
    "script",
    "seconds a step",
    "GFLOP a step",
    "GFLOP/s",
    "share of the limit",
    *KINDS,
    "elementwise",
    "Python, files",
]


def kind_of(operator: str) -> str:
    """The kind of an operator of the profile, "" for what is not one of torch's."""
    if operator.startswith("mkldnn"):
        return "matmul"
    if operator.startswith("Optimizer"):
        return "optimiser"
    if not operator.startswith("aten::"):
        return ""
    name = operator.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name.startswith(tuple(names.split()))), "elementwise")


# -------------------------------------------------------------------------------------------- one run, in a process


def watch(script, name: str, flops) -> Counter:
    """Counts the seconds and the FLOPs of the script's function of that name, if it has one, in what it returns."""
    found = Counter()
    if not hasattr(script, name):
        return found
    function = getattr(script, name)

    def watched(*args, **kwargs):
        clock, before = time.perf_counter(), flops()
        result = function(*args, **kwargs)
        found.update(seconds=time.perf_counter() - clock, flops=flops() - before)
        return result

    setattr(script, name, watched)
    return found


def side(mode: str, method: str, model: str, data: str, out: str, steps: str):
    """One run of a script in this process: prints what the mode ("time", "flops" or "profile") finds."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    torch.set_num_threads(1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {  # the counter does not know the CPU's
        attention: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v),
    }
    script, counter = importlib.import_module(method), FlopCounterMode(display=False, custom_mapping=known)
    flops = lambda: counter.get_total_flops() if mode == "flops" else 0
    sampling, reference = (watch(script, name, flops) for name in ("sample_answers", "reference_logps"))
    work, Args = ours(method, model, data, out), script.Args
    next(work)
    script.Args = lambda **flags: Args(**flags | dict(max_steps=int(steps)))
    if mode == "flops":
        with counter:
            next(work, None)
        found = dict(flops=counter.get_total_flops() - reference["flops"])  # that pass is before the steps
    elif mode == "profile":
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            clock = time.perf_counter()
            next(work, None)
            wall, spent = time.perf_counter() - clock, Counter()
        for event in profiler.key_averages():
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        found = dict(wall=wall, spent=spent)
    else:
        next(work, None)
        seconds = [json.loads(line)["seconds"] for line in open(f"{out}/metrics.jsonl")]
        found = dict(seconds=(seconds[-1] - seconds[0]) / (len(seconds) - 1))
    print(json.dumps(found | dict(sampling=sampling)))


# -------------------------------------------------------------------------------------------------------- all runs


def rate(n: int, k: int, m: int) -> float:
    """GFLOP/s of [n, k] x [k, m] in float32 on one core: the best of several."""
    import torch

    torch.set_num_threads(1)
    a, b, best = torch.randn(n, k), torch.randn(k, m), 0.0
    repeats = max(3, round(2e9 / (n * k * m)))
    for _ in range(5):
        clock = time.perf_counter()
        for _ in range(repeats):
            a @ b
        best = max(best, 2 * n * k * m * repeats / (time.perf_counter() - clock) / 1e9)
    return best


def run(*arguments) -> dict:
    done = subprocess.run([sys.executable, __file__, "--side", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=8, help="of 16 rows; for grpo and ppo half as many, of 64 answers")
    parser.add_argument("--pairs", default="Anthropic/hh-rlhf", help="preference data: hub id or file")
    parser.add_argument("--questions", default="openai/gsm8k:main", help="prompts: hub id or file")
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps must be at least 4")
    limit, projection, decoding = rate(1024, 1024, 1024), rate(2048, 256, 768), rate(64, 256, 768)
    rates = f"Matrices of 1024 x 1024: {limit:.0f} GFLOP/s, the limit; [2048, 256] x [256, 768]: {projection:.0f}; "
    rates += f"[64, 256] x [256, 768]: {decoding:.0f}."
    print(rates, flush=True)
    rows, sampled = [], []
    with tempfile.TemporaryDirectory() as folder:
        files = make_work(Path(folder), args.pairs, args.questions, args.steps)
        for method in args.methods:
            steps = max(2, args.steps // 2) if method in ("grpo", "ppo") else args.steps
            timed, few, many, profiled = (
                run(mode, method, f"{folder}/model", files[method], f"{folder}/{method}-{mode}-{n}", n)
                for mode, n in (("time", steps), ("flops", 1), ("flops", steps), ("profile", steps))
            )
            flops = (many["flops"] - few["flops"]) / (steps - 1) / 1e9
            speed = flops / timed["seconds"]
            share = {kind: profiled["spent"].get(kind, 0) / profiled["wall"] for kind in (*KINDS, "elementwise")}
            share["Python, files"] = 1 - sum(share.values())
            cells = [f"{method}.py", f"{timed['seconds']:.2f}", f"{flops:.0f}", f"{speed:.0f}", f"{speed / limit:.2f}"]
            rows.append(f"| {' | '.join([*cells, *(f'{part:.0%}' for part in share.values())])} |")
            print(rows[-1], flush=True)
            if timed["sampling"]:
                seconds = timed["sampling"]["seconds"] / steps
                floor = many["sampling"]["flops"] / steps / 1e9 / limit
                sampled.append(f"| {method}.py | {seconds:.2f} | {floor:.2f} | {floor / seconds:.2f} |")
                print(sampled[-1], flush=True)
    table = "\n".join([f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|", *rows])
    floors = "\n".join(["| sampling of | seconds a step | its floor | share |", "| --- " * 4 + "|", *sampled])
    notes = "The last columns are shares of the time of a whole run under the profiler, start-up included."
    write_results("Beside the limit", f"{machine()}\n\n{rates}\n{notes}\n\n{table}\n\n{floors}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        main()
