"""Fan-out on Ray: the same bytes as a local run, also where a worker is killed in the middle; and clear refusals.

Ray is started once, with two CPUs, on loopback. Items that kill their worker do so on the first attempt, which a file marks.
"""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import _TINY, word_tokenizer
from fan_out_work import always_dies, deadly, square
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, name_of, quiet_loop, save_base, true_adapter
from web_world import Picky

from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.bank.importing import ImportOptions, import_adapters
from lorag.cli import main as cli
from lorag.errors import ConfigError, DescriptionError, LoragError, MissingDependencyError, UnknownTaskError
from lorag.generator.generate import AdapterRequest, BatchSettings, open_generator, read_requests, write_adapters
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.parallel import Backend, FanOutError
from lorag.tasks.suite import TaskSuite
from lorag.training.preparation import SpaceChoice, prepare
from lorag.training.train import fit_generator

RAY = Backend("ray")
EXPERTS = ExpertConfig(target_modules=["q_proj", "v_proj"], ranks=[2, 4], group=2, steps=4, batch=2, checkpoints=2, test_limit=4)
CELLS = TRAINING[:6]


@pytest.fixture(scope="module")
def ray():
    """A local Ray of two CPUs, which the code under test finds and leaves running."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "lorag[ray]"')
    here = Path(__file__).resolve().parent
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{here.parent}:{here}"}},  # for the work that is defined here
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads as a task has: sums are rounded by their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), _TINY["llama"], word_tokenizer())


@pytest.fixture(scope="module")
def generator(tmp_path_factory, base):
    """Folder of a generator that needs no embedder to be downloaded: of MiniLM, from the package of its weights."""
    from lorag.text.embedding import SentenceEmbedder

    bank = make_bank(tmp_path_factory.mktemp("bank"), base, CELLS)
    prepared = prepare(bank, SentenceEmbedder.from_pretrained(device="cpu"), space=SpaceChoice(k=8), quiet=True)
    made = fit_generator(prepared, method_type("sg_mixture").with_settings({}), quiet_loop(), rank=4, strength=1.0, origin={})
    return made.save_pretrained(tmp_path_factory.mktemp("generator"))


def _files(folder, *but):
    """Contents of all files by path, without what only remembers and what is locked."""
    names = {".lock", "metrics.jsonl", *but}
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in names}


# --- the fan-out itself -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_item_has_one_outcome_though_a_worker_dies(ray, tmp_path):
    """12 items, ordered and as finished, one of which kills its worker: each is there once, a refusal with its words."""
    mark, right = tmp_path / "mark", list(Backend().run(square, 0, [(n, "") for n in range(12)], ordered=True))
    pids = set()
    for ordered in (True, False):
        items = [(n, str(mark) if n == 3 else "") for n in range(12)]
        found = list(RAY.run(square, os.getpid(), items, ordered=ordered))
        places = [one.place for one in found]
        assert places == list(range(12)) if ordered else sorted(places) == list(range(12))
        for one in found:
            if one.place == 7:
                assert isinstance(one.error, ConfigError) and str(one.error) == str(right[7].error)
                with pytest.raises(ConfigError, match="Take another"):
                    one.result()
            else:
                assert one.result()["square"] == right[one.place].result()["square"] and one.result()["threads"] == 1
                pids.add(one.result()["pid"])
    assert mark.exists() and os.getpid() not in pids


@pytest.mark.slow
def test_a_task_that_no_worker_survives_is_given_up_by_name(ray):
    """After its retries; and Ray goes on serving."""
    with pytest.raises(FanOutError, match="gave a task up.*goes on from there"):
        list(replace(RAY, retries=1).run(always_dies, None, [0], ordered=True))
    assert [one.result()["square"] for one in RAY.run(square, 0, [(2, "")], ordered=True)] == [4]


@pytest.mark.slow
def test_backends_that_cannot_be_used_are_refused(ray, monkeypatch):
    """Unknown names, an address for local work, more CPUs than the cluster has, no Ray at all."""
    for wrong, said in (({"name": "slurm"}, "slurm"), ({"address": "auto"}, "address"), ({"name": "ray", "cpus": 0}, "cpus")):
        with pytest.raises(ConfigError, match=said):
            Backend(**wrong)
    with pytest.raises(FanOutError, match="2 CPUs.*--cpus"):
        list(Backend("ray", cpus=64).run(square, 0, [(1, "")], ordered=True))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"lorag\[ray\]"):
        list(RAY.run(square, 0, [(1, "")], ordered=True))


@pytest.mark.slow
def test_a_ray_of_our_own_listens_on_loopback_and_is_gone_afterwards(tmp_path):
    """Started where none was asked for: in a process of its own, because one process has one Ray."""
    pytest.importorskip("ray")
    code = """
