"""Kill -9 at random moments of building, filling and learning from a bank and of generating; then what is left is looked at.

Every command runs in a process of its own on the toy world of the tests. A kill comes at a random time, or just before or
after a random call that changes the file system. After each kill everything that the process had reported as finished must be
there, everything that was there before must be unchanged, and the next process must go on and end at the same bytes as one
that was never killed. Beside that, three processes fill one bank at once, and each command meets a limit on the size of its files.

    OMP_NUM_THREADS=1 python -m benchmarks.kills --kills 200
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import tqdm
from conftest import _TINY, word_tokenizer
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, name_of, save_base, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.bank.importing import ImportOptions, import_adapters
from lorag.errors import StorageError
from lorag.files.tensors import read_header
from lorag.files.training_state import save_training_state
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import training_loop
from lorag.text.embedding import SentenceEmbedder
from lorag.training.train import TrainConfig, train

CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
TEXTS = tuple(f"paint the {colour} {animal}" for colour, animal in TRAINING[:6])
AS_SAID = ImportOptions(("do it",))
GROUPS = 4
ENDLESS = 300.0  # seconds after which a process is taken to hang
tqdm.tqdm.monitor_interval = 0  # a thread that watches bars would hold locks over a fork
tqdm.tqdm.set_lock(threading.RLock())  # its own lock is shared over forks: a process killed while it holds it would stop all later ones
Report = Callable[[str], None]


class _Embedder(WordEmbedder):
    """The toy world's embedder in place of one that has to be loaded."""

    @classmethod
    def from_pretrained(cls, name: str = "words", device: str = "auto") -> _Embedder:
        return cls()


# --- the commands -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What the commands start from; nothing here changes."""

    root: Path
    base: Any = None
    generator: Any = None

    @property
    def bank(self) -> Path:
        """A bank of ten experts."""
        return self.root / "bank"

    @property
    def adapters(self) -> list[Path]:
        """Six PEFT folders to be added."""
        return sorted((self.root / "adapters").iterdir())


def build(world: World, folder: Path, report: Report) -> None:
    """`lorag bank build`: eight experts in four groups."""
    add = AdapterBank.add

    def reported(bank: AdapterBank, experts: Any, **more: Any) -> AdapterBank:  # noqa: ANN401 - passed on
        after = add(bank, experts, **more)
        report(" ".join(name for name, _, _ in experts))
        return after

    AdapterBank.add = reported  # type: ignore[method-assign]
    config = ExpertConfig(
        target_modules=list(world.base.layout.target_modules), ranks=[2], group=2, steps=3, batch=2, checkpoints=1, test_limit=0
    )
    suite = make_suite(TRAINING[: 2 * GROUPS], train=4, test=1)
    build_bank(folder / "built", suite, world.base.model, "causal_lm", world.base.settings, config, device="cpu", quiet=True)


def add(world: World, folder: Path, report: Report) -> None:
    """`lorag bank add`, for one adapter after the other."""
    for place in world.adapters:
        for one in import_adapters(folder / "bank", find_sources([str(place)]), ImportOptions((f"do {place.name}",))):
            if one.error is not None:
                raise one.error
            report(one.name)


def learn(world: World, folder: Path, report: Report) -> None:
    """`lorag train`, its state kept every hundred steps."""
    save = save_training_state

    def reported(path: Path, *more: Any) -> None:  # noqa: ANN401 - passed on
        save(path, *more)
        report(str(more[-1]["step"]))

    training_loop.save_training_state = reported
    settings = {"width": 16, "steps": 300, "batch": 8}
    train(
        TrainConfig(
            bank=str(world.bank), out=str(folder / "generator"), method="mlp", settings=settings, tasks=None, k=4, rank=2, device="cpu"
        ),
        quiet=True,
    )


def generate(world: World, folder: Path, report: Report) -> None:
    """`lorag generate`, six times into one folder."""
    for number, text in enumerate(TEXTS):
        world.generator.generate(text).save_pretrained(folder / "adapter")
        report(str(number))


LIMITS = {"build": 3_000, "add": 3_000, "train": 16_000, "generate": 2_000}  # bytes of a file, each below the largest that is written
COMMANDS = {"build": build, "add": add, "train": learn, "generate": generate}


# --- what must be left --------------------------------------------------------------------------------------------------


def _values(adapter: LoraAdapter) -> dict[str, Any]:
    return {name: (a.clone(), b.clone()) for name, (a, b) in adapter.factors.items()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(a, c) and torch.equal(b, d) for n, (a, b) in one.items() for c, d in [other[n]])


