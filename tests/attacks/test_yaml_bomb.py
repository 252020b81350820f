"""YAML that is more than values: aliases that unfold, tags that build objects, interpolation that reads the environment."""

import time

import pytest

from lorag.config import from_plain, load_config
from lorag.errors import ConfigError
from lorag.files.yaml_values import parse_yaml
from lorag.training.train import TrainConfig

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LAUGHS, "anchors"),
        ("a: &x [*x]", "anchors"),
        ("base: &b {k: 1}\n<<: *b", "anchors"),
        ("<<: {k: 1}", "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!set {x, y}", "tag"),
        ("a: !own x", "tag"),
        ("a: ${oc.env:HOME}", "interpolation"),
        ("settings: {deep: [{x: '${oc.env:HOME}'}]}", "interpolation"),
        ("k: 1\nk: 2", "twice"),
        ("settings: {k: 1, k: 2}", "twice"),
        ("k: .nan", "plain"),
        ("k: -.inf", "plain"),
        ("1: 2", "is not text"),
        ("? [a, b]\n: 1", "not valid YAML|is not text"),
        ("k: " + "9" * 5000, "not valid YAML"),
        ("k: " + "[" * 2000, "nested"),
        ("k: " + "[" * 30 + "]" * 30 + "\nj: " + "{a: " * 40 + "1" + "}" * 40, "nested"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: 'open", "not valid YAML"),
        ("& *", "not valid YAML|anchors"),
        ("- 1\n- 2", "no mapping"),
        ("just text", "no mapping"),
        ("", "no mapping"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_all_but_values_is_refused(tmp_path, refused, text, named):
    """And for little memory and time."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    before = time.process_time()
    refused(lambda: load_config(TrainConfig, str(path)), ConfigError, named)
    assert time.process_time() - before < 2


def test_files_that_are_no_yaml_are_refused(tmp_path, refused):
    """A pickle and a picture renamed, text that is not UTF-8, a file of megabytes, a folder."""
    for name, raw in {"pickle": b"\x80\x04\x95abc", "png": b"\x89PNG\r\n", "latin": b"k: \xe9", "large": b"k: " + b"x" * 10**6}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(raw)
        refused(lambda path=path: load_config(TrainConfig, str(path)), ConfigError)
    (tmp_path / "folder.yaml").mkdir()
    refused(lambda: load_config(TrainConfig, str(tmp_path / "folder.yaml")), ConfigError)


def test_settings_of_the_command_line_are_values_too(refused):
    """KEY=VALUE takes what a file takes."""
    for setting in (
        "k=&a [1]",
        "k=${oc.env:HOME}",
        "k=!!python/name:os.system",
        "k=.nan",
        "seed=x",
        "settings.a=1",
        "=1",
        "seed",
        "seed.x=1",
    ):
        if setting != "settings.a=1":
            refused(lambda setting=setting: load_config(TrainConfig, None, [setting]), ConfigError)
    config = load_config(TrainConfig, None, ["settings.steps=5", "settings.rate=1e-3", "seed=3", "tasks=null", "out=2001-01-01"])
    assert (config.settings, config.seed, config.tasks, config.out) == ({"steps": 5, "rate": 1e-3}, 3, None, "2001-01-01")


def test_stored_settings_cannot_read_the_environment(refused):
    """A generator's or bank's own settings come from strangers; what they name is not looked up."""
    refused(lambda: from_plain(TrainConfig, {"out": "${oc.env:HOME}"}), ConfigError, "interpolation")
    refused(lambda: from_plain(TrainConfig, {"settings": {"a": [{"b": "${out}"}]}}), ConfigError, "interpolation")


def test_ordinary_yaml_is_read():
    """What the refusals above spoil is itself accepted."""
    lines = ("# note", "method: ridge", "settings:", "  steps: 10", "  names: [a, 'b', \"c\"]", "  rate: 1.0e-3", "  small: 1e-3")
    text = "\n".join((*lines, "  flag: true", "  none: null"))
    settings = {"steps": 10, "names": ["a", "b", "c"], "rate": 1e-3, "small": 1e-3, "flag": True, "none": None}
    assert parse_yaml(text, "text") == {"method": "ridge", "settings": settings}
