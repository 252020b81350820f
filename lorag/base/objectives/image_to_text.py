"""The objective of encoder-decoders that read an image and a prompt, such as Florence-2: captions, or boxes as location tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.objectives.image_text import open_images
from lorag.base.objectives.language_model import TokenRows, pad_rows
from lorag.base.objectives.seq2seq_lm import Seq2SeqLM
from lorag.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorag.tasks.suite import Example

__all__ = ["ImageSeq2Seq", "box_f1", "boxes_of"]

_OBJECT = re.compile(r"([^<>]*)((?:<loc_\d{1,4}>){4})")
_PLACE = re.compile(r"<loc_(\d{1,4})>")
_MOST_TOKENS = 1024
_IMAGE_TOKENS = 577
_OVERLAP = 0.5  # intersection over union from which two boxes count as one

Box = tuple[str, float, float, float, float]


class ImageSeq2Seq(Seq2SeqLM):
    """An example's input is an image, its output what the decoder writes after the one prompt that all tasks share.

    Detection is text: `dog<loc_102><loc_40><loc_611><loc_980>` is a box from (x1, y1) to (x2, y2) in thousandths of width and
    height, as Florence-2 (Xiao et al. 2024) writes it, and several boxes follow one another. Teacher forcing gives losses,
    exact match and the rest; with `boxes` answers are also written out, and the score is F1 of the boxes of all test images at
    an overlap of 0.5. Written answers carry no confidences, so that there is no average precision to report.

    Args:
        tokenizer: The processor.
        prompt: What the processor turns into the prompt, such as "<OD>" or "<CAPTION>".
        max_length: Most tokens that are written.
        boxes: Whether outputs are boxes.
    """

    name, kind = "image_seq2seq", "image_seq2seq"
    reads_texts = False
    needs_processor = True

    def __init__(self, tokenizer: Any, prompt: str = "<OD>", max_length: int = 256, boxes: bool = False) -> None:  # noqa: ANN401 - a processor
        super().__init__(tokenizer.tokenizer, max_length=max_length)
        if not 1 <= max_length <= _MOST_TOKENS:
            raise ConfigError("objective_settings.max_length cannot be used", got=max_length, expected=f"1 to {_MOST_TOKENS}")
        self.processor, self.prompt, self.boxes = tokenizer, prompt, boxes
        self.metric = "box_f1" if boxes else "exact_match"

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        return {"prompt": self.prompt, "max_length": self.max_length, "boxes": self.boxes}

    def _read(self, inputs: Sequence[str]) -> dict[str, Tensor]:
        return dict(self.processor(images=open_images(inputs), text=[self.prompt] * len(inputs), padding=True, return_tensors="pt"))

    def _tokenised(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, list[int]]]:
        return [(image, [*self._ids(answer)[: self.max_length], self.tokenizer.eos_token_id]) for image, answer in pairs]

    def _size(self, row: tuple[Any, list[int]]) -> int:
        """Tokens of an answer, beside those of an image, of which all have about as many."""
        return _IMAGE_TOKENS + len(row[1])

    def _collate(self, rows: Sequence[tuple[Any, list[int]]], tasks: int) -> TokenRows:
        """Images and prompts for the encoder, and the decoder's targets, padded on the right."""
        return TokenRows(self._read([image for image, _ in rows]), pad_rows([answer for _, answer in rows], -100), tasks)

    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Logits of the answers alone: the begin token, which decoders of BART's family are given, is not a target."""
        first = [token for token in (_start(model), self.tokenizer.bos_token_id) if token is not None]
        before = batch.targets[:, :-1].clamp_min(0).masked_fill(batch.targets[:, :-1] == -100, int(self.tokenizer.pad_token_id))
        given = torch.cat([torch.tensor(first).expand(len(before), -1), before], 1)
        return model(**_on(model, batch.arguments), decoder_input_ids=given.to(model.device), use_cache=False).logits[:, len(first) - 1 :]

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The encoder's last states, averaged over image and prompt (b, h)."""
        read = _on(model, self._read(inputs))
        start = torch.full((len(inputs), 1), _start(model), device=model.device)
        states = model(**read, decoder_input_ids=start, use_cache=False).encoder_last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int | None = None) -> list[str]:
        """Greedy answers with their location tokens, by default of at most `max_length` tokens."""
        writer: Any = model
        written = writer.generate(
            **_on(writer, self._read(inputs)),
            max_new_tokens=self.max_length if max_new_tokens is None else max_new_tokens,
            do_sample=False,
            num_beams=1,
            no_repeat_ngram_size=0,  # coordinates do repeat
            forced_bos_token_id=self.tokenizer.bos_token_id,
        )
        ends = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
        # Location tokens are special ones to some tokenizers, and must not be skipped.
        return [str(self.tokenizer.decode([token for token in row if token not in ends])) for row in written.tolist()]

    @property
    def writes(self) -> bool:
        """Whether scores need answers that are written out."""
        return self.boxes

    def compare(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """F1 of the boxes; of captions, as language models."""
        if not self.boxes:
            return super().compare(answers, examples)
        return {"box_f1": box_f1([boxes_of(a) for a in answers], [boxes_of(example.output) for example in examples])}


def _start(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config(decoder=True)
    return int(config.decoder_start_token_id)


def _on(model: PreTrainedModel, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments on the model's device, pixels in its precision."""
    return {key: value.to(model.device, model.dtype if value.is_floating_point() else None) for key, value in arguments.items()}


def boxes_of(text: str) -> list[Box]:
    """Boxes of a written answer: label, x1, y1, x2, y2 in thousandths. A box without a label has that of the box before it."""
    boxes: list[Box] = []
    label = ""
    for name, places in _OBJECT.findall(text):
        label = " ".join(name.lower().split()) or label
        x1, y1, x2, y2 = (float(place) for place in _PLACE.findall(places))
        boxes.append((label, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def box_f1(answers: Iterable[Sequence[Box]], references: Iterable[Sequence[Box]]) -> float:
    """F1 over the boxes of all images: a box is right if one of its label, not yet taken, overlaps it by at least a half.

    Pairs are taken by overlap, the largest first. Without a box on either side it is 1: nothing to find, and nothing found.
    """
    right = total = 0
    for mine, wanted in zip(answers, references, strict=True):
        total += len(mine) + len(wanted)
        pairs = sorted(((_overlap(a, b), i, j) for i, a in enumerate(mine) for j, b in enumerate(wanted) if a[0] == b[0]), reverse=True)
        taken: set[tuple[str, int]] = set()
        for overlap, i, j in pairs:
            if overlap >= _OVERLAP and not {("mine", i), ("wanted", j)} & taken:
                taken |= {("mine", i), ("wanted", j)}
                right += 1
    return 2 * right / total if total else 1.0


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union; edges are whole places, so that a box of one place has a size."""
    width = min(one[3], other[3]) - max(one[1], other[1]) + 1
    height = min(one[4], other[4]) - max(one[2], other[2]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [(box[3] - box[1] + 1) * (box[4] - box[2] + 1) for box in (one, other)]
    return width * height / (sum(sizes) - width * height)
