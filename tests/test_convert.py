"""Generators of the format before today's: refused with the command that converts them, and the same adapters afterwards."""

import json
import re

import pytest
import torch
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base
from typer.testing import CliRunner

from lorag.cli import main as cli
from lorag.errors import ConfigError, FormatVersionError, GeneratorError, StorageError
from lorag.files.artifacts import GENERATOR_FORMAT, read_json, write_manifest
from lorag.files.tensors import load_tensors, save_tensors
from lorag.generator.convert import convert_generator
from lorag.methods import method_type
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

READER = {"width": 16, "queries": 2, "hidden": 16, "layers": 1, "heads": 2}
STAGES = {"kernel_steps": 0, "steps": 2, "functional": {"steps": 0}, "ensemble": {"count": 2, "steps": 2}}
CASES = {
    "house": ("house", {**READER, **STAGES}),
    "house with a kernel": ("house", {**READER, **STAGES, "kernel_steps": 2}),
    "house with a shared decoder": ("house", {**READER, **STAGES, "decoder": "shared", "decoder_width": 8}),
    "attention": ("attention", {"view": 8, "functional": {"steps": 0}}),
    "mlp": ("mlp", {"steps": 1, "width": 8}),
    "hypernet": ("hypernet", {"steps": 1, "width": 8, "depth": 1, "module_width": 4}),
    "kernel": ("kernel", {"steps": 1, "width": 16, "queries": 2, "features": 8, "groups": 2}),
    "icm_lora": ("icm_lora", {"steps": 1, "width": 16, "queries": 2, "latent": 4, "kernel": {"steps": 1, "width": 16, "features": 6}}),
    "sg_lora": ("sg_lora", {"steps": 1, "width": 8, "latent": 4, "reading": 16, "queries": 2, "features": 8}),
    "sg_lora of the merge alone": ("sg_lora", {"steps": 1, "width": 8, "latent": 4, "condition": "merge"}),
    "icm_fusion": ("icm_fusion", {"steps": 1, "meta_steps": 0, "sets": {"steps": 0}, "width": 8, "latent": 4, "temperature": 0.1}),
    "top_k": ("top_k", {}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_models, tokenizer):
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING[:8])
    return prepare_toy(bank, RunTasks(make_suite(TRAINING[:8])), SplitRule(validation=0.25))


def _as_it_was(method, tensors, shape, settings):
    """What lorag 0.1.0 wrote for a method, by the names that it used."""
    settings = dict(settings)
    sizes = {
        "house": ("embedding", "code"),
        "attention": ("embedding", "code"),
        "mlp": ("embedding", "code"),
        "icm_lora": ("embedding", "vector", "elements"),
        "icm_fusion": ("elements", "vector"),
    }.get(method)
    if method in ("mlp", "hypernet", "house", "attention"):
        tensors = {name.removeprefix("network."): value for name, value in tensors.items()}
    if sizes:
        tensors["sizes"] = torch.tensor([shape[name] for name in sizes])
    if method == "hypernet":
        tensors |= {"sizes": torch.tensor([shape["embedding"], sum(shape["parts"])]), "parts": torch.tensor(shape["parts"])}
    if method == "kernel":
        tensors["embedding"] = torch.tensor(shape["embedding"])
    if method == "sg_lora":
        own = [shape["merge"], *([shape["embedding"]] if shape["embedding"] else []), shape["elements"]]
        tensors = {name.replace("network.prior_network.", "network.beliefs."): value for name, value in tensors.items()}
        tensors["sizes"] = torch.tensor(own)
    if method == "icm_fusion":
        settings |= {"sharpness": settings["temperature"], "temperature": settings.pop("spread"), "second_order": False}
    if method == "attention":
        tensors = {name.replace("log_scale", "sharpness"): value for name, value in tensors.items()}
        tensors["modules"] = torch.tensor(shape["modules"])
        return "house", tensors, {**settings, "source": "experts", "colleagues": {"count": 0}}
    if method == "house":
        settings |= {"source": "description", "view": 32, "temperature": 0.2, "offset": True, "colleagues": settings.pop("ensemble")}
        settings.pop("experts")
        found = {}
        for name, value in tensors.items():
            name = re.sub(r"^readers\.0\.", "", name)
            name = re.sub(r"^readers\.(\d+)\.", lambda m: f"colleagues.{int(m[1]) - 1}.", name)
            name = re.sub(r"(blocks\.\d+\.body)\.4\.", r"\1.3.", name)
            name = {"head.experts": "head.known", "head.weights": "head.shares"}.get(name, name)
            found[name if name == "sizes" else f"reading.{name}"] = value
        tensors = found | {name: torch.tensor(shape[name]) for name in ("kinds", "depths") if name in shape}
    return method, tensors, settings


