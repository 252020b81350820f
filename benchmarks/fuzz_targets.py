"""What the fuzzer spoils, and how each of it is read: valid folders of every kind, and the calls that users make on them."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.formats import FORMATS, Base, adapter_files, format_of
from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank, BankBase
from lorag.bank.importing import ImportOptions, import_adapters
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.cli.info import describe_path
from lorag.config import from_plain, load_config, preset_names
from lorag.errors import ArtifactError, LoragError
from lorag.files.artifacts import read_json, require_name, resolve_inside, write_json
from lorag.files.tensors import save_tensors
from lorag.files.training_state import load_training_state, save_training_state
from lorag.files.yaml_values import parse_yaml
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.methods.method import nested
from lorag.methods.regression import MlpSettings
from lorag.spaces import FlatFactors, SharedSubspace
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.text.conditioning import Conditioner
from lorag.text.embedding import Embedding
from lorag.training.train import TrainConfig

__all__ = ["LAYOUT", "TARGETS", "Target", "make_seeds"]

LAYOUT = LoraLayout(
    ("down_proj", "q_proj"),
    tuple(
        ModuleShape(f"model.layers.{layer}.{name}", size, other)
        for layer in range(2)
        for name, size, other in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 12, 8))
    ),
)
BASE = BankBase(BaseModel("tiny-base", "causal_lm"), "sha256:0123", LAYOUT, "causal_lm", {"max_length": 64})
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A kind of folder, how often it is tried, and how it is read."""

    kind: str
    weight: float
    read: Callable[[Path, random.Random], object]