def left_of(world: World, command: str, folder: Path, reference: Path | None, finished: list[str], before: int | None = None) -> str | None:
    """What is wrong with what a killed process left, or None.

    Args:
        world: What it started from.
        command: Which command it ran.
        folder: Where.
        reference: The same without a kill, to compare with.
        finished: What it reported; of "build" and "add" also what processes before it did.
        before: Of "generate", which adapter was there when it started.
    """
    if command in ("build", "add"):
        path = folder / ("built" if command == "build" else "bank")
        if not (path / "bank.json").exists():
            return "what was finished is gone" if finished else None
        bank = AdapterBank.from_pretrained(path)
        lost = [name for names in finished for name in names.split() if name not in bank]
        if command == "add":
            lost += [name for name in AdapterBank.from_pretrained(world.bank).names if name not in bank]
        broken = [f"{expert.name}: {problem}" for expert, problem in bank.check() if problem]
        if lost or broken:
            return f"lost {lost}, broken {broken}"
        if reference is not None:
            whole = AdapterBank.from_pretrained(reference / path.name)
            other = [name for name in bank.names if not _same(_values(bank.adapter(name)), _values(whole.adapter(name)))]
            return f"other weights than without a kill: {other}" if other else None
    elif command == "train":
        state = folder / "generator" / "mlp reconstruction.state.safetensors"
        if (folder / "generator" / "generator.json").exists():
            LoraGenerator.from_pretrained(folder / "generator", embedder=_Embedder())
        elif finished:
            step = _step(state)
            if step < int(finished[-1]):
                return f"step {finished[-1]} was finished, and the state is of step {step}"
    elif (folder / "adapter").exists():
        if (
            not finished
            and before is None
            and not any((folder / "adapter" / name).exists() for name in ("adapter_config.json", ".replacing"))
        ):
            return None  # killed before the first was written
        found = LoraAdapter.from_pretrained(folder / "adapter", world.base.layout)
        number = _which(found)
        if not _same(_values(found), _values(world.generator.generate(TEXTS[number]))):
            return "weights of one adapter beside the description of another"
        allowed = {int(finished[-1]), int(finished[-1]) + 1} if finished else {before, 0, 1}
        if number not in allowed:
            return f"adapter {finished[-1] if finished else before} was finished, and {number} is there"
    return None


def _which(adapter: LoraAdapter) -> int:
    """Which of the generated adapters it is, as its lorag.json has it."""
    return TEXTS.index(adapter.info["description"])


def _step(state: Path) -> int:
    return int(json.loads(read_header(state)[1]["counters"])["step"])


def same_end(command: str, folder: Path, reference: Path) -> bool:
    """Whether a command that was killed and went on ended with the same bytes as one that was not."""
    if command == "build":
        names = [
            path.relative_to(reference) for path in sorted((reference / "built").rglob("*")) if path.suffix in (".safetensors", ".json")
        ]
    elif command == "train":
        names = [Path("generator/generator.safetensors")]
    elif command == "generate":
        names = [Path("adapter") / name for name in ("adapter_config.json", "adapter_model.safetensors", "lorag.json")]
    else:
        one, other = (AdapterBank.from_pretrained(path / "bank") for path in (folder, reference))
        return one.experts == other.experts and all(_same(_values(one.adapter(n)), _values(other.adapter(n))) for n in one.names)
    return all((folder / name).read_bytes() == (reference / name).read_bytes() for name in names)


# --- processes ----------------------------------------------------------------------------------------------------------


class _Reporting(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report(f"log {record.getMessage()}")


def start(work: Callable[[Report], None], die_at: tuple[int, bool] | None = None, limit: int | None = None) -> tuple[int, int]:
    """Starts work in a process of its own; returns its id and the pipe on which it reports.

    Args:
        work: What it does.
        die_at: It kills itself at this call that changes the file system, before (False) or after it (True).
        limit: Bytes that a file of its may have.
    """
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if len(threads) > 1:
        raise RuntimeError(f"a process with threads must not be split in two: {threads}")
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading

    def report(line: str) -> None:
        os.write(writing, f"{line}\n".encode())

    code = 1
    try:
        os.close(reading)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        logging.getLogger("lorag").setLevel(logging.INFO)
        logging.getLogger("lorag").addHandler(_Reporting(report))
        _watch(report, die_at)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work(report)
        code = 0
    except BaseException as error:  # told to the parent, whatever it is
        report(f"error {type(error).__name__} {error!r:.400}")
    finally:
        os._exit(code)
    raise AssertionError("not reached")


def _watch(report: Report, die_at: tuple[int, bool] | None) -> None:
    """Counts calls that change the file system, and dies at one of them."""
    count = 0

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:  # noqa: ANN401 - passed on
            nonlocal count
            count += 1
            if die_at == (count, False):
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **more)
            if die_at == (count, True):
                os.kill(os.getpid(), signal.SIGKILL)
            if die_at is None and name in CHANGES:
                report(f"changes {count}")
            return result

        return call

    for name in CHANGES:
        setattr(os, name, watched(name))


