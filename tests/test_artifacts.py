"""Files: names and paths stay inside, writes are whole or not at all, and nothing that a file says is believed unchecked."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorag.errors import ArtifactError, LoragError, StorageError
from lorag.files import artifacts, atomic
from lorag.files import tensors as tensor_files

# --- names and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "summarise-legal_text-2", "a" * 64])
def test_safe_names_pass(name):
    """Lower-case letters, digits, _ and - name files on every system."""
    assert artifacts.require_name(name) == artifacts.safe_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "../a", "A", "é", "a b", "-a", "_a", "a\n", "a\0", "a" * 65, "a.b", None, 3, b"a"]
)
def test_unsafe_names_are_refused(name):
    """Anything else is refused, and the message says what was being named."""
    with pytest.raises(ArtifactError, match="an expert's name"):
        artifacts.require_name(name, "an expert's name")


@pytest.mark.slow
@given(st.text(), st.text())
def test_slugs_are_safe_and_distinct(one, other):
    """Any text gets a safe name, and different texts get different ones."""
    assert artifacts.require_name(artifacts.slug(one)) == artifacts.slug(one)
    assert artifacts.require_name(artifacts.safe_name(one))
    assert (artifacts.slug(one) == artifacts.slug(other)) == (one == other)


def test_plain_relative_paths_resolve(tmp_path):
    """A plain path is joined to its root, whether it exists or not."""
    assert artifacts.resolve_inside(tmp_path, "experts/a.safetensors") == tmp_path / "experts" / "a.safetensors"


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../a", "a/../b", "a/..", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "C:a", "C:/a", "a\0b", "file:a"]
)
def test_paths_that_leave_their_folder_are_refused(tmp_path, path):
    """No parent, root, drive, backslash or empty part."""
    with pytest.raises(ArtifactError, match="leaves its folder"):
        artifacts.resolve_inside(tmp_path, path)


@pytest.mark.parametrize("path", ["link/a", "folder/link"])
def test_links_are_refused(tmp_path, path):
    """A link on the way or at the end could lead anywhere."""
    (tmp_path / "folder").mkdir()
    (tmp_path / path.split("link")[0] / "link").symlink_to("/etc")
    with pytest.raises(ArtifactError, match="link"):
        artifacts.resolve_inside(tmp_path, path)


def test_endless_names_are_refused(tmp_path):
    """A part longer than a file system takes is an ArtifactError, not an OSError."""
    with pytest.raises(ArtifactError):
        artifacts.resolve_inside(tmp_path, "a" * 5000)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file(tmp_path, error):
    """A full disk or an interruption in the middle leaves the old file, and no debris."""
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"old": 1})

    def fail(sibling):
        sibling.write_text("half of it")
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        artifacts.write_atomically(path, fail)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and str(path) in str(caught.value)
    assert artifacts.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_failure_to_flush_or_rename_keeps_the_old_file(tmp_path, monkeypatch):
    """The file is replaced only once the new one is on disk."""
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"old": 1})
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(StorageError, match="Input/output error"):
                artifacts.write_json(path, {"new": 2})
        assert artifacts.read_json(path) == {"old": 1}
        assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.slow
def test_real_size_limit_keeps_the_old_file(tmp_path):
    """A process that may write no more than 4 kB: StorageError, and the old tensors are still there."""
    path = tmp_path / "a.safetensors"
    tensor_files.save_tensors(path, {"x": torch.arange(4.0)})
    code = (
        "import resource, signal, sys, pathlib, torch\n"
        "from lorag import errors\nfrom lorag.files import tensors as tensor_files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    tensor_files.save_tensors(pathlib.Path(sys.argv[1]), {'x': torch.zeros(10**5)})\n"
        "except errors.StorageError as error:\n    print(error); sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 7, done.stderr
    assert "File too large" in done.stdout and str(path) in done.stdout
    assert torch.equal(load_file(path)["x"], torch.arange(4.0))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_unwritable_folder_is_a_storage_error(tmp_path):
    """A file where the folder should be."""
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match="writing"):
        artifacts.write_json(tmp_path / "a" / "b.json", {})


def test_a_new_folder_is_whole_or_absent(tmp_path):
    """Folders inside it are written too; an empty folder is filled, one in use is left alone, and a failure leaves no rest."""

    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        atomic.write_folder(tmp_path / name, write)
        assert (tmp_path / name / "inner" / "file").read_text() == "x"
    for used in (tmp_path / "new", tmp_path / "new" / "inner" / "file"):
        with pytest.raises(StorageError, match=f"^{re.escape(str(used))} is not an empty folder"):
            atomic.write_folder(used, write)
    with pytest.raises(StorageError, match="No space left"):
        atomic.write_folder(tmp_path / "failed", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


@pytest.mark.slow
def test_equal_tensors_give_equal_bytes(tmp_path):
    """Neither the order of tensors nor of metadata, nor the process's hash seed, changes the file."""
    tensors, metadata = {"b": torch.ones(2, 3).T, "a": torch.arange(3)}, {"z": "1", "y": "2", "x": "3", "w": "4"}
    tensor_files.save_tensors(tmp_path / "a", tensors, metadata)
    tensor_files.save_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    code = (
        "import torch, pathlib, sys; from lorag.files import artifacts; from lorag.files import tensors as tensor_files\n"
        "tensors = {'b': torch.ones(2, 3).T, 'a': torch.arange(3)}\n"
        "tensor_files.save_tensors(pathlib.Path(sys.argv[1]), tensors, {'z': '1', 'y': '2', 'x': '3', 'w': '4'})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert tensor_files.read_header(tmp_path / "a") == ({"a": ("I64", (3,)), "b": ("F32", (3, 2))}, metadata)
    assert torch.equal(load_file(tmp_path / "a")["b"], tensors["b"])
    assert list(tensor_files.load_tensors(tmp_path / "a", prefix="b")) == [""]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    st.dictionaries(
        st.text(max_size=9),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    )
)
def test_json_round_trip(value):
    """What is written is read back."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts.write_json(Path(folder, "a.json"), value)
        assert artifacts.read_json(Path(folder, "a.json")) == value


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": [-Infinity]}',
        '{"a": 1e999}',
        '{"a": -1e999}',
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        "[1]",
        "3",
        "null",
        "",
        "{",
        "{'a': 1}",
        '{"a": 1} x',
        "[" * 100_000,
        '{"a": ' + "9" * 10_000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_loose_json_is_refused(tmp_path, text):
    """NaN, infinity (also spelled 1e999), a key twice, no object, no JSON, bottomless nesting: the file is named."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="a.json"):
        artifacts.read_json(path)


