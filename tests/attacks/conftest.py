"""A sound adapter and a sound bank of the fuzzer's tiny layout, refusals, and how much memory a call takes."""

import json
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz_targets import BASE, LAYOUT, adapter  # noqa: E402
from lorag.adapters.adapter import LoraAdapter  # noqa: E402
from lorag.bank.bank import AdapterBank  # noqa: E402
from lorag.errors import LoragError  # noqa: E402
from lorag.files.artifacts import read_json, write_json  # noqa: E402

MOST = 64 * 2**20  # bytes that a refused file may cost


class Folder:
    """An adapter folder that can be spoiled."""

    def __init__(self, path):
        self.path = path
        self.config, self.weights = path / "adapter_config.json", path / "adapter_model.safetensors"

    def read(self):
        """Reads it as an import does."""
        return LoraAdapter.from_pretrained(self.path, LAYOUT)

    def configure(self, **changes):
        """Changes settings; None of a value is null, and absent ones are added."""
        write_json(self.config, {**read_json(self.config), **changes})

    def tensors(self, change):
        """Rewrites the weights with what `change` makes of them."""
        save_file(change(load_file(self.weights)), self.weights)

    def header(self, change):
        """Rewrites the header alone; the data stay."""
        raw = self.weights.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = change(json.loads(raw[8 : 8 + length]))
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.weights.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


@pytest.fixture
def folder(tmp_path):
    """A sound adapter folder."""
    adapter(0).save_pretrained(tmp_path / "adapter")
    found = Folder(tmp_path / "adapter")
    found.read()
    return found


@pytest.fixture
def bank(tmp_path):
    """A sound bank of two experts."""
    return AdapterBank.create(tmp_path / "bank", BASE).add([(f"task-{i}", ["a task"], [adapter(i)]) for i in range(2)])


def _memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


@contextmanager
def _measured():
    """Bytes by which the resident memory of this process grew at its highest; where the system does not say, nothing is measured."""
    grown = []
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what there is now
        before = _memory("VmRSS")
    except OSError:
        before = None
    yield grown
    grown.append(0 if before is None else _memory("VmHWM") - before)


@pytest.fixture
def refused():
    """Calls something that must end in a LoragError of a kind, on one line, for less than 64 MiB."""

    def call(function, kind=LoragError, match=None):
        with _measured() as grown, pytest.raises(kind, match=match) as caught:
            function()
        assert grown[0] < MOST, f"{grown[0] / 2**20:.0f} MiB were allocated before it was refused"
        text = str(caught.value)
        assert text.isprintable() and len(text) < 2000
        return text

    return call
