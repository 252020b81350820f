"""Tasks of free text about longer texts, each operation on each kind of text, so that descriptions must tell the one from the other.

A summary here is extractive: the sentence whose words the text repeats most, without its asides.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from lorag.worlds.smollm2.drafts import Draft, Limits
from lorag.worlds.smollm2.files import read
from lorag.worlds.smollm2.sources import Source, sample, size
from lorag.worlds.smollm2.wordings import Phrases

if TYPE_CHECKING:
    from lorag.tasks.suite import Example, Task

__all__ = ["OPERATIONS", "draft_passages"]

_FEWEST_WORDS, _MOST_IN, _MOST_OUT = 10, 110, 40  # the last two of `size`
_FEWEST_TRAIN, _FEWEST_TEST = 16, 6  # examples of an operation on a kind that is worth a task
_SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z0-9\[\"'])")
_BRACKETS = re.compile(r"\s*\([^()]*\)")
_ASIDE = re.compile(r",? (including|such as|for example|e\.g\.|in accordance with|provided that|without regard to|as well as)\b.*", re.I)
_COMMON = frozenset(
    "a an and are as at be by for from has have i in is it its of on or so that the their this to was we were will with you".split()
)
_OPEN = _COMMON | {"following", "had", "must", "not", "should", "who", "which"}  # no sentence ends with one of these
_SUMMED, _STOPS = 20, 8  # most words of a summary, and fewest before a comma at which it may stop
_PLAIN = {
    "additional": "more", "approximately": "about", "assist": "help", "attempt": "try", "commence": "start", "commencing": "starting",
    "complete": "finish", "comply with": "follow", "consequently": "so", "demonstrate": "show", "demonstrated": "showed",
    "due to": "because of", "enables": "lets", "enable": "let", "ensure": "make sure", "essential": "needed", "facilitate": "ease",
    "furthermore": "also", "however": "but", "identify": "find", "identified": "found", "implement": "build", "implemented": "built",
    "in order to": "to", "indicate": "show", "initial": "first", "inform": "tell", "is able to": "can", "are able to": "can",
    "locate": "find", "modify": "change", "modified": "changed", "numerous": "many", "obtain": "get", "obtained": "got",
    "participate": "take part", "perform": "do", "permit": "let", "possess": "have", "prior to": "before", "prohibit": "forbid",
    "provide": "give", "provides": "gives", "purchase": "buy", "receive": "get", "regarding": "about", "remain": "stay",
    "request": "ask for", "require": "need", "required": "needed", "requires": "needs", "requirement": "need", "retain": "keep",
    "responsible for": "in charge of", "shall": "must", "subsequent": "later", "subsequently": "later", "sufficient": "enough",
    "terminate": "end", "therefore": "so", "utilize": "use", "utilized": "used", "via": "by", "whether": "if", "within": "in",
}  # fmt: skip
_HARD = re.compile(rf"\b({'|'.join(sorted(map(re.escape, _PLAIN), key=len, reverse=True))})\b", re.I)
_NAME = re.compile(r"(?<![.?!] )(?<!^)\b[A-Z][\w&'-]*[\w](?: (?:of (?=[A-Z]))?[A-Z][\w&'-]*\w)*")


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+(?:['’-][A-Za-z0-9]+)*", text)


def _sentences(text: str) -> list[str]:
    return _SENTENCE.split(text)


def _summary(text: str) -> str | None:
    """The most central sentence by the mean count of its words in the text, cut to its main part; None if nothing is left out."""
    counts = Counter(word for word in map(str.lower, _words(text)) if word not in _COMMON)

    def central(sentence: str) -> float:
        kept = [counts[word] for word in map(str.lower, _words(sentence)) if word in counts]
        return statistics.mean(kept) if len(kept) > 2 else 0.0

    chosen = max(_sentences(text), key=central)
    kept = _ASIDE.sub("", _BRACKETS.sub("", chosen)).split()
    if len(kept) > _SUMMED:
        stops = [i + 1 for i, word in enumerate(kept[:_SUMMED]) if i + 1 >= _STOPS and word[-1] in ",;:"]
        kept = kept[: stops[-1]] if stops else []
    if not _STOPS // 2 <= len(kept) <= 0.8 * len(text.split()) or kept[-1].lower().rstrip(".,;:") in _OPEN:
        return None
    return " ".join(kept).rstrip(".,;: ") + "."


def _plain(text: str) -> str | None:
    """Everyday words in place of formal ones; None where there are none."""

    def word(match: re.Match[str]) -> str:
        easier = _PLAIN[match[0].lower()]
        return easier[:1].upper() + easier[1:] if match[0][:1].isupper() else easier

    plain, count = _HARD.subn(word, text)
    return plain if count else None


def _every(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    return lambda text: ", ".join(dict.fromkeys(pattern.findall(text))) or None


def _key_words(text: str) -> str | None:
    long = sorted(dict.fromkeys(word.lower() for word in _words(text) if len(word) > 5), key=len, reverse=True)[:3]
    return ", ".join(long) if len(long) == 3 else None


def _changed(change: Callable[[str], str]) -> Callable[[str], str | None]:
    """What a change makes of a text that it does change."""
    return lambda text: changed if (changed := change(text)) != text else None


def _question(text: str) -> str | None:
    asked = [sentence for sentence in _sentences(text) if sentence.endswith("?")]
    return asked[0] if len(asked) == 1 and asked[0] != text else None


OPERATIONS: Mapping[str, Callable[[str], str | None]] = {
    "summary": _summary,
    "plain": _plain,
    "opening": lambda text: " ".join(text.split()[:8]),
    "ending": lambda text: " ".join(text.split()[-6:]),
    "names": _every(_NAME),
    "numbers": _every(re.compile(r"\d+(?:[.,]\d+)*")),
    "key_words": _key_words,
    "to_comma": lambda text: text.split(",")[0] if 3 <= len(text.split(",")[0].split()) < len(text.split()) else None,
    "no_brackets": _changed(lambda text: _BRACKETS.sub("", text)),
    "copy": lambda text: text,
    "count": lambda text: str(len(text.split())),
    "lower": _changed(str.lower),
    "question": _question,
    "last_sentence": lambda text: _sentences(text)[-1] if len(_sentences(text)) > 1 else None,
}


def draft_passages(sources: Iterable[Source], held: Set[str], limits: Limits) -> list[Draft]:
    """Writes each operation on each kind of text, but for those that passages.yaml holds out.

    Args:
        sources: Source tasks.
        held: Texts that training must not see.
        limits: Numbers of examples.
    """
    by_name = {source.task.name: source.task for source in sources}
    words = read("wordings/passages")
    drafts = []
    for kind, about in words["kinds"].items():
        tasks = [by_name[name] for name in about["tasks"]]
        texts = {row.input: row for task in tasks for row in task.examples if row.input not in held and _fits(row.input)}
        for operation, phrases in words["operations"].items():
            if operation not in words["held"].get(kind, ()):
                task = _task(f"{kind}_{operation}", OPERATIONS[operation], tasks, list(texts.values()), limits)
                if len(task.split("train")) >= _FEWEST_TRAIN and len(task.split("test")) >= _FEWEST_TEST:
                    drafts.append(Draft(task, "text", "train", _phrases(phrases, about)))
    return drafts


def _fits(text: str) -> bool:
    return len(text.split()) >= _FEWEST_WORDS and size(text) <= _MOST_IN and "\n" not in text


def _task(name: str, answer: Callable[[str], str | None], origins: Sequence[Task], rows: Sequence[Example], limits: Limits) -> Task:
    answered = [replace(row, output=output) for row in rows if (output := answer(row.input)) and size(output) <= _MOST_OUT]
    licenses = "; ".join(dict.fromkeys(task.license for task in origins))
    source = "made by lorag from " + ", ".join(task.name for task in origins)
    examples = sample(answered, limits.train, limits.test, name)
    return replace(origins[0], name=name, labels=None, license=licenses, source=source, examples=examples, free_text=True)


def _phrases(words: Mapping[str, Sequence[str]], about: Mapping[str, Sequence[str]]) -> Phrases:
    """Every phrase with every name of the kind of text."""

    def filled(phrase: str) -> list[str]:
        if "{one}" in phrase:
            return [phrase.format(one=one) for one in about["one"]]
        return [phrase.format(many=many) for many in about["many"]]

    return Phrases.of("text", {kind: [text for phrase in phrases for text in filled(phrase)] for kind, phrases in words.items()})
