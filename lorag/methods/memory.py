"""Which tasks a network remembers, and by which directions of a description's vector it tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.networks.memory import TaskMemory

if TYPE_CHECKING:
    from lorag.methods.training_set import TrainingSet

__all__ = ["Remembered"]

_FLOOR = 1.0  # of the mean variance of wordings within a task, added to each direction's


@dataclass(frozen=True)
class Remembered:
    """The tasks of a training set as a memory holds them. Those that differ in their answer format alone are one task there.

    Attributes:
        names: Of the n tasks of the memory, in its order.
        places: The number in it of each task of the training set (t,); −1 where it is held out.
        keys: Key of that task without the descriptions of this one (t, d), zero where it has no others.
    """

    names: list[str]
    places: Tensor
    keys: Tensor

    @classmethod
    def begin(
        cls, data: TrainingSet, features: int, directions: int, before: tuple[Sequence[str], TaskMemory]
    ) -> tuple[TaskMemory, Remembered]:
        """A memory of the training tasks; what one held before stays in it.

        Args:
            data: The tasks.
            features: Length of a value.
            directions: Length of a key.
            before: Names and memory to go on with, which may be empty. If one of its tasks is not at hand any more, its projection and the
                keys that it has stay as they are.
        """
        vectors = {i: _unit(data, i) for i in data.training}
        every, members = {task.name for task in data.tasks}, dict[str, list[int]]()
        for i in data.training:
            task = data.tasks[i]
            members.setdefault(task.variant_of if task.variant_of in every else task.name, []).append(i)
        earlier, old = before
        names = [*earlier, *(name for name in members if name not in set(earlier))]
        memory = TaskMemory(data.embedding_size, features, len(names), directions)
        if stays := not set(earlier) <= set(members):
            centre, projection = old.centre, old.projection
        else:
            centre, projection = _directions([[vectors[i] for i in some] for some in members.values()], directions)
        memory.centre.copy_(centre)
        memory.projection.copy_(projection)
        place = {name: number for number, name in enumerate(names)}
        places = torch.full((len(data.tasks),), -1)
        keys = torch.zeros(len(data.tasks), directions)
        for name, some in members.items():
            memory.keys[place[name]] = memory.key(torch.cat([vectors[i] for i in some]).mean(0))
            for i in some:
                places[i] = place[name]
                if others := [vectors[j] for j in some if j != i]:
                    keys[i] = memory.key(torch.cat(others).mean(0))
        if old.count:
            with torch.no_grad():
                memory.values[: old.count].copy_(old.values)
                if stays:
                    memory.keys[: old.count].copy_(old.keys)
                memory.nothing.copy_(old.nothing)
        return memory, cls(names, places, keys)


def _unit(data: TrainingSet, task: int) -> Tensor:
    return torch.nn.functional.normalize(torch.stack([one.pooled for one in data.embeddings[task]]).float(), dim=-1)


def _directions(tasks: Sequence[Sequence[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The mean vector (e,), and the projection (d, e) that tells tasks apart: linear discriminant analysis.

    Vectors are whitened by how wordings of one task differ, in whatever format it asks for; of those, the leading directions of the
    tasks' means.
    """
    every = [torch.cat(list(some)).double() for some in tasks]
    centre = torch.cat(every).mean(0)
    means = torch.stack([one.mean(0) for one in every])
    spread = torch.cov(torch.cat([one - mean for one, mean in zip(every, means, strict=True)]).T).nan_to_num()
    values, vectors = torch.linalg.eigh(spread)
    values = values.clamp_min(0) + _FLOOR * values.clamp_min(0).mean() + 1e-12
    white = vectors / values.sqrt() @ vectors.T
    leading = torch.linalg.svd((means - centre) @ white, full_matrices=False)[2][:count]
    projection = torch.zeros(count, len(centre), dtype=torch.float64)
    projection[: len(leading)] = leading @ white
    return centre.float(), projection.float()
