"""The command line: exit codes, one line an error, and the commands of the README on real folders."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.cli import info as cards
from lorag.cli import main as cli
from lorag.errors import LoragError
from lorag.files.artifacts import embedded
from lorag.worlds.sandbox.grid import splits

TARGETS = ["q_proj", "v_proj"]
TRAINED = len(splits()["train"])


@pytest.fixture
def refused(lorag):
    """Runs a command line that must fail: exit code 1, one line that starts with the program's name, and nothing else."""

    def run(*arguments):
        code, out, err = lorag(*arguments)
        assert code == 1, err
        assert "Traceback" not in out + err
        (line,) = err.splitlines()
        assert line.startswith("lorag: ")
        return line

    return run


def _process(*command, **more):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, **more)


@pytest.fixture(scope="module")
def sandbox_base():
    """The sandbox's base model as a bank states it."""
    model = BaseModel("sandbox-lm", "causal_lm")
    return BankBase(model, model.identity(), LoraLayout.from_model(model.load("cpu"), TARGETS), "causal_lm", {"template": "{input}\n"})


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory):
    """What a user of plain PEFT has: an adapter of the sandbox's base model, without lorag.json."""
    torch.manual_seed(0)
    model = BaseModel("sandbox-lm", "causal_lm").load("cpu")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"))
    folder = tmp_path_factory.mktemp("peft") / "triage"
    wrapped.save_pretrained(folder)
    return folder


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["generate", "text"], ["evaluate", "--seeds", "0"], ["train", "--nope"]])
def test_wrong_usage_exits_with_2(lorag, arguments):
    """Unknown commands and options, missing arguments, numbers out of range."""
    code, _, err = lorag(*arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in err


@pytest.mark.slow
def test_help_exits_with_0_and_names_every_command(lorag):
    """And each command has help of its own."""
    code, out, _ = lorag("--help")
    assert code == 0
    for name in ("generate", "train", "evaluate", "quickstart", "info", "bank", "tasks", "sandbox"):
        assert name in out
        assert lorag(name, "--help")[0] == 0


@pytest.mark.slow
def test_importing_lorag_is_quick_and_light():
    """Below 300 ms, without torch and transformers; the help of the command line too goes without them."""
    code = (
        "import sys, time; t = time.perf_counter(); import lorag; t = time.perf_counter() - t; print(t, *(n in sys.modules for n in HEAVY))"
    )
    code = code.replace("HEAVY", "('torch', 'transformers')")
    runs = [_process("-c", code).stdout.split() for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    assert all(loaded == ["False", "False"] for _, *loaded in runs)
    code = "import sys\nfrom lorag.cli.main import main\n"
    code += "try: main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    assert _process("-c", code).stdout.splitlines()[-1] == "0 False"


def test_a_name_that_lorag_lacks_is_an_attribute_error():
    """The lazy module behaves like one: dir, unknown names, and every public name."""
    import lorag

    assert set(lorag.__all__) <= set(dir(lorag))
    assert all(getattr(lorag, name) is not None for name in lorag.__all__)
    with pytest.raises(AttributeError, match="generate_loar"):
        _ = lorag.generate_loar


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("description", "said"), [("", "empty"), ("  \n", "empty"), ("word " * 1000, "too long"), ("a\x00b", "not text")])
def test_descriptions_that_cannot_be_used(refused, tmp_path, description, said):
    """Empty, too long, or not text: said before anything is loaded, and nothing is written."""
    assert said in refused("generate", description, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method=delphi"], "delphi"),
        (["settings.stepps=3"], "stepps"),
        (["settings.steps=many"], "steps"),
        (["seed=many"], "seed"),
        (["sed=1"], "sed"),
        (["seed"], "KEY=VALUE"),
        (["seed=[1"], "seed"),
        (["device=abacus"], "abacus"),
        (["--config", "no-such-preset"], "no-such-preset"),
        (["bank=no/such"], "no/such"),
    ],
)
def test_settings_that_cannot_be_used_are_named(refused, tmp_path, settings, said):
    """Unknown, of the wrong type, or not of the form KEY=VALUE; nothing is trained."""
    assert said in refused("train", f"out={tmp_path / 'out'}", *settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["bank", "list"], ["bank", "check"], ["info"]])
