"""Benchmarks run in their smallest form, and the page keeps what it is not asked to measure again."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks import machine, vae_step
from benchmarks.page import Table, read_page, write_page

ROOT = Path(__file__).resolve().parent.parent
# The others measure sizes of eight-billion-parameter models even in their quick form; their own tests hold them.
SMALL = ("rows", "base_step", "experts", "vae_step", "growth", "startup")


@pytest.fixture
def runnable(monkeypatch):
    """Benchmarks start processes of their own, which must find the package wherever the tests run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_smallest_form_gives_rows_of_one_table(name, runnable):
    """measure(quick=True) gives rows of the same columns but for gaps, and every time in them is positive."""
    rows = importlib.import_module(f"benchmarks.{name}").measure(True)
    assert rows and all(row.keys() <= rows[0].keys() | rows[-1].keys() for row in rows)
    times = [value for row in rows for key, value in row.items() if key.endswith((" ms", "seconds"))]
    assert times and all(isinstance(value, float) and value > 0 for value in times)


@pytest.mark.parametrize("name", runner.TABLES)
def test_every_benchmark_says_what_bounds_it(name):
    """The contract of the runner: a title, a docstring with more than its first line, a `measure`."""
    module = importlib.import_module(f"benchmarks.{name}")
    assert isinstance(module.TITLE, str) and callable(module.measure)
    assert len((module.__doc__ or "").strip().splitlines()) > 2


def _table(name, device, **cells):
    return Table(name, device, f"Title of {name}", "a machine", "Bounded by nothing -- or by | bars.", [cells, {"n": 2}])


def test_a_page_keeps_other_tables(tmp_path):
    """CPU and GPU tables of one benchmark live side by side; a new one replaces its own predecessor alone."""
    path, order = tmp_path / "page.md", ("a", "b")
    tables = {t.key: t for t in (_table("a", "cpu", n=1, ms=12345.678), _table("a", "cuda", n=1), _table("b", "cpu", what="x | y"))}
    write_page(path, tables, order)
    assert read_page(path) == tables
    tables["cpu", "a"] = _table("a", "cpu", n=3)
    write_page(path, tables, order)
    assert read_page(path) == tables
    text = path.read_text(encoding="utf-8")
    assert text.index("## CPU") < text.index("| x \\| y |") < text.index("## GPU") < text.index("## Longer studies")


def test_tables_are_markdown():
    """Every line has as many cells as there are columns, whatever rows lack; thousands are separated, digits rounded."""
    lines = _table("a", "cpu", n=1, ms=12345.678, words="long | text").lines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[2] == "| 1 | 12,346 | long \\| text |"


def test_the_runner_writes_and_keeps(tmp_path, monkeypatch, capsys):
    """`python -m benchmarks NAME` measures NAME, writes the page at once and leaves other tables."""
    page = tmp_path / "page.md"
    write_page(page, {("cpu", "rows"): _table("rows", "cpu", n=1)}, runner.TABLES)
    monkeypatch.setattr("benchmarks.startup.measure", lambda quick: [{"what": "nothing", "quick": str(quick)}])
    runner.main(["startup", "--quick", "--out", str(page)])
    found = read_page(page)
    assert {name for _, name in found} == {"rows", "startup"}
    assert "| nothing | True |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["startup", "--quick"])  # quick figures never reach docs/benchmarks.md


def test_a_machine_is_described_without_names():
    """Neither host, user nor folder: what is compared is the hardware."""
    import getpass
    import platform

    text = machine.describe()
    assert "cores" in text and "torch" in text
    for private in (platform.node(), getpass.getuser(), str(Path.home()), sys.prefix):
        assert not private or len(private) < 4 or private not in text


def test_medians_of_interleaved_calls():
    """One call of each is not counted, then they take turns."""
    order = []
    seconds = machine.interleaved_seconds([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3 and len(seconds) == 2 and all(value >= 0 for value in seconds)


def test_a_network_that_cannot_fit_is_estimated_and_not_run(monkeypatch):
    """Two measurements give a line; where it leaves the memory, no process is started and the row says so."""
    started = []

    def child(what, adapter):
        started.append((what, adapter.name))
        gigabytes = adapter.layout.values(adapter.rank) / 1e6 * 2 if what == "conv" else 0.3
        return {"peak": gigabytes * 1e9, "step": 1.0 if what == "conv" else 0.01, "parameters": 1e6, "generate": 0.1}

    monkeypatch.setattr(vae_step, "memory_bytes", lambda: 24e9)
    rows = vae_step.measure(False, child)
    assert [row["values"] for row in rows[::2]] == [1_929_216, 3_407_872, 20_971_520]
    assert ("conv", vae_step.ADAPTERS[2].name) not in started
    assert "does not fit" in rows[-1]["step ms"] and "42 GB" in rows[-1]["step ms"]
    assert rows[1]["time ratio"] == 100


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.stem != "vae_step"],
)
def test_a_script_explains_itself(path):
    """What can be started reads its arguments with argparse, so that --help says what it does and starts nothing.

    `vae_step` starts itself, once per network.
    """
    text = path.read_text(encoding="utf-8")
    assert 'if __name__ == "__main__"' not in text or ("argparse.ArgumentParser(" in text and "sys.argv" not in text)
