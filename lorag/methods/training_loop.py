"""The loop under every learned method: Adam with a schedule, validation, the best state kept, resume, progress, shares.

A batch is drawn by the loop's seed and its step alone, the same in every process. Dropout and other noise of a share follow
from the seed, the step and the share's number. So the result depends on the number of shares, and not, but for the order in
which sums are rounded, on how many processes work on them; several shares in one process are gradient accumulation.
(Accelerate's own data parallelism wraps a module's forward; losses here run networks by parts, which such a wrapper does not see.)
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim import Optimizer

from lorag.errors import ConfigError
from lorag.files.metrics import Metrics
from lorag.files.tensors import save_tensors
from lorag.files.training_state import load_best, load_training_state, save_training_state
from lorag.progress import progress_bar

__all__ = ["Batch", "LoopSettings", "Shares", "TrainingLoop", "from_main"]

logger = logging.getLogger(__name__)

_PRECISIONS = ("no", "bf16")


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass
class LoopSettings:
    """Length and rates of one stage of training.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak rate of AdamW; warmed up over a twentieth, then lowered to a hundredth by a cosine.
        weight_decay: Of AdamW.
        validate_every: Steps between validations.
        patience: Validations without improvement after which the stage ends.
    """

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    validate_every: int = 100
    patience: int = 8


@dataclass
class TrainingLoop:
    """Where a run keeps its state, and how it shows its progress.

    Attributes:
        folder: Gets `metrics.jsonl` and, while a stage runs, its state; None keeps nothing.
        rng: The run's source of randomness, on the CPU, with one seed in all processes.
        quiet: No progress bar.
        accelerator: Devices, processes and precision.
        shares: Into how many each step's batch is cut; None is one for each process.
        mixed_precision: "no" or "bf16"; None is what the accelerator says.
        metrics: Where numbers go; None is `metrics.jsonl` in the folder.
    """

    folder: Path | None
    rng: torch.Generator
    quiet: bool = False
    accelerator: Accelerator = field(default_factory=lambda: Accelerator(cpu=not torch.cuda.is_available()))
    shares: int | None = None
    mixed_precision: str | None = None
    metrics: Metrics | None = None

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """What is made inside starts from a seed of the run's own; randomness outside goes on as if nothing had been made."""
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.rng)))
            yield

    def run(
        self,
        stage: str,
        module: nn.Module,
        loss: Callable[[nn.Module, int], Batch],
        validate: Callable[[nn.Module], float] | None,
        settings: LoopSettings,
    ) -> float:
        """Trains a module in place and leaves it in its best state, the same in all processes. The main one alone writes files.

        Args:
            stage: Names the stage on the bar, in the metrics and in the state file.
            module: What is trained; it is moved to the accelerator's device.
            loss: One step's batch, drawn from `rng`.
            validate: A number that should fall; without it the last state is kept. The main process works it out.
            settings: Length and rates.

        Returns:
            The best validation, or NaN without one.

        Raises:
            ConfigError: If the batches cannot be cut into the shares.
        """
        if settings.steps == 0:
            return math.nan
        shares, main = Shares.of(self.accelerator, self.shares, self.mixed_precision), self.accelerator.is_main_process
        shares.check(stage, module)
        # The module is not wrapped: losses run it by parts that a wrapper for data parallelism would not see.
        module.to(self.accelerator.device)
        learned = [one for one in module.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        stand = _Standing(self.folder if main else None, stage, module, optimizer, self.rng)
        start = 0 if self.folder is None else stand.resume(self.folder)
        if start and main:
            logger.info("%s: going on at step %d of %d", stage, start, settings.steps)
        shares.agree(module, start)
        began = time.monotonic()
        left = range(start, settings.steps if stand.waited < settings.patience else start)
        device = self.accelerator.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            progress_bar(left, initial=start, total=settings.steps, desc=stage, disable=self.quiet) as bar,
        ):
            for step in bar:
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
                value = self._step(stage, module, loss, step, optimizer, shares)
                last = step + 1 == settings.steps
                if step % 20 == 0 or last:
                    bar.set_postfix({"loss": f"{value.item():.4f}"} | ({} if math.isinf(stand.best) else {"best": f"{stand.best:.4f}"}))
                if (step + 1) % settings.validate_every == 0 or last:
                    validation = math.nan
                    if validate is not None:
                        module.eval()
                        validation = from_main(self.accelerator, functools.partial(validate, module))
                        stand.judge(validation)
                    self._record(stage, step + 1, value.item(), validation, time.monotonic() - began)
                    if not last:
                        stand.save(step + 1)
                    if stand.waited >= settings.patience:
                        break
        if stand.best_state is not None:
            module.load_state_dict(stand.best_state)
        module.eval()
        return stand.best if validate is not None else math.nan

    def _step(
        self, stage: str, module: nn.Module, loss: Callable[[nn.Module, int], Batch], step: int, optimizer: Optimizer, shares: Shares
    ) -> Tensor:
        """One step of the optimizer; returns the batch's mean loss ()."""
        seed = int(torch.randint(2**62, (), generator=self.rng))
        torch.manual_seed(seed)
        module.train()
        with shares.autocast():
            batch = loss(module, step)
        optimizer.zero_grad(set_to_none=True)
        value = shares.backward(stage, batch, seed, module.parameters())
        self.accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return value

    def finish(self) -> None:
        """Closes the metrics, and removes the stages' states once the result is written elsewhere; for the main process."""
        if self.metrics is not None:
            self.metrics.close()
        for pattern in ("*.state.safetensors", "*.best.safetensors"):
            for path in [] if self.folder is None else self.folder.glob(pattern):
                path.unlink()

    def _record(self, stage: str, step: int, loss: float, validation: float, seconds: float) -> None:
        if self.metrics is None:
            self.metrics = Metrics(self.folder, main=self.accelerator.is_main_process)
        self.metrics.record(stage, step, loss=loss, validation=validation, seconds=round(seconds, 1))


