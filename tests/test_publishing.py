"""Provenance, model cards, and the way to the hub and back, through the official client and a stand-in of the hub's interface."""

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from hub_standin import TOKEN
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from toy_world import TRAINING, WordEmbedder, describe, make_bank, name_of, prepare_toy, quiet_loop, save_base

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.provenance import UNKNOWN, derive, known_licence, parents, public_name
from lorag.adapters.publishing import CARD, adapter_card, own_card
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel
from lorag.cli import info as cards
from lorag.cli import main as cli
from lorag.errors import ArtifactError, BaseModelError, StorageError
from lorag.files import hub
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.training.train import _licences, fit_generator

CELLS = TRAINING[:6]
NAMES = [name_of(*cell) for cell in CELLS]


@pytest.fixture(scope="module")
def toy(tmp_path_factory, tiny_models, tokenizer):
    """A base model in a folder, and a bank of six experts of it under mixed licences."""
    folder = tmp_path_factory.mktemp("toy")
    base = save_base(folder / "base", tiny_models["llama"], tokenizer)
    bank = make_bank(folder / "bank", base, CELLS)
    manifest = json.loads((bank.folder / "bank.json").read_text())
    for number, entry in enumerate(manifest["experts"]):
        entry["license"] = "CC BY-NC 4.0" if number == 0 else "Apache-2.0" if number % 2 else "MIT"
    (bank.folder / "bank.json").write_text(json.dumps(manifest))
    return AdapterBank.from_pretrained(bank.folder)


@pytest.fixture(scope="module")
def hosted(tmp_path_factory, toy):
    """The same bank, of a base model that is named as on the hub."""
    base = BankBase(BaseModel("toys/base-lm", "causal_lm"), "revision:main", toy.base.layout, "causal_lm", toy.base.settings)
    return make_bank(tmp_path_factory.mktemp("hosted"), base, CELLS)


@pytest.fixture(scope="module")
def fitted(toy):
    """Generators of the toy bank by method."""
    prepared = prepare_toy(toy, k=16)

    def fit(method):
        return fit_generator(prepared, method_type(method)(), quiet_loop(), rank=8, strength=1.0, origin={})

    return fit


def _front(text):
    return yaml.safe_load(text.split("---\n")[1])


def _file_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- licences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["MIT", "Apache 2.0"], "apache-2.0"),
        (["MIT", "CC BY-NC 4.0", "cc-by-4.0"], "cc-by-nc-4.0"),
        (["cc0-1.0"], "cc0-1.0"),
        (["MIT", "GPL-3.0"], "gpl-3.0"),
        (["cc-by-nc-sa-4.0", "cc-by-nc-4.0", "mit"], "cc-by-nc-sa-4.0"),
        (["llama3.1", "apache-2.0"], "llama3.1"),
    ],
)
def test_the_most_restrictive_licence_wins(given, name):
    """Of several parents the strictest, however people spell them and in whatever order."""
    assert derive(given).name == name == derive(reversed(given)).name


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "nothing states"),
        (["MIT", "unknown"], "1 of 2"),
        (["MIT", ""], "1 of 2"),
        (["MIT", None], "1 of 2"),
        (["MIT", "ask Bob"], "ask Bob"),
        (["cc-by-sa-4.0", "gpl-3.0"], "no one licence meets both"),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], "no one licence meets both"),
        (["mit", "cc-by-nd-4.0"], "allows no derivatives"),
    ],
)
def test_what_cannot_be_told_is_unknown(given, named):
    """No guess: a parent without known terms, or two that cannot be met at once, give "unknown" and the reason."""
    derived = derive(given)
    assert derived.name == UNKNOWN and named in derived.reason


def test_spellings_of_licences():
    """As data sets' cards write them."""
    for text, name in {
        "Apache License 2.0": "apache-2.0",
        "apache-2.0": "apache-2.0",
        "The MIT License": "mit",
        "CC-BY-SA 4.0": "cc-by-sa-4.0",
        "cc by nc 4.0": "cc-by-nc-4.0",
        "GPL v3.0": "gpl-3.0",
        "CC0": "cc0-1.0",
    }.items():
        assert known_licence(text) == name
    assert known_licence("proprietary") is None and known_licence(3) is None


