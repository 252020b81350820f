"""Descriptions of sandbox tasks, as people would type them; wordings for evaluation never occur in training."""

from __future__ import annotations

import functools
import random
from importlib import resources
from typing import Any

import yaml

__all__ = ["describe", "read"]

_FUSED_SHARE = 0.25  # of descriptions in which one phrase names skill and domain together


@functools.cache
def read(factor: str) -> dict[str, Any]:
    """Reads the wordings of `skills`, `domains`, `styles` or `fused`."""
    source = resources.files("lorag.worlds.sandbox").joinpath("wordings", f"{factor}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(source)


def describe(skill: str, domain: str, style: str, split: str, rng: random.Random, count: int) -> list[str]:
    """Writes distinct descriptions of one task.

    Args:
        skill: A key of `skills.yaml`.
        domain: A key of `domains.yaml`.
        style: A key of `styles.yaml`.
        split: "train" or "eval".
        rng: Source of every choice.
        count: How many.
    """
    texts: dict[str, None] = {}
    while len(texts) < count:
        if rng.random() < _FUSED_SHARE:
            task = rng.choice(read("fused")[domain][skill][split])
        else:
            task = rng.choice(read("skills")[skill][split]).format(domain=rng.choice(read("domains")[domain][split]))
        texts[rng.choice(read("styles")[style][split]).format(task=task)] = None
    return list(texts)