class HashEmbedder:
    """Embeds a text as a random unit vector that its hash decides."""

    name, size = "hash", 6

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        """Embeds texts in order."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Embedding:
        rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
        tokens = torch.randn(3, self.size, generator=rng)
        return Embedding(torch.nn.functional.normalize(tokens.sum(0), dim=0), tokens)


def adapter(seed: int, rank: int = 2, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """A random adapter of the tiny layout."""
    rng = torch.Generator().manual_seed(seed)
    factors = {
        m.name: (
            (torch.randn(rank, m.in_features, generator=rng) * 0.3).to(dtype),
            (torch.randn(m.out_features, rank, generator=rng) * 0.3).to(dtype),
        )
        for m in LAYOUT.modules
    }
    return LoraAdapter(LAYOUT, Factors(factors, 2.0), "tiny-base", "CAUSAL_LM", {"description": f"do task {seed}", "seed": seed})


# --- valid folders ----------------------------------------------------------------------------------------------------


def make_seeds(folder: Path) -> dict[str, list[Files]]:
    """Writes valid folders of every kind once, and returns their files."""
    made: dict[str, list[Path]] = {kind: [] for kind in ("adapter", "format", "bank", "filled", "generator", "suite", "config", "state")}

    def new(kind: str) -> Path:
        made[kind].append(folder / f"{kind}-{len(made[kind])}")
        return made[kind][-1]

    for seed, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        adapter(seed, dtype=dtype).save_pretrained(new("adapter"))
    mixed = adapter(3, rank=4).save_pretrained(new("adapter"))
    config = read_json(mixed / "adapter_config.json")
    config.update(use_rslora=True, alpha_pattern={"q_proj": 3, "model.layers.1.mlp.down_proj": 5.5}, rank_pattern={"down_proj": 4})
    write_json(mixed / "adapter_config.json", config)

    _write_formats(new)
    banks = []
    for precision in ("float32", "int8", "float16"):
        bank = AdapterBank.create(new("bank"), BASE)
        for rank in (2, 3):
            experts = [(f"task-{rank}-{i}", [f"do task {rank} {i}", "same"], [adapter(i, rank), adapter(i + 9, rank)]) for i in range(3)]
            bank = bank.add(experts, precision=precision)
        banks.append(bank)
    filled = AdapterBank.create(new("filled"), BASE).add([(f"known-{i}", [f"known task {i}"], [adapter(i)]) for i in range(2)])
    list(import_adapters(filled.folder, find_sources([str(made["adapter"][0])]), ImportOptions(("a new task",)), embedder=HashEmbedder()))
    for name, space_type in (("ridge", SharedSubspace), ("mlp", SharedSubspace), ("ridge", FlatFactors)):
        _generator(banks[0], name, space_type).save_pretrained(new("generator"))

    tasks = [
        Task(
            f"task-{i}", "toy", (f"do {i}", f"please do {i}"), ("yes", "no") if i else None, "MIT", "made",
            tuple(Example(f"text {j} of {i}", "yes", "test" if j % 3 == 0 else "train") for j in range(6)),
        )
        for i in range(3)
    ]  # fmt: skip
    suite = TaskSuite(tasks).save(new("suite"))
    write_json(suite / "splits.json", {"train": ["task-0", "task-1"], "test": ["task-2"]})

    from importlib import resources

    for name in preset_names():
        path = new("config")
        path.mkdir(parents=True)
        (path / "config.yaml").write_bytes(resources.files("lorag").joinpath("configs", f"{name}.yaml").read_bytes())

    module, optimizer, rng = _training()
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    save_training_state(new("state") / "run.state.safetensors", module, [optimizer], rng, {"step": 3, "best": None, "waited": 1})
    return {kind: [_files(path) for path in paths] for kind, paths in made.items()}


def _write_formats(new: Callable[[str], Path]) -> None:
    """An adapter as GGUF, as MLX, and under kohya's and diffusers' names."""
    base = new("format") / "base"
    base.mkdir(parents=True)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    write_json(base / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    FORMATS["gguf"].write(adapter(4), base.parent / "adapter.gguf", Base(BaseModel(str(base), "causal_lm")))
    shutil.rmtree(base)
    mlx = new("format")
    mlx.mkdir()
    FORMATS["mlx"].write(adapter(5), mlx, Base())
    for names in ("lora_te_{flat}.lora_{down}.weight", "text_encoder.{name}.lora_{side}.weight"):
        folder = new("format")
        folder.mkdir()
        tensors = {
            names.format(flat=name.replace(".", "_"), name=name, side=side, down="down" if side == "A" else "up"): value
            for name, pair in adapter(6).factors.items()
            for side, value in zip("AB", pair, strict=True)
        }
        save_tensors(folder / "style.safetensors", tensors)


def _files(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


def _generator(bank: AdapterBank, name: str, space_type: type[SharedSubspace] | type[FlatFactors]) -> LoraGenerator:
    embedder = HashEmbedder()
    space = (
        SharedSubspace.fit(bank.adapters, LAYOUT, 3) if space_type is SharedSubspace else FlatFactors.fit(lambda: bank.adapters(), LAYOUT)
    )
    conditioner = Conditioner.fit(bank.names, [embedder.embed(expert.descriptions) for expert in bank.experts])
    settings = {"width": MlpSettings.width // 96} if name == "mlp" else {}
    method = method_type(name).with_settings(settings)
    rng = torch.Generator().manual_seed(0)
    values = {"weight": (embedder.size, space.size), "bias": (space.size,), "centre": (embedder.size,)}
    if name == "ridge":
        method.restore({key: torch.randn(size, generator=rng) * 0.1 for key, size in values.items()}, {})
    else:
        shape = {"embedding": embedder.size, "code": space.size}
        method.restore(nested(network=method.build(shape).state_dict()), shape)
    rank = space.rank if isinstance(space, FlatFactors) else 2
    return LoraGenerator(base=BASE, space=space, conditioner=conditioner, method=method, embedder=embedder, rank=rank)


def _training() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Generator]:
    module = torch.nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1), torch.Generator().manual_seed(0)


# --- reading ----------------------------------------------------------------------------------------------------------


def _whole(found: LoraAdapter) -> None:
    """What was accepted must be usable: of its layout, finite, and with finite norms."""
    found.layout.check_factors(found.factors.tensors)
    if not all(value >= 0 and value < float("inf") for value in found.norms().values()):
        raise AssertionError("an accepted adapter has a norm that is not a number")
    if not all(tensor.isfinite().all() for pair in found.factors.values() for tensor in pair):
        raise AssertionError("an accepted adapter has a value that is not a number")


def read_adapter(folder: Path, rng: random.Random) -> None:
    """Reads an adapter on its layout, strictly or leniently, or on its own tensors alone."""
    layout = None if rng.random() < 0.2 else LAYOUT
    _whole(LoraAdapter.from_pretrained(folder, layout, allow_missing=rng.random() < 0.5, ignore_extra=rng.random() < 0.3))


def read_format(folder: Path, rng: random.Random) -> None:
    """Reads an adapter in another format than PEFT's, and then as what it became."""
    for file in adapter_files(folder) or [path for path in folder.iterdir() if path.suffix in (".gguf", ".safetensors")]:
        known = format_of(file)
        if known is None:
            raise ArtifactError(f"{file} is not an adapter")
        form = known.read(file, Base(None, LAYOUT.modules))
        save_tensors(folder / "peft" / "adapter_model.safetensors", form.tensors)
        write_json(folder / "peft" / "adapter_config.json", form.config)
        _whole(LoraAdapter.from_pretrained(folder / "peft"))


