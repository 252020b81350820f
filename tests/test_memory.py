"""Known tasks that a network remembers: recalled when they are meant, and in training never from what must not have been seen."""

from dataclasses import replace

import torch
from toy_world import TRAINING, WordEmbedder, make_suite

from lorag.methods.memory import Remembered
from lorag.methods.training_set import TrainingSet
from lorag.networks.memory import TaskMemory


def _memory(count=3):
    memory = TaskMemory(4, 2, count, 4)
    memory.projection.copy_(torch.eye(4))
    memory.keys.copy_(torch.eye(4)[:count])
    with torch.no_grad():
        memory.values.copy_(torch.arange(2.0 * count).view(count, 2) + 1)
    return memory


def test_a_description_recalls_its_task_and_a_strange_one_nothing():
    """Near one key it gives that value alone; far from all keys next to nothing; a memory without tasks gives zeros."""
    memory = _memory()
    recalled = memory(torch.tensor([[0.0, 3.0, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(recalled[0] / recalled[0, 0], memory.values[1] / memory.values[1, 0], atol=1e-4) and recalled[0, 0] > 0.5
    assert recalled[1].abs().max() < 1e-5
    assert torch.equal(TaskMemory(4, 2)(torch.ones(3, 4)), torch.zeros(3, 2))


def test_while_it_learns_a_task_is_known_by_its_other_descriptions_alone():
    """The key that is given takes the place of the task's own; without any, the task is not recalled; −1 changes nothing."""
    memory, vectors = _memory(), torch.eye(4)[:1].repeat(3, 1)
    away = torch.nn.functional.normalize(torch.tensor([0.2, 0.0, 0.0, 1.0]), dim=0)
    with_own, strange, unknown = memory(vectors, torch.tensor([0, 0, -1]), torch.stack([torch.eye(4)[0], away, away]))
    assert torch.allclose(with_own, memory(vectors)[0]) and torch.equal(unknown, memory(vectors)[2])
    assert strange.abs().max() < 1e-3
    assert memory(vectors[:1], torch.tensor([0]), torch.zeros(1, 4)).abs().max() < 1e-5


def _data(tasks, training):
    embedder = WordEmbedder()
    embeddings = [list(embedder.embed(list(task.descriptions))) for task in tasks]
    return TrainingSet(None, torch.zeros(0, 1), torch.zeros(0, 1), embeddings, range(len(tasks)), training, [], None, tasks)


def test_formats_of_one_task_share_a_place():
    """A task and its variant have one value, each knows it by the other's descriptions; held-out tasks have none; names that were
    there before keep place, key and value."""
    plain = list(make_suite(TRAINING[:6]))
    tasks = [*plain, replace(plain[0], name=f"{plain[0].name}+upper", descriptions=("shout it out",))]
    odd = [replace(plain[0], name="c++ to rust"), replace(plain[1], name="c++ to zig")]
    assert Remembered.begin(_data(odd, [0, 1]), 5, 4, ((), TaskMemory(1, 1)))[1].names == ["c++ to rust", "c++ to zig"]
    empty = TaskMemory(1, 1)
    memory, known = Remembered.begin(_data(tasks, [0, 1, 2, 3, 6]), 5, 4, ((), empty))
    assert known.names == [task.name for task in plain[:4]] and known.places.tolist() == [0, 1, 2, 3, -1, -1, 0]
    shouted = memory.key(torch.nn.functional.normalize(WordEmbedder().embed(["shout it out"])[0].pooled, dim=-1))
    assert torch.allclose(known.keys[0], shouted, atol=1e-6) and not known.keys[1:6].any()
    with torch.no_grad():
        memory.values.fill_(7)
    more, then = Remembered.begin(_data(tasks, [4, 1]), 5, 4, (known.names, memory))
    assert then.names == [*known.names, plain[4].name] and then.places.tolist() == [-1, 1, -1, -1, 4, -1, -1]
    assert torch.equal(more.keys[:4], memory.keys) and (more.values[:4] == 7).all() and not more.values[4].any()