# --- provenance ---------------------------------------------------------------------------------------------------------


def test_a_generated_adapter_says_how_it_came_about(fitted, toy, tmp_path):
    """lorag.json: description, method, revisions, embedder, seed, strength, parents with licences, norms, novelty, versions."""
    generator = fitted("ridge")
    generator.save_pretrained(tmp_path / "g")
    adapter = generator.generate("paint the red bird", seed=3, strength=1.5)
    info = json.loads((adapter.save_pretrained(tmp_path / "a") / "lorag.json").read_text())
    assert (info["kind"], info["description"], info["method"], info["seed"], info["strength"]) == (
        "adapter",
        "paint the red bird",
        "ridge",
        3,
        1.5,
    )
    assert info["generator"]["revision"].startswith("sha256:") and info["embedder"] == "words"
    base = info["base_model"]
    assert (base["name"], base["identity"], base["layout"]) == ("base", toy.base.identity, toy.base.layout.fingerprint)
    assert set(info["norms"]) == set(toy.base.layout.names) and info["norm"] > 0 and info["novelty"] == info["gate"]["novelty"]
    assert set(info["versions"]) == {"lorag", "torch", "transformers", "peft"}
    assert [parent["name"] for parent in info["parents"]] == NAMES and {parent["weight"] for parent in info["parents"]} == {None}
    assert info["license"] == "cc-by-nc-4.0"


def test_parents_of_a_mixture_have_their_weights(fitted):
    """nearest has one parent; top_k's weights are those with which it mixes ΔW, and the licence is that of these parents alone."""
    text = " ".join(describe(*CELLS[1])[0].split())
    (parent,) = fitted("nearest").generate(text).info["parents"]
    assert parent == {"name": NAMES[1], "weight": 1.0, "license": "Apache-2.0"}
    generator = fitted("top_k")
    adapter = generator.generate(text)
    weights = {parent["name"]: parent["weight"] for parent in adapter.info["parents"]}
    assert 1 < len(weights) <= 4 and sum(weights.values()) == pytest.approx(1, abs=1e-5)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    codes = generator.method.codes
    mixed = sum(weight * codes[generator.conditioner.names.index(name)] for name, weight in weights.items())
    made = generator.method.generate(generator.condition(text), torch.Generator())[0]
    assert torch.allclose(mixed, made, atol=1e-4)
    assert fitted("nearest").generate(text).info["license"] == "apache-2.0"


def test_merged_experts_are_parents(toy):
    """A fusion by any rule names its experts, their weights and licences."""
    info = toy.fuse(NAMES[1:3], "mean").info
    assert {(p["name"], p["weight"], p["license"]) for p in info["parents"]} == {(NAMES[1], 1.0, "Apache-2.0"), (NAMES[2], 1.0, "MIT")}


def test_licences_survive_the_generator_s_folder(fitted, tmp_path):
    """What the bank states of its experts is in generator.json; a generator without it has parents of unknown licence."""
    folder = fitted("ridge").save_pretrained(tmp_path)
    opened = LoraGenerator.from_pretrained(folder, embedder=WordEmbedder())
    assert opened.generate("red cat").info["license"] == "cc-by-nc-4.0"
    manifest = json.loads((folder / "generator.json").read_text())
    del manifest["licenses"]
    (folder / "generator.json").write_text(json.dumps(manifest))
    assert LoraGenerator.from_pretrained(folder, embedder=WordEmbedder()).generate("red cat").info["license"] == UNKNOWN


def test_same_seed_same_bytes_and_nothing_of_the_machine(fitted, tmp_path, toy):
    """Two runs write equal files; no time, no user and no folder but the base model's, which PEFT needs in its config."""
    first, second = (fitted("ridge").generate("red cat", seed=1).save_pretrained(tmp_path / name) for name in "ab")
    files = _file_bytes(first)
    assert files == _file_bytes(second)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "lorag.json", CARD}
    for name, data in files.items():
        assert name == "adapter_config.json" or str(tmp_path.parent).encode() not in data
        assert not re.search(rb"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", data)
    assert toy.base.model.name in json.loads(files["adapter_config.json"])["base_model_name_or_path"]


