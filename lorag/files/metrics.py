"""Metrics of long work: `metrics.jsonl` in the run's folder always, and Accelerate's trackers where they are asked for.

A row is one JSON object with `stage`, `step` and numbers. Rows are appended as they come, each by one write, so that a run that is
watched, killed or spread over processes has a file that can be read at any moment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.errors import ArtifactError, ConfigError, MissingDependencyError
from lorag.files.artifacts import parse_json, read_bounded, writing

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["METRICS", "TRACKERS", "Metrics", "check_trackers", "read_metrics"]

METRICS = "metrics.jsonl"
TRACKERS = ("tensorboard", "trackio")  # each is also the name of the package that it needs
_PROJECT = "lorag"
_MAX_BYTES = 64 * 2**20
_LONGEST = 200


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers are known and installed, before anything long begins.

    Raises:
        ConfigError: If a name is not a tracker.
        MissingDependencyError: If its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError("trackers: a name is unknown", got=repr(name)[:40], expected=" or ".join(TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"the tracker {name} is not installed", remedy='pip install "lorag[trackers]"')


class Metrics:
    """Where the numbers of a run go.

    Args:
        folder: Gets `metrics.jsonl`, and TensorBoard's files below `tensorboard/`; None keeps nothing.
        trackers: Names among `TRACKERS`. TensorBoard is read with `tensorboard --logdir FOLDER`; trackio keeps what it gets where
            its own settings say, under the project "lorag", and is read with `trackio show`.
        settings: Of the run, for the trackers to show.
        main: Whether this process writes; the others of a run only compute.

    Raises:
        ConfigError: If a name is not a tracker.
        MissingDependencyError: If a tracker's package is not installed.
    """

    def __init__(
        self, folder: Path | None, trackers: Sequence[str] = (), settings: Mapping[str, Any] | None = None, *, main: bool = True
    ) -> None:
        check_trackers(trackers)
        self.folder = folder if main else None
        self._names, self._settings = tuple(dict.fromkeys(trackers)), dict(settings or {})
        self._running: list[GeneralTracker] | None = None
        self._begun = False

    def record(self, stage: str, step: int, **values: float | None) -> None:
        """Notes numbers of a step; None or a number that is not finite stands for what was not measured.

        Raises:
            StorageError: If the file cannot be written.
        """
        folder = self.folder
        if folder is None:
            return
        rounded = {name: None if value is None or not math.isfinite(value) else round(value, 6) for name, value in values.items()}
        self._append(folder, json.dumps({"stage": stage, "step": step, **rounded}, allow_nan=False))
        measured = {f"{stage}/{name}": value for name, value in rounded.items() if value is not None}
        for tracker in self._trackers(folder):
            tracker.log(measured, step=step)

    def close(self) -> None:
        """Lets the trackers write what they hold back; `record` may be called again afterwards."""
        with contextlib.redirect_stdout(sys.stderr):
            for tracker in self._running or ():
                tracker.finish()
        self._running = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, folder: Path, line: str) -> None:
        path = folder / METRICS
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            # A kill may have left half a line; the next one must not be glued to it.
            start = "\n" if not self._begun and path.is_file() and _torn(path) else ""
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, f"{start}{line}\n".encode())
            finally:
                os.close(handle)
        self._begun = True

    def _trackers(self, folder: Path) -> Sequence[GeneralTracker]:
        """Started with the first numbers: Accelerate must have been set up by then, and a run without numbers leaves none."""
        if self._running is None:
            with contextlib.redirect_stdout(sys.stderr):  # what a command prints is its result
                self._running = [_start(name, folder, self._settings) for name in self._names]
        return self._running


def _start(name: str, folder: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, TrackioTracker

    PartialState()  # trackers ask it which process they run in; where an accelerator was made, this is its own
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(name, folder)
    else:
        # Numbers of the run are its business, those of the machine are not.
        run = folder.resolve().name or _PROJECT
        tracker = TrackioTracker(_PROJECT, name=run, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    tracker.start()
    if settings:
        tracker.store_init_configuration(_flat(settings))
    return tracker


def _flat(settings: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Settings in groups as single ones, `experts.steps` and the like, each a plain value as trackers want them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{head}{key}.")
        else:
            flat[f"{head}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)[:_LONGEST]
    return flat


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl` in the order of their steps within each stage; of a step done twice the last counts.

    What is not JSON is what a kill left of a line, and is passed over.

    Raises:
        ArtifactError: If the file cannot be read, or a row has no stage and step, or holds what is not a number.
    """
    path = folder / METRICS
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(read_bounded(path, _MAX_BYTES).split(b"\n"), 1):
        try:
            row = parse_json(line, path)
        except ArtifactError:
            continue
        if not isinstance(row, dict) or not _is_row(row):
            raise ArtifactError(f"{path}, line {number} is not a row of metrics", expected="stage, step and numbers")
        rows[row["stage"], row["step"]] = row
    stages = list(dict.fromkeys(stage for stage, _ in rows))
    return sorted(rows.values(), key=lambda row: (stages.index(row["stage"]), row["step"]))


def _is_row(row: Mapping[str, Any]) -> bool:
    numbers = (value for key, value in row.items() if key != "stage")
    return (
        isinstance(row.get("stage"), str)
        and isinstance(row.get("step"), int)
        and all(value is None or isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    )
