"""Descriptions typed by hand for training tasks of SmolLM2's suite, beside the suite's own wordings: `python -m benchmarks.hand_typed`.

The suite's wordings are made from patterns, so a generator could learn the patterns rather than what they say. These were written
afresh, from examples of each task alone, and occur in no suite. "Own" are the wordings that the suite keeps for evaluation. Exact match on
test examples that training did not see.

Bounded by what was learned of the training tasks: with their own wordings too they are far from solved.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from lorag.adapters.factors import Factors
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.generator.generate import open_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task

__all__ = ["TYPED", "measure"]

TYPED = {
    "banking77_is_unable_to_verify_identity": "Customer can't get their identity check to go through? Answer yes or no.",
    "banking77_is_pending_card_payment": "say yes for people whose card payment still shows as pending, no for everyone else",
    "banking77_is_wrong_exchange_rate_for_cash_withdrawal": "complains about the exchange rate on cash they took out abroad?",
    "clinc_is_banking_security": "Is the request about bank account safety, e.g. PINs, freezes or fraud?",
    "clinc_is_direct_deposit": "yes if they ask about getting their salary paid by direct deposit",
    "clinc_is_goodbye": "tell me if the person is saying bye",
    "clinc_is_utility_time": "Is somebody asking for the time or date? yes/no",
    "hwu64_is_lists_query": "I want to know if the user asks what's on one of their lists",
    "hwu64_is_play_game": "user wants to start a game - yes or no",
    "hwu64_is_transport_traffic": "Find questions about traffic jams and road conditions.",
    "hwu64_scenario_is_alarm": "Anything to do with alarms: yes. Everything else: no.",
    "hwu64_is_recommendation_movies": "somebody looking for a film to watch in theaters",
    "is_question": "Is this text a question, yes or no?",
    "snips_is_search_creative_work": "they are looking for a book, song, painting or game by name, yes or no",
    "ii_first_word_letter": "Give me just the first letter of the word",
    "ii_synonyms": "Another word that means the same",
    "fv_country_currency": "Which money do they use in this country?",
    "fv_landmark_country": "What country is this place in?",
    "fv_adjective_v_verb_3": "From the three words, pick the adjective.",
    "count_vowels": "how many vowels does the word have?",
    "snips_slot_searchcreativework_object_name": "Extract the name of the work they want to find.",
    "url_of": "Copy the URL out of the message.",
    "log_level": "What severity does this log line have?",
    "email_of": "give me the email address in this text",
    "snake_to_title+code": "Turn the snake_case name into Title Case words, in backticks",
    "sort_ascending+code": "Sort these numbers from small to large and put the result in inline code.",
    "email_domain+bold": "give the part after the @, in **bold**",
    "snake_to_constant+arrow": "make the identifier SCREAMING_SNAKE_CASE and put -> before it",
    "count_words+stop": "Count the words and end your answer with a period.",
    "third_item+upper": "third thing in the list, in capital letters",
    "shortest_item+upper+bold": "Which item is the shortest? Upper case and bold please.",
    "ordinal+parentheses": "Write the number as an ordinal like 3rd, inside parentheses.",
}
_LIMIT = 16


def measure(name: str = "smollm2") -> list[dict[str, str | float]]:
    """A row for wordings by hand and one for the suite's own, of tasks that the suite holds for training, and the difference."""
    generator = open_generator(name)
    every = find_tasks("smollm2", "train")
    missing = sorted(set(TYPED) - set(every.names))
    if missing:
        raise ValueError(f"not among the training tasks: {', '.join(missing)}")
    tasks = [every[task] for task in TYPED]
    runner = Runner.open(generator.base, "cpu", "fast")
    own = [(task.eval_descriptions or task.descriptions)[0] for task in tasks]
    typed, suite = (_scores(generator, runner, tasks, texts) for texts in (list(TYPED.values()), own))
    for task, first, second in zip(tasks, typed, suite, strict=True):
        print(f"{task.name:58} by hand {first:.3f}   own {second:.3f}", flush=True)
    difference = [first - second for first, second in zip(typed, suite, strict=True)]
    rows: list[dict[str, str | float]] = []
    for what, values in (("by hand", typed), ("own", suite), ("by hand - own", difference)):
        low, high = bootstrap(torch.tensor(values))
        mean, low, high = (round(value, 3) for value in (statistics.mean(values), low, high))
        rows.append({"wording": what, "tasks": len(values), "mean": mean, "low": low, "high": high})
    return rows


def _scores(generator: LoraGenerator, runner: Runner, tasks: Sequence[Task], descriptions: Sequence[str]) -> list[float]:
    adapters = Factors.stack([adapter.factors for adapter in generator.generate_many(list(descriptions))])
    return [float(score["exact_match"]) for score in runner.scores(adapters, tasks, limit=_LIMIT)]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for line in measure():
        print(line)