def test_unreadable_json_files_are_refused(tmp_path):
    """Missing, a folder, not UTF-8, too large."""
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "large").write_text('{"a": "' + "x" * 100 + '"}')
    for path, text in (
        (tmp_path / "no", "missing"),
        (tmp_path, "missing"),
        (tmp_path / "latin", "UTF-8"),
        (tmp_path / "large", "too large"),
    ):
        with pytest.raises(ArtifactError, match=text):
            artifacts.read_json(path, 100)


def test_nan_is_never_written(tmp_path):
    """A NaN in a report is our bug, not a file."""
    with pytest.raises(ValueError):
        artifacts.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


# --- safetensors headers ----------------------------------------------------------------------------------------------


def _file(path, header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def test_good_header_is_read(tmp_path):
    """The file that the refusals below spoil is itself accepted, by us and by safetensors."""
    path = _file(tmp_path / "a.safetensors", {"x": _entry(), "__metadata__": {"k": "v"}})
    assert tensor_files.read_header(path) == ({"x": ("F32", (2,))}, {"k": "v"})
    assert tensor_files.load_tensors(path)["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "header",
    [
        {"x": _entry(), "y": _entry()},
        {"x": _entry(), "y": _entry(data_offsets=[4, 12])},
        {"x": _entry(data_offsets=[0, 4])},
        {"x": _entry(data_offsets=[4, 8], shape=[1])},
        {"x": _entry(data_offsets=[8, 0])},
        {"x": _entry(data_offsets=[0, 8, 8])},
        {"x": _entry(data_offsets=["0", "8"])},
        {"x": _entry(data_offsets=[0.0, 8.0])},
        {"x": _entry(data_offsets=None)},
        {"x": _entry(shape=[3])},
        {"x": _entry(shape=[2**40, 2**40])},
        {"x": _entry(shape=[-1, -2])},
        {"x": _entry(shape=[2.0])},
        {"x": _entry(shape=[2, True])},
        {"x": _entry(shape=2)},
        {"x": _entry(dtype="F31")},
        {"x": _entry(dtype=["F32"])},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": 3},
        {"x": _entry(), "__metadata__": [1]},
        {"x": _entry(), "__metadata__": {"k": {"deep": 1}}},
        json.dumps({"x": _entry()}).encode("utf-16-le"),
        {},
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"[]",
        b"{]",
        b"{\xff\xfe}",
        b'{"x": NaN}',
        b"pickle, really",
    ],
    ids=str,
)
def test_lying_headers_are_refused(tmp_path, header):
    """Overlaps, gaps, wrong totals, unknown types, impossible shapes, no JSON: refused, and the file is named."""
    path = _file(tmp_path / "a.safetensors", header)
    for read in (tensor_files.read_header, tensor_files.load_tensors):
        with pytest.raises(ArtifactError, match="a.safetensors"):
            read(path)


def test_headers_that_only_the_library_refuses_are_artifact_errors(tmp_path):
    """Half a surrogate pair is a string for Python and none for safetensors; its own error never reaches the user."""
    path = _file(tmp_path / "a.safetensors", {"\ud800": _entry()})
    with pytest.raises(ArtifactError, match="a.safetensors"):
        tensor_files.load_tensors(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1) + b"{}",
        struct.pack("<Q", 40) + b"{}",
    ],
    ids=str,
)
def test_short_files_and_huge_lengths_are_refused(tmp_path, raw):
    """A header's length is believed only within the file; nothing is allocated for it."""
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(ArtifactError, match="a.safetensors"):
        tensor_files.read_header(tmp_path / "a.safetensors")