def test_names_of_folders_are_not_published(tmp_path):
    """Of a local folder only the last part; a hub id as it is."""
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("~/models/mine") == "mine" and public_name("C:\\models\\mine") != "C:\\models"
    assert public_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B" and public_name("sandbox-lm") == "sandbox-lm"


def test_parents_without_weight_are_left_out():
    """Of a mixture only those that counted, the heaviest first; a parent without a stated licence is "unknown"."""
    found = parents(["a", "b", "c"], {"a": "mit"}, [0.25, 0.0, 0.75])
    assert found == [{"name": "c", "weight": 0.75, "license": UNKNOWN}, {"name": "a", "weight": 0.25, "license": "mit"}]


# --- cards --------------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_has_a_card(fitted, tmp_path):
    """README.md: front matter that the hub reads, and the task, parents and places where it fits for people."""
    text = (fitted("top_k").generate("paint the red bird").save_pretrained(tmp_path) / CARD).read_text()
    front = _front(text)
    assert front["library_name"] == "peft" and front["base_model"] == "base" and {"lora", "lorag"} <= set(front["tags"])
    assert front["license"] in ("cc-by-nc-4.0", "apache-2.0", "mit")
    for part in ("    paint the red bird", "| expert | weight | licence |", "has not been evaluated", "vLLM: yes"):
        assert part in text


def test_an_unknown_licence_is_said_loudly(llama_layout, random_adapter, tmp_path):
    """In the front matter, at the head of the card, and where the licence is."""
    text = (random_adapter(llama_layout).save_pretrained(tmp_path) / CARD).read_text()
    assert _front(text)["license"] == "unknown"
    assert text.count("**The licence of this adapter is unknown") == 2 and text.index("unknown:") < text.index("## Use")


def test_a_description_cannot_write_the_card():
    """Neither front matter nor markup nor code of the card can come from a description, a name or a licence."""
    hostile = "x\n---\nlicense: mit\n---\n# Free!\n```\n<script>alert(1)</script> | $mark ${front}"
    info = {"description": hostile, "method": hostile, "parents": [{"name": hostile, "weight": 1.0, "license": hostile}]}
    text = adapter_card(info, base_model=f"`{hostile}`", rank=4, alpha=8.0, modules=["q_proj"])
    assert _front(text)["license"] == UNKNOWN
    assert not [line for line in text.splitlines() if line.startswith(("# Free", "```\n<", "license: mit"))]
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script>" not in outside.split("## Parents")[1]


def test_a_readme_of_one_s_own_stays(llama_layout, random_adapter, tmp_path):
    """lorag replaces its own card, and nobody else's."""
    adapter = random_adapter(llama_layout)
    adapter.save_pretrained(tmp_path)
    before = (tmp_path / CARD).read_text()
    LoraAdapter(llama_layout, adapter.factors, "other/base").save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() != before
    (tmp_path / CARD).write_text("mine")
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_the_card_that_peft_leaves_unfilled_is_replaced(tiny_models, tmp_path):
    """It says nothing, but where the base model lies on the machine that trained."""
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path))
    get_peft_model(tiny_models["llama"].build(), config).save_pretrained(tmp_path)
    assert "More Information Needed" in (tmp_path / CARD).read_text() and own_card(tmp_path) is None
    LoraAdapter.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / CARD).read_text()


# --- to the hub and back ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_and_back(standin, fitted):
    """push_to_hub, then from_pretrained("user/name"): same ΔW, provenance and card; a new repository is private."""
    adapter = fitted("nearest").generate("paint the red bird")
    address = adapter.push_to_hub("me/red-bird", base_model="toys/base-lm")
    assert address.startswith(f"{standin.address}/me/red-bird/commit/") and standin.private["me/red-bird"]
    assert set(standin.files("me/red-bird")) == {"adapter_config.json", "adapter_model.safetensors", "lorag.json", CARD}
    back = LoraAdapter.from_pretrained("me/red-bird")
    assert back.base_model == "toys/base-lm" and back.info["parents"] == adapter.info["parents"]
    assert set(back.layout.modules) == set(adapter.layout.modules) and back.layout.target_modules == adapter.layout.target_modules
    for name in adapter.layout.names:
        assert torch.equal(back.delta(name), adapter.delta(name))
    assert b"toys/base-lm" in standin.files("me/red-bird")[CARD]


