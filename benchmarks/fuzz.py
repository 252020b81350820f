"""Mutation fuzzer: valid adapters, banks, generators, suites, configs and training states, spoiled at random, must end in LoragError.

Each case takes one valid folder, spoils it and reads it the way users do. Whatever is read must be refused with a LoragError
or be whole: anything else that is raised, an accepted adapter with a value that is not a number, or a case that takes more than
five seconds of processor time is an escape. A case depends on the seed and its number alone:

    python -m benchmarks.fuzz --cases 100000
    python -m benchmarks.fuzz --cases 1 --start 4711      # the same case again, with its traceback
"""

from __future__ import annotations

import argparse
import gc
import gzip
import io
import json
import logging
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz_targets import TARGETS, make_seeds
from lorag.errors import LoragError

MANIFESTS = ("bank.json", "generator.json")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, -1e308),
    *("", "a", "NaN", "1", "../../x", "/etc/passwd", "con", "a\\b", "C:a", "\x00", "\ud800", "é" * 40, "a" * 5000, "${oc.env:HOME}"),
    *([], {}, [[]], [None], [0, 0], [1] * 64, ["a", "a"], {"": None}, {"a": {"a": {}}}, [2**62, 2**62], [[["x"]]]),
    *("LORA", "F32", "I8", "BF16", "F8_E4M3", "causal_lm", "none", "all", "model.layers.0.self_attn.q_proj"),
)
STARTS = (
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"<!doctype html>",
    b"version https://git-lfs",
    b"\0",
)
DTYPES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "I64", "F64", "F8_E4M3", "U64", "F4", "")
_BEYOND = (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, RecursionError, MemoryError, struct.error, zlib.error)
BATCH = 5000  # cases of one process
SLOWEST = 5.0  # seconds of processor time

Files = dict[str, bytes]


@dataclass
class Report:
    """What became of some cases.

    Attributes:
        outcomes: How often each target accepted a folder, or refused it with which error.
        escapes: Number of the case, what was done to the folder, and what went wrong.
        slowest: Seconds of processor time, and the case that took them.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    escapes: list[tuple[int, str, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)


# --- what is done to files ------------------------------------------------------------------------------------------------


def spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, overwrites or lengthens bytes."""
    data, choice = bytearray(raw), rng.randrange(9)
    place = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 4, 8, 64, len(data)))
    if choice == 0 and data:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif choice == 1:
        del data[place:]
    elif choice == 2:
        del data[place : place + length]
    elif choice == 3:
        data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
    elif choice == 4:
        data[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2, 7, 2**31, 2**63, 2**64 - 1, len(data))))
    elif choice == 5:
        data[0:0] = rng.choice(STARTS)
    elif choice == 6:
        start = rng.choice(STARTS)
        data[: len(start)] = start
    elif choice == 7:
        data += rng.randbytes(length)
    else:
        data[place : place + length] = rng.choice((b"", b"\0", b"{", b'"', b"]", b",", b"NaN", b"1e999", b"[" * 2000, b"\xff")) * 4
    return bytes(data)


