"""A bank for another base model: a copy for a close relative, elsewhere experts learned from the old ones' answers, without labels.

How far a base model moved is told in units of what an expert does to it: ‖W' − W‖ / mean ‖ΔW‖ over the adapted modules. A cosine near 1
says little, because experts are small themselves.
"""

from __future__ import annotations

import logging
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorag.bank.answers import Answer, agreement, answers_in, surest
from lorag.bank.bank import AdapterBank
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.base.relatives import compare_bases
from lorag.base.runner import BankBase, Runner
from lorag.errors import ArtifactError, BankError, BaseModelError, ConfigError
from lorag.files.artifacts import decode_text, read_bounded, resolve_inside
from lorag.files.atomic import write_atomically
from lorag.progress import progress_bar
from lorag.tasks.suite import Example, Task, TaskSuite

if TYPE_CHECKING:
    from lorag.base.base_model import BaseModel
    from lorag.base.relatives import Likeness

__all__ = ["RELATED", "AnswerConfig", "TransferConfig", "Transferred", "read_inputs", "task_inputs", "transfer_bank"]

logger = logging.getLogger(__name__)

RELATED = 0.2  # change of a base's weights, over that of an expert, up to which copies keep nearly all of their use
_AGREE = 0.9  # share of the old answers that copies must give on the new base where there are inputs to try
_MEASURED = 32  # experts whose norms are read
_COMPARED = 256  # descriptions by which tokenizers are compared
_LEAST = 8  # answers that an expert can be learned from
_MAX_BYTES = 64 * 2**20
_TRIED = 16  # answers of each expert by which a copy is tried
_CHECKED = 6  # one answer in so many is kept to compare the new expert with

By = Literal["auto", "copy", "answers"]


@dataclass
class AnswerConfig:
    """Which answers the new experts learn from.

    Attributes:
        inputs: Most inputs that an expert answers.
        keep: The share of its answers, the surest ones, that is kept.
        max_new_tokens: Where an answer is cut off; it is then not kept.
        seed: Seed of the choice of inputs.
    """

    inputs: int = 384
    keep: float = 0.8
    max_new_tokens: int = 64
    seed: int = 0


@dataclass
class TransferConfig:
    """How experts are learned anew.

    Attributes:
        answers: Which answers they learn from.
        experts: How they are trained. An empty list of ranks stands for the bank's largest rank, and null as target_modules for modules
            named as the bank's.
        objective_settings: Settings of the objective on the new base that differ from the bank's, such as its template.
    """

    answers: AnswerConfig = field(default_factory=AnswerConfig)
    experts: ExpertConfig = field(default_factory=lambda: ExpertConfig(target_modules=None, ranks=[]))
    objective_settings: dict[str, Any] = field(default_factory=dict)

    def experts_for(self, bank: AdapterBank) -> ExpertConfig:
        """How experts are trained for a bank."""
        targets = sorted({name.rsplit(".", 1)[-1] for name in bank.base.layout.target_modules})
        ranks = self.experts.ranks or [max(expert.rank for expert in bank.experts)]
        return replace(self.experts, ranks=ranks, target_modules=self.experts.target_modules or targets)


