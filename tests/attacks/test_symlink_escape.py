"""Links and things that are not files, where files belong: refused, other than the hub client's own links into its cache."""

import os

import pytest

from lorag.adapters.adapter import LoraAdapter
from lorag.bank.bank import AdapterBank
from lorag.cli.info import describe_path
from lorag.errors import LoragError
from lorag.files.artifacts import read_json, require_plain, resolve_inside
from lorag.files.tensors import read_header
from lorag.tasks.suite import TaskSuite

from .conftest import LAYOUT

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorag.json")


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_s_files_are_no_links(folder, refused, tmp_path, name):
    """Not even to a file that would be sound: it could be anybody's."""
    (folder.path / name).rename(tmp_path / "elsewhere")
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    refused(folder.read, LoragError, "link")
    refused(lambda: describe_path(folder.path), LoragError, "link")


@pytest.mark.parametrize("name", ["bank.json", "experts"])
def test_a_bank_s_files_and_folders_are_no_links(bank, refused, tmp_path, name):
    """Neither manifest nor the folder of shards."""
    (bank.folder / name).rename(tmp_path / "elsewhere")
    (bank.folder / name).symlink_to(tmp_path / "elsewhere")
    refused(lambda: AdapterBank.from_pretrained(bank.folder), LoragError, "link")


def test_a_suite_s_files_are_no_links(refused, tmp_path):
    """Examples that are a link to another user's file."""
    suite = tmp_path / "suite"
    suite.mkdir()
    (tmp_path / "t").write_text('{"name": "a", "descriptions": ["d"]}\n')
    (suite / "tasks.jsonl").symlink_to(tmp_path / "t")
    refused(lambda: TaskSuite.from_folder(suite), LoragError, "link")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "loop", "/dev/zero", "/proc/self/environ", "missing"])
def test_links_are_refused_wherever_they_lead(refused, tmp_path, target):
    """Outside, to themselves, to devices, to nowhere; as a file and on the way to one."""
    (tmp_path / "loop").symlink_to(target)
    for call in (lambda: require_plain(tmp_path / "loop"), lambda: resolve_inside(tmp_path, "loop"), lambda: read_json(tmp_path / "loop")):
        refused(call, LoragError)
    refused(lambda: resolve_inside(tmp_path, "loop/a"), LoragError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_pipes_and_folders_are_no_files(folder, refused):
    """Opening a pipe would wait for ever."""
    for name in FILES[:2]:
        kept = (folder.path / name).read_bytes()
        (folder.path / name).unlink()
        os.mkfifo(folder.path / name)
        refused(folder.read)
        refused(lambda name=name: read_header(folder.path / name))
        (folder.path / name).unlink()
        (folder.path / name).mkdir()
        refused(folder.read)
        (folder.path / name).rmdir()
        (folder.path / name).write_bytes(kept)
    folder.read()


def _cache(folder, root):
    """Lays an adapter out as the hub's client does: links from snapshots/<revision> to blobs/<digest>."""
    snapshot, blobs = root / "models--user--repo" / "snapshots" / "0123", root / "models--user--repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.path.iterdir() if path.is_file())):
        path.rename(blobs / f"digest{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/digest{number}")
    return snapshot, blobs


def test_the_hub_s_cache_is_read(folder, tmp_path):
    """Its links lead into their own repository, and nowhere else."""
    snapshot, _ = _cache(folder, tmp_path)
    assert LoraAdapter.from_pretrained(snapshot, LAYOUT).rank == 2


@pytest.mark.parametrize("kind", ["blob", "outside", "blobs", "other repository"])
def test_what_only_looks_like_the_cache_is_refused(folder, refused, tmp_path, kind):
    """A blob that is a link itself, a link past the blobs, blobs that are elsewhere, the blobs of another repository."""
    snapshot, blobs = _cache(folder, tmp_path)
    config = snapshot / "adapter_config.json"
    secret = tmp_path / "secret.json"
    config.resolve().rename(secret)
    if kind == "blob":
        (blobs / "digest0").unlink(missing_ok=True)
        (blobs / "digest0").symlink_to(secret)
        config.unlink()
        config.symlink_to("../../blobs/digest0")
    elif kind == "outside":
        config.unlink()
        config.symlink_to("../../../secret.json")
    elif kind == "blobs":
        blobs.rename(tmp_path / "moved")
        blobs.symlink_to(tmp_path / "moved")
        secret.rename(tmp_path / "moved" / os.path.basename(os.readlink(config)))
    else:
        (tmp_path / "models--other--repo" / "blobs").mkdir(parents=True)
        secret.rename(tmp_path / "models--other--repo" / "blobs" / "x")
        config.unlink()
        config.symlink_to("../../../models--other--repo/blobs/x")
    refused(lambda: LoraAdapter.from_pretrained(snapshot, LAYOUT), LoragError)