def _nodes(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _nodes(child, (*path, key))


def spoil_value(value: Any, rng: random.Random) -> Any:  # noqa: ANN401 - JSON is any value
    """Replaces, removes, renames, wraps or swaps one part of a JSON value."""
    nodes = list(_nodes(value))
    path = rng.choice(nodes)
    if not path:
        return rng.choice((*ODD, [value], value)) if rng.random() < 0.1 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, choice = path[-1], rng.randrange(7)
    if choice <= 2:
        parent[key] = rng.choice(ODD)
    elif choice == 3:
        del parent[key]
    elif choice == 4 and isinstance(parent, dict):
        parent[rng.choice([odd for odd in ODD if isinstance(odd, str)])] = parent.pop(key)
    elif choice == 5:
        for _ in range(rng.choice((1, 3, 100))):
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    else:
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    return value


def spoil_json(raw: bytes, rng: random.Random) -> bytes:
    """Spoils one to three parts of a JSON text; sometimes a key occurs twice, or a number is none."""
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = spoil_value(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.05 and '": ' in text:
        text = text.replace('": ', f'": {rng.choice(("NaN", "Infinity", "1e999", "0x10", "01"))}, "x": ', 1)
    if rng.random() < 0.05 and text.startswith("{"):
        text = text.replace("{", '{"r": 1, "r": 2, "kind": 1, ', 1)
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def spoil_tensors(raw: bytes, rng: random.Random) -> bytes:
    """Spoils a safetensors file so that it stays one, or lies in its header only."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    choice = rng.randrange(8)
    if choice == 0 or not names:
        return _packed(spoil_json(json.dumps(header).encode(), rng), data)
    name = rng.choice(names)
    entry = header[name]
    if choice == 1:
        header[rng.choice((name + ".x", name.replace("lora_A", "lora_B"), name.split(".", 1)[-1], "x" * 300, ""))] = header.pop(name)
    elif choice == 2:
        entry["shape"] = entry["shape"][::-1]
    elif choice == 3:
        entry["shape"] = rng.choice(([-1], [2**40, 0], [1] * 20, [*entry["shape"], 1], [0], entry["shape"][:1], [2**62, 4]))
    elif choice == 4:
        entry["dtype"] = rng.choice(DTYPES)
    elif choice == 5:
        start, end = entry["data_offsets"]
        value = rng.choice((float("nan"), float("inf"), 1e30, -1e38, 0.0))
        data = data[:start] + (struct.pack("<f", value) * ((end - start) // 4 + 1))[: end - start] + data[end:]
    elif choice == 6:  # a tensor less or more, its data with it
        kept = {n: header[n] for n in sorted(names, key=lambda n: header[n]["data_offsets"]) if n != name or rng.random() < 0.5}
        parts, end, left = [], 0, {key: header[key] for key in header if key == "__metadata__"}
        for n, one in {**kept, f"{name}.twin": entry}.items():
            part = data[slice(*one["data_offsets"])]
            left[n] = {**one, "data_offsets": [end, end + len(part)]}
            parts.append(part)
            end += len(part)
        header, data = left, b"".join(parts)
    else:
        entry["data_offsets"] = rng.choice(
            ([0, 0], [0, len(data)], [len(data), 0], [2**63, 2**63], [-8, 0], header[rng.choice(names)]["data_offsets"])
        )
    return _packed(json.dumps(header).encode(), data)


def _packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def spoil_gzip(raw: bytes, rng: random.Random) -> bytes:
    """Spoils what is packed."""
    inner = gzip.decompress(raw)
    lines = inner.splitlines(keepends=True) or [b"{}\n"]
    place = rng.randrange(len(lines))
    lines[place] = spoil_json(lines[place], rng) + b"\n" if rng.random() < 0.7 else spoil_bytes(lines[place], rng)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(b"".join(lines))
    return packed.getvalue()


def spoil_lines(raw: bytes, rng: random.Random) -> bytes:
    """Spoils one line of JSON lines, or of YAML."""
    lines = raw.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    if lines[place].startswith(b"{"):
        lines[place] = spoil_json(lines[place], rng) + b"\n"
    else:
        odd = rng.choice(ODD)
        new = rng.choice(
            (f": {odd!r}", f": {json.dumps(odd)}", ": &a [1]", ": *a", ": !!python/name:os.system", ": .inf", ": 2001-99-99", "  x: 1")
        )
        lines[place] = lines[place].split(b":")[0] + new.encode("utf-8", "replace") + b"\n"
    return b"".join(lines)


def spoil(files: Files, rng: random.Random) -> tuple[Files, str]:
    """Spoils one or two files of a folder and says how. Checksums of a manifest are mostly put right, to get beyond them."""
    files, done = dict(files), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(files))
        raw, how = files[name], rng.random()
        if how < 0.03:
            del files[name]
            done.append(f"removed {name}")
            if not files:
                break
            continue
        if how < 0.05:
            files[name] = files[rng.choice(sorted(files))]
            done.append(f"another file as {name}")
            continue
        kinds: list[Callable[[bytes, random.Random], bytes]] = [spoil_bytes]
        if name.endswith(".json"):
            kinds = [spoil_bytes, *[spoil_json] * 4]
        elif name.endswith(".safetensors"):
            kinds = [spoil_bytes, *[spoil_tensors] * 4]
        elif name.endswith(".gz"):
            kinds = [spoil_bytes, *[spoil_gzip] * 3]
        elif name.endswith((".jsonl", ".yaml")):
            kinds = [spoil_bytes, *[spoil_lines] * 3]
        kind = rng.choice(kinds)
        try:
            files[name] = kind(raw, rng)
        except _BEYOND:  # it was spoiled before
            kind = spoil_bytes
            files[name] = spoil_bytes(raw, rng)
        done.append(f"{kind.__name__} {name}")
    if rng.random() < 0.85:
        for name in MANIFESTS:
            if name in files:
                files[name] = _put_right(files, name)
    return files, ", ".join(done)


def _put_right(files: Files, name: str) -> bytes:
    import hashlib

    try:
        manifest = json.loads(files[name])
        for file, entry in manifest["files"].items():
            entry.update(bytes=len(files[file]), sha256=hashlib.sha256(files[file]).hexdigest())
        return json.dumps(manifest).encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files[name]


# --- running ----------------------------------------------------------------------------------------------------------------


def _write(folder: Path, files: Files, rng: random.Random) -> None:
    """Writes the files; now and then one is a link that leads outside, or a folder."""
    odd = rng.choice(sorted(files)) if files and rng.random() < 0.02 else None
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == odd and rng.random() < 0.5:
            path.symlink_to("/etc/hostname")
        elif name == odd:
            path.mkdir()
        else:
            path.write_bytes(raw)


def run(cases: int, seed: int = 0, start: int = 0) -> Report:
    """Runs cases number `start` to `start + cases - 1` of a seed."""
    report = Report()
    shared = Path("/dev/shm")  # noqa: S108 - files of this process only, in a folder of its own
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        seeds = make_seeds(Path(scratch) / "seeds")
        names = list(TARGETS)
        weights = [TARGETS[name].weight for name in names]
        for number in range(start, start + cases):
            rng = random.Random(f"{seed}/{number}")
            (target,) = rng.choices(names, weights)
            files, done = spoil(rng.choice(seeds[TARGETS[target].kind]), rng)
            folder = Path(scratch) / "case"
            folder.mkdir()
            began = time.process_time()
            try:
                _write(folder, files, rng)
                TARGETS[target].read(folder, rng)
                outcome = "accepted"
            except LoragError as error:
                outcome = type(error).__name__
                if not str(error).isprintable() or len(str(error)) > 3000:
                    report.escapes.append((number, f"{target}: {done}", f"an unreadable message: {str(error)[:200]!r}"))
            except Exception as error:  # anything that is not a LoragError is what is looked for
                outcome = f"ESCAPE {type(error).__name__}"
                report.escapes.append((number, f"{target}: {done}", "".join(traceback.format_exception(error)[-6:])))
            spent = time.process_time() - began
            if spent > SLOWEST:
                report.escapes.append((number, f"{target}: {done}", f"took {spent:.1f} s"))
            report.slowest = max(report.slowest, (spent, number))
            report.outcomes[target, outcome] += 1
            shutil.rmtree(folder)
            if number % 500 == 0:  # Python leaves rings of objects for long where a process has as many as this one
                gc.collect()
    return report


def run_apart(cases: int, seed: int, start: int, memory: int) -> Report:
    """`run` in a process of its own, which may take `memory` MiB beyond what this one has; 0 sets no limit."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.close(reading)
            if memory:
                limit_memory(memory)
            found = run(cases, seed, start)
            outcomes = [[*key, count] for key, count in found.outcomes.items()]
            with open(writing, "w") as pipe:
                json.dump({"outcomes": outcomes, "escapes": found.escapes, "slowest": found.slowest}, pipe)
            code = 0
        except BaseException:  # nobody else would say what ended it
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        return Report(escapes=[(start, f"{cases} cases from here on", f"the process ended with {os.waitstatus_to_exitcode(status)}")])
    value = json.loads(said)
    outcomes = Counter({(target, outcome): count for target, outcome, count in value["outcomes"]})
    return Report(outcomes, [tuple(escape) for escape in value["escapes"]], tuple(value["slowest"]))


def limit_memory(mebibytes: int) -> None:
    """Lets this process have that much address space beyond what it has now; more is a MemoryError, which is an escape."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """Runs the fuzzer from the command line; the exit code is 1 if there was an escape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--memory", type=int, default=512, help="MiB that 5,000 cases may take, which run in a process of their own; 0 sets no limit"
    )
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    began, report = time.monotonic(), Report()
    for start in range(given.start, given.start + given.cases, BATCH):
        part = run_apart(min(BATCH, given.start + given.cases - start), given.seed, start, given.memory)
        report.outcomes.update(part.outcomes)
        report.escapes += part.escapes
        report.slowest = max(report.slowest, part.slowest)
        if not given.quiet:
            print(f"{sum(report.outcomes.values())} cases, {len(report.escapes)} escapes", file=sys.stderr, flush=True)
    for number, done, what in report.escapes[:20]:
        print(f"case {number} of seed {given.seed}, {done}\n{what}")
    for (target, outcome), count in sorted(report.outcomes.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"{target:<10} {outcome:<28} {count:>7}")
    seconds, number = report.slowest
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"slowest case {number}: {seconds:.2f} s; peak memory {used.ru_maxrss // 1024} MiB; {used.ru_utime:.0f} s of processor time", end=""
    )
    print(f", {time.monotonic() - began:.0f} s in all\n{given.cases} cases of seed {given.seed}: {len(report.escapes)} escapes")
    return 1 if report.escapes else 0


if __name__ == "__main__":
    sys.exit(main())