@pytest.mark.slow
def test_a_folder_of_this_machine_is_not_published(standin, fitted, toy, tmp_path):
    """Adapter, bank and generator of a base model in a folder: refused before anything is sent, with the way out."""
    generator = fitted("ridge")
    for push in (generator.generate("red cat").push_to_hub, toy.push_to_hub, generator.push_to_hub):
        with pytest.raises(BaseModelError, match="folder of this machine") as caught:
            push("me/thing")
        assert str(tmp_path.parent) not in str(caught.value)
    assert not standin.log


@pytest.mark.slow
def test_a_bank_goes_to_the_hub_and_back(standin, hosted):
    """Manifest, shards and card, and nothing else that lies in the folder; every expert is the same."""
    (hosted.folder / "secrets.json").write_text("{}")
    (hosted.folder / "experts" / "draft.safetensors").write_bytes(b"unfinished")
    hosted.push_to_hub("me/bank")
    assert set(standin.files("me/bank")) == {"bank.json", CARD, *{expert.file for expert in hosted.experts}}
    back = AdapterBank.from_pretrained("me/bank")
    assert back.names == hosted.names and back.base == hosted.base
    for name in hosted.names:
        assert all(torch.equal(back.adapter(name).delta(m), hosted.adapter(name).delta(m)) for m in hosted.base.layout.names)
    assert _front(standin.files("me/bank")[CARD].decode())["license"] == UNKNOWN  # nobody stated one


