"""The scripts that sample, run for a long time at their recipes' settings: does memory stay flat, does the pace hold, does the policy collapse?

    bash recipes/instructgpt.sh                          makes the checkpoints that this starts from
    python benchmarks/soak.py                            ppo.py, grpo.py and rlaif.py, an hour each: benchmarks/RESULTS.md and soak.png
    python benchmarks/soak.py --together                 the same, side by side: an hour in all, and a slower pace

The memory is what the process holds (resident), read every five seconds; the pace is tokens a second of the script's own log, or rows a second of
rlaif.py's. Both are medians over tenths of the time, after the first step.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

from beside_trl import HERE, machine, write_results

LEARN = "--batch-size 128 --ppo-epochs 2 --kl-coef 0.2 --learning-rate 2e-4 --value-learning-rate 1e-3 --max-new-tokens 24 --epochs 100000 --warmup-ratio 0"
RUNS = {  # name -> (command, what is watched in the log besides the pace)
    "ppo": (
        f"ppo.py --model runs/sft --rewards runs/reward_model --dataset data/grid/prompts.jsonl {LEARN}",
        "objective/scores",
    ),
    "grpo": (
        "grpo.py --model runs/sft --dataset data/grid/reasoning.jsonl --rewards gridworld.py:walk_score --batch-size 16"
        " --max-new-tokens 96 --kl-coef 0.02 --learning-rate 1e-4 --epochs 100000 --warmup-ratio 0 --eval-fraction 0",
        "reward",
    ),
    "rlaif": (
        "rlaif.py synthesise --model runs/sft --reward-model runs/reward_model --rows 100000 --max-new-tokens 150",
        "",
    ),
}


def resident(pid: int) -> float:
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(name: str, minutes: float) -> tuple:
    """Runs a command for so long and stops it as a user would, with SIGTERM: [(seconds, MB)], [(seconds, pace, watched)]."""
    command, watched = RUNS[name]
    out = Path("runs/soak") / name
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--output-dir", str(out), "--overwrite"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    start, held, rows = time.time(), [], []
    while time.time() - start < 60 * minutes:
        time.sleep(5)
        if process.poll() is not None:
            sys.exit(
                f"{command}: ended by itself after {time.time() - start:.0f} s with exit code {process.returncode}"
            )
        held.append((time.time() - start, resident(process.pid)))
        file = out / "rows.part"
        rows.append((held[-1][0], sum(1 for _ in open(file)) if file.exists() else 0))
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    if name == "rlaif":
        rows = [point for point in rows if point[1]]
        log = [
            (then, (many - few) / (then - now), 0.0) for (now, few), (then, many) in zip(rows, rows[12:])
        ]  # rows of the last minute
    else:
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
        log = [(line["seconds"], line["tokens_per_second"], line[watched]) for line in lines[1:]]
    return [point for point in held if point[0] >= log[0][0]], log


def tenths(points: list) -> list:
    """The points of each tenth of the time."""
    first, last = points[0][0], points[-1][0] + 1e-9
    return [
        [p for p in points if first + (last - first) * k / 10 <= p[0] < first + (last - first) * (k + 1) / 10]
        for k in range(10)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--together", action="store_true")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(args.scripts), 3, figsize=(11, 2.6 * len(args.scripts)), layout="constrained", squeeze=False
    )
    rows = []
    with ThreadPoolExecutor(len(args.scripts) if args.together else 1) as pool:
        soaked = pool.map(lambda name: soak(name, args.minutes), args.scripts)
    for name, line, (held, log) in zip(args.scripts, axes, soaked):
        for axis, points, title in zip(
            line, (held, [p[:2] for p in log], [(p[0], p[2]) for p in log]), ("MB", "pace", RUNS[name][1] or "-")
        ):
            axis.plot([p[0] / 60 for p in points], [p[1] for p in points])
            axis.set(title=f"{name}.py: {title}", xlabel="minutes", ylim=0 if title != RUNS[name][1] else None)
            axis.set_visible(title != "-")
        values = [
            [f"{median(p[1] for p in part):.0f}" for part in tenths(held) if part],
            [f"{median(p[1] for p in part):.{0 if name != 'rlaif' else 1}f}" for part in tenths(log) if part],
            [f"{mean(p[2] for p in part):.2f}" for part in tenths(log) if part] if RUNS[name][1] else [],
        ]
        for what, found in zip(("MB", "rows/s" if name == "rlaif" else "tokens/s", RUNS[name][1]), values):
            if found:
                rows.append(
                    f"| {name}.py, {len(log)} steps | {what} | {', '.join(found)} |"
                    if name != "rlaif"
                    else f"| rlaif.py | {what} | {', '.join(found)} |"
                )
                print(rows[-1], flush=True)
    figure.savefig(HERE / "soak.png", dpi=80)
    table = "| run | what | by tenths of the time |\n| --- | --- | --- |\n" + "\n".join(rows)
    write_results(
        "Soak",
        f"{machine()}\n\n{args.minutes:.0f} minutes each{', side by side' if args.together else ''}.\n\n{table}\n\n![soak](soak.png)",
    )


if __name__ == "__main__":
    main()
