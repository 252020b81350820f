"""What flows through the modules that adapters change: their inputs on texts and on tasks, and gradients of a loss at their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorag.base.row_adapters import Stacked
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task

__all__ = ["InputStatistics", "input_moments", "input_statistics", "output_gradients"]


@dataclass(frozen=True)
class InputStatistics:
    """Inputs of adapted modules on n texts. Modules that read the same tensor, as q and v of a layer do, share one entry.

    Attributes:
        entry: For each module of the layout, the number of its entry.
        means: For each of g entries, the input averaged over the tokens of each text (n, i).
        moments: For each entry, the mean over all those tokens of x xᵀ (i, i).
    """

    entry: tuple[int, ...]
    means: tuple[Tensor, ...]
    moments: tuple[Tensor, ...]


@contextmanager
def _watched(
    runner: Runner,
    hook: Any,  # noqa: ANN401 - a function of (name) that gives a torch hook
    names: Sequence[str] | None = None,
) -> Iterator[None]:
    modules = dict(runner.model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in (runner.layout.names if names is None else names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_gradient(output: Tensor) -> Tensor:
    """A module's output that keeps its gradient, also where nothing before it has one."""
    output = output if output.requires_grad else output.detach().requires_grad_()
    output.retain_grad()
    return output


@torch.inference_mode()
def input_statistics(runner: Runner, texts: Sequence[str], batch: int = 32) -> Iterator[InputStatistics]:
    """Reads texts with the bare base model, as its objective writes prompts, and gives the statistics of each batch.

    Only tokens of the text itself count, not those with which every prompt begins or ends.

    Args:
        runner: The base model.
        texts: Inputs of tasks.
        batch: Texts at once; texts of like length stand together, in the order of `sorted(texts, key=len)`.

    Raises:
        ConfigError: If the objective's prompts cannot be read token by token.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str):  # noqa: ANN202 - a torch hook
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0]

        return keep

    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), batch):
        arguments, mask = runner.objective.read(ordered[start : start + batch])
        with _watched(runner, hook):
            runner.model(**{key: value.to(runner.device) for key, value in arguments.items()})
        mask = mask.to(runner.device)
        places: dict[int, int] = {}
        entry = tuple(places.setdefault(id(seen[name]), len(places)) for name in runner.layout.names)
        distinct = {number: seen[name] for name, number in zip(runner.layout.names, entry, strict=True)}
        means, moments = [], []
        for number in range(len(distinct)):
            x = distinct[number].float()
            means.append(((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu())
            tokens = x[mask]
            moments.append((tokens.T @ tokens / len(tokens)).cpu())
        yield InputStatistics(entry, tuple(means), tuple(moments))


def output_gradients(runner: Runner, tasks: Sequence[Task], count: int, seed: str) -> dict[str, Tensor]:
    """Σ g gᵀ (o, o) of each adapted module, over tokens: g is the gradient of the tasks' losses at the module's output.

    Args:
        runner: The base model.
        tasks: Tasks whose training examples are drawn.
        count: Examples of each.
        seed: Seed of the draw.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str):  # noqa: ANN202 - a torch hook
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name] = _with_gradient(output)
            return outputs[name]

        return keep

    with torch.enable_grad(), _watched(runner, hook):
        runner.losses(None, tasks, count, seed).sum().backward()
    grams = {}
    for name, output in outputs.items():
        gradient = output.grad if output.grad is not None else torch.zeros_like(output)
        rows = gradient.float().flatten(0, -2)
        grams[name] = (rows.T @ rows).cpu()
    return grams


def input_moments(
    runner: Runner, adapter: Stacked | None, task: Task, count: int, seed: str, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Mean of x xᵀ (i, i) at the input of adapted modules, over those positions where a task's loss depends on the module's output.

    So neither padding counts, nor what a last layer makes of a prompt that no answer reads.

    Args:
        runner: The base model.
        adapter: One adapter that is at work, or None.
        task: Its training examples are drawn.
        count: Examples that are drawn.
        seed: Seed of the draw.
        names: Modules; all of the layout without.
    """
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str):  # noqa: ANN202 - a torch hook
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = _with_gradient(output)
            passed.setdefault(name, []).append((inputs[0].detach(), output))
            return output

        return keep

    with torch.enable_grad(), _watched(runner, hook, names):
        runner.losses(adapter, [task], count, seed).sum().backward()
    moments = {}
    for name, calls in passed.items():
        counted = []
        for x, output in calls:
            rows = x.float().flatten(0, -2)
            felt = None if output.grad is None else (output.grad != 0).flatten(0, -2).any(1)
            counted.append(rows[:0] if felt is None else rows[felt])
        rows = torch.cat(counted)
        moments[name] = rows.T @ rows / max(1, len(rows))
    return moments
