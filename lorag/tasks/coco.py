"""Annotations in COCO's format to a suite of images: one task per category, boxes as location tokens or captions to be found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorag.errors import TaskError
from lorag.files.artifacts import parse_json, read_bounded
from lorag.files.images import ImageFile, copy_images
from lorag.tasks.suite import Example, Task, TaskSuite

__all__ = ["import_coco"]

_MAX_BYTES, _MAX_VALUES = 512 * 2**20, 120_000_000  # instances_train2017.json has 450 MB
_FEWEST = 8  # images of a category that is worth a task
_TEST_ONE_IN = 4
_DETECTION = ("detect every {name} in the image", "draw a box around each {name}", "where in the picture is a {name}?")
_RETRIEVAL = ("match pictures of a {name} with their captions", "find the text that describes this {name}", "search photos with a {name}")


def import_coco(
    instances: Path,
    images: Path,
    out: Path,
    *,
    captions: Path | None = None,
    train: int = 200,
    test: int = 100,
    held_out: float = 0.2,
    seed: int = 0,
) -> Mapping[str, int]:
    """Writes a suite with one task per category, and copies its images below `out/images`.

    Without captions a task's outputs are its category's boxes, label first, in reading order, as location tokens:
    `dog<loc_x1><loc_y1><loc_x2><loc_y2>…`, in thousandths of width and height; boxes of crowds are left out. With
    captions each of an image's captions is an output. An image that one task has for tests is never another task's for training.

    Args:
        instances: JSON with "images", "annotations" and "categories", as COCO has them.
        images: Folder of the images.
        out: Folder of the new suite.
        captions: JSON whose "annotations" have captions.
        train: Most training images of a task.
        test: Most test images of a task.
        held_out: Share of the categories held out.
        seed: Seed of which images and categories are taken.

    Returns:
        Number of tasks of the splits "train" and "test", and of categories "skipped", with fewer than eight images.

    Raises:
        TaskError: Naming what is missing from the file, or if nothing is left.
        ArtifactError: If a file is not JSON, or an image is missing or its path leaves the folder.
    """
    instances_of = _read(instances, ("images", "annotations", "categories"))
    files = {one["id"]: one for one in _rows(instances_of["images"], instances, ("id", "file_name", "width", "height"))}
    names = {one["id"]: str(one["name"]) for one in _rows(instances_of["categories"], instances, ("id", "name"))}
    boxes: dict[Any, dict[Any, list[list[float]]]] = {category: {} for category in names}
    for one in _rows(instances_of["annotations"], instances, ("image_id", "category_id", "bbox")):
        if one["image_id"] not in files or one["category_id"] not in names:
            raise TaskError(f"{instances}: an annotation names no image or category of the file", got=str(one["image_id"])[:40])
        if not one.get("iscrowd"):
            boxes[one["category_id"]].setdefault(one["image_id"], []).append(one["bbox"])
    texts: dict[Any, list[str]] = {}
    if captions is not None:
        for one in _rows(_read(captions, ("annotations",))["annotations"], captions, ("image_id", "caption")):
            texts.setdefault(one["image_id"], []).append(" ".join(str(one["caption"]).split()))

    def outputs(category: Any, image: Any) -> list[str]:  # noqa: ANN401 - whatever the file numbers them with
        if captions is not None:
            return list(dict.fromkeys(text for text in texts.get(image, []) if text))
        return [f"{names[category]}{''.join(_places(boxes[category][image], files[image], instances))}"]

    tasks = []
    patterns = _DETECTION if captions is None else _RETRIEVAL
    for category, name in names.items():
        examples = _examples(boxes[category], files, partial(outputs, category), out, (train, test), seed)
        if len(boxes[category]) >= _FEWEST and {example.split for example in examples} == {"train", "test"}:
            wordings = tuple(pattern.format(name=name) for pattern in patterns)
            tasks.append(Task(name, "coco", wordings, None, "unknown", f"category {name}", tuple(examples), "image"))
    if not tasks:
        raise TaskError(f"{instances} leaves no task", got=f"{len(names)} categories", expected=f"one with {_FEWEST} images")
    used = {str(example.input).removeprefix("images/") for task in tasks for example in task.examples}
    copy_images((ImageFile(name, images) for name in sorted(used)), out / "images")
    held = set(random.Random(seed).sample([task.name for task in tasks], int(held_out * len(tasks))))
    splits = {"train": [t.name for t in tasks if t.name not in held], "test": [t.name for t in tasks if t.name in held]}
    TaskSuite(tasks, splits).save(out)
    return {key: len(value) for key, value in splits.items()} | {"skipped": len(names) - len(tasks)}


def _examples(
    members: Mapping[Any, object],
    files: Mapping[Any, Mapping[str, Any]],
    outputs: Callable[[Any], list[str]],
    out: Path,
    most: tuple[int, int],
    seed: int,
) -> list[Example]:
    """Examples of one task; the side of an image depends on seed and file alone."""
    marks = {image: hashlib.sha256(f"{seed}/{files[image]['file_name']}".encode()).digest() for image in members}
    examples: list[Example] = []
    for split, limit in zip(("train", "test"), most, strict=True):
        mine = sorted((mark, image) for image, mark in marks.items() if (mark[0] % _TEST_ONE_IN == 0) == (split == "test"))
        for _, image in mine[:limit]:
            path = ImageFile(f"images/{files[image]['file_name']}", out)
            examples += [Example(path, text, split) for text in outputs(image)]
    return examples


def _places(boxes: list[list[float]], image: Mapping[str, Any], where: Path) -> list[str]:
    """Location tokens of boxes (x, y, width, height) in pixels."""
    places = []
    for box in boxes:
        numbers = [*box, image["width"], image["height"]] if isinstance(box, list) else []
        if len(numbers) != 6 or not all(isinstance(value, int | float) for value in numbers) or min(numbers[4:]) < 1:
            raise TaskError(f"{where}: a box cannot be used", got=repr(box)[:80], expected="[x, y, width, height] in pixels")
        x, y, width, height = box
        edges = (x / image["width"], y / image["height"], (x + width) / image["width"], (y + height) / image["height"])
        places.append([min(999, max(0, int(1000 * edge))) for edge in edges])
    return [f"<loc_{place}>" for box in sorted(places, key=lambda b: (b[1], b[0])) for place in box]


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    value = parse_json(read_bounded(path, _MAX_BYTES, named=True), path, _MAX_VALUES)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in keys):
        raise TaskError(f"{path} is not in COCO's format", expected="an object with lists " + ", ".join(keys))
    return value


def _rows(rows: list[Any], path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    for row in rows:
        complete = isinstance(row, dict) and all(key in row for key in keys)
        if not complete or not all(isinstance(row[key], int | str) for key in keys if key.endswith("id")):
            raise TaskError(f"{path} is not in COCO's format", got=repr(row)[:80], expected="fields " + ", ".join(keys))
    return rows
