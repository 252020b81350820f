"""Work on many items, here or as tasks of a Ray cluster: each item on its own, with retries where a worker dies.

What runs in a task is a function of a module with plain arguments, so that a worker of another machine can run it too. Tasks
return what they made; only the process that asks for it writes files. Results are those of a local run: the same function
of the same item, at the same number of threads.

A Ray cluster runs the code that it is sent. Whoever can reach its ports is trusted with everything: keep it in a private
network. A local one, started here, listens on loopback.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from lorag.errors import ConfigError, LoragError, MissingDependencyError

__all__ = ["Backend", "FanOutError", "Outcome"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

NAMES = ("local", "ray")
_WAITING = 4  # tasks sent ahead for each that can run: enough to keep workers busy, and results do not pile up


class FanOutError(LoragError, RuntimeError):
    """A task could not be finished on any worker."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one item: its place among the items, and its result or the error that lorag raised for it."""

    place: int
    value: Result | None = None
    error: LoragError | None = None

    def result(self) -> Result:
        """The result.

        Raises:
            LoragError: The item's error, if it has one.
        """
        if self.error is not None:
            raise self.error
        return cast(Result, self.value)  # None only if that is the result


@dataclass(frozen=True)
class Backend:
    """Where items are worked on.

    Attributes:
        name: "local", one after the other in this process, or "ray".
        address: Of a Ray cluster, such as "auto" or "ray://host:10001"; None takes the one that this process is connected to, or
            starts one on this machine for the time of the work.
        cpus: CPU cores of a task, which is also its number of threads.
        gpus: GPUs of a task; a share such as .5 lets two of them use one.
        retries: How often a task whose worker died is tried again.
    """

    name: str = "local"
    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0
    retries: int = 3

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError("backend is unknown", got=repr(self.name)[:40], expected=" or ".join(NAMES))
        if self.name == "local" and self.address is not None:
            raise ConfigError("an address is for --backend ray", got=self.address)
        if self.cpus < 1 or self.gpus < 0 or self.retries < 0:
            raise ConfigError(
                "backend: cpus must be positive, gpus and retries not negative", got=f"{self.cpus}, {self.gpus}, {self.retries}"
            )

    def run(
        self, work: Callable[[Any, Item], Result], shared: object, items: Iterable[Item], *, ordered: bool
    ) -> Iterator[Outcome[Result]]:
        """Works on items.

        Args:
            work: A function of a module. It gets `shared` and an item, and keeps what is dear to make, such as a loaded model,
                in its own process for the next item.
            shared: The same for all items; sent once.
            items: Plain values.
            ordered: Whether outcomes come in the items' order, or, on Ray, as they are finished.

        Yields:
            One outcome an item. Errors that lorag raises on purpose are outcomes; others stop the work.

        Raises:
            MissingDependencyError: If the backend is Ray and it is not installed.
            FanOutError: If no cluster can be reached, or if a task's workers died more often than it may be tried again.
        """
        if self.name == "local":
            return (_outcome(work, shared, place, item) for place, item in enumerate(items))
        return self._run_on_ray(work, shared, items, ordered)

    def _run_on_ray(
        self, work: Callable[[Any, Item], Result], shared: object, items: Iterable[Item], ordered: bool
    ) -> Iterator[Outcome[Result]]:
        if self.address is None:
            # Ray reads this where it is imported: no cluster of several machines, and so everything listens on loopback.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
            from ray.exceptions import RayError, RayTaskError
        except ImportError as error:
            raise MissingDependencyError("Ray is not installed", remedy='pip install "lorag[ray]"') from error
        started = not ray.is_initialized()
        try:
            if started:
                _connect(ray, self.address)
            resources = ray.cluster_resources()
            if self.cpus > resources.get("CPU", 0) or self.gpus > resources.get("GPU", 0):
                raise FanOutError(
                    "the Ray cluster has no room for a task",
                    got=f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs in all",
                    expected=f"{self.cpus} and {self.gpus:g} for each",
                    remedy="Give --cpus and --gpus that fit.",
                )
            # Crashed workers and lost machines are tried again; an exception would come again, too.
            task: Any = ray.remote(_task).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, retry_exceptions=False)
            sent, todo, place = ray.put(shared), iter(items), 0
            running: dict[Any, int] = {}
            done: dict[int, Outcome[Result]] = {}
            wanted, most, left = 0, _WAITING * max(1, int(resources["CPU"] // self.cpus)), True
            while left or running:
                while left and len(running) + len(done) < most:
                    try:
                        item = next(todo)
                    except StopIteration:
                        left = False
                        break
                    running[task.remote(work, sent, place, item, self.cpus)] = place
                    place += 1
                if not running:
                    break
                ready, _ = ray.wait(list(running), num_returns=1)
                done[running.pop(ready[0])] = ray.get(ready[0])
                while done and (not ordered or wanted in done):
                    yield done.pop(wanted if ordered else next(iter(done)))
                    wanted += 1
        except RayTaskError:  # a fault in what was run, with its traceback
            raise
        except RayError as error:
            raise FanOutError(
                "Ray gave a task up",
                got=str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__,
                remedy="What was finished is kept; the same command goes on from there.",
            ) from error
        finally:
            if started and ray.is_initialized():
                ray.shutdown()


def _outcome(work: Callable[[Any, Item], Result], shared: object, place: int, item: Item) -> Outcome[Result]:
    try:
        return Outcome(place, work(shared, item))
    except LoragError as error:
        return Outcome(place, error=error)


def _task(work: Callable[[Any, Item], Result], shared: object, place: int, item: Item, threads: int) -> Outcome[Result]:
    """What a worker runs. Sums are rounded by how many threads share them, so that their number is the task's, not the machine's."""
    import torch

    torch.set_num_threads(threads)
    return _outcome(work, shared, place, item)


def _connect(ray: Any, address: str | None) -> None:  # noqa: ANN401 - the module
    """Connects to a cluster, or starts one on this machine; nothing is reported to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
            if any(node["NodeManagerAddress"] != "127.0.0.1" for node in ray.nodes()):
                logger.warning("Ray was imported before lorag could tell it to listen on loopback: other machines reach this one's workers")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise FanOutError(
            "no Ray cluster could be reached" if address is not None else "no local Ray cluster could be started",
            got=f"{address or 'local'}: {next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]}",
            remedy="Look at its address, or use --backend local.",
        ) from error
