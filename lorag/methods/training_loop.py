"""The loop under every learned generator: Adam with a schedule, validation, the best state kept, resume, progress."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorag.errors import ConfigError
from lorag.files.metrics import Metrics
from lorag.files.tensors import save_tensors
from lorag.files.training_state import load_best, load_training_state, save_training_state
from lorag.methods.data_parallel import Batch, Shares, told
from lorag.progress import progress_bar

__all__ = ["LoopSettings", "TrainingLoop"]

logger = logging.getLogger(__name__)


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
        loss: Callable[[nn.Module, int], Batch | Tensor],
        validate: Callable[[nn.Module], float] | None,
        settings: LoopSettings,
    ) -> float:
        """Trains a module in place and leaves it in its best state, the same in all processes. The main one alone writes files.

        Args:
            stage: Names the stage on the bar, in the metrics and in the state file.
            module: What is trained; it is moved to the accelerator's device.
            loss: One step's batch, drawn from `rng`; or its loss, which only one process with one share can learn from.
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
        optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        best, best_state, waited, start = math.inf, None, 0, 0
        state = None if self.folder is None else self.folder / f"{stage}.state.safetensors"
        kept = None if self.folder is None else self.folder / f"{stage}.best.safetensors"
        if state is not None and kept is not None and state.exists():
            counters = load_training_state(state, module, [optimizer], self.rng, ("step", "waited", "best"))
            start, waited = int(counters["step"] or 0), int(counters["waited"] or 0)
            best = math.inf if counters["best"] is None else float(counters["best"])
            best_state = None if counters["best"] is None else load_best(kept, module)
            if main:
                logger.info("%s: going on at step %d of %d", stage, start, settings.steps)
        shares.agree(module, start)
        began = time.monotonic()
        left = range(start, settings.steps if waited < settings.patience else start)
        device = self.accelerator.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            progress_bar(left, initial=start, total=settings.steps, desc=stage, disable=self.quiet) as bar,
        ):
            for step in bar:
                seed = int(torch.randint(2**62, (), generator=self.rng))
                torch.manual_seed(seed)
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
                module.train()
                with shares.autocast():
                    made = loss(module, step)
                optimizer.zero_grad(set_to_none=True)
                value = shares.backward(stage, _cut(stage, made, shares.count), seed, module.parameters())
                self.accelerator.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                last = step + 1 == settings.steps
                if step % 20 == 0 or last:
                    shown = {"loss": f"{value.item():.4f}"} | ({} if math.isinf(best) else {"best": f"{best:.4f}"})
                    bar.set_postfix(shown)
                if (step + 1) % settings.validate_every == 0 or last:
                    found = math.nan
                    if validate is not None:
                        module.eval()
                        found = told(self.accelerator, functools.partial(validate, module))
                        waited = 0 if found < best else waited + 1
                        if found < best:
                            best, best_state = found, {n: v.detach().clone() for n, v in module.state_dict().items()}
                            if kept is not None and main:
                                save_tensors(kept, best_state)
                    self._record(stage, step + 1, value.item(), found, time.monotonic() - began)
                    if state is not None and main and not last:
                        counters = {"step": step + 1, "best": None if math.isinf(best) else best, "waited": waited}
                        save_training_state(state, module, [optimizer], self.rng, counters)
                    if waited >= settings.patience:
                        break
        if best_state is not None:
            module.load_state_dict(best_state)
        module.eval()
        return best if validate is not None else math.nan

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


def _cut(stage: str, made: Batch | Tensor, count: int) -> Batch:
    """What a loss gave, as a batch."""
    if isinstance(made, Batch):
        return made
    if count > 1:
        raise ConfigError(
            f"{stage}: this method does not cut its batches into shares",
            got=f"{count} shares",
            remedy="Train it in one process, with shares=1.",
        )
    return Batch(1, lambda _: made)


def _schedule(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then a cosine to a hundredth."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.505 + 0.495 * math.cos(math.pi * step / steps))
