"""A step's batch cut into shares: processes take them in turn, and their gradients add up to those of the whole batch.

A batch is drawn by the loop's seed and its step alone, the same in every process. Dropout and other noise of a share follow
from the seed, the step and the share's number. So the result depends on the number of shares, and not, but for the order in
which sums are rounded, on how many processes work on them; several shares in one process are gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lorag.errors import ConfigError

__all__ = ["Batch", "Shares", "told"]

_PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        size: Rows b.
        losses: Loss of a run of its rows: their mean (), or one a row.
        learned: Gets the losses of all rows (b,), without gradients, once they are known; `losses` must give one a row then.
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
                found = batch.losses(part)
                value = found.mean() * ((part.stop - part.start) / batch.size)
            self.accelerator.backward(value)
            total = value.detach() if total is None else total + value.detach()
            rows.append((part, found.detach()))
        if total is None:
            raise AssertionError("a process without a share")
        known = total.new_zeros(batch.size if batch.learned is not None else 0)
        if batch.learned is not None:
            for part, found in rows:
                known[part] = found
        if self.accelerator.num_processes > 1:
            total, known = self._add_up(total, known, [p.grad for p in parameters if p.grad is not None])
        if batch.learned is not None:
            batch.learned(known)
        return total

    def _add_up(self, total: Tensor, known: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sums over the processes, in one exchange, for which everything is laid end to end; gradients are changed in place."""
        parts = [total.float()[None], known.float(), *(gradient.flatten() for gradient in gradients)]
        summed = self.accelerator.reduce(torch.cat(parts), "sum").split([part.numel() for part in parts])
        for gradient, part in zip(gradients, summed[2:], strict=True):
            gradient.copy_(part.view_as(gradient))
        return summed[0][0], summed[1]

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


def told(accelerator: Accelerator, find: Callable[[], float]) -> float:
    """A number that the main process works out and tells the others."""
    found = find() if accelerator.is_main_process else 0.0
    if accelerator.num_processes == 1:
        return found
    return float(broadcast(torch.tensor(found, dtype=torch.float64, device=accelerator.device)).item())
