"""The command that scores an adapter in EleutherAI's lm-evaluation-harness, prompted as the adapter was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorag.adapters.reading import own_chat_template
from lorag.base.kinds import kind_named, kind_of_task
from lorag.base.names import locate
from lorag.errors import LoragError

__all__ = ["lm_eval_command"]

_LOADERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")  # that the harness knows


def lm_eval_command(folder: Path, config: Mapping[str, Any], info: Mapping[str, Any]) -> str | None:
    """A shell command that runs `lm_eval` on a base model with an adapter; TASK stands for the task.

    The chat template is applied where the adapter was trained with it, or where nothing says how it was trained and the base
    model's tokenizer, or the adapter's own, has one.

    Args:
        folder: The adapter's.
        config: Its adapter_config.json.
        info: Its lorag.json, or nothing.

    Returns:
        The command in one line; None for adapters of no base model, or of one that writes no texts.
    """
    base, named = info.get("base_model"), config.get("base_model_name_or_path")
    stated: Mapping[str, Any] = base if isinstance(base, Mapping) else {}
    kind = kind_named(stated.get("kind")) or kind_of_task(config.get("task_type"))
    if kind is None or kind.loader not in _LOADERS or not isinstance(named, str) or not named:
        return None
    revision = config.get("revision") if isinstance(config.get("revision"), str) else stated.get("revision")
    place = _place(named, revision)
    arguments = {"pretrained": place, "peft": str(folder)}
    if isinstance(revision, str) and revision not in ("", "main") and not Path(place).is_dir():
        arguments["revision"] = revision
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        arguments["tokenizer"] = str(folder)
    words = ["lm_eval", "--model", "hf", "--model_args", _joined(arguments)]
    prompt = stated.get("prompt")
    template = prompt.get("template") if isinstance(prompt, Mapping) else None
    if template == "chat" or template is None and _chats(place, folder, "tokenizer" in arguments):
        words.append("--apply_chat_template")
    if isinstance(prompt, Mapping) and isinstance(prompt.get("system"), str):
        words += ["--system_instruction", prompt["system"]]
    return shlex.join([*words, "--tasks", "TASK"])


def _place(name: str, revision: object) -> str:
    """What transformers loads: a folder where the name leads to one here, else the name."""
    try:
        return locate(name, revision if isinstance(revision, str) and revision not in ("", "main") else None)
    except LoragError:
        return name


def _joined(arguments: Mapping[str, str]) -> str:
    """KEY=VALUE with commas between; as JSON where a path holds what the harness would cut at."""
    plain = not any(sign in value for value in arguments.values() for sign in ",={")
    return ",".join(f"{key}={value}" for key, value in arguments.items()) if plain else json.dumps(dict(arguments), ensure_ascii=False)


def _chats(place: str, folder: Path, own_tokenizer: bool) -> bool:
    """Whether the tokenizer that the harness will load has a chat template, as far as files here tell."""
    where = folder if own_tokenizer else Path(place)
    try:
        return where.is_dir() and own_chat_template(where) is not None
    except LoragError:
        return False
