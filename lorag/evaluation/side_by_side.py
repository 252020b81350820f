"""One adapter tried on a few texts: its answers beside the base model's, and whether it changes more than a random one would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.adapters.factors import Factors
from lorag.base.base_model import warn_if_slow
from lorag.base.objectives import OBJECTIVES, make_objective, take
from lorag.base.objectives.language_model import LanguageModel
from lorag.base.runner import Runner
from lorag.errors import AdapterError, ConfigError
from lorag.evaluation.rivals import random_like
from lorag.tasks.descriptions import check_description

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.row_adapters import Stacked

__all__ = ["Answers", "Effect", "open_for", "side_by_side"]

_NULLS = 4  # random adapters whose effects are measured; the first one answers too
_NOTHING = 1e-6  # nats per token: rounding of fp32
_LONGEST = 2048  # tokens of a prompt, where the base model takes as many


@dataclass(frozen=True)
class Effect:
    """How far an adapter moves what the base model would write, beside random adapters of its norms.

    Attributes:
        kl: Mean KL(adapted ‖ base) of the next token, in nats, over the tokens of the base model's own answers.
        nulls: The same of each random adapter.
        tokens: How many next tokens were compared.
    """

    kl: float
    nulls: tuple[float, ...]
    tokens: int

    def line(self) -> str:
        """Whether the adapter changes anything, for a person."""
        null = sum(self.nulls) / len(self.nulls)
        size = f"{self.kl:.3g} nats per token from the base model (mean KL over {self.tokens} tokens); random adapters of its norm: "
        size += f"{null:.3g} on average, {max(self.nulls):.3g} at most"
        if self.kl < _NOTHING:
            return f"the adapter changes nothing here: {size}"
        if self.kl <= max(self.nulls):
            return f"the adapter changes no more than noise of its size does: {size}"
        return f"the adapter changes {self.kl / max(null, _NOTHING):.3g} times what noise of its size does: {size}"


@dataclass(frozen=True)
class Answers:
    """Greedy answers to the same texts.

    Attributes:
        texts: What was asked.
        columns: Of each who answered ("base", "prompted", "adapter", "random") one answer per text.
        effect: How far the adapter moves the base model; None unless random adapters were asked for.
    """

    texts: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    effect: Effect | None = None


def open_for(
    adapter: LoraAdapter,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    chat_template: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[Runner, LoraAdapter]:
    """Loads the base model that an adapter states, prompted as the adapter was trained, where its lorag.json says how.

    Args:
        adapter: Of any PEFT folder.
        base_model: Another name of the base model.
        kind: A kind that writes texts, such as "causal_lm"; by default what the adapter and the base model's config say.
        chat_template: Stands for the base model's own, as trainers save one beside an adapter.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the base model.

    Returns:
        The runner, and the adapter under the base model's own names of its modules.

    Raises:
        ConfigError: If the base model writes no texts.
        BaseModelError: If it cannot be had, or is not the adapter's.
    """
    base = adapter.stated_base(base_model, kind)
    writing = {one.kind: one.name for one in reversed(OBJECTIVES.values()) if one.generates and one.reads_texts}  # the first of a kind
    if base.kind not in writing:
        raise ConfigError(
            "answers can be tried on base models that write texts",
            got=f"{base.name}, a base model of kind {base.kind}",
            expected=" or ".join(sorted(writing)),
            remedy="Compare what it is for with lorag evaluate; if it does write texts, give --kind.",
        )
    tokenizer, model = base.tokenizer(), base.load(device, dtype)
    warn_if_slow(model)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    fitted = adapter.fitted(model)
    stated = adapter.info.get("base_model")
    prompt = stated.get("prompt") if isinstance(stated, dict) else None
    written = {key: prompt[key] for key in ("template", "system") if isinstance(prompt.get(key), str)} if isinstance(prompt, dict) else {}
    room: Any = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None) or 2 * _LONGEST
    objective = make_objective(writing[base.kind], tokenizer, {"max_length": min(_LONGEST, room // 2), **written})
    return Runner(model, fitted.layout, objective), fitted


def side_by_side(
    runner: Runner,
    adapter: LoraAdapter,
    texts: Sequence[str],
    *,
    description: str | None = None,
    base: bool = True,
    null: bool = False,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> Answers:
    """Answers texts with the base model, with a description in its prompt, with an adapter, and with a random one.

    Args:
        runner: The base model; `open_for` loads it.
        adapter: On the runner's layout.
        texts: Inputs.
        description: What the adapter is for; with it "prompted" answers too.
        base: Whether the bare base model answers.
        null: Whether a random adapter with the same norm at each module answers too, and effects are measured.
        seed: Of random adapters.
        max_new_tokens: Most tokens of an answer.

    Raises:
        ConfigError: If there is no text.
        AdapterError: If the adapter changes other modules than the runner's, or makes it predict NaN.
        DescriptionError: If the description cannot be used.
    """
    given = tuple(texts)
    if not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ConfigError("there is nothing to answer", got=f"{len(given)} texts, one of them empty" if given else "no text")
    if adapter.layout != runner.layout:
        raise AdapterError("the adapter changes other modules than the runner does", remedy="Open both together: open_for(adapter).")
    factors = [adapter.factors]
    if null:
        factors += [random_like(adapter, seed + number).factors for number in range(_NULLS)]
    stacked = Factors.stack(factors, runner.device)

    def answers(inputs: Sequence[str], adapters: Stacked | None = None) -> tuple[str, ...]:
        return tuple(runner.generate(inputs, adapters, max_new_tokens=max_new_tokens))

    columns: dict[str, tuple[str, ...]] = {}
    bare = answers(given) if base or null else ()
    if base:
        columns["base"] = bare
    if description is not None:
        said = check_description(description)
        columns["prompted"] = answers([f"{said}\n\n{text}" for text in given])
    columns["adapter"] = answers(given, take(stacked, 0, 1))  # type: ignore[arg-type]
    if not null:
        return Answers(given, columns)
    columns["random"] = answers(given, take(stacked, 1, 2))  # type: ignore[arg-type]
    return Answers(given, columns, _effect(runner, stacked, list(zip(given, bare, strict=True))))


@torch.inference_mode()
def _effect(runner: Runner, adapters: Stacked, pairs: Sequence[tuple[str, str]]) -> Effect:
    """KL of each adapter, the first of which is the one that is tried; text by text, so that few logits are held at once."""
    objective = runner.objective
    if not isinstance(objective, LanguageModel):
        raise ConfigError(f"objective {objective.name} predicts no tokens", expected="one of a language model")
    count = 1 + _NULLS
    totals, tokens = torch.zeros(count, dtype=torch.float64), 0
    for pair in pairs:
        reference = objective.predictions(runner.model, [[pair]])
        with runner.use(adapters) as model:
            moved = objective.predictions(model, [[pair]] * count)
        totals += _kl(moved.unflatten(0, (count, -1)), reference).double().sum(1).cpu()
        tokens += len(reference)
    first, *others = (max(0.0, total / tokens) for total in totals.tolist())
    if not all(math.isfinite(value) for value in (first, *others)):
        raise AdapterError("the base model predicts NaN or infinite values with the adapter", remedy="Try it in float32: --dtype float32.")
    return Effect(first, tuple(others), tokens)


def _kl(moved: Tensor, reference: Tensor) -> Tensor:
    """KL (n, t) of predictions (n, t, v) from a reference (t, v), both as log-probabilities."""
    return (moved.exp() * (moved - reference)).sum(-1)
