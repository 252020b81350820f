"""JSON that readers understand differently, or that unfolds: keys twice, NaN, numbers without end, bottomless nesting."""

import json

import pytest

from lorag.bank.bank import AdapterBank
from lorag.errors import ArtifactError, LoragError
from lorag.files.artifacts import read_json, write_json


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        '{"r": 2, "r": 200000}',
        '{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": -Infinity}',
        '{"lora_alpha": 1e999}',
        '{"r": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a": ' * 5000,
        "{" + '"a": [' * 200 + "]" * 200 + "}",
        '{"a": [' + "0," * 300_000 + "0]}",
        "{'r': 2}",
        '{"r": 2} {"r": 3}',
        '{"r": 2,}',
        '\ufeff{"r": 2}',
        '{"r": "\x00"}',
    ],
    ids=lambda text: text[:24],
)
def test_an_adapter_s_config_is_strict_json(folder, refused, text):
    """And for a few mebibytes, whatever it says."""
    folder.config.write_text(text, encoding="utf-8")
    refused(folder.read, LoragError)


def test_text_in_other_encodings_is_refused(folder, refused):
    """Python's own reader would guess UTF-16 and UTF-32."""
    text = folder.config.read_text()
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        folder.config.write_bytes(text.encode(encoding))
        refused(folder.read, ArtifactError)


def test_deep_nesting_is_refused_before_anything_walks_it(tmp_path, refused):
    """Sixty levels are more than any file of ours has; a thousand would end in a RecursionError somewhere else."""
    for depth, fine in ((50, True), (200, False), (900, False)):
        (tmp_path / "a.json").write_text('{"a":' * depth + "1" + "}" * depth)
        if fine:
            assert read_json(tmp_path / "a.json")
        else:
            refused(lambda: read_json(tmp_path / "a.json"), ArtifactError, "deep|nest|JSON")


def test_a_config_of_megabytes_is_refused(folder, refused):
    """An adapter's settings fit into one."""
    folder.configure(padding="x" * 3_000_000)
    refused(folder.read, ArtifactError, "too large")


@pytest.mark.slow
def test_a_manifest_of_other_things_is_refused(bank, refused):
    """Each part replaced by something else: the bank is refused, whichever it is."""
    sound = read_json(bank.folder / "bank.json")
    for key in sound:
        for odd in (None, 0, "x", [], {}, [1], {"a": 1}, [[["x"]]], -1, 1e30, True):
            if odd == sound[key]:
                continue
            write_json(bank.folder / "bank.json", {**sound, key: odd})
            refused(lambda: [*AdapterBank.from_pretrained(bank.folder).check()] or _no_expert(bank.folder))
    write_json(bank.folder / "bank.json", sound)
    AdapterBank.from_pretrained(bank.folder)


def test_a_million_wrong_values_are_refused_at_the_first(bank, refused):
    """Of names, descriptions or modules: what checks them does not collect what it finds."""
    sound = read_json(bank.folder / "bank.json")
    wrong = [0] * 100_000
    base, first = sound["base"], sound["experts"][0]
    for changed in (
        {"experts": [{**first, "descriptions": wrong}]},
        {"base": {**base, "layout": {**base["layout"], "modules": wrong}}},
        {"base": {**base, "layout": {**base["layout"], "target_modules": wrong}}},
    ):
        write_json(bank.folder / "bank.json", {**sound, **changed})
        refused(lambda: AdapterBank.from_pretrained(bank.folder), match=r"\.0: 0")


def _no_expert(folder):
    """A bank without experts is sound; it is what an empty list of them says."""
    assert json.loads((folder / "bank.json").read_text())["experts"] in ([], {}, "")
    raise ArtifactError("an empty bank")