def test_cut_and_lengthened_files_are_refused(tmp_path):
    """A download that stopped, or a tail that hides something."""
    path = tmp_path / "a.safetensors"
    tensor_files.save_tensors(path, {"x": torch.zeros(16)})
    raw = path.read_bytes()
    for spoiled in (raw[:-1], raw + b"\0", raw[:-64]):
        path.write_bytes(spoiled)
        with pytest.raises(ArtifactError, match="cut short or has a tail"):
            tensor_files.read_header(path)


def test_missing_file_is_refused(tmp_path):
    """A path that leads nowhere, or to a folder."""
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(ArtifactError, match="missing"):
            tensor_files.read_header(path)


def test_pickles_are_never_run(tmp_path):
    """A pickle renamed .safetensors is refused, and its code does not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bombed"),)

    torch.save({"x": Bomb()}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in "ab":
        with pytest.raises(ArtifactError, match="not a safetensors file"):
            tensor_files.load_tensors(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "bombed").exists()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_cleanly(data):
    """Whatever a header holds, the answer is ArtifactError and no other exception."""
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder, "a.safetensors"), b"{" + data)
        with pytest.raises(ArtifactError):
            tensor_files.read_header(path)


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A complete folder: one file and its manifest."""
    tensor_files.save_tensors(tmp_path / "sub" / "x.safetensors", {"x": torch.zeros(4)})
    artifacts.write_manifest(tmp_path, "m.json", {"kind": "bank", "format": 1, "extra": "kept"}, ["sub/x.safetensors"])
    return tmp_path