def test_folders_that_are_no_bank(refused, tmp_path, command):
    """An empty folder, a missing one, and a file."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "file"):
        assert name in refused(*command, tmp_path / name)


def test_a_suite_with_a_missing_field(refused, tmp_path):
    """The line says file, line and field."""
    (tmp_path / "tasks.jsonl").write_text('{"name": "a", "descriptions": ["b"], "labels": null}\n{"name": "c", "labels": null}\n')
    line = refused("info", tmp_path)
    assert "tasks.jsonl" in line and "line 2" in line and "descriptions" in line


@pytest.mark.slow
def test_damaged_and_foreign_folders(refused, tmp_path):
    """A manifest that is not JSON, of another kind, or that lists a file which is not there."""
    for name, text in (
        ("torn", "{"),
        ("foreign", '{"kind": "generator", "format": 1, "files": {}}'),
        ("lost", '{"kind": "bank", "format": 1, "experts": [], "files": {"a.safetensors": {"bytes": 1, "sha256": "0"}}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bank.json").write_text(text)
        assert name in refused("bank", "list", tmp_path / name)
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator/generator.json").write_text("[]")
    refused("generate", "summarise", "--out", tmp_path / "out", "--generator", tmp_path / "generator")
    refused("info", tmp_path / "generator")


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path, lorag):
    """The same error: one line without --debug, a traceback with it."""
    code, out, err = lorag("info", tmp_path)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    loud = _process("-m", "lorag.cli", "--debug", "info", str(tmp_path))
    assert loud.returncode == 1 and "Traceback" in loud.stderr and "ArtifactError" in loud.stderr
    with pytest.raises(LoragError):
        cli.main(["--debug", "info", str(tmp_path)])


def test_interruption_says_what_is_kept(lorag, monkeypatch, tmp_path):
    """Exit code 130, one line, no traceback."""

    def interrupted(path, base_model):
        raise KeyboardInterrupt

    monkeypatch.setattr(cards, "describe_path", interrupted)
    code, _, err = lorag("info", tmp_path)
    assert code == 130 and "kept" in err and "Traceback" not in err


def test_a_full_disk_is_one_line(refused, monkeypatch, tmp_path):
    """Errors of the system name the file."""

    def full(path, base_model):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cards, "describe_path", full)
    assert "No space left" in refused("info", tmp_path)


# --- banks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_peft_folder_is_added_listed_and_checked(lorag, refused, tmp_path, sandbox_base, peft_folder):
    """What plain PEFT wrote, with a description; its ΔW in the bank is its ΔW; a second of that name is refused."""
    bank = tmp_path / "bank"
    AdapterBank.create(bank, sandbox_base)
    assert "description" in refused("bank", "add", peft_folder, "--bank", bank)
    code, out, err = lorag("bank", "add", peft_folder, "--bank", bank, "--description", "triage support tickets", "--name", "triage")
    assert code == 0, err
    assert "triage" in out
    code, out, _ = lorag("bank", "list", bank)
    assert code == 0 and "triage support tickets" in out and ["triage", "4"] in [line.split()[:2] for line in out.splitlines()]
    code, out, _ = lorag("bank", "check", bank)
    assert code == 0 and "1 experts, all sound" in out
    code, out, _ = lorag("info", bank)
    assert code == 0 and "sandbox-lm" in out
    assert "triage" in refused("bank", "add", peft_folder, "--bank", bank, "--description", "again", "--name", "triage")
    stored = AdapterBank.from_pretrained(bank).adapter("triage")
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    for name in sandbox_base.layout.names:
        rows, columns = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert torch.allclose(stored.delta(name), 2 * columns @ rows, atol=1e-6)


@pytest.mark.slow
def test_a_bank_of_another_base_takes_nothing(refused, tmp_path, peft_folder, llama_layout, random_adapter):
    """Once it holds an expert: neither an adapter of other shapes, nor one whose config names another base model of the same shapes."""
    other = BankBase(BaseModel("tiny-base", "causal_lm"), "sha256:0", llama_layout, "causal_lm", {})
    AdapterBank.create(tmp_path / "other", other).add([("first", ["do this"], [random_adapter(llama_layout)])])
    refused("bank", "add", peft_folder, "--bank", tmp_path / "other", "--description", "x")
    twin = BaseModel("sandbox-lm", "causal_lm")
    layout = LoraLayout.from_model(twin.load("cpu"), TARGETS)
    own = BankBase(BaseModel("twin-lm", "causal_lm"), "sha256:0", layout, "causal_lm", {})
    AdapterBank.create(tmp_path / "twin", own).add([("first", ["do this"], [random_adapter(layout)])])
    assert "another base" in refused("bank", "add", peft_folder, "--bank", tmp_path / "twin", "--description", "x")
    for name in ("other", "twin"):
        assert AdapterBank.from_pretrained(tmp_path / name).names == ("first",)


def test_check_finds_an_expert_that_does_nothing(refused, lorag, tmp_path, sandbox_base):
    """Exit code 1, and its name."""
    zero = {m.name: (torch.ones(2, m.in_features), torch.zeros(m.out_features, 2)) for m in sandbox_base.layout.modules}
    AdapterBank.create(tmp_path, sandbox_base).add([("idle", ["do nothing"], [LoraAdapter(sandbox_base.layout, Factors(zero))])])
    code, out, err = lorag("bank", "check", tmp_path)
    assert code == 1 and "idle" in out and err.startswith("lorag: ")


# --- the embedded default ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_writes_what_stock_peft_loads(lorag, tmp_path):
    """`lorag generate "summarise legal text" --out DIR`: every tensor placed, and `lorag info` says where it came from."""
    code, out, err = lorag("generate", "summarise legal text", "--out", tmp_path / "adapter")
    assert code == 0, err
    assert "rank" in out and "nearest experts" in out
    base = BaseModel("sandbox-lm", "causal_lm").load("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT reads an old name of transformers'
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    own = {name: value for name, value in loaded.state_dict().items() if ".lora_" in name}
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(own) == len(stored)
    for name, value in stored.items():
        head, tail = name.rsplit(".", 1)
        assert torch.equal(own[f"{head}.default.{tail}"], value.float())
    code, out, _ = lorag("info", tmp_path / "adapter")
    assert code == 0
    for part in ("summarise legal text", "house", "sandbox-lm", "novelty"):
        assert part in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "parts"),
    [
        ("data/sandbox/bank", ("bank", str(TRAINED), "sandbox-lm")),
        ("checkpoints/house", ("generator", "house", "sandbox-lm")),
        ("data/sandbox/tasks", ("task suite", f"train ({TRAINED})", "test (60)")),
    ],
)
def test_info_describes_what_ships(lorag, folder, parts):
    """Bank, generator and suite."""
    code, out, err = lorag("info", embedded(folder))
    assert code == 0, err
    assert all(part in out for part in parts)


@pytest.mark.slow
def test_evaluate_writes_its_report(lorag, refused, tmp_path):
    """A short ladder on the embedded default: a table, a JSON file; an unknown method is named."""
    code, out, err = lorag(
        "evaluate", "--methods", "base,house,house_shuffled,oracle", "--seeds", 1, "--limit", 1, "--json", tmp_path / "r.json", "--quiet"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["methods"]) == {"base", "house", "house_shuffled", "oracle"} and len(report["tasks"]) == 60
    assert all(name in out for name in report["methods"])
    assert "augury" in refused("evaluate", "--methods", "augury", "--seeds", 1, "--limit", 1)


@pytest.mark.slow
def test_train_from_the_command_line(lorag, refused, tmp_path):
    """Ridge on the embedded bank in two minutes' work, what to do next without tasks, again; other settings are refused."""
    started = time.process_time()  # a busy machine is not a failure
    values = [f"out={tmp_path / 'g'}", "method=ridge", "tasks=null", "wordings=1", "validation=0.03"]
    code, out, err = lorag("train", *values)
    assert code == 0, err
    assert f"{TRAINED} experts" in out and time.process_time() - started < 120
    assert "next: lorag generate" in out and "evaluate" not in out
    assert lorag("train", *values)[0] == 0
    assert "other settings" in refused("train", *values, "seed=1")
    code, _, err = lorag("generate", "who signed this lease?", "--out", tmp_path / "a", "--generator", tmp_path / "g")
    assert code == 0, err


@pytest.mark.slow
def test_generate_takes_a_few_examples(lorag, refused, tmp_path):
    """--examples with --refine-steps changes the adapter and says so in lorag.json; a broken file is named with its line."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"input": "The lease was signed in Leeds.", "output": "Leeds, per lease"}\n')
    bad.write_text('{"input": "The lease was signed in Leeds.", "output": "Leeds"}\n{"input": "no output"}\n')
    text = "in which town was the lease signed?"
    for name, more in (("plain", ()), ("refined", ("--examples", good, "--refine-steps", 2))):
        code, _, err = lorag("generate", text, "--out", tmp_path / name, *more)
        assert code == 0, err
    plain, refined = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "refined"))
    assert plain.keys() == refined.keys()
    assert any(not torch.equal(plain[key], refined[key]) for key in plain)
    info = json.loads((tmp_path / "refined" / "lorag.json").read_text())
    assert (info["examples"], info["refine_steps"]) == (1, 2)
    assert "line 2" in refused("generate", text, "--out", tmp_path / "x", "--examples", bad)
    assert "refine_steps" in refused("generate", text, "--out", tmp_path / "x", "--refine-steps", 3)