class _Standing:
    """Where a stage stands: its best state so far, and the files from which it can go on.

    Args:
        folder: Gets the files; None writes none.
        stage: Names them.
        module: What is trained.
        optimizer: Of its parameters.
        rng: The run's.
    """

    def __init__(self, folder: Path | None, stage: str, module: nn.Module, optimizer: Optimizer, rng: torch.Generator) -> None:
        self.folder, self.stage, self.module, self.optimizer, self.rng = folder, stage, module, optimizer, rng
        self.best, self.waited = math.inf, 0  # validations without improvement since the best
        self.best_state: dict[str, Tensor] | None = None

    def resume(self, folder: Path) -> int:
        """Goes on from the files in a folder, if there are any; returns the step."""
        state, best = self._files(folder)
        if not state.exists():
            return 0
        counters = load_training_state(state, self.module, [self.optimizer], self.rng, ("step", "waited", "best"))
        self.waited = int(counters["waited"] or 0)
        if counters["best"] is not None:
            self.best, self.best_state = float(counters["best"]), load_best(best, self.module)
        return int(counters["step"] or 0)

    def judge(self, validation: float) -> None:
        """Keeps the module's state if it is the best so far."""
        self.waited = 0 if validation < self.best else self.waited + 1
        if validation < self.best:
            self.best, self.best_state = validation, {n: v.detach().clone() for n, v in self.module.state_dict().items()}
            if self.folder is not None:
                save_tensors(self._files(self.folder)[1], self.best_state)

    def save(self, step: int) -> None:
        """Writes what `resume` reads."""
        if self.folder is not None:
            counters = {"step": step, "best": None if math.isinf(self.best) else self.best, "waited": self.waited}
            save_training_state(self._files(self.folder)[0], self.module, [self.optimizer], self.rng, counters)

    def _files(self, folder: Path) -> tuple[Path, Path]:
        return folder / f"{self.stage}.state.safetensors", folder / f"{self.stage}.best.safetensors"


