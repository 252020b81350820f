"""Base models in GGUF files, as llama.cpp keeps them: checked, and converted once to a folder that transformers loads."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorag.errors import BaseModelError, LoragError, MissingDependencyError
from lorag.files.artifacts import looks_like, require_plain, sha256, write_json
from lorag.files.cache import cached_folder
from lorag.progress import progress_bar, quiet_loading

__all__ = ["ORIGIN", "converted", "is_gguf"]

logger = logging.getLogger(__name__)

ORIGIN = "gguf.json"  # in a converted folder: the file that it was made from
_FORMAT = 1  # of converted folders; raised when the same file is converted to something else
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "starcoder2", "gpt2")
# Vocabularies whose merges were learned on text with every digit by itself. transformers splits them as GPT-2's, so that blanks
# before digits become other tokens than the model knows (checked against llama.cpp's own tokenizer).
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PLAIN_SPLITS = ("gpt-2", "default", None)


def is_gguf(name: str) -> bool:
    """Whether a base model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def converted(path: Path, digest: str | None = None) -> Path:
    """The folder that a GGUF file was converted to, in lorag's cache: safetensors in fp32, config, tokenizer and chat template.

    Quantised weights are dequantised, exactly as llama.cpp reads them.

    Args:
        path: The file.
        digest: Its sha256, if it is known already.

    Raises:
        BaseModelError: If it is missing, damaged, or of an architecture that cannot be converted.
        MissingDependencyError: If the package gguf is needed and missing.
        StorageError: If the cache cannot be written to.
    """
    _check_start(path)
    digest = digest or sha256(path)
    name = "-".join(re.findall("[a-z0-9]+", path.stem.lower()))[:48]
    return cached_folder(f"bases/{name}-{digest[:16]}-{_FORMAT}", lambda folder: _convert(path, folder, digest))


@dataclass(frozen=True)
class _Facts:
    architecture: str
    format: str  # the commonest type of its weights
    splitting: str | None  # how its vocabulary wants text split


def _check_start(path: Path) -> None:
    try:
        size = require_plain(path, named=True)
        with path.open("rb") as file:
            start = file.read(64)
    except (LoragError, OSError) as error:
        raise BaseModelError(f"base model {path} cannot be read", got=str(error), remedy="Check the path.") from error
    if not start.startswith(b"GGUF"):
        raise BaseModelError(
            f"base model {path} is not a GGUF file", got=looks_like(start), expected="GGUF", remedy="Was it downloaded completely?"
        )
    if size < 64:
        raise _damaged(path, f"{size} bytes")


def _damaged(path: Path, got: object) -> BaseModelError:
    return BaseModelError(f"GGUF file {path} is cut short or damaged", got=got, remedy="Download it again.")


def _read_facts(path: Path) -> _Facts:
    """Reads the header and places every tensor, without reading weights.

    Raises:
        BaseModelError: If the file is damaged or of another architecture.
        MissingDependencyError: If the package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"reading {path.name} needs the package gguf", remedy="Install it: pip install 'lorag[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name].contents() for name in ("general.architecture", "tokenizer.ggml.pre") if name in reader.fields}
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
        vocabulary = "tokenizer.ggml.tokens" in reader.fields
    except Exception as error:  # its reader has no errors of its own: a damaged file fails wherever it is met
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    architecture = str(fields.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise BaseModelError(
            f"GGUF file {path} is of an architecture that lorag does not convert",
            got=architecture,
            expected=", ".join(_ARCHITECTURES),
            remedy="Give the model's folder or hub id instead.",
        )
    if not kinds or not vocabulary:
        raise BaseModelError(
            f"GGUF file {path} is not a whole model",
            got="no weights" if vocabulary else "no vocabulary",
            remedy="Give the model's own file.",
        )
    return _Facts(architecture, kinds.most_common(1)[0][0], fields.get("tokenizer.ggml.pre"))


def _convert(path: Path, folder: Path, digest: str) -> None:
    """Converts a file into an empty folder."""
    with progress_bar(total=4, desc=f"converting {path.name}, once") as bar:
        facts = _read_facts(path)
        bar.update()
        try:
            with _alone(path) as only, quiet_loading(), contextlib.redirect_stderr(io.StringIO()):
                tokenizer = _tokenizer(only, facts.splitting)
                tokenizer.save_pretrained(folder)
                model = _model(only)
                bar.update(2)
                model.save_pretrained(folder)
        except Exception as error:  # whatever a damaged tensor or an unheard-of setting makes fail in transformers
            got = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
            remedy = "Give the model's folder or hub id instead."
            raise BaseModelError(f"GGUF file {path} cannot be converted", got=got, remedy=remedy) from error
        plain = facts.format in ("F32", "F16", "BF16")
        stored = facts.format if plain else f"{facts.format}, dequantised"
        write_json(folder / ORIGIN, {"file": path.name, "sha256": digest, "format": stored})
        bar.update()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers would take configs and adapters that lie beside it for the model's."""
    with tempfile.TemporaryDirectory() as folder:
        only = Path(folder) / path.name
        try:
            only.symlink_to(path.resolve())
        except OSError:  # Windows asks for a right that users rarely have
            shutil.copyfile(path, only)
        yield only


def _model(path: Path) -> Any:  # noqa: ANN401 - of a class that the file names
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    # What is left of the quantisation would make `save_pretrained` refuse, and a later reader dequantise again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model


def _tokenizer(path: Path, splitting: str | None) -> Any:  # noqa: ANN401 - of a class that the file names
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    bytewise = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)  # else transformers knew how to split
    if bytewise and splitting in _SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif bytewise and splitting not in _PLAIN_SPLITS:
        logger.warning("%s: text is split as GPT-2 does, not as %s; some tokens may differ", path.name, splitting)
    return tokenizer
