"""Experts for PEFT's Arrow routing: one rank, the same ΔW, and a model that PEFT builds from them."""

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from peft import ArrowConfig, create_arrow_model
from toy_world import TRAINING, describe, make_bank, name_of, save_base, true_adapter
from typer.testing import CliRunner

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.exporting import export_arrow
from lorag.cli.main import app
from lorag.errors import BankError, StorageError


@pytest.fixture
def bank(tmp_path, tiny_models, tokenizer):
    """Two experts of rank 4, and one of rank 6 whose alpha is not a multiple of it."""
    base = save_base(tmp_path / "base", tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path / "bank", base, TRAINING[:2])
    wide = true_adapter(base.layout, *TRAINING[2])
    factors = {n: (torch.cat([a, a[:2]]), torch.cat([b / 2, b[:, :2]], 1)) for n, (a, b) in wide.factors.items()}
    return bank.add([(name_of(*TRAINING[2]), describe(*TRAINING[2]), [LoraAdapter(base.layout, Factors.with_alpha(factors, 7.0))])])


def test_ranks_are_one_and_delta_w_the_same(bank, tmp_path):
    """Every expert comes back with the largest rank, and no product changes."""
    folders = list(export_arrow(bank, tmp_path / "out"))
    assert [folder.name for folder in folders] == list(bank.names)
    for folder, name in zip(folders, bank.names, strict=True):
        written = LoraAdapter.from_pretrained(folder)
        assert written.rank == 6
        for module in written.layout.names:
            torch.testing.assert_close(written.delta(module), bank.adapter(name).delta(module), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_peft_routes_among_them(bank, tmp_path):
    """PEFT takes them all; with one expert per token, each row's change is one of the experts' own."""
    folders = [str(folder) for folder in export_arrow(bank, tmp_path / "out")]
    model = create_arrow_model(bank.base.model.load("cpu"), folders, ArrowConfig(top_k=1, rng_seed=0)).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = layer(x) - layer.base_layer(x)
    module = next(name for name in bank.base.layout.names if name.endswith("layers.0.self_attn.q_proj"))
    own = torch.stack([x @ bank.adapter(name).delta(module).T for name in bank.names])
    nearest = (own - changed).norm(dim=-1).amin(0)
    assert nearest.max() < 1e-3 * own.norm(dim=-1).mean()
    assert len((own - changed).norm(dim=-1).argmin(0).unique()) > 1


def test_what_cannot_be_exported(bank, tmp_path):
    """One expert, an unknown one, or a folder in use."""
    with pytest.raises(BankError, match="nothing to route"):
        list(export_arrow(bank, tmp_path / "a", bank.names[:1]))
    with pytest.raises(BankError, match="no such expert"):
        list(export_arrow(bank, tmp_path / "a", ["nobody", bank.names[0]]))
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("x")
    with pytest.raises(StorageError, match=r"^\S+used is not an empty folder"):
        list(export_arrow(bank, tmp_path / "used"))
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_command(bank, tmp_path):
    """`lorag bank export BANK --arrow --out DIR`, for all or some experts."""
    done = CliRunner().invoke(app, ["bank", "export", str(bank.folder), "--arrow", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "3 adapters of one rank" in done.output
    some = ["--expert", bank.names[0], "--expert", bank.names[2]]
    done = CliRunner().invoke(app, ["bank", "export", str(bank.folder), "--arrow", "--out", str(tmp_path / "some"), *some])
    assert done.exit_code == 0 and sorted(path.name for path in (tmp_path / "some").iterdir()) == sorted([bank.names[0], bank.names[2]])
    assert CliRunner().invoke(app, ["bank", "export", str(bank.folder), "--out", str(tmp_path / "none")]).exit_code == 2
