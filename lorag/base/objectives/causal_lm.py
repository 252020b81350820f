"""The objective of causal language models: an answer follows a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.base.objectives.language_model import LanguageModel, TokenRows, pad_rows
from lorag.base.objectives.packing import PackedRows, fitting, pack, shared_start
from lorag.base.objectives.prompts import CHAT, make_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorag.tasks.suite import Task

__all__ = ["CausalLM"]

_ROWS = 8  # packed rows that run together
_PAIRS = 64  # pairs that are read together


class CausalLM(LanguageModel):
    """Answers follow the prompt and end with the token that ends a turn.

    The template may be "chat", the tokenizer's own chat template, which it is by default where the tokenizer has one. Of prompts longer
    than `max_length` the beginning of the input is left out.

    Args:
        tokenizer: The base model's.
        system: System text of the chat template; None leaves it to the template.
        pack: Most tokens of a row in which the training examples of one task stand together, with their prompts' common beginning
            read once: much faster where inputs are short. What does not fit is left out, but for the first example. 0 gives each a
            row of its own. For decoders that take positions and a mask for each pair of tokens, as those with rotary embeddings do.
        settings: What all language models take.
    """

    name, kind = "causal_lm", "causal_lm"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, pack: int = 0, **settings: Any) -> None:  # noqa: ANN401 - see above
        super().__init__(tokenizer, **settings)
        self.system, self.pack = system, pack
        self.prompts = make_prompts(tokenizer, self.template, system, self.max_length)

    def _usual_template(self) -> str:
        return CHAT if getattr(self.tokenizer, "chat_template", None) else super()._usual_template()

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        more = {"system": self.system, "pack": self.pack or None}
        return super().settings() | {key: value for key, value in more.items() if value is not None}

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> Any:  # noqa: ANN401 - rows, packed or not
        """Draws `count` training examples per task."""
        if not self.pack:
            return super().sample(tasks, count, seed)
        return pack([fitting(group, self.pack) for group in self._drawn(tasks, count, seed)], self.tokenizer.pad_token_id)

    def sample_parts(self, tasks: Sequence[Task], count: int, seed: str, most: int | None = None) -> list[tuple[list[int], Any]]:
        """What `sample` draws, in parts of tasks of about one length, so that few tokens are padding; packed, of a few rows each."""
        if not self.pack:
            return [*super().sample_parts(tasks, count, seed, most)]
        groups = [fitting(group, self.pack) for group in self._drawn(tasks, count, seed)]
        order = sorted(range(len(tasks)), key=lambda number: sum(self._size(row) for row in groups[number]))
        parts = [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]
        return [(part, pack([groups[number] for number in part], self.tokenizer.pad_token_id)) for part in parts]

    def losses(self, model: PreTrainedModel, batch: Any) -> Tensor:  # noqa: ANN401 - rows, packed or not
        """Mean cross-entropy of the answers' tokens, one value per task."""
        if not isinstance(batch, PackedRows):
            return super().losses(model, batch)
        network: Any = model
        device = network.device
        bias = torch.zeros(batch.seen.shape, dtype=network.dtype).masked_fill(~batch.seen, torch.finfo(network.dtype).min)
        arguments = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": bias}
        rows, columns = batch.rows.to(device), batch.columns.to(device)
        if self._head_sees_rows(model):
            logits = self._forward(model, arguments, None).logits[rows, columns]
        else:
            logits = self._forward(model, arguments, lambda states: states[rows, columns][None]).logits[0]
        each = F.cross_entropy(logits.float(), batch.targets.to(device), reduction="none")
        count = len(batch.input_ids)
        return torch.zeros(count, device=device).index_add(0, rows, each) / torch.bincount(rows, minlength=count)

    def read(self, inputs: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts padded on the right, and which tokens (b, t) come after the beginning that all prompts share."""
        prompts = self.prompts.prompts(inputs)
        ids = pad_rows(prompts, self.tokenizer.pad_token_id)
        mask = pad_rows([[1] * len(prompt) for prompt in prompts], 0)
        start = shared_start(prompts) if len(prompts) > 1 else 0
        seen = mask.bool()
        seen[:, :start] = False
        return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": torch.ones(1, dtype=torch.long)}, seen

    def _tokenised(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, list[int]]]:
        return [(prompt, answer) for prompt, answer in self.prompts.rows(pairs)]

    def _collate(self, rows: Sequence[tuple[Any, list[int]]], tasks: int) -> TokenRows:
        """Prompts padded on the left and answers on the right, so that all answers start in one column."""
        prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
        pad = self.tokenizer.pad_token_id
        left, right = pad_rows(prompts, pad, left=True), pad_rows(answers, pad)
        mask = torch.cat([pad_rows([[1] * len(p) for p in prompts], 0, left=True), pad_rows([[1] * len(a) for a in answers], 0)], 1)
        arguments = {
            "input_ids": torch.cat([left, right], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        }
        return TokenRows(arguments, pad_rows(answers, -100), tasks)

    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        width = batch.targets.shape[1]
        return self._forward(model, batch.arguments, lambda states: states.contiguous(), width + 1).logits[:, :width]

    def _answer_logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Logits (k, v) of the k answer tokens: the head, larger than all else in a small model, sees their states alone."""
        if self._head_sees_rows(model):
            return super()._answer_logits(model, batch)
        width, answered = batch.targets.shape[1], (batch.targets != -100).to(model.device)
        return self._forward(model, batch.arguments, lambda states: states[:, -width - 1 : -1][answered][None], width + 1).logits[0]

    @staticmethod
    def _head_sees_rows(model: PreTrainedModel) -> bool:
        """Whether the head must get whole rows, since an adapter that changes it goes by them, or since the model has none apart."""
        head: Any = model.get_output_embeddings()
        return head is None or bool(head._forward_hooks) or hasattr(head, "lora_A")

    def _forward(
        self, model: PreTrainedModel, arguments: Mapping[str, Tensor], keep: Callable[[Tensor], Tensor] | None, last: int = 0
    ) -> Any:  # noqa: ANN401 - its class's output
        """Runs the model; `keep` chooses among the states (b, last, h) that its head gets; 0 is all columns.

        A slice that is not contiguous would make torch copy the head once for every row.
        """
        head: Any = model.get_output_embeddings()
        hook = None if head is None or keep is None else head.register_forward_pre_hook(lambda module, given: (keep(given[0]), *given[1:]))
        try:
            return model(**{key: value.to(model.device) for key, value in arguments.items()}, logits_to_keep=last, use_cache=False)
        finally:
            if hook is not None:
                hook.remove()

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """Last layer's states at the prompts' last position (b, h)."""
        prompts = self.prompts.prompts(inputs)
        ids = pad_rows(prompts, self.tokenizer.pad_token_id, left=True)
        mask = pad_rows([[1] * len(p) for p in prompts], 0, left=True)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        outputs: Any = model(**{k: v.to(model.device) for k, v in arguments.items()}, output_hidden_states=True, logits_to_keep=1)
        return outputs.hidden_states[-1][:, -1].float()

    @torch.inference_mode()
    def read_pairs(self, model: PreTrainedModel, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """The last layer's states (p, 2h), averaged over the prompt's tokens and over the answer's."""
        rows, parts = self._tokenised(pairs), []
        for start in range(0, len(rows), _PAIRS):
            batch = self._collate(rows[start : start + _PAIRS], 1)
            arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
            outputs: Any = model(**arguments, output_hidden_states=True, logits_to_keep=1, use_cache=False)
            states, seen = outputs.hidden_states[-1].float(), arguments["attention_mask"].float()
            width = batch.targets.shape[1]
            means = [
                (states[:, columns] * seen[:, columns, None]).sum(1) / seen[:, columns].sum(1, keepdim=True)
                for columns in (slice(None, -width), slice(-width, None))
            ]
            parts.append(torch.cat(means, 1))
        return torch.cat(parts)

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, one per row."""
        writer: Any = model
        prompts = self.prompts.prompts(inputs)
        ids = pad_rows(prompts, self.tokenizer.pad_token_id, left=True).to(writer.device)
        mask = pad_rows([[1] * len(p) for p in prompts], 0, left=True).to(writer.device)
        output = writer.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.prompts.stops),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [self.prompts.read(row) for row in output[:, ids.shape[1] :].tolist()]