def finish(process: int, reading: int, after: float | None = None) -> tuple[int, list[str]]:
    """Waits for a process, or kills it after some seconds; returns how it ended and what it reported."""
    deadline = time.monotonic() + (ENDLESS if after is None else after)
    said, running = b"", True
    with open(reading, "rb", buffering=0) as pipe:
        while running:  # until it closes the pipe, which a killed process does too
            left = deadline - time.monotonic()
            if left <= 0:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                said += b"" if after is not None else b"error it hangs\n"
                deadline = time.monotonic() + ENDLESS
            elif select.select([pipe], [], [], left)[0]:
                part = pipe.read(65536)
                said, running = said + part, bool(part)
    lines = said.decode(errors="replace").splitlines()
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), lines


def at_work(world: World, command: str, folder: Path) -> Callable[[Report], None]:
    """A command on a folder, as a process runs it."""
    return lambda report: COMMANDS[command](world, folder, report)


# --- rounds -------------------------------------------------------------------------------------------------------------


def _fresh(world: World, command: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if command == "add":
        shutil.copytree(world.bank, folder / "bank")
    return folder


def kill_rounds(world: World, command: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills a command again and again, each process going on where the killed one stopped, until it has been killed so often."""
    reference = _fresh(world, command, world.root / f"{command}-whole")
    began = time.monotonic()
    code, lines = finish(*start(at_work(world, command, reference)))
    seconds = time.monotonic() - began
    if code:
        raise RuntimeError(f"{command} fails without a kill: {lines[-3:]}")
    changes = max(int(line.split()[1]) for line in lines if line.startswith("changes"))
    units = [line for line in lines if line.split()[0] not in ("changes", "log")]
    done = {"kills": 0, "ended": 0, "finished units": 0, "wrong": [], "resumed": 0, "calls": changes, "seconds": round(seconds, 2)}
    folder, finished = _fresh(world, command, world.root / f"{command}-killed"), []
    while done["kills"] < kills:
        by_time = rng.random() < 0.5
        die_at = None if by_time else (rng.randint(1, changes), rng.random() < 0.5)
        there = None
        if (folder / "adapter" / "adapter_config.json").exists():
            there = _which(LoraAdapter.from_pretrained(folder / "adapter", world.base.layout))
        process, pipe = start(at_work(world, command, folder), die_at)
        code, lines = finish(process, pipe, rng.uniform(0, seconds) if by_time else None)
        own = [line for line in lines if line.split()[0] not in ("changes", "log", "error")]
        finished = own if command == "generate" else finished + own
        done["finished units"] += len(own)
        done["resumed"] += any("going on" in line for line in lines if line.startswith("log"))
        errors = [line for line in lines if line.startswith("error")]
        if code == -signal.SIGKILL:
            done["kills"] += 1
        elif code:
            done["wrong"].append(f"{command}: {errors}")
        try:
            wrong = left_of(world, command, folder, reference, finished, there)
        except Exception as error:  # whatever cannot be read any more is what is looked for
            wrong = repr(error)
        if wrong:
            done["wrong"].append(f"{command}, {'a random time' if by_time else f'call {die_at}'}: {wrong}")
        if code == 0:
            done["ended"] += 1
            if not same_end(command, folder, reference):
                done["wrong"].append(f"{command} ended otherwise than without kills")
        if code == 0 or wrong or code not in (0, -signal.SIGKILL):
            folder, finished = _fresh(world, command, folder), []
    code, lines = finish(*start(at_work(world, command, folder)))
    if code or not same_end(command, folder, reference):
        done["wrong"].append(f"{command} does not end as without kills: {lines[-2:]}")
    done["units of a run"] = len(units)
    return done


def every_call(world: World) -> dict[str, Any]:
    """Kills one overwriting of an adapter, and one addition to a bank, before and after each call that changes the file system."""
    done: dict[str, Any] = {"kills": 0, "wrong": []}
    old = _fresh(world, "generate", world.root / "old")
    world.generator.generate(TEXTS[0]).save_pretrained(old / "adapter")

    def overwrite(folder: Path) -> Callable[[Report], None]:
        return lambda report: report(str(world.generator.generate(TEXTS[1]).save_pretrained(folder / "adapter")))

    def enlarge(folder: Path) -> Callable[[Report], None]:
        place = world.adapters[0]
        return lambda report: report(*[one.name for one in import_adapters(folder / "bank", find_sources([str(place)]), AS_SAID)])

    for command, work in (("generate", overwrite), ("add", enlarge)):
        for call in range(1, 1000):
            codes = []
            for after in (False, True):
                folder = _fresh(world, command, world.root / "every")
                if command == "generate":
                    shutil.copytree(old / "adapter", folder / "adapter")
                code, lines = finish(*start(work(folder), (call, after)))
                codes.append(code)
                done["kills"] += code == -signal.SIGKILL
                finished = [line for line in lines if line.split()[0] not in ("changes", "log", "error")]
                try:
                    wrong = left_of(world, command, folder, None, ["1" if command == "generate" else line for line in finished], 0)
                except Exception as error:
                    wrong = repr(error)
                if wrong or code not in (0, -signal.SIGKILL):
                    done["wrong"].append(f"{command}, call {call}, {'after' if after else 'before'}: {wrong or lines}")
            if codes == [0, 0]:
                break
    return done


def together(world: World, processes: int = 3) -> dict[str, Any]:
    """Several processes fill one bank at once."""
    folder = _fresh(world, "add", world.root / "together")
    places = world.adapters

    def one(number: int) -> Callable[[Report], None]:
        def work(report: Report) -> None:
            for place in places[number::processes]:
                for imported in import_adapters(folder / "bank", find_sources([str(place)]), ImportOptions((f"do {place.name}",))):
                    if imported.error is not None:
                        raise imported.error

        return work

    running = [start(one(number)) for number in range(processes)]
    ended = [finish(*each) for each in running]
    bank = AdapterBank.from_pretrained(folder / "bank")
    expected = {*AdapterBank.from_pretrained(world.bank).names, *(place.name for place in places)}
    wrong = [line for code, lines in ended for line in lines if code and line.startswith("error")]
    return {"processes": processes, "experts": len(bank), "wrong": wrong + sorted(expected ^ set(bank.names))}


def full_disk(world: World) -> dict[str, Any]:
    """Each command meets a limit on the size of files: a clear error, and what was there before is there still."""
    said, wrong = {}, []
    for command in COMMANDS:
        folder = _fresh(world, command, world.root / f"{command}-full")
        if command == "generate":
            world.generator.generate(TEXTS[0]).save_pretrained(folder / "adapter")
        code, lines = finish(*start(at_work(world, command, folder), limit=LIMITS[command]))
        errors = [line for line in lines if line.startswith("error")]
        said[command] = errors[-1] if errors else f"no error, exit code {code}"
        if not said[command].startswith(f"error {StorageError.__name__}") or "File too large" not in said[command]:
            wrong.append(f"{command}: {said[command]}")
        try:
            problem = left_of(world, command, folder, None, [], 0 if command == "generate" else None)
        except Exception as error:
            problem = repr(error)
        if problem:
            wrong.append(f"{command}: {problem}")
    return {"said": said, "wrong": wrong}


def make_world(root: Path) -> World:
    """A base model, a bank, adapters to add, and a generator."""
    SentenceEmbedder.from_pretrained = _Embedder.from_pretrained  # type: ignore[method-assign, assignment]
    world = World(root)
    world.base = save_base(root / "base", _TINY["llama"], word_tokenizer())
    make_bank(world.bank, world.base, TRAINING[:10])
    for cell in TRAINING[10:16]:
        adapter = true_adapter(world.base.layout, *cell)
        replace(adapter, base_model=world.base.model.name).save_pretrained(root / "adapters" / name_of(*cell))
    code, lines = finish(*start(lambda report: learn(world, root / "made", report)))
    if code:
        raise RuntimeError(f"training fails: {lines[-3:]}")
    world.generator = LoraGenerator.from_pretrained(root / "made" / "generator", embedder=_Embedder())
    return world


def main() -> int:
    """Runs everything; the exit code is 1 if something was lost or went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=16, help="in all, shared out to the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the findings here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        world = make_world(Path(scratch))
        found: dict[str, Any] = {"together": together(world), "full disk": full_disk(world), "every call": every_call(world)}
        for number, command in enumerate(COMMANDS):
            share = given.kills // len(COMMANDS) + (number < given.kills % len(COMMANDS))
            found[command] = kill_rounds(world, command, share, random.Random(f"{given.seed}/{command}"))
            print(f"{command}: {found[command]}", flush=True)
    wrong = [line for part in found.values() for line in part["wrong"]]
    kills = sum(found[command]["kills"] for command in COMMANDS)
    print(f"together: {found['together']}\nfull disk: {found['full disk']}\nevery call: {found['every call']}")
    print(f"{kills} random kills of seed {given.seed}, {len(wrong)} losses, {time.monotonic() - began:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps({**found, "kills": kills, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
