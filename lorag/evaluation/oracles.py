"""Oracles, the upper end of a ladder: adapters trained on the evaluated tasks' own examples, or the scores that such adapters had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.bank.bank import AdapterBank
from lorag.errors import ArtifactError
from lorag.evaluation.rivals import WITH_EXAMPLES
from lorag.files.artifacts import read_json
from lorag.files.stored import Number, Stored, Text

if TYPE_CHECKING:
    from lorag.tasks.suite import TaskSuite

__all__ = ["OracleScores", "Oracles"]


@dataclass(frozen=True)
class OracleScores:
    """What oracles of some tasks scored, without the adapters.

    Attributes:
        metric: Of what.
        scores: Of each task, by name.
    """

    metric: str
    scores: Mapping[str, float]

    def covers(self, tasks: TaskSuite) -> bool:
        """Whether some of these tasks have a score."""
        return any(task.name in self.scores for task in tasks)

    @classmethod
    def read(cls, path: Path) -> OracleScores:
        """Reads what `lorag evaluate --json` wrote: the row `oracle`, or else that of the `fresh_K` with most examples.

        Raises:
            ArtifactError: If it is something else, or has no such row.
        """
        stored = read_json(path)
        splits = stored["splits"] if isinstance(stored.get("splits"), dict) else {"": stored}
        reports = [_Report.read(one, f"{path.name} is not what lorag evaluate --json writes", ArtifactError) for one in splits.values()]
        rows = [report.methods[name] for report in reports if (name := report.upper_end) is not None]
        if not rows or len({report.metric for report in reports}) > 1:
            raise ArtifactError(
                f"{path.name} has no scores of oracles",
                got=", ".join(sorted({name for report in reports for name in report.methods})) or "no rows",
                expected="a row oracle or fresh_K, of one metric",
            )
        return cls(reports[0].metric, {task: score for row in rows for task, score in row.per_task.items()})


Oracles = AdapterBank | OracleScores


class _Row(Stored):
    per_task: dict[str, Number]


class _Report(Stored):
    metric: Text
    methods: dict[str, _Row]

    @property
    def upper_end(self) -> str | None:
        """The row that stands for oracles."""
        matches = {name: WITH_EXAMPLES.fullmatch(name) for name in self.methods}
        trained = {name: int(match[2]) for name, match in matches.items() if match is not None and match[1] == "fresh"}
        return "oracle" if "oracle" in self.methods else max(trained, key=lambda name: trained[name], default=None)
