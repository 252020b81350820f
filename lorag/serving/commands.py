"""Commands that start an engine with an adapter, to be pasted: the base model, the adapter, and how its prompts are made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.portability import check_portability
from lorag.base.names import SANDBOX_LM, packaged

if TYPE_CHECKING:
    from lorag.adapters.portability import Facts, Verdict

__all__ = ["Start", "start_commands", "vllm_command"]

_PLAIN = re.compile(r"[\w.~/][\w.~/ +-]*")  # names of base models that may stand in a command: an adapter's config is a stranger's word
_URL = "http://localhost:8000/v1"
_SAID = "…"


@dataclass(frozen=True)
class Start:
    """How an engine is started with an adapter.

    Attributes:
        engine: Its name, as `lorag info` has it.
        command: For a shell.
        ask: How it is then asked, so that prompts are as the adapter was trained with; "" if the command itself asks.
    """

    engine: str
    command: str
    ask: str = ""


def start_commands(folder: str | Path, facts: Facts, info: Mapping[str, Any]) -> list[Start]:
    """Commands for the engines that the adapter of a causal language model fits.

    Args:
        folder: The adapter's.
        facts: What its files state.
        info: Its lorag.json, which says how inputs become prompts; chats where it does not.

    Returns:
        One per engine; none if the adapter's config names no base model that can stand in a command.
    """
    folder = Path(folder)
    base = facts.config.get("base_model_name_or_path")
    if facts.config.get("task_type") != "CAUSAL_LM" or not isinstance(base, str) or _PLAIN.fullmatch(base) is None:
        return []
    prompt = _prompt(info)
    fits = {verdict.target: verdict for verdict in check_portability(facts) if verdict.fits}
    starts = []
    if "PEFT" in fits:
        starts.append(Start("PEFT", _transformers_command(base, folder, prompt)))
    if "vLLM" in fits:
        name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)
        starts.append(Start("vLLM", vllm_command(_located(base), folder, name, fits["vLLM"]), _asked(name, prompt)))
    gguf = _gguf_of(base)
    if "llama.cpp" in fits and gguf is not None:
        out = shlex.quote(f"{folder}.gguf")
        command = f"lorag export {shlex.quote(str(folder))} --gguf --out {out} && llama-server -m {shlex.quote(str(gguf))} --lora {out}"
        starts.append(Start("llama.cpp", f"{command} --port 8000", _asked("any", prompt)))
    return starts


def vllm_command(base: str, folder: Path, name: str, verdict: Verdict) -> str:
    """The command that serves a base model with an adapter; `--max-lora-rank` only where the rank is above vLLM's default.

    Args:
        base: A shell word for the base model.
        folder: The adapter's.
        name: Under which it is served.
        verdict: On vLLM.

    Raises:
        ValueError: If vLLM would refuse the adapter, with the reasons.
    """
    if not verdict.fits:
        raise ValueError(verdict.line())
    command = f"vllm serve {base} --enable-lora --lora-modules {shlex.quote(f'{name}={folder}')}"
    needed = [finding.text.split()[-1] for finding in verdict.findings if "--max-lora-rank" in finding.text]
    return command + (f" --max-lora-rank {needed[0]}" if needed else "")


def _transformers_command(base: str, folder: Path, prompt: Mapping[str, Any]) -> str:
    """Answers one request: a chat where the tokenizer's template makes the prompts."""
    if prompt["template"] == "chat":
        asked = _literal(_messages(prompt, "Hello"))
    else:
        asked = _literal(str(prompt["template"]).replace("{input}", "Hello"))
    where = f"locate({_literal(base)})" if _ours(base) else _literal(base)
    code = "from transformers import pipeline; " + ("from lorag.base.names import locate; " if _ours(base) else "")
    code += f'p = pipeline("text-generation", {where}); p.model.load_adapter({_literal(str(folder))}); '
    code += f'print(p({asked}, return_full_text=False, do_sample=False)[0]["generated_text"])'
    return f"python -c {shlex.quote(code)}"


def _literal(value: str | list[dict[str, str]]) -> str:
    """A value in Python, in double quotes, which stand in a shell's single ones without more."""
    return json.dumps(value)


def _located(base: str) -> str:
    """A shell word for a base model: its name, or for those that lorag or a package carries, their folder."""
    if not _ours(base):
        return shlex.quote(base)
    code = f"from lorag.base.names import locate; print(locate({_literal(base)}))"
    return f'"$(python -c {shlex.quote(code)})"'


def _ours(base: str) -> bool:
    one = packaged(base)
    return base == SANDBOX_LM or one is not None and one.file() is not None


def _gguf_of(base: str) -> Path | None:
    """The GGUF file of a base model, where one is at hand."""
    one = packaged(base)
    path = Path(base).expanduser() if one is None else one.file()
    return path if path is not None and path.suffix == ".gguf" and path.is_file() else None


def _prompt(info: Mapping[str, Any]) -> Mapping[str, Any]:
    base = info.get("base_model")
    prompt = base.get("prompt") if isinstance(base, Mapping) else None
    return prompt if isinstance(prompt, Mapping) and isinstance(prompt.get("template"), str) else {"template": "chat"}


def _messages(prompt: Mapping[str, Any], text: str) -> list[dict[str, str]]:
    system = prompt.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*first, {"role": "user", "content": text}]


def _asked(name: str, prompt: Mapping[str, Any]) -> str:
    """A request of a server that speaks OpenAI's protocol, in the template that the adapter was trained with."""
    body: dict[str, Any] = {"model": name, "temperature": 0}
    if prompt["template"] == "chat":
        path, body["messages"] = "chat/completions", _messages(prompt, _SAID)
    else:
        path, body["prompt"] = "completions", str(prompt["template"]).replace("{input}", _SAID)
    return f"curl {_URL}/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
