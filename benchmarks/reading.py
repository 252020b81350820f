"""What the shipped SmolLM2 generator reads from descriptions of held-out tasks, before any adapter is run: `python -m benchmarks.reading`.

"AUROC" is how well a probe separates the texts of two answers: the base model's averaged inputs along the probe's row, mean over
yes/no tasks, their descriptions and the adapted layers. "Formats" is the share of descriptions of `unseen_format` from which ridge
regression on the reader's features, fitted on training tasks' descriptions, tells exactly which answer formats they ask for; "task" the
share from which it tells which known task is meant, whatever its format. "Untrained" is the same network before it learned. The
embedder's row is of its mean vectors instead of features.

Bounded by what the text embedder says of a description: a probe is linear in its vectors, and of two meanings that lie at one place there
no probe makes two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lorag.base.activations import input_statistics
from lorag.base.runner import Runner
from lorag.generator.generate import open_generator
from lorag.methods.aligned import Aligned
from lorag.methods.method import collate
from lorag.networks.factor_network import FactorNetwork
from lorag.spaces.activation_bases import ActivationBases
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task
from lorag.text.embedding import Embedding, TextEmbedder

__all__ = ["TITLE", "measure"]

TITLE = "What is read from a description before any adapter runs: SmolLM2"


def measure(quick: bool) -> list[dict[str, str | float]]:
    """Rows of probes, one for each split, and of the reader; `quick` takes a few tasks."""
    generator = open_generator("smollm2")
    method, space = generator.method, generator.space
    if not isinstance(method, Aligned) or not isinstance(method.network, FactorNetwork) or not isinstance(space, ActivationBases):
        raise TypeError("the shipped generator is of another method")
    runner = Runner.open(generator.base, "cpu", "fast")
    rows: list[dict[str, str | float]] = []
    for split in ("validation", "unseen_label", "unseen_task"):
        tasks = [task for task in find_tasks("smollm2", split) if {one.output for one in task.examples} == {"yes", "no"}]
        tasks = tasks[:1] if quick else tasks
        area = _separation(tasks, method.network, space, runner, generator.embedder)
        rows.append({"what": "probes, AUROC", "on": split, "tasks": len(tasks), "trained": round(area, 3)})
    torch.manual_seed(0)
    untrained = method.build(method.shape)
    training, held = (find_tasks("smollm2", split).tasks for split in ("train", "unseen_format"))
    known, new = _described(training[:: 40 if quick else 1], 3, generator.embedder), _described(held, 4, generator.embedder)
    about: dict[str, str | float] = {"on": "unseen_format", "tasks": len(held)}
    features = [[_features(network.eval(), some.embeddings) for some in (known, new)] for network in (method.network, untrained)]
    for what, right in (("formats", _formats_told), ("task", _task_told)):
        trained, plain = (right(known, new, *both) for both in features)
        rows.append({"what": f"reader, {what}", **about, "trained": trained, "untrained": plain})
    pooled = [torch.stack([one.pooled for one in some.embeddings]) for some in (known, new)]
    rows.append({"what": "embedder, task", **about, "trained": _task_told(known, new, *pooled)})
    return rows


@torch.inference_mode()
def _separation(tasks: Sequence[Task], network: FactorNetwork, space: ActivationBases, runner: Runner, embedder: TextEmbedder) -> float:
    texts = sorted({one.input for task in tasks for one in task.split("test")}, key=len)
    place = {text: number for number, text in enumerate(texts)}
    parts = [torch.stack(part.means, 1) for part in input_statistics(runner, texts)]
    means = torch.cat(parts)
    coordinates = torch.stack([means[:, i] @ u[:, :-1].float() for i, u in enumerate(space.bases_in)], 1)
    areas = []
    for task in tasks:
        probes = network.probes(*collate(embedder.embed(list(task.descriptions[:4])))[1:])
        examples = task.split("test")
        scores = torch.einsum("bgpk,ngk->bgpn", probes, coordinates[[place[one.input] for one in examples]]).flatten(0, 2)
        right = [one.output == "yes" for one in examples]
        areas += [float(roc_auc_score(right, one)) for one in scores]
    return sum(areas) / len(areas)


@dataclass(frozen=True)
class _Described:
    """Descriptions (n) of tasks: what they describe, and their embeddings."""

    about: list[Task]
    embeddings: list[Embedding]

    @property
    def formats(self) -> list[set[str]]:
        """The answer formats that each asks for."""
        return [set(task.name.split("+")[1:]) for task in self.about]

    @property
    def tasks(self) -> list[str]:
        """The task that each is of, whatever its format."""
        return [task.variant_of for task in self.about]


def _described(tasks: Sequence[Task], wordings: int, embedder: TextEmbedder) -> _Described:
    pairs = [(task, text) for task in tasks for text in task.descriptions[:wordings]]
    return _Described([task for task, _ in pairs], embedder.embed([text for _, text in pairs]))


@torch.inference_mode()
def _features(network: FactorNetwork, embeddings: Sequence[Embedding]) -> Tensor:
    return torch.cat([network.read(*collate(embeddings[start : start + 256])) for start in range(0, len(embeddings), 256)])


def _formats_told(known: _Described, new: _Described, x: Tensor, x_new: Tensor) -> float:
    """Share of new descriptions whose formats are told exactly, by what (n, f) and (m, f) say of known and new ones."""
    kinds = sorted(set().union(*known.formats))
    asked, wanted = (torch.tensor([[float(kind in formats) for kind in kinds] for formats in some.formats]) for some in (known, new))
    return round(((_told(x, asked, x_new) > 0.4) == (wanted > 0)).all(1).float().mean().item(), 3)


def _task_told(known: _Described, new: _Described, x: Tensor, x_new: Tensor) -> float:
    """Share of new descriptions whose task is told, by what (n, f) and (m, f) say of known and new ones."""
    place = {name: number for number, name in enumerate(sorted(set(known.tasks)))}
    meant = torch.nn.functional.one_hot(torch.tensor([place[name] for name in known.tasks])).float()
    right = torch.tensor([place.get(name, -1) for name in new.tasks])
    return round((_told(x, meant, x_new).argmax(1) == right).float().mean().item(), 3)


def _told(x: Tensor, y: Tensor, x_new: Tensor) -> Tensor:
    """What ridge regression from x (n, f) to y (n, c) says of new ones (m, f)."""
    middle, size = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_new = (torch.cat([(one - middle) / size, torch.ones(len(one), 1)], 1) for one in (x, x_new))
    return x_new @ torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ y)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for line in measure(False):
        print(line)
