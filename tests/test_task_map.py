"""The map of tasks: what two dimensions can keep is kept, and the same bank gives the same map."""

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment

from lorag.errors import BankError
from lorag.text.task_map import TaskMap


def _flat(count=12, size=7, seed=0):
    """Points that lie in a plane of a larger space, with the plane's own coordinates."""
    rng = torch.Generator().manual_seed(seed)
    plane = torch.randn(count, 2, generator=rng) * torch.tensor([3.0, 1.0])
    axes = torch.linalg.qr(torch.randn(size, 2, generator=rng))[0]
    return plane @ axes.T + 5.0, plane


def test_a_plane_is_drawn_to_scale():
    """Of tasks that differ in two directions alone, all distances and all of the variance are kept."""
    vectors, plane = _flat()
    found = TaskMap.fit([f"task-{i}" for i in range(12)], vectors)
    assert torch.allclose(torch.cdist(found.points, found.points), torch.cdist(plane, plane), atol=1e-4)
    assert found.kept == pytest.approx(1.0, abs=1e-6)
    assert found.points[:, 0].var() > found.points[:, 1].var()


def test_a_third_direction_is_what_is_lost():
    """`kept` is the share of the variance that the two axes hold, worked out from a bank with three known variances."""
    vectors = torch.zeros(6, 5)
    vectors[0, 0], vectors[1, 0], vectors[2, 1], vectors[3, 1], vectors[4, 2], vectors[5, 2] = 3, -3, 2, -2, 1, -1
    found = TaskMap.fit(list("abcdef"), vectors)
    assert found.kept == pytest.approx((9 + 4) / (9 + 4 + 1))
    assert torch.allclose(found.points[4:], torch.zeros(2, 2), atol=1e-5)


def test_a_description_of_a_task_lies_on_its_dot():
    """Placing a task's own vector gives its point."""
    vectors, _ = _flat()
    found = TaskMap.fit([str(i) for i in range(12)], vectors)
    for i in range(12):
        assert found.place(vectors[i]) == pytest.approx(found.points[i].tolist(), abs=1e-4)


def test_the_order_of_a_bank_does_not_turn_its_map():
    """The same tasks in another order, and the same call again: each task at the same place, not mirrored."""
    vectors, _ = _flat()
    names = [str(i) for i in range(12)]
    one, again, turned = TaskMap.fit(names, vectors), TaskMap.fit(names, vectors), TaskMap.fit(names[::-1], vectors.flip(0))
    assert torch.equal(one.points, again.points)
    assert torch.allclose(one.points, turned.points.flip(0), atol=1e-4)


def test_a_single_task_is_a_map_too():
    """One task, or several alike: finite points, and no variance that could be kept."""
    for count in (1, 3):
        found = TaskMap.fit([str(i) for i in range(count)], torch.ones(count, 4))
        assert found.points.shape == (count, 2) and found.points.abs().max() < 1e-6 and found.kept == 0


@pytest.mark.parametrize(("names", "vectors"), [([], torch.zeros(0, 4)), (["a"], torch.zeros(2, 4)), (["a"], torch.zeros(4))])
def test_what_is_no_bank_is_refused(names, vectors):
    """No task, or not one vector for each: BankError."""
    with pytest.raises(BankError, match="a map needs tasks"):
        TaskMap.fit(names, vectors)


def test_an_embedding_of_another_size_is_refused():
    """BankError, before anything is multiplied."""
    with pytest.raises(BankError, match="does not fit the map"):
        TaskMap.fit(["a", "b"], torch.eye(2, 4)).place(torch.zeros(3))