def read_bank(folder: Path, rng: random.Random) -> None:
    """Opens a bank and reads every checkpoint of every expert."""
    bank = AdapterBank.from_pretrained(folder)
    for expert, problem in bank.check():
        if problem is None:
            require_name(expert.name)
            resolve_inside(folder, expert.file)
            _whole(bank.adapter(expert.name))


def add_to_bank(folder: Path, rng: random.Random) -> None:
    """Adds a spoiled adapter to a sound bank, which must stay sound."""
    bank_folder = folder / "sound-bank"
    bank = AdapterBank.create(bank_folder, BASE).add([("known", ["a task"], [adapter(1)])])
    for one in import_adapters(bank_folder, find_sources([str(folder)]), ImportOptions(("a new task",), ignore_extra=rng.random() < 0.5)):
        if one.error is not None and not isinstance(one.error, LoragError):
            raise one.error
    after = AdapterBank.from_pretrained(bank_folder)
    if after["known"] != bank["known"] or any(problem for _, problem in after.check()):
        raise AssertionError("a spoiled adapter has harmed the bank")


def add_to_spoiled(folder: Path, rng: random.Random) -> None:
    """Adds a sound adapter to a spoiled bank, of which what it remembers of its experts may be all that is spoiled."""
    adapter(7).save_pretrained(folder / "sound")
    for one in import_adapters(folder, find_sources([str(folder / "sound")]), ImportOptions(("another task",)), embedder=HashEmbedder()):
        if one.error is not None:
            raise one.error
    _whole(AdapterBank.from_pretrained(folder).adapter("sound"))


def read_generator(folder: Path, rng: random.Random) -> None:
    """Opens a generator and makes an adapter with it."""
    _whole(LoraGenerator.from_pretrained(folder, embedder=HashEmbedder()).generate("do task 1"))


def read_suite(folder: Path, rng: random.Random) -> None:
    """Reads a suite, or one split of it."""
    TaskSuite.from_folder(folder, rng.choice((None, "train", "test"))).fingerprint()


def read_config(folder: Path, rng: random.Random) -> None:
    """Reads a preset from a file, and its text as a setting's value and as a stored config."""
    load_config(TrainConfig, str(folder / "config.yaml"))
    values = parse_yaml((folder / "config.yaml").read_bytes(), "config.yaml")
    from_plain(TrainConfig, values)


def read_state(folder: Path, rng: random.Random) -> None:
    """Resumes a training run and goes one step further."""
    module, optimizer, stream = _training()
    load_training_state(folder / "run.state.safetensors", module, [optimizer], stream, ("step", "best", "waited"))
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def describe(folder: Path, rng: random.Random) -> None:
    """What `lorag info` prints."""
    with redirect_stdout(io.StringIO()):
        print(describe_path(folder))


TARGETS = {
    "adapter": Target("adapter", 0.40, read_adapter),
    "format": Target("format", 0.06, read_format),
    "bank": Target("bank", 0.26, read_bank),
    "import": Target("adapter", 0.01, add_to_bank),
    "index": Target("filled", 0.01, add_to_spoiled),
    "generator": Target("generator", 0.06, read_generator),
    "suite": Target("suite", 0.05, read_suite),
    "config": Target("config", 0.03, read_config),
    "state": Target("state", 0.04, read_state),
    "info-a": Target("adapter", 0.03, describe),
    "info-b": Target("bank", 0.02, describe),
    "info-g": Target("generator", 0.02, describe),
    "info-s": Target("suite", 0.01, describe),
}