@pytest.mark.slow
def test_a_generator_goes_to_the_hub_and_back(standin, hosted, tmp_path):
    """It generates the same bytes; of a training folder only the generator is published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankBase, "check", lambda self: None)  # toys/base-lm is on no hub
        made = prepare_toy(hosted, k=16)
    generator = fit_generator(made, method_type("ridge")(), quiet_loop(), rank=8, strength=1.0, origin={})
    generator.push_to_hub("me/generator")
    assert set(standin.files("me/generator")) == {"generator.json", "generator.safetensors", CARD}
    back = LoraGenerator.from_pretrained("me/generator", embedder=WordEmbedder())
    assert back.revision == generator.revision
    one, two = (which.generate("red cat", seed=2).save_pretrained(tmp_path / name) for name, which in (("a", generator), ("b", back)))
    assert _file_bytes(one) == _file_bytes(two)


@pytest.mark.slow
def test_nothing_but_named_files_is_fetched(standin, fitted, caplog):
    """Pickles, code and whole models that lie beside an adapter are not even asked for; weights of something else are named."""
    fitted("nearest").generate("red bird").push_to_hub("me/mixed", base_model="toys/base-lm")
    strange = ("adapter_model.bin", "evil.py", "model-00001-of-00099.safetensors", "experts/x.safetensors", "training_args.bin")
    standin.put("me/mixed", {name: b"\x80\x04." for name in strange})
    LoraAdapter.from_pretrained("me/mixed")
    assert standin.fetched("me/mixed") == {"adapter_config.json", "adapter_model.safetensors", "lorag.json", CARD}
    (said,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "passed over model-00001-of-00099.safetensors beside" in said and "me/mixed" in said


@pytest.mark.slow
def test_a_bank_is_started_from_hub_ids(standin, hosted, toy, tmp_path, capsys):
    """`lorag bank add user/name` fetches adapters with their description.txt, and of the base model the config alone; ΔW is the same."""
    for number, name in enumerate(NAMES[:2]):
        adapter = toy.adapter(name)
        stated = LoraAdapter(adapter.layout, adapter.factors, "toys/base-lm", "CAUSAL_LM")
        folder = stated.save_pretrained(tmp_path / name)
        files = {file: (folder / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")}
        standin.put(f"me/{name}", {**files, "description.txt": f"task {number}\n".encode(), "training_args.bin": b"\x80\x04."})
    standin.put("toys/base-lm", {"config.json": (Path(toy.base.model.name) / "config.json").read_bytes(), "model.safetensors": b"weights"})
    command = ["bank", "add", *(f"me/{name}" for name in NAMES[:2]), "--bank", str(tmp_path / "new"), "--embedder", "none"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert not stopped.value.code, capsys.readouterr()
    made = AdapterBank.from_pretrained(tmp_path / "new")
    assert made.base.model == BaseModel("toys/base-lm", "causal_lm") and set(made.base.layout.names) == set(toy.base.layout.names)
    assert [expert.name for expert in made.experts] == [f"me-{name}" for name in NAMES[:2]]
    assert [expert.descriptions for expert in made.experts] == [("task 0",), ("task 1",)]
    for name in NAMES[:2]:
        got, wanted = made.adapter(f"me-{name}"), toy.adapter(name)
        assert all(torch.equal(got.delta(module), wanted.delta(module)) for module in wanted.layout.names)
    assert "model.safetensors" not in standin.fetched("toys/base-lm")
    assert "training_args.bin" not in standin.fetched(f"me/{NAMES[0]}")


def test_tasks_without_an_expert_count_as_parents_where_they_were_learned_from(toy):
    """A method trained on their examples inherits their licence; one that only reads experts does not, nor one without functional steps."""
    task = SimpleNamespace(key="extra", license="AGPL-3.0")
    tasks = [*(SimpleNamespace(key=name, license="MIT") for name in NAMES), task]
    data = SimpleNamespace(tasks=tasks, training=range(len(tasks)))
    prepared = SimpleNamespace(bank=toy, data=data)
    own = {expert.name: expert.license for expert in toy.experts}
    assert _licences(prepared, method_type("house").with_settings({})) == {**own, "extra": "AGPL-3.0"}
    assert _licences(prepared, method_type("multitask")()) == {**own, "extra": "AGPL-3.0"}
    assert _licences(prepared, method_type("ridge")()) == own
    assert _licences(prepared, method_type("house").with_settings({"functional": {"steps": 0}})) == own
    assert {"name": "extra", "weight": None, "license": "AGPL-3.0"} in parents(NAMES, {**own, "extra": "AGPL-3.0"}, None)
    assert "extra" not in {one["name"] for one in parents(NAMES, {**own, "extra": "AGPL-3.0"}, [1.0] * len(NAMES))}


@pytest.mark.slow
def test_a_pickle_under_the_right_name_is_refused(standin, fitted):
    """What is called safetensors on the hub is judged by its bytes."""
    fitted("nearest").generate("red bird").push_to_hub("me/pickle", base_model="toys/base-lm")
    standin.put("me/pickle", {"adapter_model.safetensors": b"\x80\x04cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(ArtifactError):
        LoraAdapter.from_pretrained("me/pickle")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["../escape.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x", ".."])
def test_a_manifest_cannot_reach_out_of_its_folder(standin, hosted, path):
    """A bank from the hub whose manifest lists a path outside is refused before anything listed is fetched."""
    hosted.push_to_hub("me/hostile")
    manifest = json.loads(standin.files("me/hostile")["bank.json"])
    manifest["files"] = {path: {"bytes": 1, "sha256": "0"}}
    standin.put("me/hostile", {"bank.json": json.dumps(manifest).encode()})
    with pytest.raises(ArtifactError):
        AdapterBank.from_pretrained("me/hostile")
    assert standin.fetched("me/hostile") <= {"bank.json"}


@pytest.mark.slow
def test_a_revision_is_one_commit(standin, hosted):
    """Manifest and shards come from the same commit; an older one can be asked for by name."""
    hosted.push_to_hub("me/grown")
    old = standin.repositories["me/grown"][-1][0]
    manifest = json.loads(standin.files("me/grown")["bank.json"])
    manifest["experts"][0]["descriptions"] = ["changed"]
    standin.put("me/grown", {"bank.json": json.dumps(manifest).encode()})
    assert AdapterBank.from_pretrained("me/grown").experts[0].descriptions == ("changed",)
    assert AdapterBank.from_pretrained("me/grown", revision=old).experts[0].descriptions != ("changed",)
    with pytest.raises(ArtifactError, match="no such revision"):
        AdapterBank.from_pretrained("me/grown", revision="nowhere")


@pytest.mark.slow
def test_what_was_fetched_is_there_offline(standin, hosted, monkeypatch):
    """The second time no network is needed."""
    hosted.push_to_hub("me/cached")
    AdapterBank.from_pretrained("me/cached")
    standin.shutdown()
    standin.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(AdapterBank.from_pretrained("me/cached")) == len(hosted)
    with pytest.raises(ArtifactError, match="nothing is in the cache"):
        AdapterBank.from_pretrained("me/other")


@pytest.mark.slow
def test_errors_of_the_hub_name_the_remedy_and_no_token(standin, fitted, monkeypatch, caplog):
    """No repository, no right to write, a commit that fails: lorag's own errors, and no secret in them or in the log."""
    adapter = fitted("nearest").generate("red bird")
    with pytest.raises(ArtifactError, match="no such repository"):
        LoraAdapter.from_pretrained("me/nothing")
    standin.broken_commits = True
    with pytest.raises(StorageError, match="uploading to me/red failed"):
        adapter.push_to_hub("me/red", base_model="toys/base-lm")
    assert not standin.repositories["me/red"]
    secret = "hf_wrongwrongwrongwrong"
    monkeypatch.setenv("HF_TOKEN", secret)
    with caplog.at_level("DEBUG", "lorag"), pytest.raises(StorageError, match="hf auth login") as caught:
        adapter.push_to_hub("me/blue", base_model="toys/base-lm")
    assert "***" in str(caught.value) and secret not in caplog.text
    assert secret not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(StorageError):
        hub.push({}, "not a name", message="x")


