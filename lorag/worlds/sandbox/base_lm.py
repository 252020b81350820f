"""The sandbox's base language model: a small Llama that reads a text and writes *some* answer to it.

It is trained on texts and answers with no instruction, so a text alone never tells it which task is meant. Several
answers to one text share one reading of it: they lie side by side in a sequence, and a mask keeps them apart.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

from lorag.files.training_state import load_training_state, save_training_state
from lorag.progress import progress_bar
from lorag.worlds.sandbox import world
from lorag.worlds.sandbox.grid import splits

__all__ = ["TEMPLATE", "PretrainConfig", "pretrain", "train_tokenizer"]

logger = logging.getLogger(__name__)

TEMPLATE = "{input}\n"  # what stands before an answer


@dataclass(frozen=True)
class PretrainConfig:
    """Size and training of the base model; the defaults made the shipped one."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    steps: int = 1000
    texts: int = 32
    answers: int = 16
    learning_rate: float = 3e-3
    text_weight: float = 0.1
    seed: int = 0


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Words of the world as whole tokens, each with the space before it, in every case in which they occur.

    A name is then one token wherever it stands, so that copying it is looking it up; what the world does not know
    falls back to characters and bytes. An opening quotation mark is followed by a space inside the tokenizer only.
    """
    rng = random.Random(seed)
    seen = sorted(splits()["train"] + splits()["without_expert"])
    inward = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r'(?<=")(?=\w)'), " ")])
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex("\u2581?[\\w'-]+"), "isolated"),
        ]
    )
    counts: Counter[str] = Counter()
    for cell in seen * 60:
        text = world.write_text(cell.domain, rng)
        for part in (TEMPLATE.format(input=text.text), world.answer(text, cell.skill, cell.style, rng.choice(world.DOMAINS))):
            counts.update(word for word, _ in words.pre_tokenize_str(inward.normalize_str(part)))
    counts.update({word.upper(): 1 for word in counts if word.lstrip("\u2581").isalpha()})
    characters = {chr(code) for code in range(32, 127)} | {"\n", "\u2581"}
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    # Scores: a known word beats any way to spell it, and a character beats its bytes.
    pieces = [(token, 0.0) for token in special] + [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    pieces += [(character, -20.0) for character in sorted(characters)]
    pieces += [(word, -10.0) for word in sorted(counts) if word not in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = inward, words
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse(), decoders.Replace(Regex(r'" (?=\w)'), '"')]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
    )


class _Cases:
    """Keeps the embedding of each upper-case word at that of the same word elsewhere plus one shared direction.

    Case is then one direction for all words: a word that no answer ever showed in capitals can still be written so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = tokenizer.get_vocab()
        by_upper = {token.upper(): index for token, index in sorted(vocabulary.items()) if token.upper() != token}
        pairs = [(index, by_upper[token]) for token, index in vocabulary.items() if token in by_upper]
        self.upper, self.lower = torch.tensor(pairs).T

    @torch.no_grad()
    def project(self, weight: Tensor) -> None:
        """Moves embeddings (v, d) to the nearest that obey the rule."""
        direction = (weight[self.upper] - weight[self.lower]).mean(0)
        weight[self.lower] = (weight[self.lower] + weight[self.upper] - direction) / 2
        weight[self.upper] = weight[self.lower] + direction


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # (b, t)
    positions: Tensor  # (b, t)
    mask: Tensor  # (b, 1, t, t) additive
    source: Tensor  # (n, 2) row and position whose output predicts ...
    target: Tensor  # (n,) ... this answer token
    text_source: Tensor  # (m, 2)
    text_target: Tensor  # (m,)