import socket, sys
from lorag.parallel import Backend
def work(shared, item):
    import psutil
    every = psutil.Process().parent().parent().children(recursive=True)
    own = [c.laddr.ip for p in every for c in p.net_connections() if c.status == "LISTEN"]
    return sorted(set(own))
(found,) = Backend("ray").run(work, None, [0], ordered=True)
import ray
print(found.result(), ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    addresses, left = done.stdout.strip().rsplit(" ", 1)
    assert left == "False" and addresses != "[]"
    assert all(one.removeprefix("::ffff:") in ("127.0.0.1", "::1") for one in ast.literal_eval(addresses))


# --- bank build -------------------------------------------------------------------------------------------------------


def _build(folder, base, suite, **more):
    return build_bank(folder, suite, base.model, "causal_lm", base.settings, EXPERTS, device="cpu", quiet=True, **more)


@pytest.mark.slow
def test_a_bank_built_on_ray_is_the_local_one(ray, base, tmp_path):
    """Three groups of two ranks, one of whose workers is killed: manifest and shards, byte for byte."""
    suite = make_suite(CELLS, train=4, test=2)
    _build(tmp_path / "local", base, suite)
    mark = tmp_path / "mark"
    killing = TaskSuite([deadly(task, mark) if n == 2 else task for n, task in enumerate(suite)])
    bank = _build(tmp_path / "ray", base, killing, backend=RAY)
    assert mark.exists() and len(bank) == len(CELLS)
    assert _files(tmp_path / "ray") == _files(tmp_path / "local")
    lines = [(tmp_path / where / "metrics.jsonl").read_text().splitlines() for where in ("local", "ray")]
    assert len(lines[0]) == len(lines[1]) > 0


@pytest.mark.slow
def test_what_was_built_here_is_finished_on_ray_in_its_order(ray, base, tmp_path):
    """A bank whose first group is missing gets it on Ray, in the place that a local run gives it."""
    suite = make_suite(CELLS, train=4, test=2)
    whole = _build(tmp_path / "local", base, suite)
    part = _build(tmp_path / "part", base, suite)
    part.remove(whole.names[:2])
    assert _build(tmp_path / "part", base, suite, backend=RAY).names == whole.names
    assert _files(tmp_path / "part") == _files(tmp_path / "local")


# --- bank add ---------------------------------------------------------------------------------------------------------


def _import(bank, sources, **more):
    return list(import_adapters(bank.folder, sources, ImportOptions(), embedder=WordEmbedder(), **more))


@pytest.mark.slow
def test_a_bank_filled_on_ray_is_the_local_one(ray, base, tmp_path):
    """Ten adapters, of which one is broken, one undescribed, one far too large, one given twice, and one kills its worker: the
    same words on each, in their order, and the same files."""
    for number, cell in enumerate(TRAINING[:10]):
        adapter = true_adapter(base.layout, *cell)
        if number == 7:
            adapter = adapter.scaled(100.0)
        adapter.save_pretrained(tmp_path / "in" / f"t{number}")
        (tmp_path / "in" / f"t{number}" / "README.md").unlink()
        if number != 4:
            (tmp_path / "in" / f"t{number}" / "description.txt").write_text(f"paint {name_of(*cell)} at once\n")
    (tmp_path / "in" / "t2" / "adapter_model.safetensors").write_bytes(b"broken")
    sources = find_sources([str(tmp_path / "in")])
    sources.append(sources[0])
    banks = [AdapterBank.create(tmp_path / where, base) for where in ("local", "ray")]
    local = _import(banks[0], sources)
    mark = tmp_path / "mark"
    found = _import(banks[1], [deadly(one, mark) if n == 5 else one for n, one in enumerate(sources)], backend=RAY)
    assert mark.exists()
    said = [[(one.name, type(one.error), str(one.error), replace(one, error=None)) for one in done] for done in (local, found)]
    assert said[0] == said[1]
    assert sum(one.error is None for one in found) == 7 and any("already has an expert" in str(one.error) for one in found)
    assert [one.existed for one in _import(banks[1], sources[:1], backend=RAY)] == [True]
    assert _files(tmp_path / "ray") == _files(tmp_path / "local")


# --- generate --descriptions ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_of_a_batch_are_those_made_alone(ray, generator, tmp_path):
    """Four descriptions, here, on Ray with a killed worker, and one by one: the same bytes. Made once, they are kept."""
    texts = ["paint the red dog", "blue fish please", "pink cat", "something else entirely"]
    wanted = [AdapterRequest(f"a{number}", text) for number, text in enumerate(texts)]
    settings = BatchSettings(str(generator), seed=3)
    assert [one.error for one in write_adapters(wanted, tmp_path / "local", settings)] == [None] * 4
    mark = tmp_path / "mark"
    killing = [deadly(one, mark) if n == 1 else one for n, one in enumerate(wanted)]
    found = list(write_adapters(killing, tmp_path / "ray", settings, backend=RAY))
    assert mark.exists() and {one.request.name for one in found} == {"a0", "a1", "a2", "a3"}
    assert not any(one.error or one.existed for one in found)
    opened = LoraGenerator.from_pretrained(generator, device="cpu")
    for one in wanted:
        opened.generate(one.description, seed=3, on_unknown="ignore").save_pretrained(tmp_path / "alone" / one.name)
    local = _files(tmp_path / "local")
    assert _files(tmp_path / "ray") == local
    weights = "adapter_model.safetensors"
    assert all(local[f"a{n}/{weights}"] == (tmp_path / "alone" / f"a{n}" / weights).read_bytes() for n in range(4))
    assert all(one.existed for one in write_adapters(wanted, tmp_path / "local", settings))
    (other,) = write_adapters(wanted[:1], tmp_path / "local", replace(settings, seed=4))
    assert isinstance(other.error, LoragError) and "holds another adapter" in str(other.error)
    assert _files(tmp_path / "local") == local


def test_descriptions_of_a_batch_are_decoded_together(generator, tmp_path, monkeypatch):
    """Here, four descriptions take one decoding, and the one that is refused stops none of the others; another rank is another adapter."""
    decoded = []
    opened = open_generator(str(generator))
    decode = type(opened.space).decode
    monkeypatch.setattr(type(opened.space), "decode", lambda space, codes, rank: decoded.append(len(codes)) or decode(space, codes, rank))

    monkeypatch.setattr(opened, "gate", Picky())
    texts = ("paint the red dog", "weld with a robot", "blue fish", "green cat")
    requests = [AdapterRequest(f"a{number}", text) for number, text in enumerate(texts)]
    settings = BatchSettings(str(generator), rank=3, on_unknown="raise")
    results = {one.request.name: one for one in write_adapters(requests, tmp_path, settings)}
    assert decoded == [3] and isinstance(results["a1"].error, UnknownTaskError) and not (tmp_path / "a1").exists()
    assert [results[name].info["rank"] for name in ("a0", "a2", "a3")] == [3, 3, 3]
    (other,) = write_adapters(requests[:1], tmp_path, BatchSettings(str(generator), rank=2))
    assert "holds another adapter" in str(other.error)


def test_descriptions_are_read_from_lines_and_json_lines(tmp_path):
    """Names from words, or given; empty lines passed over; the line of what cannot be read is named."""
    file = tmp_path / "descriptions.txt"
    file.write_text('summarise legal text\n\n{"name": "mine", "description": "count  the dates"}\n')
    first, second = read_requests(file)
    assert first.name.startswith("summarise-legal-text-") and first.description == "summarise legal text"
    assert second == AdapterRequest("mine", "count  the dates")
    for text, said in (("a\na\n", "line 2.*twice"), ('{"text": "a"}', "line 1"), ("\n", "no description"), ("x " * 4000, "line 1.*long")):
        file.write_text(text)
        with pytest.raises(DescriptionError, match=said):
            read_requests(file)


@pytest.mark.slow
def test_the_command_generates_a_folder_for_each_line(generator, tmp_path, capsys):
    """`lorag generate --descriptions FILE`, here: a line each, exit code 0; again: kept; and wrong usage exits with 2."""
    file = tmp_path / "descriptions.txt"
    file.write_text("paint the red dog\nblue fish please\n")
    line = ["generate", "--descriptions", str(file), "--generator", str(generator), "--out", str(tmp_path / "out")]
    for said in ("generated", "kept"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(line)
        out = capsys.readouterr().out
        assert not stopped.value.code and out.count(said) == 2 and "2/2" in out and "next: lorag info" in out
    assert len(list((tmp_path / "out").glob("*/adapter_config.json"))) == 2
    for wrong in ([*line, "a description"], ["generate", "--out", "x"], ["generate", "text", "--out", "x", "--backend", "ray"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2