def test_manifest_round_trip(folder):
    """The fields come back, and each file is listed with size and checksum."""
    manifest = artifacts.check_manifest(folder, "m.json", "bank", 1)
    assert manifest["extra"] == "kept"
    path = folder / "sub" / "x.safetensors"
    assert manifest["files"] == {"sub/x.safetensors": {"bytes": path.stat().st_size, "sha256": artifacts.sha256(path)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "generator"},
        {"format": 2},
        {"format": None},
        {"files": None},
        {"files": ["sub/x.safetensors"]},
        {"files": {"sub/x.safetensors": None}},
        {"files": {"sub/x.safetensors": {"bytes": 1, "sha256": "0"}}},
        {"files": {"sub/no.safetensors": {"bytes": 1, "sha256": "0"}}},
        {"files": {"../x": {}}},
        {"files": {"/etc/passwd": {}}},
        {"files": {"sub": {}}},
    ],
    ids=str,
)
def test_manifests_that_do_not_fit_are_refused(folder, changes):
    """Another kind or version, files that are missing, differ or lie outside."""
    manifest = artifacts.read_json(folder / "m.json")
    artifacts.write_json(folder / "m.json", {**manifest, **changes})
    with pytest.raises(ArtifactError):
        artifacts.check_manifest(folder, "m.json", "bank", 1)


def test_tampered_and_unfinished_folders_are_refused(folder):
    """One flipped bit, or no manifest: an unfinished folder is not read."""
    path = folder / "sub" / "x.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="x.safetensors"):
        artifacts.check_manifest(folder, "m.json", "bank", 1)
    (folder / "m.json").unlink()
    with pytest.raises(ArtifactError, match="not a complete lorag bank"):
        artifacts.check_manifest(folder, "m.json", "bank", 1)


def test_missing_embedded_folder_names_where_it_looked():
    """The remedy is part of the message."""
    with pytest.raises(LoragError, match="lorag sandbox build"):
        artifacts.embedded("checkpoints/no-such")


# --- files that belong together -----------------------------------------------------------------------------------------


def _pair(text):
    def write(staging):
        for name in ("a", "b", "last"):
            (staging / name).write_text(text)

    return write


def _texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_together(tmp_path):
    """All of them, nothing else, and nothing is left lying about."""
    (tmp_path / "mine").write_text("kept")
    for text in ("old", "new"):
        artifacts.replace_together(tmp_path, _pair(text), "last")
        assert _texts(tmp_path) == {"mine": "kept", "a": text, "b": text, "last": text}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_replacement_that_fails_changes_nothing(tmp_path, error):
    """A full disk or an interruption while the second of three files is written."""
    artifacts.replace_together(tmp_path, _pair("old"), "last")

    def fail(staging):
        (staging / "a").write_text("new")
        raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        artifacts.replace_together(tmp_path, fail, "last")
    assert _texts(tmp_path) == {"a": "old", "b": "old", "last": "old"}


@pytest.mark.parametrize("moved", range(5))
def test_a_replacement_cut_off_after_its_decision_is_finished(tmp_path, moved):
    """However many of the files were moved when the process died; until then nobody takes old and new for one."""
    artifacts.replace_together(tmp_path, _pair("old"), "last")
    journal = tmp_path / ".replacing"
    journal.mkdir()
    _pair("new")(journal)
    if moved:
        (tmp_path / "last").unlink()
    for name in ("a", "b", "last")[: max(0, moved - 1)]:
        (journal / name).replace(tmp_path / name)
    artifacts.finish_replacing(tmp_path, "last")
    assert _texts(tmp_path) == {"a": "new", "b": "new", "last": "new"}


def test_a_folder_without_a_rest_is_not_touched(tmp_path):
    """Readers may call it on folders that cannot be written to, or that are none."""
    artifacts.finish_replacing(tmp_path / "no", "last")
    (tmp_path / ".replacing").symlink_to("/etc")
    artifacts.finish_replacing(tmp_path, "last")
    assert (tmp_path / ".replacing").is_symlink()


def test_debris_of_killed_writers_is_swept(tmp_path):
    """Unfinished siblings go after an hour; those of a writer that may still be at it stay, and so do other files."""
    old, new, other = tmp_path / ".a.json.x.tmp", tmp_path / ".a.json.y.tmp", tmp_path / ".b.json.x.tmp"
    for path in (old, new, other):
        path.write_text("")
    folder = tmp_path / ".new.x.tmp"
    (folder / "sub").mkdir(parents=True)
    for path in (old, other, folder):
        os.utime(path, (1, 1))
    artifacts.write_json(tmp_path / "a.json", {})
    assert not old.exists() and new.exists() and other.exists()
    artifacts.replace_together(tmp_path, _pair("new"), "last")
    assert not folder.exists() and new.exists()
