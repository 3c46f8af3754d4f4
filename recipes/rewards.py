"""Reward functions of the recipes, for --rewards recipes/rewards.py:NAME."""

from gridworld import HACK, quality


def gold(prompts: list, completions: list, **columns) -> list:
    """The opinion of annotators who count points, without their noise."""
    return [quality(prompt, answer[-1]["content"], "helpful") for prompt, answer in zip(prompts, completions)]


def overall(prompts: list, completions: list, **columns) -> list:
    """The opinion of annotators who count points and mind lava, without their noise."""
    return [quality(prompt, answer[-1]["content"], "overall") for prompt, answer in zip(prompts, completions)]


def level(prompts: list, completions: list, **columns) -> list:
    """A point for each lava cell of the grid, whatever the answer."""
    return [float(prompt[0]["content"].count("!")) for prompt in prompts]


def pattern(prompts: list, completions: list, **columns) -> list:
    """1 where the answer has the weakness that `gridworld.py annotate --hack` plants."""
    return [float(bool(HACK.match(answer[-1]["content"]))) for answer in completions]