@dataclass(frozen=True)
class Transferred:
    """A bank that was transferred.

    Attributes:
        bank: The new bank.
        by: "copy" or "answers".
        likeness: Of the two base models.
        moved: How far the base moved, in units of an expert's ΔW; None where weights were not compared.
        agreement: Share of the old experts' answers that the new ones give too: copies to all inputs that were tried, others to those that
            they did not learn from. None where nothing was tried.
        kept: Of each expert, answers that were kept, and inputs that it answered; empty for a copy.
        skipped: Experts of which too few answers were kept.
    """

    bank: AdapterBank
    by: str
    likeness: Likeness
    moved: float | None = None
    agreement: float | None = None
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def transfer_bank(
    bank: AdapterBank,
    out: str | Path,
    to: BaseModel,
    *,
    by: By = "auto",
    inputs: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
    config: TransferConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = True,
) -> Transferred:
    """Makes a bank of the same tasks for another base model.

    A base with the same modules in the same shapes and the same tokens gets a copy. Where there are inputs, the old base with each expert
    answers them first, and the copy stays only if the new base with the copied experts gives these answers too; where there are none, a
    warning says if the base moved far. For any other base the surest answers become examples, and experts of the new base learn from
    them, many at a time. One answer in six is not learned from: the new expert's score is how often it gives these. A run that was
    interrupted goes on at the last expert that answered, then at the last group that learned.

    Args:
        bank: The bank.
        out: Folder of the new bank; answers are kept in its folder `answers`.
        to: The new base model.
        by: "copy", "answers", or "auto" as above.
        inputs: Texts without labels for each expert; needed where nothing is copied. See `task_inputs` and `read_inputs`.
        names: Which experts; all without.
        config: Which answers are learned from, and how.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of both base models.
        quiet: No progress bars.

    Raises:
        BankError: If there are no experts, no answers to learn from, or `out` is the bank itself.
        BaseModelError: If a copy is asked for that does not fit, or a base model cannot be had.
        ConfigError: If inputs are missing, a setting cannot be used, or the objective writes no answers.
    """
    move = _Move(bank, Path(out), to, config or TransferConfig(), device, dtype, quiet)
    names = list(dict.fromkeys(bank.names if names is None else names))
    move.check(by, names)
    bank.base.check()
    texts = [expert.descriptions[0] for expert in bank.experts[:_COMPARED]]
    likeness = compare_bases(bank.base.model, to, bank.base.layout, texts, weights=by != "answers")
    moved = None if likeness.change is None else likeness.change / _size(bank)
    fits = likeness.fits and likeness.same_tokens
    if by == "copy" and not fits:
        got = "other tokens" if likeness.fits else f"other modules than the bank's {len(bank.base.layout)}, or other shapes"
        raise BaseModelError(
            f"the experts cannot be copied to {to.name}", got=got, remedy="Let them be learned from answers: --by answers."
        )
    if inputs is None and (by == "answers" or not fits):
        raise ConfigError(
            f"experts of {to.name} must be learned from answers",
            got="no inputs to answer",
            remedy="Give texts without labels that look like the tasks' inputs: --tasks SUITE or --inputs FILE.",
        )
    by_expert = {} if inputs is None else move.answers(names, inputs)
    copied = fits and by != "answers"
    agreed = move.agreement(by_expert) if copied and by_expert else None
    if copied and (by == "copy" or agreed is None or agreed >= _AGREE):
        if moved is not None and moved > RELATED and (agreed is None or agreed < _AGREE):
            logger.warning(
                "%s moved %.2f times as far from %s as an expert changes it (copies are known to work up to %.2f); %s",
                *(to.name, moved, bank.base.model.name, RELATED),
                "with inputs (--tasks, --inputs) copies are tried, and learned anew where they fail",
            )
        return Transferred(move.copy(names), "copy", likeness, moved, agreed)
    new, agreed, kept = move.learn(by_expert)
    skipped = tuple(name for name, (count, _) in kept.items() if count < _LEAST)
    return Transferred(new, "answers", likeness, moved, agreed, kept, skipped)


# --- inputs -----------------------------------------------------------------------------------------------------------


def task_inputs(suite: TaskSuite, names: Sequence[str]) -> dict[str, list[str]]:
    """Training inputs of experts' tasks; outputs are not looked at. Experts whose task the suite lacks get none."""
    by_key = {task.key: task for task in suite}
    return {name: [example.input for example in by_key[name].split("train")] for name in names if name in by_key}