def _batch(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, forms: dict[str, list], rng: random.Random) -> _Batch:
    """Packs `config.texts` texts with `config.answers` answers each."""
    prompts, groups = [], []
    for _ in range(config.texts):
        name = rng.choice(world.DOMAINS)
        text = world.write_text(name, rng)
        prompts.append(TEMPLATE.format(input=text.text))
        groups += [world.answer(text, *rng.choice(forms[name])) for _ in range(config.answers)]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    read = [[bos, *ids] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    written = [[*ids, eos] for ids in tokenizer(groups, add_special_tokens=False)["input_ids"]]
    rows, positions, branches, source, target, text_source, text_target = [], [], [], [], [], [], []
    for row, prompt in enumerate(read):
        ids, place, branch = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for offset in rng.sample(range(len(prompt) - 1), len(prompt) // 4):
            text_source.append((row, offset))
            text_target.append(prompt[offset + 1])
        for number, answer in enumerate(written[row * config.answers : (row + 1) * config.answers], start=1):
            before = len(prompt) - 1
            for step, token in enumerate(answer):
                source.append((row, before))
                target.append(token)
                before = len(ids) + step
            ids += answer
            place += range(len(prompt), len(prompt) + len(answer))
            branch += [number] * len(answer)
        rows.append(torch.tensor(ids))
        positions.append(torch.tensor(place))
        branches.append(torch.tensor(branch))
    pad = torch.nn.utils.rnn.pad_sequence
    packed = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    padded = pad(branches, batch_first=True, padding_value=-1)
    length = packed.shape[1]
    same = (padded[:, :, None] == padded[:, None, :]) | (padded[:, None, :] == 0)
    visible = same & torch.ones(length, length, dtype=torch.bool).tril()
    return _Batch(
        ids=packed,
        positions=pad(positions, batch_first=True),
        mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None],
        source=torch.tensor(source),
        target=torch.tensor(target),
        text_source=torch.tensor(text_source),
        text_target=torch.tensor(text_target),
    )


def _forms() -> dict[str, list[tuple[str, str, str]]]:
    """For texts of each domain, all (skill, style, note) but the held-out tasks."""
    held = {(cell.skill, cell.style, cell.domain) for name in ("test", "hard") for cell in splits()[name]}
    every = [(skill, style, note) for skill in world.SKILLS for style in world.STYLES for note in world.DOMAINS]
    return {name: [form for form in every if form[2] != name or form not in held] for name in world.DOMAINS}


def pretrain(folder: Path, config: PretrainConfig | None = None, *, quiet: bool = False) -> None:
    """Trains tokenizer and base model and writes them to `folder`; goes on where an interrupted run stopped.

    Args:
        folder: Gets the model in bf16, as `transformers` writes it, and the tokenizer.
        config: Size and training.
        quiet: No progress bar.
    """
    config = config or PretrainConfig()
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]  # its stub lacks attn_implementation
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )
    cases = _Cases(tokenizer)
    embeddings: Any = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[cases.upper] += torch.randn(config.hidden_size) * embeddings.std()
    cases.project(embeddings)
    # Muon for the matrices: role binding and copying form in half the steps that AdamW needs for them.
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rng = torch.Generator().manual_seed(config.seed)
    state, start = folder / "pretraining.safetensors", 0
    if state.exists():
        start = int(load_training_state(state, model, optimizers, rng)["step"])
        logger.info("resuming %s at step %d of %d", folder, start, config.steps)
    forms = _forms()
    bar = progress_bar(range(start, config.steps), initial=start, total=config.steps, desc="base model", disable=quiet)
    for step in bar:
        batch = _batch(tokenizer, config, forms, random.Random(int(torch.randint(2**62, (), generator=rng))))
        output: BaseModelOutputWithPast = model.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        )
        hidden: Any = output.last_hidden_state
        logits = model.lm_head(hidden[batch.source[:, 0], batch.source[:, 1]])
        loss = F.cross_entropy(logits, batch.target)
        text_logits = model.lm_head(hidden[batch.text_source[:, 0], batch.text_source[:, 1]])
        total = loss + config.text_weight * F.cross_entropy(text_logits, batch.text_target)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min((step + 1) / 100, 1.0, 2 * (1 - step / config.steps))
            optimizer.step()
        cases.project(embeddings)
        model.zero_grad(set_to_none=True)
        if step % 20 == 0:
            accuracy = (logits.argmax(-1) == batch.target).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", token_accuracy=f"{accuracy:.3f}")
        if (step + 1) % 250 == 0 and step + 1 < config.steps:
            save_training_state(state, model, optimizers, rng, {"step": step + 1})
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]  # the stub of `to` takes self for an argument
    tokenizer.save_pretrained(folder)
    state.unlink(missing_ok=True)
