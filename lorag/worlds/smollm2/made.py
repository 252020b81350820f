"""Tasks that a few lines of code answer: what the answer to each is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

__all__ = ["ANSWERS", "mentions"]

_MONTHS = "January February March April May June July August September October November December".split()
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_ROMAN = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
_QUESTION = ("who", "what", "when", "where", "why", "how", "which", "is", "are", "do", "does", "can", "could", "will", "did", "should")
_NEGATIVE = re.compile(r"\b(not|no|never|none|nothing|cannot)\b|n't\b|\b(dont|cant|wont|didnt|doesnt|isnt)\b", re.I)
_EMAIL = re.compile(r"([\w.]+)@([\w.]+\w)")
_URL = re.compile(r"https?://([\w.-]+)(/[\w/-]*\w)?")
_LINK = re.compile(r"\[([^]]*)\]\(([^)]*)\)")
_LOG = re.compile(r"^\S+ (\S+) \[(\S+)\] (\w+): (.*)$")


def mentions(words: Sequence[str]) -> Callable[[str], str]:
    """The answer whether a text has any of these words."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.I)
    return lambda text: _yes(pattern.search(text) is not None)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _bare(text: str) -> list[str]:
    """Words without punctuation, in lower case."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def _slugs(text: str) -> list[str]:
    return [word.replace("'", "") for word in _bare(text)]


def _items(text: str) -> list[str]:
    return text.split(", ")


def _longest(words: Sequence[str], sign: int = 1) -> str | None:
    """The longest word, or with sign −1 the shortest; None if two words are as long."""
    best = sorted(set(words), key=lambda word: -sign * len(word))
    return None if len(best) > 1 and len(best[0]) == len(best[1]) else best[0]


def _several(words: Sequence[str]) -> str | None:
    return ", ".join(words) or None


def _listed(items: Sequence[str], word: str) -> str:
    return f"{', '.join(items[:-1])} {word} {items[-1]}"


def _plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"


def _ing(verb: str) -> str | None:
    if re.search(r"[^aeiou][aeiou][bdgklmnprt]$", verb):
        return f"{verb}{verb[-1]}ing" if len(verb) < 5 else None  # whether longer ones double depends on the stress
    return f"{verb[:-2]}ying" if verb.endswith("ie") else f"{verb[:-1]}ing" if re.search(r"[^eoy]e$", verb) else f"{verb}ing"


def _in_words(number: int) -> str:
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10 - 1] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    return f"{_UNITS[number // 100]} hundred" + (f" and {_in_words(number % 100)}" if number % 100 else "")


def _roman(number: int) -> str | None:
    if number >= 200:
        return None
    numeral = ""
    for value, letters in _ROMAN:
        numeral += letters * (number // value)
        number %= value
    return numeral


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _twelve(text: str) -> str:
    hour, minute = text.split(":")
    return f"{(int(hour) - 1) % 12 + 1}:{minute} {'am' if int(hour) < 12 else 'pm'}"


def _date(text: str) -> tuple[str, str, str]:
    year, month, day = text.split("-")
    return year, month, day


def _found(pattern: re.Pattern[str], group: int) -> Callable[[str], str | None]:
    def answer(text: str) -> str | None:
        match = pattern.search(text)
        return None if match is None else match.group(group)

    return answer


def _person(text: str) -> str:
    value = json.loads(text)
    return f"{value['name']} is {value['age']} years old and lives in {value['city']}."


# By kind of input and name of the task, as in made.yaml; None where a text has no clear answer.
ANSWERS: Mapping[str, Mapping[str, Callable[[str], str | None]]] = {
    "sentence": {
        "upper_case": str.upper,
        "title_case": lambda text: " ".join(word[:1].upper() + word[1:] for word in text.split()),
        "lower_no_punctuation": lambda text: " ".join(_bare(text)),
        "first_word": lambda text: text.split()[0],
        "last_word": lambda text: text.split()[-1].rstrip(".?!,"),
        "second_word": lambda text: text.split()[1].rstrip(".?!,"),
        "first_two_words": lambda text: " ".join(text.split()[:2]).rstrip(".?!,"),
        "last_two_words": lambda text: " ".join(text.split()[-2:]).rstrip(".?!,"),
        "count_words": lambda text: str(len(text.split())),
        "longest_word": lambda text: _longest(_bare(text)),
        "reverse_words": lambda text: " ".join(reversed(_bare(text))) if len(text.split()) <= 8 else None,
        "without_first_word": lambda text: " ".join(text.split()[1:]),
        "without_last_word": lambda text: " ".join(text.split()[:-1]),
        "swap_ends": lambda text: " ".join([(words := _bare(text))[-1], *words[1:-1], words[0]]),
        "snake_case": lambda text: "_".join(_slugs(text)),
        "kebab_case": lambda text: "-".join(_slugs(text)),
        "camel_case": lambda text: "".join(word.capitalize() if i else word for i, word in enumerate(_slugs(text))),
        "initials": lambda text: "".join(word[0].upper() for word in _bare(text)),
        "comma_separated": lambda text: ", ".join(_bare(text)),
        "piped": lambda text: " | ".join(_bare(text)),
        "hashtag": lambda text: f"#{''.join(_slugs(text))}",
        "say_twice": lambda text: f"{text}; {text}" if len(text.split()) <= 8 else None,
        "greet": lambda text: f"Hello, {text}",
        "python_comment": lambda text: f"# {text}",
        "html_paragraph": lambda text: f"<p>{text}</p>",
        "markdown_heading": lambda text: f"## {text}",
        "echo_command": lambda text: f'echo "{text}"',
        "print_call": lambda text: f'print("{text}")',
        "vowel_words": lambda text: _several([word for word in _bare(text) if word[0] in "aeiou"]),
        "short_words": lambda text: _several([word for word in _bare(text) if len(word) <= 3]),
        "long_words": lambda text: _several([word for word in _bare(text) if len(word) >= 6]),
        "sorted_words": lambda text: " ".join(sorted(_bare(text))) if len(text.split()) <= 8 else None,
        "is_question": lambda text: _yes(text.endswith("?") or text.lower().split()[0] in _QUESTION),
        "has_number": lambda text: _yes(re.search(r"\d", text) is not None),
        "is_long": lambda text: _yes(len(text.split()) > 10),
        "says_please": mentions(("please",)),
        "says_not": lambda text: _yes(_NEGATIVE.search(text) is not None),
        "about_me": mentions(("i", "me", "my", "mine", "i'm", "i've", "i'd")),
    },
    "noun": {"plural": _plural, "article": lambda word: f"{'an' if word[0] in 'aeiou' else 'a'} {word}"},
    "verb": {"ing_form": _ing, "third_person": _plural},
    "word": {
        "spell_hyphens": "-".join,
        "spell_spaces": " ".join,
        "no_vowels": lambda word: re.sub("[aeiou]", "", word) or None,
        "count_vowels": lambda word: str(len(re.findall("[aeiou]", word))),
        "last_two_letters": lambda word: word[-2:],
        "first_three_letters": lambda word: word[:3],
        "word_twice": lambda word: f"{word} {word}",
        "un_prefix": lambda word: f"un{word}",
        "starts_with_vowel": lambda word: _yes(word[0] in "aeiou"),
        "has_double_letter": lambda word: _yes(re.search(r"(.)\1", word) is not None),
    },
    "list": {
        "sort_list": lambda text: ", ".join(sorted(_items(text))),
        "reverse_list": lambda text: ", ".join(reversed(_items(text))),
        "count_items": lambda text: str(len(_items(text))),
        "second_item": lambda text: _items(text)[1],
        "third_item": lambda text: _items(text)[2],
        "without_first_item": lambda text: ", ".join(_items(text)[1:]),
        "without_last_item": lambda text: ", ".join(_items(text)[:-1]),
        "join_and": lambda text: _listed(_items(text), "and"),
        "join_or": lambda text: _listed(_items(text), "or"),
        "semicolons": lambda text: "; ".join(_items(text)),
        "json_array": lambda text: json.dumps(_items(text)),
        "capital_items": lambda text: ", ".join(item.capitalize() for item in _items(text)),
        "upper_items": str.upper,
        "numbered": lambda text: " ".join(f"{number}. {item}" for number, item in enumerate(_items(text), 1)),
        "longest_item": lambda text: _longest(_items(text)),
        "shortest_item": lambda text: _longest(_items(text), -1),
    },
    "repeats": {
        "unique_items": lambda text: ", ".join(dict.fromkeys(_items(text))),
        "has_duplicate": lambda text: _yes(len(set(_items(text))) < len(_items(text))),
    },
    "numbers": {
        "largest_number": lambda text: str(max(map(int, _items(text)))),
        "smallest_number": lambda text: str(min(map(int, _items(text)))),
        "sort_ascending": lambda text: ", ".join(sorted(_items(text), key=int)),
        "sort_descending": lambda text: ", ".join(sorted(_items(text), key=int, reverse=True)),
        "count_numbers": lambda text: str(len(_items(text))),
        "even_numbers": lambda text: _several([item for item in _items(text) if int(item) % 2 == 0]),
    },
    "number": {
        "plus_one": lambda text: str(int(text) + 1),
        "doubled": lambda text: str(2 * int(text)),
        "in_words": lambda text: _in_words(int(text)),
        "roman": lambda text: _roman(int(text)),
        "ordinal": lambda text: _ordinal(int(text)),
        "even_or_odd": lambda text: _yes(int(text) % 2 == 0),
        "is_large": lambda text: _yes(int(text) > 100),
        "rounded_ten": lambda text: None if int(text) % 10 == 5 else str(round(int(text), -1)),
    },
    "amount": {"thousands": lambda text: f"{int(text):,}"},
    "date": {
        "date_long": lambda text: f"{int(_date(text)[2])} {_MONTHS[int(_date(text)[1]) - 1]} {_date(text)[0]}",
        "date_us": lambda text: "/".join((_date(text)[1], _date(text)[2], _date(text)[0])),
        "date_uk": lambda text: "/".join(reversed(_date(text))),
        "date_german": lambda text: ".".join(reversed(_date(text))),
        "year_of": lambda text: _date(text)[0],
        "month_of": lambda text: _MONTHS[int(_date(text)[1]) - 1],
        "day_of": lambda text: str(int(_date(text)[2])),
    },
    "time": {
        "twelve_hours": _twelve,
        "hour_of": lambda text: str(int(text.split(":")[0])),
        "minutes_of_day": lambda text: text.split(":")[1],
        "is_morning": lambda text: _yes(int(text.split(":")[0]) < 12),
    },
    "contact": {
        "email_of": _found(_EMAIL, 0),
        "email_domain": _found(_EMAIL, 2),
        "email_user": _found(_EMAIL, 1),
    },
    "maybe_contact": {"has_email": lambda text: _yes(_EMAIL.search(text) is not None)},
    "link": {
        "url_of": _found(_URL, 0),
        "host_of": _found(_URL, 1),
        "without_url": lambda text: " ".join(_URL.sub("", text).split()),
    },
    "handle": {"hashtag_of": _found(re.compile(r"#\w+"), 0), "mention_of": _found(re.compile(r"@\w+"), 0)},
    "log": {
        "log_time": _found(_LOG, 1),
        "log_component": _found(_LOG, 2),
        "log_level": _found(_LOG, 3),
        "log_message": _found(_LOG, 4),
        "is_error": lambda text: _yes(" ERROR: " in text),
    },
    "record": {
        "json_to_pairs": lambda text: ", ".join(f"{key}={value}" for key, value in json.loads(text).items()),
        "json_name": lambda text: json.loads(text)["name"],
        "json_city": lambda text: json.loads(text)["city"],
        "json_keys": lambda text: ", ".join(json.loads(text)),
        "json_sentence": _person,
    },
    "row": {
        "csv_second": lambda text: text.split(",")[1],
        "csv_last": lambda text: text.split(",")[-1],
        "csv_to_pipes": lambda text: f"| {' | '.join(text.split(','))} |",
        "csv_to_json": lambda text: json.dumps(text.split(",")),
    },
    "name": {
        "snake_to_camel": lambda text: "".join(part.capitalize() if i else part for i, part in enumerate(text.split("_"))),
        "snake_to_words": lambda text: text.replace("_", " "),
        "snake_to_constant": str.upper,
        "snake_to_title": lambda text: " ".join(part.capitalize() for part in text.split("_")),
    },
    "path": {
        "file_name": lambda text: text.rsplit("/", 1)[1],
        "folder_of": lambda text: text.rsplit("/", 1)[0],
        "extension_of": lambda text: text.rsplit(".", 1)[1],
        "stem_of": lambda text: text.rsplit("/", 1)[1].split(".")[0],
    },
    "markup": {
        "link_text": _found(_LINK, 1),
        "link_target": _found(_LINK, 2),
        "strip_markdown": lambda text: _LINK.sub(r"\1", text),
    },
}