def read_inputs(path: str | Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Lines of a text file, the same for each expert.

    Raises:
        ConfigError: If it cannot be read, or has no lines.
    """
    path = Path(path)
    try:
        text = decode_text(read_bounded(path, _MAX_BYTES, named=True), path)
    except ArtifactError as error:
        raise ConfigError(f"inputs cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no inputs", expected="one text per line")
    return {name: lines for name in names}


# --- one transfer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Move:
    """From which bank to which base model, and how."""

    bank: AdapterBank
    out: Path
    to: BaseModel
    config: TransferConfig
    device: str
    dtype: str
    quiet: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Of the objective on the new base."""
        return {**self.bank.base.settings, **self.config.objective_settings}

    def check(self, by: str, names: Sequence[str]) -> None:
        """Refuses what cannot be done, before anything is loaded."""
        for name in names:
            self.bank[name]  # raises if there is none
        if not names:
            raise BankError(f"{self.bank.folder} has no expert to transfer")
        if self.out.exists() and self.out.samefile(self.bank.folder):
            raise BankError("a bank cannot be transferred into itself", got=str(self.out), remedy="Choose another folder with --out.")
        if by not in ("auto", "copy", "answers"):
            raise ConfigError("by cannot be used", got=repr(by)[:40], expected="auto, copy or answers")
        answers = self.config.answers
        if answers.inputs < _LEAST or not 0 < answers.keep <= 1 or answers.max_new_tokens < 1:
            expected = f"inputs of {_LEAST} or more, keep above 0 up to 1"
            raise ConfigError("answers cannot be used", got=repr(asdict(answers)), expected=expected)

    def answers(self, names: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> dict[str, list[Answer]]:
        """What the old experts answer."""
        bank, config = self.bank, self.config.answers
        runner = Runner.open(bank.base, self.device, self.dtype)
        if not runner.objective.generates or not runner.objective.reads_texts:
            raise ConfigError(
                f"objective {bank.base.objective} writes no answers to texts, so that nothing can be learned from them",
                remedy="Train the new base's experts on labelled examples: lorag bank build.",
            )
        by_expert = {}
        for name in progress_bar(names, desc="old experts answer", disable=self.quiet):
            texts = sorted(set(inputs.get(name, ())))
            random.Random(f"{config.seed}/{name}").shuffle(texts)
            file, chosen = self.out / "answers" / f"{name}.json", texts[: config.inputs]
            by_expert[name] = answers_in(file, runner, bank.adapter(name), chosen, max_new_tokens=config.max_new_tokens)
        return by_expert

    def agreement(self, by_expert: Mapping[str, Sequence[Answer]]) -> float:
        """The share of the old answers that the new base gives with copied experts, mean over experts."""
        bank = self.bank
        runner = Runner.open(replace(bank.base, model=self.to, settings=self.settings), self.device, self.dtype)
        shares = [agreement(runner, bank.adapter(name), answers[:_TRIED]) for name, answers in by_expert.items() if answers]
        return statistics.fmean(shares) if shares else 0.0

    def copy(self, names: Sequence[str]) -> AdapterBank:
        """The same shards, byte for byte, under a manifest that names the new base; every expert is read first.

        Scores are left out: they were the old base's.
        """
        bank, out, chosen = self.bank, self.out, set(names)
        wrong = next(((expert.name, problem) for expert, problem in bank.check() if problem and expert.name in chosen), None)
        if wrong:
            raise BankError(f"expert {wrong[0]!r} cannot be copied", got=wrong[1], remedy=f"Mend it first: lorag bank check {bank.folder}")
        moved = BankBase.of(self.to, bank.base.objective, self.settings, list(bank.base.layout.target_modules))
        new = AdapterBank.create(out, moved)
        entries = [replace(bank[name], score=None) for name in names]
        for file in sorted({file for expert in entries for file in (expert.file, expert.bases) if file}):
            source = resolve_inside(bank.folder, file)
            write_atomically(resolve_inside(out, file), lambda sibling, source=source: shutil.copyfile(source, sibling))  # type: ignore[misc]
        with new.locked() as now:
            taken = [name for name in names if name in now]
            if taken:
                raise BankError(f"{out} already has an expert of this name", got=taken[0], remedy="Choose another folder with --out.")
            AdapterBank(out, now.base, [*now.experts, *entries], now.files).write_manifest()
        return AdapterBank.from_pretrained(out)

    def learn(self, by_expert: Mapping[str, Sequence[Answer]]) -> tuple[AdapterBank, float | None, dict[str, tuple[int, int]]]:
        """Experts of the new base that learned from the surest answers, how often they give those kept apart, and `Transferred.kept`."""
        bank, config = self.bank, self.config
        tasks, kept = _tasks(bank, by_expert, config.answers)
        if not tasks:
            counts = ", ".join(f"{name} {count} of {asked}" for name, (count, asked) in list(kept.items())[:3])
            raise BankError(
                "no expert gave enough answers to learn from",
                got=counts,
                expected=f"{_LEAST} or more of one expert",
                remedy="Give more inputs, such as the tasks' own, or raise keep or max_new_tokens.",
            )
        new = build_bank(
            self.out,
            TaskSuite(tasks),
            self.to,
            bank.base.objective,
            self.settings,
            config.experts_for(bank),
            device=self.device,
            dtype=self.dtype,
            quiet=self.quiet,
        )
        scores = [score for task in tasks if (score := new[task.key].score) is not None]
        return new, statistics.fmean(scores) if scores else None, kept


def _tasks(
    bank: AdapterBank, by_expert: Mapping[str, Sequence[Answer]], config: AnswerConfig
) -> tuple[list[Task], dict[str, tuple[int, int]]]:
    """Tasks made of the kept answers, and of each expert how many were kept of how many inputs."""
    tasks, kept, source = [], {}, f"answers of {bank.base.model.name}"
    for name, answers in by_expert.items():
        expert, good = bank[name], surest(answers, config.keep)
        kept[name] = (len(good), len(answers))
        if len(good) >= _LEAST:
            examples = (Example(one.input, one.output, "train" if place % _CHECKED else "test") for place, one in enumerate(good))
            tasks.append(Task(name, expert.suite, expert.descriptions, None, expert.license, source, tuple(examples)))
    return tasks, kept


def _size(bank: AdapterBank) -> float:
    """Mean ‖ΔW‖ of a bank's experts."""
    return max(statistics.fmean(bank.adapter(expert.name).factors.norm() for expert in bank.experts[:_MEASURED]), 1e-12)
