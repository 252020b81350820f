"""Text embedders: descriptions to pooled and per-token vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lorag.base.base_model import device_of
from lorag.base.names import MINILM, locate
from lorag.errors import BaseModelError, MissingDependencyError
from lorag.progress import progress_bar, quiet_loading
from lorag.text.spelling import Vocabulary

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["CachedEmbedder", "Embedding", "SentenceEmbedder", "TextEmbedder", "with_details"]

DEFAULT_EMBEDDER = MINILM
_NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.onnx",
    "*.xml",
    "*.py",
    "openvino/*",
]


@dataclass(frozen=True)
class Embedding:
    """One embedded description: pooled (e,), of unit length, and one vector per token (t, e); both fp32 on the CPU."""

    pooled: Tensor
    tokens: Tensor


def with_details(description: Embedding, details: Sequence[Embedding]) -> Embedding:
    """A description read together with further texts on the same task, which count half, all of them together."""
    if not details:
        return description
    mean = torch.nn.functional.normalize(torch.stack([one.pooled for one in details]).mean(0), dim=0)
    pooled = torch.nn.functional.normalize(description.pooled + mean, dim=0)
    return Embedding(pooled, torch.cat([description.tokens, *(one.tokens for one in details)]))


class TextEmbedder(Protocol):
    """Anything that embeds descriptions."""

    @property
    def name(self) -> str:
        """What it was loaded from."""
        ...

    @property
    def size(self) -> int:
        """Length e of its vectors."""
        ...

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        """Embeds texts in order."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model.

    A token's vector is the mean of its states after the last layer and after two thirds of the layers: the last one has been
    drawn towards the sentence as a whole, the earlier one still tells the words apart. Read in this way, wordings that were kept
    back from training were understood more often (docs/results-history.md).

    Args:
        model: The loaded model.
        name: What it was loaded from.
    """

    def __init__(self, model: SentenceTransformer, name: str) -> None:
        self._model, self.name = model, name
        config = getattr(getattr(model[0], "model", None), "config", None)
        if config is not None:
            config.output_hidden_states = True

    @classmethod
    def from_pretrained(cls, name: str = DEFAULT_EMBEDDER, device: str = "auto") -> SentenceEmbedder:
        """Loads an embedder; the default comes from its PyPI package where that is installed, else from the hub."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError("sentence-transformers is not installed", remedy="pip install sentence-transformers") from error
        where = str(device_of(device))
        try:
            with quiet_loading():
                folder = _without_pickles(locate(name))
                model = SentenceTransformer(
                    folder, device=where, local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
                )
        except BaseModelError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(
                f"text embedder {name!r} cannot be loaded",
                got=next(iter(str(error).strip().splitlines()), type(error).__name__)[:160],
                remedy='Install its package, pip install "lorag[minilm]", or allow access to the hub.',
            ) from error
        return cls(model.eval(), name)

    @property
    def size(self) -> int:
        """Length e of its vectors."""
        return int(self._model.get_embedding_dimension() or 0)

    def knows(self, word: str) -> bool:
        """Whether a word in small letters is one token."""
        return len(self._model.tokenizer.tokenize(word)) == 1

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        """Embeds texts one length at a time, so that no text's vector depends on what stands beside it."""
        vectors: dict[str, Embedding] = {}
        tokenized = {text: len(self._model.tokenizer(text)["input_ids"]) for text in dict.fromkeys(texts)}
        by_length: dict[int, list[str]] = {}
        for text, length in tokenized.items():
            by_length.setdefault(length, []).append(text)
        with progress_bar(total=len(tokenized), desc="embedding descriptions", disable=quiet, leave=False) as bar:
            for same in by_length.values():
                for start in range(0, len(same), 64):
                    chunk = same[start : start + 64]
                    features = self._model.preprocess(chunk)
                    features = {
                        key: value.to(self._model.device) if isinstance(value, Tensor) else value for key, value in features.items()
                    }
                    with torch.inference_mode():
                        output = self._model(features)
                    pooled = torch.nn.functional.normalize(output["sentence_embedding"].float(), dim=-1).cpu()
                    tokens = _states(output).float().cpu()
                    for index, text in enumerate(chunk):
                        vectors[text] = Embedding(pooled[index].clone(), tokens[index].clone())
                    bar.update(len(chunk))
        return [vectors[text] for text in texts]


def _states(output: Mapping[str, Any]) -> Tensor:
    """One vector for each token (b, t, e); the last layer's alone where a model does not show the others."""
    last, layers = output["token_embeddings"], output.get("all_layer_embeddings")
    return last if layers is None else (last + layers[len(layers) * 2 // 3]) / 2


def _without_pickles(where: str) -> str:
    """Returns the folder of an embedder, fetched without files that would be unpickled.

    The library falls back to them for layers that have no safetensors.
    """
    if not Path(where).is_dir():
        from huggingface_hub import snapshot_download

        where = snapshot_download(where, ignore_patterns=_NOT_FETCHED)
    for path in sorted(Path(where).rglob("pytorch_model*.bin")):
        if not any(path.parent.glob("model*.safetensors")):
            raise BaseModelError(
                f"text embedder {where} has weights that lorag does not open",
                got=path.name,
                expected="safetensors",
                remedy="Save it again with its library's save_pretrained.",
            )
    return where


class CachedEmbedder:
    """Remembers what an embedder has embedded.

    Args:
        embedder: The embedder.
        limit: Most descriptions remembered; the cache starts anew beyond.
    """

    def __init__(self, embedder: TextEmbedder, limit: int = 50_000) -> None:
        self._embedder, self._limit = embedder, limit
        self._known: dict[str, Embedding] = {}

    @property
    def name(self) -> str:
        """Name of the embedder."""
        return self._embedder.name

    @property
    def size(self) -> int:
        """Length e of its vectors."""
        return self._embedder.size

    def knows(self, word: str) -> bool:
        """Whether the embedder knows a word; taken for granted of one that cannot tell."""
        return not isinstance(self._embedder, Vocabulary) or self._embedder.knows(word)

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        """Embeds what is not yet known."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > self._limit:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        self._known.update(zip(new, self._embedder.embed(new, quiet=quiet), strict=True))
        return [self._known[text] for text in texts]
