"""What an adapter from elsewhere is for, and on which terms: from a sidecar, lorag.json or its model card.

Only words that say something about the task count. What templates and trainers put into every card does not, and a
card without more than that describes nothing: better no description than the same one for a thousand adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorag.errors import UndescribedError
from lorag.files.artifacts import decode_text, read_bounded
from lorag.files.markdown import plain_text, split_front, visible_text
from lorag.tasks.descriptions import check_description

__all__ = ["CARD", "SIDECAR", "Purpose", "find_purpose", "stated_licence"]

SIDECAR, CARD = "description.txt", "README.md"
_MAX_SIDECAR, _MAX_CARD = 2**18, 2**20
_READ_CARD = 2**13  # characters; what a model is for stands at the start of its card
_MOST_WORDINGS = 64
_LONGEST = 600
_FEWEST_WORDS, _FEWEST_CLAUSE = 3, 2
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*[\"']?([\w.+-]{1,60})[\"']?[ \t]*$", re.M)
_HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t#]*$|^([^\n]+)\n(?:=+|-{3,})[ \t]*$", re.M)
# Han, kana, Thai, Lao, Tibetan, Burmese and Khmer.
_JOINED = re.compile(
    "[\u0e01-\u0e5b\u0e81-\u0edf\u0f00-\u0fda\u1000-\u109f\u1780-\u17f9\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_TELLING = re.compile(
    r"description|summary|overview|about|task|purpose|intended|\buses?\b|direct use|what (it|this)"
    r"|概要|説明|用途|目的|タスク|使い方|简介|介绍|描述|说明|任务|簡介|介紹|說明|任務|คำอธิบาย|รายละเอียด|การใช้งาน|설명|개요|용도|описание|назначение"
    r"|beschreibung|aufgabe|verwendung|descripción|descrição|tarea|tarefa|uso\b|usage prévu|tâche",
    re.I,
)
_NO_TEXT = re.compile(r"^\s*([-*+>|]|\d+[.)]\s|!\[|\[!\[|</?\w)")
# What templates and trainers write into every card; matched against the start of a sentence. A sentence of `_MADE` counts all the same
# if it goes on with what the model does: in words of `_DOES`, or behind a colon or dash in any but the tools' own.
_MADE = re.compile(
    r"this (model|adapter) is a (lora )?fine-?tuned (version|adapter)? ?(of|from)\b"
    r"|(this|the|these) [\w.\- ]{0,40}?(model|adapter|lora|checkpoint|weights)( \S+/\S+)? (was|were|has been|is) (further )?"
    r"(fine-?tuned|trained|extracted|merged|converted|quantised|quantized|created|made|uploaded|built|generated)"
    r"( and (converted|quantised|quantized|exported|merged|saved|uploaded))?"
    r" (\d|from|with|using|on top|by|via|in|on (the )?\S+ (dataset|data)\b|for \d|to \S+ format)"
    r"|(it|this) (was|has been) (trained|extracted|merged|converted|created|made|built) (with|using|by|from|via|on \S+ using|\d)"
    r"|this is a (lora|qlora|peft|merge|merged|quanti[sz]ed)\b.{0,60}(extracted|merged|created|trained|converted)\b"
    r"|(fine-?tuned|trained|made|built|created|merged|generated|powered) (with|using|by|via|from)\b"
    r"|these are .{0,80}\bweights\b|\w+ (adapters?|weights) (for|of) \S+ (trained|fine-?tuned|made) (with|using|by|on|via) "
    r"|this (model|adapter) can be (used|loaded)\b|developed by\b"
    r"|本模型(是|基于).{0,60}微调|(この|本)モデルは.{0,80}(ファインチューニング|微調整|追加学習|学習|変換)(した|された)(もの|モデル)",
    re.I,
)
_DOES = re.compile(
    r"\b(?:to (?!(?:use|load|run|be|get|the|a|an|this|their|its|learn|see|save)\b)[a-z]{3,} (?!format)"
    r"|(?:that|which) (?!(?:was|were|is|are|has|have|had|can|you|we|i)\b)[a-z]{3,}"
    r"|used (?:for|as|in) (?!(?:inference|training|testing|further|fine|text generation|research|commercial|causal)\b)\w{3,}"
    r"|for (?!training|testing|inference|fine|using|causal)[a-z]{3,}ing\b)|用于|用来|ための|ために"
    r"|(?:[,:;–—] ?| - |\b(?:and|it|model|adapter|lora) )(?:now |also |only |always )?(?:"
    r"answers?|asks|captions|chats|classif(?:ies|y)|completes|converts|corrects|decides|describes|detects|drafts|edits|explains|extracts|finds"
    r"|fixes|generates|gives|grades|helps|identifies|imitates|labels|lists|names|parses|plans|predicts|produces|rates|recommends|replies"
    r"|responds|returns|rewrites|routes|scores|simplifies|solves|sorts|speaks|summari[sz]es|tags|talks|tells|translates|turns|writes)\b",
    re.I,
)
_BREAK = re.compile(r"\s*[:;](?!//)\s+|\s*[：；，]\s*|\s+-+\s+|\s*[–—]\s*")
# Names of tools, settings and places: a clause with one of them says how a model was made.
_SETTING = re.compile(
    r"https?:|\S/\S|=|\b(?:unsloth|trl|peft|axolotl|llama-?factory|mergekit|transformers|hugging ?face|autotrain|q?lora|dora|sft|dpo|grpo"
    r"|(?:rank|alpha|loss|seed|version|v)[ :]*\d\S*|\d+ steps|epochs?|learning rate|lr|batch size|dropout|\d+-?bit|gpus?|[ah]100s?|colab"
    r"|gguf"
    r"|\d+ ?x faster)\b|训练|轮|学习率|参数|数据集|量化",
    re.I,
)
_TITLE = re.compile(r"(?:introduced|described|presented|proposed) in\b.*|, ?see\b.*", re.I)  # of a paper, which may have a colon
_EMPTY = re.compile(
    r"\[?more information needed|your description\b|this is the model card of|this model card has been"
    r"|the following (hyperparameters|parameters|models|yaml|configuration|training|command)"
    r"|see axolotl config|\w+ version\W+\d|quick ?start\b"
    r"|to use this (model|adapter)|training (was|procedure|loss|logs?\W*$)\b"
    r"|\w+ (2|two) ?x faster|uploaded (model|finetuned)|example usage\b"
    r"|this (is|repository contains) (a|the)? ?(peft|lora|qlora)\b.{0,40}(for|of) (the )?\S+( \S+)?( model)?\.?$|use the code below"
    r"|users \(both direct|this (model )?card|it achieves the following|provide a quick summary|\w+ (adapters?|weights) for \S+\.?$"
    r"|(refer to|see|visit (the|our|my|us|\S+[./]\S)|for more|you can find|it can be used with|download)\b.{0,200}$"
    r"|(was )?lora for the text encoder|special vae used",
    re.I,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Purpose:
    """What an adapter is for.

    Attributes:
        descriptions: Wordings of its task.
        origin: Where they were found.
        licence: Its licence as stated, or None.
    """

    descriptions: tuple[str, ...]
    origin: str
    licence: str | None


def find_purpose(folder: Path, info: Mapping[str, Any]) -> Purpose:
    """Looks for descriptions in description.txt (one wording per line), then lorag.json, then README.md.

    Args:
        folder: The adapter's.
        info: What its lorag.json says.

    Raises:
        UndescribedError: If none of them says what it is for.
        DescriptionError: If what was found is not usable text.
        ArtifactError: If one of the files is a link, too large or no UTF-8.
    """
    card = _text(folder / CARD, _MAX_CARD)
    stated = info.get("license") or _stated_licence(card)
    licence = str(stated)[:60] if stated else None
    lines = [line.strip() for line in _text(folder / SIDECAR, _MAX_SIDECAR).splitlines() if line.strip()]
    listed = info.get("descriptions")
    if info.get("description"):  # of a generated adapter, with the other wordings that it was made from
        others = info.get("wordings")
        listed = [info["description"], *(others if isinstance(others, list) else [])]
    for origin, texts in (
        (SIDECAR, lines),
        ("lorag.json", list(listed) if isinstance(listed, list) else []),
        (CARD, [text for text in [card_text(card)] if text]),
    ):
        if texts:
            return Purpose(tuple(check_description(text) for text in texts[:_MOST_WORDINGS]), origin, licence)
    raise UndescribedError(
        f"nothing says what {folder} is for",
        got=f"{CARD} without a paragraph on its task" if card else f"neither {SIDECAR} nor {CARD}",
        remedy=f'Give --description "…", or write one wording per line into {folder / SIDECAR}.',
    )


def stated_licence(folder: Path) -> str | None:
    """The licence that an adapter's model card states.

    Raises:
        ArtifactError: If the card is a link, too large or no UTF-8.
    """
    return _stated_licence(_text(folder / CARD, _MAX_CARD))


def _text(path: Path, most: int) -> str:
    if not path.is_file() and not path.is_symlink():
        return ""
    return decode_text(read_bounded(path, most), path)


def _stated_licence(card: str) -> str | None:
    front, _ = split_front(card)
    line = _LICENCE.search(front) if front else None
    return line[1] if line else None


def card_text(card: str) -> str | None:
    """The first paragraph of a model card that tells what the model is for, in one line, or None.

    It must stand right under the title, or under a heading such as Model Description, Summary, Task or Intended Use;
    lists, tables, quotes, images, code and sentences that every template says are passed over.
    """
    body = visible_text(split_front(card)[1][:_READ_CARD])
    telling, start = True, 0
    sections: list[str] = []
    for number, heading in enumerate([*_HEADING.finditer(body), None]):
        if telling:
            sections.append(body[start : heading.start() if heading else len(body)])
        if heading is not None:
            start = heading.end()
            telling = number == 0 or bool(_TELLING.search(heading[2] or heading[3] or ""))
    for paragraph in (part for section in sections for part in re.split(r"\n\s*\n", section)):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if not lines or any(_NO_TEXT.match(line) for line in lines):
            continue
        text = _beyond_templates(plain_text(" ".join(lines)))
        if _words(text) >= _FEWEST_WORDS:
            return _shortened(text)
    return None


def _beyond_templates(text: str) -> str:
    """A paragraph without the sentences that every template says."""
    parts = [part for part in _SENTENCE.split(text) if part]
    kept = [part for part in parts if not _EMPTY.match(part) and (not _MADE.match(part) or _goes_on(part))]
    return text if len(kept) == len(parts) else " ".join(kept)


def _goes_on(sentence: str) -> bool:
    """Whether a sentence that starts with how the model was made goes on with what it does."""
    if _DOES.search(sentence):
        return True
    return any(
        _words(clause) >= _FEWEST_CLAUSE and not _SETTING.search(clause) and not _EMPTY.match(clause) and not _MADE.match(clause)
        for clause in _BREAK.split(_TITLE.sub("", sentence))[1:]
    )


def _words(text: str) -> int:
    """How many words a text has; two signs of a script that puts no blanks between them, such as Japanese or Thai, count as one."""
    joined = _JOINED.findall(text)
    return len(_JOINED.sub(" ", text).split()) + (sum(map(len, joined)) + 1) // 2


def _shortened(text: str) -> str:
    """At most some 600 characters, cut after a sentence where there is one, else between words."""
    if len(text) <= _LONGEST:
        return text
    cut = text[:_LONGEST]
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|[。！？]", cut)]
    return cut[: ends[-1]] if ends and ends[-1] > _LONGEST // 4 else cut.rsplit(" ", 1)[0]
