"""Recipes: on a machine with the hub nothing but the download is new. Each runs to a generated adapter, its base two layers deep."""

import json
import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS
from huggingface_hub.utils import validate_repo_id
from tiny_bases import picture, save_tiny, words_tokenizer
from toy_world import WordEmbedder, use_words
from transformers import CLIPConfig, CLIPModel, Florence2Config, Florence2ForConditionalGeneration

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.sources import listed_sources
from lorag.bank.bank import AdapterBank
from lorag.bank.build import BankConfig
from lorag.bank.new_bank import NewBank
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.objectives import make_objective
from lorag.base.row_adapters import RowAdapters
from lorag.cli import main as cli
from lorag.config import load_config, recipe_names
from lorag.errors import BankError, ConfigError, TaskError
from lorag.generator.lora_generator import LoraGenerator
from lorag.tasks.coco import import_coco
from lorag.tasks.natural_instructions import Limits, import_instructions
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.training.train import TrainConfig

RECIPES = {  # name -> architecture
    "clip-vit-b16-retrieval": "clip",
    "flan-t5-large-lorahub": "t5",
    "florence-2-detection": "florence2",
    "gemma-2-2b-sni": "gemma2",
    "llama-3.1-8b-own-adapters": "llama",
    "mistral-7b-lots-of-loras": "mistral",
    "qwen2.5-0.5b-sni": "qwen2",
}
PARTS = {"add": NewBank, "build": BankConfig, "train": TrainConfig}
FEW = ["settings.steps=2", "k=8", "embedder=words", "device=cpu", "dtype=float32", "--quiet"]
HOUSE = ["settings.kernel_steps=2", "settings.ensemble={count: 1, steps: 2}"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the tiny bases by architecture, each made once."""
    made = {}

    def base(architecture):
        if architecture not in made:
            made[architecture] = save_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return base


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Descriptions are embedded word by word: the tests' embedder takes no time to load."""
    use_words(monkeypatch)


@pytest.fixture
def lorag(capsys):
    """Runs a command, which must succeed, and returns what it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return out

    return run


# --- the files ----------------------------------------------------------------------------------------------------------


def test_every_recipe_is_known_documented_and_has_a_test():
    """A recipe that ships is in this file's table and in docs/recipes.md."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe_names() == sorted(RECIPES)
    assert all(f"recipes/{name}" in text for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_load_and_name_what_the_hub_can_have(name):
    """Each part fits its command's settings under both names, ids are possible ones, and what is built is what is trained on."""
    whole = yaml.safe_load(_text(name))
    assert _text(name).startswith("# ") and set(whole) <= set(PARTS) and "train" in whole
    loaded = {part: load_config(schema, f"recipes/{name}", [], part) for part, schema in PARTS.items() if part in whole}
    assert loaded["train"] == load_config(TrainConfig, name, [], "train")
    first = loaded.get("build") or loaded["add"]
    validate_repo_id(first.base)
    assert first.base.count("/") == 1
    if "build" in loaded:
        assert (loaded["build"].out, loaded["build"].tasks) == (loaded["train"].bank, loaded["train"].tasks)
        assert loaded["build"].split == "train" and loaded["train"].rank == loaded["build"].experts.ranks[0]
    missing = ({"add", "build"} - set(whole)).pop()
    with pytest.raises(ConfigError, match=missing):
        load_config(PARTS[missing], name, [], missing)


def _text(name):
    return resources.files("lorag").joinpath("configs", "recipes", f"{name}.yaml").read_text(encoding="utf-8")


def test_a_copy_of_a_recipe_is_one_too(tmp_path):
    """A person's own file with the same parts works as the shipped one does."""
    (tmp_path / "mine.yaml").write_text("train: {bank: b, method: ridge}\nadd: {base: me/base}\n")
    assert load_config(TrainConfig, str(tmp_path / "mine.yaml"), ["k=3"], "train").method == "ridge"
    assert load_config(NewBank, str(tmp_path / "mine.yaml"), [], "add").base == "me/base"


@pytest.mark.slow
def test_florence_adapters_have_the_published_size():
    """Rank 8 on the recipe's modules of Florence-2-base is 1,929,928 values, as ICM-LoRA's adapters."""
    targets = load_config(BankConfig, "florence-2-detection", [], "build").experts.target_modules
    text = {"model_type": "bart", "vocab_size": 51289, "d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    text |= {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(Florence2Config(text_config=text, vision_config={"projection_dim": 768}))
    assert LoraLayout.from_model(model, targets).values(8) == 1_929_928


def test_clip_adapters_are_of_the_vision_tower():
    """Rank 2 on q, k and v of ViT-B/16: 36 modules of 768 x 768, none of the text tower."""
    targets = load_config(BankConfig, "clip-vit-b16-retrieval", [], "build").experts.target_modules
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
    layout = LoraLayout.from_model(model, targets)
    assert len(layout) == 36 and layout.values(2) == 36 * 2 * (768 + 768)
    assert all(name.startswith("vision_model.") for name in layout.names)


# --- Super-NaturalInstructions ------------------------------------------------------------------------------------------


def _instructions(folder, count=4, examples=16):
    """Made-up task files in the format of Super-NaturalInstructions; two of them share a source."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rows = [
            {
                "id": f"{place}",
                "input": f" {' '.join(WORDS[(place + i * (number + 2)) % 20] for i in range(5))} {place}",
                "output": [WORDS[number]],
            }
            for place in range(examples)
        ]
        task = {
            "Contributors": ["nobody"],
            "Source": [f"source {min(number, 2)}"],
            "Categories": ["Testing"],
            "Definition": [f"Answer with the {WORDS[2 + number]}\n {WORDS[5 + number % 2]}."],
            "Input_language": ["English"],
            "Output_language": ["English"],
            "Positive Examples": [],
            "Instances": rows,
            "Instance License": ["MIT"],
        }
        (folder / f"task{number:03}_answer_{WORDS[number]}.json").write_text(json.dumps(task))
    return folder


def test_instructions_become_a_suite(tmp_path):
    """Definitions describe and stay out of inputs; the split of examples and of tasks is that of the seed; sources stay together."""
    source = _instructions(tmp_path / "sni")
    counts = import_instructions(source, tmp_path / "suite", Limits(train=8, test=3), held_out=0.5, seed=1)
    suite = TaskSuite.from_folder(tmp_path / "suite")
    splits = json.loads((tmp_path / "suite" / "splits.json").read_text())
    assert counts == {"train": len(splits["train"]), "test": len(splits["test"]), "skipped": 0} and counts["test"]
    task = suite["task001_answer_a"]
    assert task.descriptions == ("Answer with the green dog.",) and task.license == "MIT" and task.source == "source 1"
    assert (len(task.split("train")), len(task.split("test"))) == (8, 3)
    assert all(example.input == example.input.strip() and "Answer" not in example.input for example in task.examples)
    third = {"task002_answer_red", "task003_answer_green"}
    assert third <= set(splits["train"]) or third <= set(splits["test"])
    import_instructions(source, tmp_path / "again", Limits(train=8, test=3), held_out=0.5, seed=1)
    for name in ("tasks.jsonl", "examples.jsonl.gz", "splits.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "suite" / name).read_bytes()


def test_what_of_instructions_is_left_out(tmp_path):
    """Other languages, long and repeated examples, tasks without a definition; and broken files are named."""
    source = _instructions(tmp_path / "sni")
    files = sorted(source.glob("*.json"))
    french = json.loads(files[0].read_text()) | {"Input_language": ["French"]}
    files[0].write_text(json.dumps(french))
    endless = json.loads(files[1].read_text()) | {"Definition": ["word " * 2000]}
    files[1].write_text(json.dumps(endless))
    odd = json.loads(files[2].read_text())
    odd["Instances"] = [*odd["Instances"], odd["Instances"][0], {"input": "long " * 2000, "output": "a"}, {"input": "none", "output": []}]
    files[2].write_text(json.dumps(odd))
    (tmp_path / "held.txt").write_text("task003_answer_green\nno such task\n")
    counts = import_instructions(source, tmp_path / "suite", test_tasks=tmp_path / "held.txt")
    assert counts == {"train": 1, "test": 1, "skipped": 2}
    assert len(TaskSuite.from_folder(tmp_path / "suite")["task002_answer_red"].examples) == 16
    assert import_instructions(source, tmp_path / "all", Limits(language="all"))["skipped"] == 1
    files[3].write_text('{"Definition": ["do it"], "Instances": [{"input": 3}]}')
    with pytest.raises(TaskError, match="task003"):
        import_instructions(source, tmp_path / "broken")
    with pytest.raises(TaskError, match="0 JSON files"):
        import_instructions(tmp_path, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-0.5b-sni", "gemma-2-2b-sni"])
def test_instructions_to_a_generator(name, bases, lorag, tmp_path):
    """Task files, suite, experts, generator with functional steps, ladder, adapter: by the commands of docs/recipes.md."""
    base, suite, bank, made = bases(RECIPES[name]), tmp_path / "suite", tmp_path / "bank", tmp_path / "generator"
    lorag("tasks", "import", _instructions(tmp_path / "sni", 6, 12), "--out", suite, "--held-out", 0.2)
    few = ["experts.steps=2", "experts.batch=2", "experts.test_limit=2", "device=cpu", "dtype=float32", "--quiet"]
    lorag("bank", "build", "--config", f"recipes/{name}", f"base={base}", f"tasks={suite}", f"out={bank}", *few)
    few = [*FEW, *HOUSE, "settings.functional={steps: 2, tasks: 2, examples: 1, validate_every: 2}", "validation=0.4"]
    few += ["strength=1.0"] if "gemma" in name else []  # one of the two looks for it
    lorag("train", "--config", f"recipes/{name}", f"bank={bank}", f"tasks={suite}", f"out={made}", *few)
    table = lorag("evaluate", "--generator", made, "--bank", bank, "--tasks", suite, "--methods", "base,house", "--seeds", 1, "--quiet")
    assert re.search(r"^house +[01]\.\d+", table, re.M)
    _use(made, bank, lorag, tmp_path)
    template = AdapterBank.from_pretrained(bank).base.settings["template"]
    assert template == yaml.safe_load(_text(name))["build"]["objective_settings"]["template"]


def _use(made, bank, lorag, tmp_path):
    """Generates an adapter and runs it in the base model, through PEFT."""
    lorag("generate", "the red dog", "--generator", made, "--out", tmp_path / "adapter", "--on-unknown", "ignore")
    base = AdapterBank.from_pretrained(bank).base
    adapter = LoraAdapter.from_pretrained(tmp_path / "adapter", base.layout)
    assert adapter.rank == LoraGenerator.from_pretrained(made, embedder=WordEmbedder(), device="cpu").rank
    wrapped = adapter.apply_to(base.model.load("cpu"))
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == len(base.layout)
    return adapter


# --- from hub ids -------------------------------------------------------------------------------------------------------


def _publish(standin, name, folder):
    standin.put(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()})


def _adapters(base, kind, targets, names, folder, random_adapter, base_name):
    """PEFT folders, one a name, of random adapters of a base."""
    model = BaseModel(str(base), kind).load("cpu")
    layout = LoraLayout.from_model(model, targets)
    for seed, name in enumerate(names):
        adapter = random_adapter(layout, rank=16 if seed % 2 else 4, alpha=32.0, seed=seed)
        LoraAdapter(layout, adapter.factors, base_name, {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM"}[kind]).save_pretrained(
            folder / name
        )
        for extra in ("README.md", "lorag.json"):  # as somebody else's adapter, which says little of itself
            (folder / name / extra).unlink(missing_ok=True)
    return folder


HUB = {
    "mistral-7b-lots-of-loras": (["q_proj", "k_proj", "v_proj"], "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task{}"),
    "flan-t5-large-lorahub": (["q", "v"], "lorahub/flan_t5_large-task_{}_Is_it"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_ids_to_a_generator(name, standin, bases, lorag, tmp_path, random_adapter):
    """Base and adapters come from the hub under the very ids of the recipe; no expert is trained, and no pickle is fetched."""
    start, (targets, pattern) = load_config(NewBank, name, [], "add"), HUB[name]
    folder = bases(RECIPES[name])
    _publish(standin, start.base, folder)
    adapters = _adapters(folder, start.kind, targets, [str(n) for n in range(4)], tmp_path / "adapters", random_adapter, start.base)
    lines = ["# id, name, description"]
    for number in range(4):
        _publish(standin, pattern.format(number), adapters / str(number))
        standin.put(pattern.format(number), {"adapter_model.bin": b"\x80\x04 never fetched"})
        lines.append(f"{pattern.format(number)}\ttask{number:03}_made_up\tfind the {WORDS[2 + number]} {WORDS[5 + number % 2]}")
    (tmp_path / "ids.tsv").write_text("\n".join(lines))
    bank, made = tmp_path / "bank", tmp_path / "generator"
    out = lorag(
        "bank", "add", "--config", f"recipes/{name}", "--from", tmp_path / "ids.tsv", "--bank", bank, "--embedder", "none", "--quiet"
    )
    assert out.count("described by the list") == 4
    opened = AdapterBank.from_pretrained(bank)
    assert sorted(opened.names) == [f"task{number:03}_made_up" for number in range(4)]
    assert (opened.base.model.name, opened.base.settings["template"]) == (start.base, start.settings["template"])
    lorag("train", "--config", f"recipes/{name}", f"bank={bank}", f"out={made}", "validation=0.25", *FEW, *HOUSE)
    assert "model.safetensors" not in standin.fetched(start.base)  # its config says what adapters may change
    assert not any(path.endswith(".bin") for _, path in standin.log if "/resolve/" in path)
    _use(made, bank, lorag, tmp_path)


@pytest.mark.slow
def test_own_adapters_to_a_generator(bases, lorag, tmp_path, random_adapter):
    """A folder of PEFT folders with a description.txt each; the base is a folder, and the recipe's id its other name."""
    name = "llama-3.1-8b-own-adapters"
    base, known = bases("llama"), load_config(NewBank, name, [], "add").base
    names = [f"own-{n}" for n in range(5)]
    adapters = _adapters(base, "causal_lm", ["q_proj", "v_proj", "down_proj"], names, tmp_path / "adapters", random_adapter, known)
    for number, one in enumerate(names):
        (adapters / one / "description.txt").write_text(f"find the {WORDS[2 + number]} {WORDS[5]}")
    bank, made = tmp_path / "bank", tmp_path / "generator"
    options = ["--base", base, "--base-alias", known, "--embedder", "none", "--quiet"]
    lorag("bank", "add", adapters, "--config", f"recipes/{name}", "--bank", bank, *options)
    lorag("train", "--config", f"recipes/{name}", f"bank={bank}", f"out={made}", *[one for one in FEW if "settings" not in one])
    assert _use(made, bank, lorag, tmp_path).base_model == str(base)


def test_lists_of_ids(tmp_path):
    """Name and description are optional; a line that cannot be used is named before anything is fetched."""
    path = tmp_path / "ids.tsv"
    path.write_text("# mine\n\nme/one\nme/Two\ttask two\nme/three\t\tfind it\n")
    one, two, three = listed_sources(path)
    assert (one.name, one.descriptions, three.name, three.descriptions) == ("me-one", (), "me-three", ("find it",))
    assert two.name.startswith("task-two-") and two.place == "me/Two"
    for line in ("me/one\ta\tb\tc", "me/one", "a/b/c", "no such id", "../up", "-x/y", "me/four\tname\t \x00"):
        path.write_text(f"me/one\n{line}\n")
        with pytest.raises(BankError, match="line 2"):
            listed_sources(path)


# --- images -------------------------------------------------------------------------------------------------------------


def _coco(folder, count=48):
    """Made-up annotations in COCO's format: three categories, each of a colour, and captions that say it."""
    (folder / "photos").mkdir(parents=True)
    images, boxes, captions = [], [], []
    for number in range(count):
        colour = ("red", "green", "blue")[number % 3]
        (folder / "photos" / f"{number:04}.jpg").write_bytes(picture(colour, number, "JPEG"))
        images.append({"id": number, "file_name": f"{number:04}.jpg", "width": 24, "height": 18})
        for box, crowd in (([12, 9, 6, 4.5], 0), ([0, 0, 12, 9], 0), ([1, 1, 2, 2], 1)):
            boxes.append({"image_id": number, "category_id": 10 + number % 3, "bbox": box, "iscrowd": crowd})
        captions += [{"image_id": number, "caption": f"a {colour} {WORDS[5 + number // 3 % 3]}"} for _ in range(2)]
    names = [{"id": 10 + i, "name": name} for i, name in enumerate(("cat", "dog", "bird", "log"))]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Those annotations."""
    return _coco(tmp_path_factory.mktemp("coco"))


@pytest.mark.slow
def test_annotations_become_suites(coco, tmp_path):
    """Boxes in thousandths and reading order, without crowds; captions as they are; no image on both sides of any two tasks."""
    counts = import_coco(coco / "instances.json", coco / "photos", tmp_path / "boxes", held_out=0.4)
    assert counts == {"train": 2, "test": 1, "skipped": 1}
    suite = TaskSuite.from_folder(tmp_path / "boxes")
    assert {task.inputs for task in suite} == {"image"} and suite.names == ("cat", "dog", "bird")
    assert suite["dog"].examples[0].output == "dog<loc_0><loc_0><loc_500><loc_500><loc_500><loc_500><loc_750><loc_750>"
    assert suite["dog"].examples[0].input.open().size == (24, 18)
    sides = {split: {e.input for task in suite for e in task.split(split)} for split in ("train", "test")}
    assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
    import_coco(coco / "instances.json", coco / "photos", tmp_path / "texts", captions=coco / "captions.json", train=3)
    task = TaskSuite.from_folder(tmp_path / "texts", "train").tasks[0]
    assert len({e.input for e in task.split("train")}) == 3 and task.examples[0].output.startswith("a ")
    broken = json.loads((coco / "instances.json").read_text())
    for change, named in (({"images": []}, "names no image"), ({"categories": 3}, "COCO"), ({"annotations": [{"id": 1}]}, "fields")):
        (tmp_path / "broken.json").write_text(json.dumps(broken | change))
        with pytest.raises(TaskError, match=named):
            import_coco(tmp_path / "broken.json", coco / "photos", tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-vit-b16-retrieval", "florence-2-detection"])
def test_images_to_a_generator(name, bases, lorag, coco, tmp_path):
    """Annotations, suite of images, experts, generator, ladder with the recipe's own score, adapter."""
    suite, bank, made = tmp_path / "suite", tmp_path / "bank", tmp_path / "generator"
    captions = ["--captions", coco / "captions.json"] if "clip" in name else []
    few = ["--train", 6, "--test", 3, "--held-out", 0.34]
    lorag("tasks", "coco", coco / "instances.json", "--images", coco / "photos", "--out", suite, *few, *captions)
    few = ["experts.steps=2", "experts.batch=2", "experts.checkpoints=2", "experts.test_limit=2", "device=cpu", "dtype=float32", "--quiet"]
    few += ["objective_settings.max_length=8"]
    lorag("bank", "build", "--config", name, f"base={bases(RECIPES[name])}", f"tasks={suite}", f"out={bank}", *few)
    method = load_config(TrainConfig, name, [], "train").method
    short = [] if "clip" in name else ["settings.kernel={steps: 2}"]
    lorag("train", "--config", name, f"bank={bank}", f"tasks={suite}", f"out={made}", "validation=0", *FEW, *short)
    options = ["--seeds", 1, "--limit", 2, "--quiet"] + ([] if "clip" in name else ["--methods", f"base,{method}"])
    table = lorag("evaluate", "--generator", made, "--bank", bank, "--tasks", suite, *options)
    assert (
        "base_prompted" not in table
        and ("recall_at_1" if "clip" in name else "box_f1") in table
        and re.search(rf"^{method} +[01]\.\d+", table, re.M)
    )
    _use(made, bank, lorag, tmp_path)


# --- language modelling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
def test_perplexity_and_bits_per_character_by_hand(bases, begins):
    """Of texts alone, their end left out: from the model's own loss; also where a tokenizer puts no token before a text."""
    base = bases("llama")
    model = BaseModel(str(base), "causal_lm").load("cpu")
    tokenizer = words_tokenizer(begins=begins)
    settings = {"template": "{input}", "metric": "neg_bits_per_character"}
    objective = make_objective("causal_lm", tokenizer, settings)
    texts = ["the red cat sat on the mat", "a blue bird"]
    task = Task("t", "demo", ("t",), None, "MIT", "made", tuple(Example("", text, "test") for text in texts))
    rows = RowAdapters(model, LoraLayout.from_model(model, ["q_proj"]))
    (score,) = objective.scores(rows, None, [task], limit=9)
    lost = tokens = 0
    for text in texts:
        ids = [1 if begins else 2, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            lost += model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
        tokens += len(ids) - 1
    assert score["perplexity"] == pytest.approx(math.exp(lost / tokens), rel=1e-3)
    assert score["bits_per_character"] == pytest.approx(lost / math.log(2) / sum(map(len, texts)), rel=1e-3)
    assert score[objective.metric] == -score["bits_per_character"]
    assert make_objective("causal_lm", tokenizer, objective.settings()).metric == objective.metric
    with pytest.raises(ConfigError, match="metric"):
        make_objective("causal_lm", tokenizer, {"metric": "bleu"})