def _old(generator, folder):
    """Writes a generator as lorag 0.1.0 did."""
    generator.save_pretrained(folder)
    manifest, tensors = read_json(folder / "generator.json"), load_tensors(folder / "generator.safetensors")
    own = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
    method, own, settings = _as_it_was(manifest["method"], own, manifest.pop("shape"), manifest["settings"])
    manifest |= {"format": 2, "method": method, "settings": settings}
    manifest["origin"] = {"config": {"kin": "texts", "method": method, "settings": settings}}
    del manifest["files"]
    others = {name: value for name, value in tensors.items() if not name.startswith("method.")}
    stored = others | {f"method.{name}": value for name, value in own.items()}
    save_tensors(folder / "generator.safetensors", stored, {"lorag": json.dumps(manifest)})
    write_manifest(folder, "generator.json", manifest, ["generator.safetensors"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_converted_generator_makes_the_same_adapters(prepared, tmp_path, case):
    """Byte for byte, and its settings have today's names."""
    from lorag import LoraGenerator

    name, settings = CASES[case]
    method = method_type(name).with_settings(settings)
    generator = fit_generator(prepared, method, quiet_loop(), rank=4, strength=1.0, origin={})
    _old(generator, tmp_path / "old")
    with pytest.raises(FormatVersionError, match="lorag convert"):
        LoraGenerator.from_pretrained(tmp_path / "old", embedder=WordEmbedder())
    assert convert_generator(tmp_path / "old", tmp_path / "new") == name
    opened = LoraGenerator.from_pretrained(tmp_path / "new", embedder=WordEmbedder())
    assert opened.origin["config"]["groups"] == "texts" and opened.method.values() == generator.method.values()
    for number, text in enumerate(("paint the red dog", "something else")):
        for folder, one in (("a", generator), ("b", opened)):
            one.generate(text, seed=number, on_unknown="ignore").save_pretrained(tmp_path / folder)
        first, second = (load_tensors(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_converted_is_named(prepared, tmp_path):
    """A method that is gone, a folder in use, and tensors that do not fit: one line each, and nothing is written."""
    generator = fit_generator(
        prepared, method_type("mlp").with_settings({"steps": 1, "width": 8}), quiet_loop(), rank=4, strength=1.0, origin={}
    )
    _old(generator, tmp_path / "old")
    manifest, tensors = read_json(tmp_path / "old/generator.json"), load_tensors(tmp_path / "old/generator.safetensors")

    def write(**changes):
        save_tensors(tmp_path / "old/generator.safetensors", tensors)
        write_manifest(tmp_path / "old", "generator.json", {**manifest, **changes}, ["generator.safetensors"])

    write(method="sg_ridge")
    with pytest.raises(ConfigError, match="benchmarks.sg_controls"):
        convert_generator(tmp_path / "old", tmp_path / "new")
    write(method="house", settings={"source": "both"})
    with pytest.raises(ConfigError, match="source=both"):
        convert_generator(tmp_path / "old", tmp_path / "new")
    tensors["method.head.bias"] = tensors["method.head.bias"][1:].clone()
    write()
    with pytest.raises(GeneratorError, match="mlp"):
        convert_generator(tmp_path / "old", tmp_path / "new")
    del tensors["method.sizes"]
    write()
    with pytest.raises(GeneratorError, match="cannot be converted"):
        convert_generator(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError, match="not an empty folder"):
        convert_generator(tmp_path / "old", tmp_path)


def test_the_command(prepared, tmp_path):
    """`lorag convert` says what it wrote and what comes next."""
    _old(fit_generator(prepared, method_type("mean")(), quiet_loop(), rank=4, strength=1.0, origin={}), tmp_path / "old")
    result = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "old"), "--out", str(tmp_path / "new")])
    assert result.exit_code == 0 and "mean generator" in result.output and "next: lorag generate" in result.output
    assert read_json(tmp_path / "new/generator.json")["format"] == GENERATOR_FORMAT