@pytest.mark.slow
def test_a_path_is_never_looked_up_on_the_hub(standin, tmp_path):
    """A missing folder is a missing folder; so is any text that cannot be a hub id."""
    for path in (tmp_path / "a" / "b", "./x", "/x/y", "a/b/c", "a"):
        with pytest.raises(ArtifactError, match="no adapter"):
            LoraAdapter.from_pretrained(path)
    assert not standin.log


@pytest.mark.slow
def test_push_from_the_command_line(standin, fitted, hosted, tmp_path, capsys):
    """`lorag push FOLDER user/name` tells adapters, banks and generators apart, and refuses anything else."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    folder = fitted("nearest").generate("red bird").save_pretrained(tmp_path / "a")
    code, out, _ = run("push", folder, "me/one", "--base-model", "toys/base-lm", "--public")
    assert code == 0 and "me/one" in out and not standin.private["me/one"]
    assert b'"me/one"' in standin.files("me/one")[CARD]
    (folder / CARD).write_text("---\nlicense: mit\n---\nMine.\n")
    assert run("push", folder, "me/one", "--base-model", "toys/base-lm")[0] == 0
    assert standin.files("me/one")[CARD].endswith(b"Mine.\n")
    assert run("push", hosted.folder, "me/two")[0] == 0
    code, _, err = run("push", folder, "me/three")
    assert code == 1 and "--base-model" in err
    code, _, err = run("push", tmp_path, "me/three")
    assert code == 1 and "nothing that can be published" in err
    assert TOKEN not in out + err
    assert "parents" in cards.describe_path(folder) and "in vLLM" in cards.describe_path(folder)


@pytest.mark.slow
def test_stock_peft_loads_what_was_published(standin, fitted, toy, tmp_path):
    """Elsewhere: another process, with the hub's address, transformers and PEFT alone, computes what lorag computes."""
    adapter = fitted("nearest").generate("paint the red bird")
    adapter.push_to_hub("me/elsewhere", base_model="toys/base-lm")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapter.apply_to(toy.base.model.load("cpu"))(input_ids=ids).logits[0, -1, :4].tolist()
    script = (
        "import json, sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, 'me/elsewhere').eval()\n"
        "with torch.no_grad():\n"
        "    print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1, :4].tolist()))\n"
        "assert 'lorag' not in sys.modules\n"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_ENDPOINT": standin.address,
        "HF_HOME": str(tmp_path / "elsewhere"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, toy.base.model.name], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)
