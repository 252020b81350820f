"""The objective of models of two towers, such as CLIP: images and texts that belong together find each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lorag.base.objectives.base import Objective, take, task_rng, test_examples, training_examples
from lorag.errors import ConfigError, TaskError
from lorag.files.images import ImageFile

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from lorag.base.row_adapters import Cores, RowAdapters, Stacked
    from lorag.tasks.suite import Example, Task

__all__ = ["ImageText", "open_images", "recall"]


@dataclass(frozen=True)
class _Pairs:
    """Rows of images and texts in equal runs, one run per task."""

    pixels: Tensor  # (b, 3, height, width)
    texts: dict[str, Tensor]  # tokens (b, t)
    fits: Tensor  # (n, q, q): whether text j fits image i; more than the diagonal where a batch holds one twice


class ImageText(Objective):
    """Retrieval: an example's input is an image, its output a text that describes it.

    The loss is the symmetric contrastive one of CLIP (Radford et al. 2021) with the model's own temperature, over the pairs of
    one task; the score is recall@k among a task's own test examples, in both directions, as SG-LoRA (arXiv 2509.10535)
    reports it. An image with several texts is found by any of them.

    Args:
        tokenizer: The processor.
        max_length: Most tokens of a text; CLIP's text tower has 77 places.
        k: The values of k.
    """

    name, kind, metric = "image_text", "two_towers", "recall_at_1"
    reads_texts = False
    needs_processor = True
    rows_at_once = 64

    def __init__(self, tokenizer: Any, max_length: int = 77, k: Sequence[int] = (1, 5)) -> None:  # noqa: ANN401 - a processor
        super().__init__(tokenizer, max_length)
        if 1 not in k or any(not isinstance(one, int) or one < 1 for one in k):
            raise ConfigError("objective_settings.k cannot be used", got=list(k), expected="whole numbers, 1 among them")
        self.k = tuple(k)

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        return {"max_length": self.max_length, "k": list(self.k)}

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> _Pairs:
        """Draws `count` pairs a task: different images as far as there are enough, each with one of its texts."""
        images: list[str] = []
        texts: list[str] = []
        for task in tasks:
            rng = task_rng(task, seed)
            groups = _by_image(training_examples(task))
            names = sorted(groups)
            chosen = rng.sample(names, min(count, len(names)))
            chosen += rng.choices(names, k=count - len(chosen))
            images += [groups[name][0].input for name in chosen]
            texts += [rng.choice(groups[name]).output for name in chosen]
        fits = [
            [[images[i] == images[j] or texts[i] == texts[j] for j in range(start, start + count)] for i in range(start, start + count)]
            for start in range(0, len(images), count)
        ]
        return _Pairs(self._pixels(images), self._tokens(texts), torch.tensor(fits))

    def losses(self, model: PreTrainedModel, batch: _Pairs) -> Tensor:
        """Mean of both directions' cross-entropies over cosines times the model's temperature, one value per task."""
        n = len(batch.fits)
        images = rearrange(_image_vectors(model, batch.pixels), "(n q) e -> n q e", n=n)
        texts = rearrange(_text_vectors(model, batch.texts), "(n q) e -> n q e", n=n)
        bare: Any = model
        logits = torch.einsum("nie,nje->nij", images, texts) * bare.logit_scale.float().exp()
        fits = batch.fits.to(logits.device, logits.dtype)
        by_image = -(logits.log_softmax(2) * fits / fits.sum(2, keepdim=True)).sum(2)
        by_text = -(logits.log_softmax(1) * fits / fits.sum(1, keepdim=True)).sum(1)
        return (by_image.mean(1) + by_text.mean(1)) / 2

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The images' embeddings (b, h)."""
        return _image_vectors(model, self._pixels(inputs))

    @torch.inference_mode()
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Recall at each k from image to text, from text to image, and their mean."""
        results = []
        for index, task in enumerate(tasks):
            examples = test_examples(task, limit)
            groups = _by_image(examples)
            texts = list(dict.fromkeys(example.output for example in examples))
            adapter = take(adapters, index, index + 1)
            with nullcontext(rows.model) if adapter is None else rows.use(adapter) as model:
                seen = torch.cat([_image_vectors(model, self._pixels(part)) for part in _parts(list(groups), self.rows_at_once)])
                read = torch.cat([_text_vectors(model, self._tokens(part)) for part in _parts(texts, self.rows_at_once)])
            fits = torch.tensor([[any(e.output == text for e in group) for text in texts] for group in groups.values()])
            similarity = (seen @ read.T).cpu()
            score: dict[str, float] = {}
            for k in self.k:
                to_text, to_image = recall(similarity, fits, k), recall(similarity.T, fits.T, k)
                score |= {f"image_to_text_at_{k}": to_text, f"text_to_image_at_{k}": to_image, f"recall_at_{k}": (to_text + to_image) / 2}
            results.append(score)
        return results

    def _pixels(self, images: Sequence[str]) -> Tensor:
        return self.tokenizer.image_processor(open_images(images), return_tensors="pt")["pixel_values"]

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        read = self.tokenizer.tokenizer(list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {key: read[key] for key in ("input_ids", "attention_mask")}


def open_images(inputs: Sequence[str]) -> list[Image]:
    """Decodes the inputs of examples.

    Raises:
        TaskError: If one is not an image of a suite.
        ArtifactError: If one cannot be decoded.
    """
    opened = []
    for one in inputs:
        if not isinstance(one, ImageFile):
            raise TaskError(
                "an input is not an image of a suite",
                got=repr(one)[:80],
                remedy='Its task needs "inputs": "image" in tasks.jsonl.',
            )
        opened.append(one.open())
    return opened


def recall(similarity: Tensor, fits: Tensor, k: int) -> float:
    """Recall@k: the share of rows with a fitting column among their k most similar ones.

    A tie counts against it: embeddings that are all alike find nothing.

    Args:
        similarity: (q, c).
        fits: (q, c), true where column and row belong together; at least one in each row.
        k: How many are looked at.
    """
    best = similarity.masked_fill(~fits, float("-inf")).amax(1, keepdim=True)
    return (((similarity >= best) & ~fits).sum(1) < k).float().mean().item()


def _by_image(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.input, []).append(example)
    return groups


def _parts(rows: Sequence[str], most: int) -> list[Sequence[str]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]


def _image_vectors(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Unit-length embeddings (b, e) of images."""
    towers: Any = model
    output = towers.get_image_features(pixel_values=pixels.to(towers.device, towers.dtype))
    return F.normalize(output.pooler_output.float(), dim=-1)


def _text_vectors(model: PreTrainedModel, texts: dict[str, Tensor]) -> Tensor:
    """Unit-length embeddings (b, e) of texts."""
    towers: Any = model
    output = towers.get_text_features(**{key: value.to(towers.device) for key, value in texts.items()})
    return F.normalize(output.pooler_output.float(), dim=-1)
