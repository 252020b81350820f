"""A base model's weights on disk: which files they are, and what identifies them."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from lorag.errors import ArtifactError
from lorag.files.artifacts import read_json, sha256
from lorag.files.tensors import read_header, tensor_bytes
from lorag.progress import progress_bar

__all__ = ["same_weights", "weight_files", "weights_identity"]

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 64 * 2**20
_PIECE = 8 * 2**20
_LONG = 2 * 2**30  # bytes from which reading them is worth a bar


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder: one, or the shards that the index lists; none if there are none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        places = read_json(folder / _INDEX).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, dict) else []
        return [folder / str(name) for name in names]
    return sorted(folder.glob("model*.safetensors"))


def weights_identity(folder: Path) -> str | None:
    """What tells the weights in a folder from all others: `tensors:` and 16 hex digits; None without weights.

    A digest over name, type, shape and values of every tensor in the order of their names, so that it is the same however
    the tensors are divided into files.

    Raises:
        ArtifactError: If a file is damaged, missing, or holds a tensor that another one holds too.
    """
    files = weight_files(folder)
    return _digest(tuple((file, *_state(file)) for file in files)) if files else None


def same_weights(folder: Path, identity: str) -> bool:
    """Whether the weights in a folder are those of an identity, also of one in the form of lorag 0.1: the first file's sha256."""
    if identity.startswith("sha256:"):
        files = weight_files(folder)
        return bool(files) and identity == _old_identity(files[0], *_state(files[0]))
    return identity == weights_identity(folder)


def _state(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read", got=error.strerror or error, remedy="Is the folder complete?") from error
    return state.st_size, state.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _old_identity(file: Path, size: int, changed: int) -> str:
    return "sha256:" + sha256(file)[:16]


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    lines: dict[str, str] = {}
    done, total = 0, sum(size for _, size, _ in files)
    with progress_bar(total=total // _PIECE, desc="reading the base model (pieces of 8 MiB)", disable=total < _LONG, leave=False) as bar:
        for path, _, _ in files:
            # Checked: tensors follow one another without gaps, in the order of the spec.
            spec, _ = read_header(path, _MAX_HEADER, every_type=True)
            with path.open("rb") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
                for name, (dtype, shape) in spec.items():
                    if name in lines:
                        raise ArtifactError(f"{path} repeats a tensor of another file", got=name, remedy="Which files belong to the model?")
                    digest, left = hashlib.sha256(), tensor_bytes(dtype, shape)
                    while left:
                        piece = file.read(min(left, _PIECE))
                        if not piece:
                            raise ArtifactError(f"{path} is cut short", got=f"{left} bytes fewer of {name}")
                        digest.update(piece)
                        left -= len(piece)
                        done += len(piece)
                        bar.update(done // _PIECE - (done - len(piece)) // _PIECE)
                    lines[name] = json.dumps([name, dtype, list(shape), digest.hexdigest()])
    whole = hashlib.sha256("\n".join(lines[name] for name in sorted(lines)).encode()).hexdigest()
    return f"tensors:{whole[:16]}"
