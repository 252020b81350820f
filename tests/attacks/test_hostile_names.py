"""Names that mean another file, or a device, on one system or another: refused on all of them, wherever a name becomes a path."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_targets import adapter
from lorag.bank.bank import AdapterBank
from lorag.errors import ArtifactError
from lorag.files.artifacts import read_json, require_name, resolve_inside, safe_name, slug, write_json
from lorag.tasks.suite import Task

DEVICES = ("con", "prn", "aux", "nul", "com1", "com9", "lpt1", "lpt9")
PATHS = (
    *("..", "../a", "a/../../b", "/etc/passwd", "//host/share", "a//b", "a/", "./a", "", ".", "~/a/.."),
    *("..\\a", "a\\..\\b", "\\\\host\\share\\a", "C:\\a", "C:a", "c:/a", "a:stream", "a::$DATA", "\\\\?\\C:\\a", "//./pipe/a"),
    *("con", "CON", "Nul.safetensors", "aux.tar.gz", "com1", "LPT9.txt", "com¹", "conin$", "CONOUT$", "a/nul/b", "con .txt", "nul "),
    *(
        "a.",
        "a ",
        "a/b.",
        "a./b",
        "...",
        "a\0b",
        "a\nb",
        "a\x7f",
        "a|b",
        "a?b",
        "a*b",
        "a<b",
        'a"b',
        "\ud800",
        "a" * 300,
        "a/" * 2000 + "a",
    ),
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:24])
def test_paths_that_mean_something_else_somewhere_are_refused(tmp_path, refused, path):
    """The rules of POSIX and of Windows hold on every system: separators, drives, streams, devices, dropped dots and blanks."""
    refused(lambda: resolve_inside(tmp_path, path), ArtifactError)


@pytest.mark.parametrize("path", [None, 3, b"a", ["a"], {}], ids=str)
def test_paths_that_are_no_text_are_refused(tmp_path, refused, path):
    """A manifest can hold any value where a path belongs."""
    refused(lambda: resolve_inside(tmp_path, path), ArtifactError)


def test_ordinary_paths_pass(tmp_path):
    """What looks like a device and is none, and names with dots and blanks inside."""
    for path in ("experts/a.safetensors", "console/common.json", "nulls", "com10x", "a b/c.d.e", "é", ".hidden"):
        assert resolve_inside(tmp_path, path) == tmp_path.joinpath(*path.split("/"))


@pytest.mark.slow
@given(st.text(max_size=40) | st.lists(st.sampled_from(["a", "..", ".", "/", "\\", ":", "con", ".", " ", "~", "%2e", "\0"])).map("".join))
def test_whatever_passes_lies_inside(text):
    """However it is put together, a path that is let through stays below its root, under the rules of both systems."""
    from pathlib import Path, PurePosixPath, PureWindowsPath

    try:
        resolve_inside(Path("/nowhere/root"), text)
    except ArtifactError:
        return
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        assert not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts
        assert not PureWindowsPath(text).is_reserved()


@pytest.mark.parametrize("name", DEVICES)
def test_devices_name_no_expert_and_no_task(name, refused):
    """A bank made here can be copied to Windows: a task called `con` gets a slug."""
    refused(lambda: require_name(name), ArtifactError, "con or nul")
    assert safe_name(name) != name and require_name(safe_name(name))
    task = Task(name, "s", ("d",), None, "MIT", "made")
    assert require_name(task.key) == slug(name)


@pytest.mark.parametrize("text", ["../../etc/passwd", "con", "a\\b:c", "\x1b[2J", "x" * 10_000, "…/…", "ａ／ｂ", "‮gpj.exe"])
def test_a_task_s_text_never_becomes_a_path(text):
    """Only letters, digits and hyphens of it, and a hash."""
    assert require_name(slug(text)) == slug(text)
    assert set(slug(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "experts\\a.safetensors", "C:a", "nul", "experts/../bank.json"])
def test_a_bank_s_manifest_cannot_point_elsewhere(bank, refused, path):
    """Neither as a listed file nor as the shard of an expert."""
    manifest = read_json(bank.folder / "bank.json")
    for expert in manifest["experts"]:
        expert["file"] = path
    write_json(bank.folder / "bank.json", manifest)
    refused(lambda: AdapterBank.from_pretrained(bank.folder))
    manifest["files"] = {path: next(iter(manifest["files"].values()))}
    write_json(bank.folder / "bank.json", manifest)
    refused(lambda: AdapterBank.from_pretrained(bank.folder), ArtifactError)


def test_names_in_a_bank_s_manifest_are_checked(bank, refused):
    """An expert's name becomes part of paths and of terminal lines."""
    for name in ("../a", "con", "a\x1b[2Jb", "A", "", None, 3, ["a"]):
        manifest = json.loads((bank.folder / "bank.json").read_text())
        manifest["experts"][0]["name"] = name
        write_json(bank.folder / "other.json", manifest)
        (bank.folder / "bank.json").replace(bank.folder / "kept.json")
        (bank.folder / "other.json").replace(bank.folder / "bank.json")
        refused(lambda: AdapterBank.from_pretrained(bank.folder))
        (bank.folder / "kept.json").replace(bank.folder / "bank.json")


def test_names_that_experts_get_are_checked(bank, refused):
    """Before anything is written."""
    for name in ("../a", "nul", "a b", "Ä"):
        refused(lambda name=name: bank.add([(name, ["a task"], [adapter(3)])]))
    assert AdapterBank.from_pretrained(bank.folder).names == bank.names


def test_control_characters_reach_no_terminal(folder, refused):
    """Names from a file are shown escaped: none clears a screen, moves the cursor or forges another line."""

    def change(header):
        key = next(key for key in header if key != "__metadata__")
        header["\x1b[2J\rfine\nlorag: all is well‮"] = header.pop(key)
        return header

    folder.header(change)
    text = refused(folder.read)
    assert "\\x1b" in text or "2J" not in text
