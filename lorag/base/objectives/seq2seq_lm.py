"""The objective of encoder-decoders: the encoder reads a prompt, the decoder writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.objectives.language_model import LanguageModel, TokenRows, pad_rows
from lorag.base.objectives.prompts import require_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Seq2SeqLM"]


class Seq2SeqLM(LanguageModel):
    """The encoder reads `template.format(input=...)`, the decoder writes the answer."""

    name, kind = "seq2seq_lm", "seq2seq_lm"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:  # noqa: ANN401 - what all language models take
        super().__init__(tokenizer, **settings)
        require_input(self.template)

    def _tokenised(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, list[int]]]:
        texts = [self.template.format(input=text) for text, _ in pairs]
        read = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [(ids, [*self._ids(answer), self.tokenizer.eos_token_id]) for ids, (_, answer) in zip(read, pairs, strict=True)]

    def _collate(self, rows: Sequence[tuple[Any, list[int]]], tasks: int) -> TokenRows:
        """Encoder rows and decoder targets, both padded on the right."""
        read = [ids for ids, _ in rows]
        arguments = {
            "input_ids": pad_rows(read, self.tokenizer.pad_token_id),
            "attention_mask": pad_rows([[1] * len(ids) for ids in read], 0),
        }
        return TokenRows(arguments, pad_rows([answer for _, answer in rows], -100), tasks)

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The encoder's last states, averaged over tokens (b, h): a decoder has read nothing yet."""
        texts = [self.template.format(input=text) for text in inputs]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt").to(model.device)
        encoder: Any = model.get_encoder()
        states = encoder(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
        return model(**arguments, labels=batch.targets.to(model.device), use_cache=False).logits

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, one per row."""
        writer: Any = model
        read = self.tokenizer(
            [self.template.format(input=text) for text in inputs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(writer.device)
        output = writer.generate(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
        )
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)