def _schedule(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then a cosine to a hundredth."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.505 + 0.495 * math.cos(math.pi * step / steps))


# --- shares of a batch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        size: Rows b.
        losses: Loss of a run of its rows: their mean (), or one per row.
        learned: Gets the losses of all rows (b,), without gradients, once they are known; `losses` must give one per row then.
    """

    size: int
    losses: Callable[[slice], Tensor]
    learned: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class Shares:
    """Shares of every batch, dealt out to processes. Make one with `of`.

    Attributes:
        accelerator: The processes.
        count: Shares of a batch, as many for each process.
        bf16: Whether losses are computed in bf16 where torch's autocast takes it for safe.
    """

    accelerator: Accelerator
    count: int
    bf16: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator, count: int | None, mixed_precision: str | None) -> Shares:
        """Checks what a run asks for.

        Args:
            accelerator: The processes.
            count: Shares; None is one for each process.
            mixed_precision: "no" or "bf16"; None is what the accelerator says.

        Raises:
            ConfigError: If the processes cannot share them evenly, or if the precision is another one.
        """
        precision = str(accelerator.mixed_precision) if mixed_precision is None else mixed_precision
        if precision not in _PRECISIONS:
            raise ConfigError("mixed_precision cannot be used", got=precision, expected=" or ".join(_PRECISIONS))
        processes = accelerator.num_processes
        count = processes if count is None else count
        if count < 1 or count % processes:
            raise ConfigError(
                "shares cannot be dealt out evenly to the processes", got=count, expected=f"a multiple of {processes} processes, or null"
            )
        return cls(accelerator, count, precision == "bf16")

    def autocast(self) -> torch.autocast:
        """The precision in which losses are computed; parameters, gradients and optimizer stay in fp32."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16)

    def check(self, stage: str, module: nn.Module) -> None:
        """Refuses what would not learn the same in shares.

        Raises:
            ConfigError: If the module normalises over the batch, of which a share is only a part.
        """
        if self.count > 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            raise ConfigError(
                f"{stage}: its network normalises over the batch, which cannot be cut into shares",
                got=f"{self.count} shares, {self.accelerator.num_processes} processes",
                remedy="Train it in one process, with shares=1.",
            )

    def backward(self, stage: str, batch: Batch, seed: int, parameters: Iterable[Tensor]) -> Tensor:
        """Adds the gradients of the batch's mean loss to the parameters', in all processes alike, and returns that mean ().

        Args:
            stage: Names what is trained, in messages.
            batch: The same in every process.
            seed: Of dropout in the step; each share adds its number.
            parameters: What is trained; their gradients are empty.

        Raises:
            ConfigError: If there are fewer rows than shares.
        """
        if batch.size < self.count:
            raise ConfigError(
                f"{stage}: a batch is too small to be cut into shares",
                got=f"{batch.size} rows, {self.count} shares",
                remedy="Take a larger batch, more tasks, fewer processes or fewer shares.",
            )
        each = self.count // self.accelerator.num_processes
        first = self.accelerator.process_index * each
        total: Tensor | None = None
        rows: list[tuple[slice, Tensor]] = []
        for share in range(first, first + each):
            part = slice(batch.size * share // self.count, batch.size * (share + 1) // self.count)
            # Dropout draws from the global stream, which no state file holds.
            torch.manual_seed(seed + share)
            with self.autocast():
                row_losses = batch.losses(part)
                value = row_losses.mean() * ((part.stop - part.start) / batch.size)
            self.accelerator.backward(value)
            total = value.detach() if total is None else total + value.detach()
            rows.append((part, row_losses.detach()))
        if total is None:
            raise AssertionError("a process without a share")
        all_losses = total.new_zeros(batch.size if batch.learned is not None else 0)
        if batch.learned is not None:
            for part, row_losses in rows:
                all_losses[part] = row_losses
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            total, all_losses, *summed = self.accelerator.reduce([total.float(), all_losses.float(), *gradients], "sum")
            for gradient, value in zip(gradients, summed, strict=True):
                gradient.copy_(value)
        if batch.learned is not None:
            batch.learned(all_losses)
        return total

    def agree(self, module: nn.Module, step: int) -> None:
        """Gives every process the main one's parameters and buffers, and checks that all go on at one step.

        Raises:
            ConfigError: If they found different states of the run.
        """
        if self.accelerator.num_processes == 1:
            return
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ConfigError(
                "out: the processes do not see the same state of the run",
                got=f"steps {', '.join(map(str, steps))}",
                remedy="Give a folder that all machines share.",
            )
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                value.copy_(broadcast(value.detach().clone(memory_format=torch.contiguous_format)))


def from_main(accelerator: Accelerator, find: Callable[[], float]) -> float:
    """A number that the main process works out, broadcast to the others."""
    value = find() if accelerator.is_main_process else 0.0
    if accelerator.num_processes == 1:
        return value
    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)).item())
