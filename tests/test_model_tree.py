"""`bank add --hub-base`: what the hub lists for a base model, looked at first, then added, within limits, and gone on with."""

import pytest
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from toy_world import describe, name_of, save_base, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.bank.bank import AdapterBank
from lorag.bank.model_tree import chosen, survey, survey_lines
from lorag.errors import ArtifactError, BankError

pytestmark = pytest.mark.slow

BASE = "toys/base-lm"
TAG = f"base_model:adapter:{BASE}"
CELLS = (("red", "cat"), ("blue", "fish"), ("pink", "dog"))


@pytest.fixture
def tree(standin, tmp_path, tiny_models, tokenizer):
    """A base model on the hub, three good adapters of it, and others as people publish them."""
    base = save_base(tmp_path / "base", tiny_models["llama"], tokenizer)
    standin.put(BASE, {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    files = {}
    for number, cell in enumerate(CELLS):
        made = true_adapter(base.layout, *cell)
        folder = LoraAdapter(made.layout, made.factors, BASE, "CAUSAL_LM").save_pretrained(tmp_path / name_of(*cell))
        (folder / "README.md").write_text(f"---\nlicense: {'mit' if number else 'apache-2.0'}\n---\n# x\n\n{describe(*cell)[0]}, always.\n")
        files[number] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lorag.json"}
        standin.put(f"me/{name_of(*cell)}", files[number])
    bare = {name: data for name, data in files[0].items() if name != "README.md"}
    standin.put("me/undescribed", bare)
    standin.put("me/pickled", {"adapter_config.json": files[0]["adapter_config.json"], "adapter_model.bin": b"\x80\x04"})
    standin.put("me/broken", files[0] | {"adapter_config.json": b"{"})
    standin.put("me/large", files[0] | {"README.md": b"a" * (4 * 2**20 + 1)})
    standin.put("me/another", files[0])
    names = [name for name in standin.repositories if name not in (BASE, "me/another")]
    standin.tags = {name: [TAG] for name in names}
    return standin


def test_a_survey_fetches_no_weights(tree):
    """Sizes, ranks, licences and descriptions, and of others why not; the tree alone is listed, up to a limit."""
    listed = {one.repository: one for one in survey(BASE)}
    assert set(listed) == set(tree.tags) and not any("adapter_model.safetensors" in tree.fetched(name) for name in listed)
    good = [f"me/{name_of(*cell)}" for cell in CELLS]
    assert [one.repository for one in listed.values() if one.problem is None] == good
    assert listed[good[0]].licence == "apache-2.0" and listed[good[0]].rank and "paint the red cat" in listed[good[0]].description
    assert listed[good[0]].size == len(tree.files(good[0])["adapter_model.safetensors"])
    assert "what it is for" in listed["me/undescribed"].problem and "no adapter_model" in listed["me/pickled"].problem
    assert "too large" in listed["me/large"].problem and listed["me/broken"].rank is None
    lines = survey_lines(list(listed.values()))
    assert lines[0].startswith("7 adapters are listed; 3 can be added: ") and "mit (2)" in lines[3]
    assert len(survey(BASE, limit=2)) == 2
    size = listed[good[0]].size
    assert [source.place for source in chosen(list(listed.values()), 2 * size)] == good[:2]


def test_a_dry_run_comes_first_and_the_same_command_goes_on(tree, lorag, tmp_path):
    """Nothing is added without --yes; with it what fits; run again, the rest."""
    bank = tmp_path / "bank"
    code, out, err = lorag("bank", "add", "--bank", bank, "--hub-base", BASE, "--quiet", "--embedder", "none")
    assert code == 0 and "3 can be added" in out and "nothing was fetched or added" in out and not bank.exists(), err
    size = len(tree.files("me/red-cat")["adapter_model.safetensors"])
    more = ("--quiet", "--embedder", "none", "--any-norm", "--yes")
    code, out, err = lorag("bank", "add", "--bank", bank, "--hub-base", BASE, "--max-bytes", size + 1, *more)
    assert code == 0 and "the first 1 of them within --max-bytes" in out, err
    assert AdapterBank.from_pretrained(bank).names == ("me-red-cat",)
    code, out, err = lorag("bank", "add", "--bank", bank, "--hub-base", BASE, *more)
    assert code == 0 and "skipped me-red-cat" in out, err
    assert set(AdapterBank.from_pretrained(bank).names) == {"me-red-cat", "me-blue-fish", "me-pink-dog"}


def test_adapters_in_other_formats_are_listed_and_added(tree, lorag, tmp_path, monkeypatch):
    """A GGUF file alone in its repository, and an MLX folder; two GGUF files leave open which it is."""
    monkeypatch.setenv("LORAG_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / "red-cat"
    for option, name in (("gguf", "cat.gguf"), ("mlx", "cat-mlx")):
        code, _, err = lorag("export", plain, f"--{option}", "--out", tmp_path / name)
        assert code == 0, err
    card = b"---\nlicense: mit\n---\nPaints red cats for me.\n"
    file = (tmp_path / "cat.gguf").read_bytes()
    tree.put("me/gguf", {"cat.gguf": file, "README.md": card})
    tree.put("me/mlx", {path.name: path.read_bytes() for path in (tmp_path / "cat-mlx").iterdir()} | {"README.md": card})
    tree.put("me/twice", {"a.gguf": file, "b.gguf": file, "README.md": card})
    tree.tags = {name: [TAG] for name in ("me/gguf", "me/mlx", "me/twice")}
    listed = {one.repository: one for one in survey(BASE)}
    assert listed["me/gguf"].size == len(file) and listed["me/gguf"].description == "Paints red cats for me."
    assert "paint the red cat" in listed["me/mlx"].description
    assert "no adapter_model" in listed["me/twice"].problem
    add = ("bank", "add", "--bank", tmp_path / "bank", "--hub-base", BASE, "--quiet", "--embedder", "none", "--yes")
    code, out, err = lorag(*add)
    assert code == 0, (out, err)
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert set(bank.names) == {"me-gguf", "me-mlx"} and bank["me-gguf"].license == "apache-2.0"  # the file says it itself


def test_what_cannot_be_looked_up_gets_one_line(tree, lorag, tmp_path, monkeypatch):
    """A folder for an id, a base model without adapters, a hub out of reach."""
    for name in ("./folder", "a/b/c", "../x", "base"):
        with pytest.raises(BankError, match="hub id"):
            survey(name)
    code, _, err = lorag("bank", "add", "--bank", tmp_path / "b", "--hub-base", "nobody/nothing")
    assert code == 1 and len(err.splitlines()) == 1 and "can be added" in err
    tree.repositories.pop("me/pink-dog")  # listed, and gone or closed meanwhile
    assert survey(BASE) and all(one.problem for one in survey(BASE) if one.repository == "me/pink-dog")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="cannot be listed"):
        survey(BASE)
