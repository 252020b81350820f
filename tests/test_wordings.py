"""One task in several wordings: the adapter is made from the mean of what each of them says."""

import json

import pytest
import torch

from lorag import generate_lora
from lorag.adapters.purpose import find_purpose
from lorag.cli import main as cli
from lorag.errors import DescriptionError
from lorag.generator.generate import read_requests, write_adapters

TEXT = "write the label of the legal text in upper case"
OTHERS = ["answer with the contract's category, all in capitals", "which kind of legal text is it? use capital letters"]


@pytest.mark.slow
def test_the_code_is_the_mean_over_all_wordings():
    """The same wording twice changes nothing; others do; their order does not matter; the adapter says which they were."""
    plain = generate_lora(TEXT)
    twice, two, swapped = (generate_lora(TEXT, wordings=texts) for texts in ([TEXT], OTHERS, OTHERS[::-1]))
    assert plain.factors.cosine(twice.factors) > 1 - 1e-6 and "wordings" not in plain.info
    assert plain.factors.cosine(two.factors) < 1 - 1e-4 and two.info["wordings"] == OTHERS
    assert two.factors.cosine(swapped.factors) > 1 - 1e-5
    assert all(torch.equal(x, y) for x, y in zip(*(_values(generate_lora(TEXT, wordings=OTHERS)) for _ in range(2)), strict=True))


def test_the_adapter_lies_between_those_of_its_wordings():
    """It is nearer to each of them than they are to each other."""
    alone = [generate_lora(text).factors for text in (TEXT, OTHERS[0])]
    both = generate_lora(TEXT, wordings=OTHERS[:1]).factors
    assert min(both.cosine(one) for one in alone) > alone[0].cosine(alone[1])


def test_the_gate_judges_the_description():
    """Whatever the other wordings are."""
    gates = [generate_lora(TEXT, wordings=texts).info["gate"] for texts in ([], OTHERS)]
    assert gates[0] == gates[1]


def test_wordings_are_checked():
    """Each as a description is; they stand beside one."""
    with pytest.raises(DescriptionError):
        generate_lora(TEXT, wordings=["good", " "])
    with pytest.raises(DescriptionError, match="beside a description"):
        generate_lora(wordings=OTHERS, examples=[("a", "b")])


def test_the_command_takes_them(tmp_path, capsys):
    """--wording, as often as wanted, for a single description."""
    out = tmp_path / "adapter"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", TEXT, "--wording", OTHERS[0], "--wording", OTHERS[1], "--out", str(out)])
    assert stopped.value.code == 0
    assert json.loads((out / "lorag.json").read_text())["wordings"] == OTHERS
    (tmp_path / "many.txt").write_text(TEXT)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--descriptions", str(tmp_path / "many.txt"), "--wording", "x", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "--wording" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_descriptions_may_hold_them(tmp_path):
    """JSON lines with wordings: as if each adapter were made alone; a folder made from others is not taken for it."""
    file, out = tmp_path / "many.jsonl", tmp_path / "out"
    rows = [{"name": "one", "description": TEXT, "wordings": OTHERS}, {"name": "two", "description": TEXT}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not [one.error for one in write_adapters(read_requests(file), out) if one.error]
    for row in rows:
        alone = generate_lora(TEXT, wordings=row.get("wordings", ())).save_pretrained(tmp_path / "alone" / row["name"])
        assert (alone / "adapter_model.safetensors").read_bytes() == (out / row["name"] / "adapter_model.safetensors").read_bytes()
    assert all(one.existed for one in write_adapters(read_requests(file), out))
    rows[0]["wordings"] = OTHERS[:1]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = sorted(write_adapters(read_requests(file), out), key=lambda one: one.request.name)
    assert "another adapter" in str(first.error) and second.existed


@pytest.mark.parametrize("wordings", ["text", [3], [""]])
def test_a_file_s_wordings_are_checked(tmp_path, wordings):
    """They are a list of descriptions."""
    (tmp_path / "many.jsonl").write_text(json.dumps({"description": TEXT, "wordings": wordings}))
    with pytest.raises(DescriptionError, match="line 1"):
        read_requests(tmp_path / "many.jsonl")


def test_a_bank_takes_them_as_descriptions(tmp_path):
    """An adapter that was generated from several wordings brings all of them."""
    folder = generate_lora(TEXT, wordings=OTHERS).save_pretrained(tmp_path / "adapter")
    info = json.loads((folder / "lorag.json").read_text())
    assert find_purpose(folder, info).descriptions == (TEXT, *OTHERS)
    assert find_purpose(folder, info | {"wordings": "not a list"}).descriptions == (TEXT,)


def _values(adapter):
    return [value for name in sorted(adapter.factors) for value in adapter.factors[name]]
