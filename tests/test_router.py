"""The router: each request gets the adapter that its description, its text or the caller names, and answers as that adapter alone does."""

from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from peft import PeftModel

from lorag.adapters.adapter import LoraAdapter
from lorag.errors import BankError, ServedNameError, TaskError
from lorag.serving import LoraRouter
from lorag.serving.retrieval import DescriptionIndex, TextIndex
from lorag.tasks.finding import find_tasks


@pytest.fixture(scope="module")
def tasks():
    """Six tasks of the embedded world that have an expert, of six domains."""
    found = {}
    for task in find_tasks("sandbox", "train").tasks:
        if task.name.endswith("-plain"):
            found.setdefault(task.name.split("-")[0], task)
    return list(found.values())[:6]


@pytest.fixture(scope="module")
def router(tasks):
    router = LoraRouter.from_pretrained()
    router.learn_texts({task.key: [e.input for e in task.split("train")[:16]] for task in tasks})
    return router


def _inputs(tasks, split="test", count=1):
    return [example.input for task in tasks for example in task.split(split)[:count]]


@pytest.mark.slow
def test_a_request_is_known_by_its_text(router, tasks):
    """Texts of six domains that were not among the examples find the expert of their domain, and the route says why."""
    routes = router.route(_inputs(tasks, count=4))
    wanted = [task.key for task in tasks for _ in range(4)]
    right = [route.served == "expert" and route.experts[0][0] == name for route, name in zip(routes, wanted, strict=True)]
    assert sum(right) >= 23 and all("like the examples of" in route.reason for route in routes)


@pytest.mark.slow
def test_a_text_between_tasks_gets_a_fusion(router, tasks):
    """Half of one domain's text and half of another's: two experts or more, whose weights add up to one."""
    first, second = _inputs(tasks[:2])
    halves = [f"{a[: len(a) // 2]} {b[len(b) // 2 :]}" for a, b in [(first, second), (second, first)]]
    fused = [route for route in router.route(["the a", *halves]) if route.served == "fusion"]
    assert fused and all(abs(sum(w for _, w in route.experts) - 1) < 0.06 and len(route.experts) > 1 for route in fused)


@pytest.mark.slow
def test_a_description_goes_through_the_gate(router):
    """A known wording gets its expert, a new one an adapter of its own, an unknown task the base model, with the gate's reason."""
    known = router.bank.experts[0]
    routes = router.route(["x"] * 3, descriptions=[known.descriptions[0], "summarise legal text", "drive my robot arm forward"])
    assert (routes[0].served, routes[0].experts) == ("expert", ((known.name, 1.0),))
    assert (routes[1].served, routes[1].description) == ("generated", "summarise legal text")
    assert routes[2].served == "base" and "nearest tasks" in routes[2].reason


@pytest.mark.slow
def test_it_can_be_told(router):
    """An expert, a fusion, a description, or none; wrong names are refused."""
    one, other = router.bank.names[:2]
    models = [f"lorag:expert/{one}", f"lorag:fuse/{one}=.5,{other}=.5", "lorag:summarise legal text", "base"]
    assert [route.served for route in router.route(["x"] * 4, models=models)] == ["expert", "fusion", "generated", "base"]
    with pytest.raises(BankError, match="no such expert"):
        router.route(["x"], models=["lorag:expert/nobody"])
    with pytest.raises(ServedNameError):
        router.route(["x"], models=["lorag:a\0b"])
    with pytest.raises(TaskError, match="do not fit the texts"):
        router.route(["x"], models=[])


@pytest.mark.slow
def test_without_texts_it_must_be_told(router):
    """A request alone says nothing then."""
    bare = LoraRouter(router.generator, router.bank, runner=router.runner)
    with pytest.raises(TaskError, match="neither a description nor a model"):
        bare.generate(["x"])
    with pytest.raises(BankError, match="no task with examples is one that the router knows"):
        bare.learn_texts({"nobody": ["x"]})


@pytest.mark.slow
def test_rows_answer_as_peft_does(router, tasks):
    """A batch of rows with an adapter each, in an order that mixes them: every answer is the one of that adapter alone in PEFT."""
    texts = _inputs(tasks, count=3)
    models = [f"lorag:expert/{task.key}" for task in tasks for _ in range(3)]
    mixed = sorted(range(len(texts)), key=lambda place: place % 5)
    texts, models = [texts[i] for i in mixed] + texts[:2], [models[i] for i in mixed] + ["base", "lorag:summarise legal text"]
    answers = router.generate(texts, models=models)
    objective, model = router.runner.objective, router.runner.model
    for text, name, answer in zip(texts, models, answers, strict=True):
        if name == "base":
            alone = objective.generate(model, [text])[0]
        else:
            peft = router.adapter(answer.route).apply_to(model)
            assert isinstance(peft, PeftModel)
            alone = objective.generate(peft, [text])[0]
            peft.unload()
        assert answer.text == alone
    right = [answer.text.strip() for answer in answers[:18]]
    wanted = [example.output for task in tasks for example in task.split("test")[:3]]
    assert sum(a == wanted[i] for a, i in zip(right, mixed, strict=True)) >= 14


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1,), (5, 4, 1)])
def test_runs_of_rows_get_their_own_adapter(router, tasks, sizes):
    """Whether runs are equal, filled up or copied: row i is where the batch says, with the adapter of its route."""
    texts = [f"text {i}" for i in range(sum(sizes))]
    routes = [router.route(["x"], models=[f"lorag:expert/{tasks[i].key}"])[0] for i, size in enumerate(sizes) for _ in range(size)]
    inputs, adapters, kept = router._batch(texts, routes)
    assert [inputs[row] for row in kept] == texts
    module = router.bank.base.layout.names[0]
    run = len(inputs) // len(adapters[module][0])
    for route, row in zip(routes, kept, strict=True):
        own, rank = router.adapter(route), router.adapter(route).rank
        torch.testing.assert_close(adapters[module][0][row // run][:rank], own.factors[module][0])


@pytest.mark.slow
def test_a_description_s_task(router, tasks):
    """Found by the adapter that the description asks for, in words that share little with the task's own; a text must fit, too."""
    few = LoraRouter(router.generator, known={task.key: router.known[task.key] for task in tasks})
    few.learn_texts({task.key: [e.input for e in task.split("train")[:8]] for task in tasks})
    found = [few.nearest_task(task.descriptions[5]) for task in tasks]
    assert sum(name == task.key for (name, _), task in zip(found, tasks, strict=True)) >= 5
    assert all(0 < share <= 1 for _, share in found)
    words, inputs = tasks[0].descriptions, [[e.input for e in task.split("train")[:8]] for task in tasks[:2]]
    alike = LoraRouter(router.generator, known={"first": words[:4], "second": words[:4]})
    alike.learn_texts({"first": inputs[0], "second": inputs[1]})
    texts = [task.split("test")[0].input for task in tasks[:2]]
    assert [alike.nearest_task(words[5], text)[0] for text in texts] == ["first", "second"]
    with pytest.raises(BankError, match="no task is known"):
        LoraRouter(router.generator).nearest_task("summarise legal text")


@pytest.mark.slow
def test_without_a_bank_known_tasks_are_served_by_generated_adapters(router, tasks):
    """Their names and their texts lead to the adapter of their first description; other names are refused."""
    bare = LoraRouter(router.generator, known={task.key: task.descriptions for task in tasks}, runner=router.runner)
    bare.learn_texts({task.key: [e.input for e in task.split("train")[:16]] for task in tasks})
    told, read = bare.route(["x", tasks[0].split("test")[0].input], models=[f"lorag:expert/{tasks[0].key}", None])
    assert (read.served, read.experts) == ("generated", ((tasks[0].key, 1.0),)) and told.experts == read.experts
    made = router.generator.generate(tasks[0].descriptions[0], on_unknown="ignore")
    for route in (told, read):
        for name, (a, b) in bare.adapter(route).factors.items():
            assert torch.equal(a, made.factors[name][0]) and torch.equal(b, made.factors[name][1])
    fused = bare.adapter(bare.route(["x"], models=[f"lorag:fuse/{tasks[0].key}=.5,{tasks[1].key}=.5"])[0])
    assert fused.rank <= router.generator.rank
    with pytest.raises(BankError, match="no task of this name"):
        bare.route(["x"], models=["lorag:expert/nobody"])


def test_an_index_of_texts():
    """Mean of the cosines to the nearest texts of each task and to their mean, -1 for a task without any."""
    vectors = torch.eye(4)[[0, 0, 0, 2]]
    index = TextIndex(["a", "b", "c"], vectors, torch.tensor([0, 0, 0, 1]))
    scores = index.scores(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, -1.0], [0.6, 0.0, -1.0]]))
    assert TextIndex([], torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).scores(torch.eye(4)).shape == (4, 0)


def test_what_all_texts_of_a_task_share_counts():
    """Texts differ far more by what any task may be about than from task to task: the nearest ones mislead, the means do not."""
    rng = torch.Generator().manual_seed(0)
    tasks, count = torch.randn(12, 16, generator=rng), 40
    about = torch.cat([3 * torch.randn(12, count, 16, generator=rng), torch.zeros(12, count, 16)], 2)
    texts = about + torch.cat([torch.zeros(12, 16), tasks], 1)[:, None] + 0.3 * torch.randn(12, count, 32, generator=rng)
    texts = torch.nn.functional.normalize(texts, dim=2)
    known, asked, owners = texts[:, 1:].flatten(0, 1), texts[:, 0], torch.arange(12).repeat_interleave(count - 1)
    nearest = torch.stack([(asked @ known[owners == task].T).topk(5).values.mean(1) for task in range(12)], 1)
    right = (TextIndex([str(task) for task in range(12)], known, owners).scores(asked).argmax(1) == torch.arange(12)).sum()
    assert right >= 11 > (nearest.argmax(1) == torch.arange(12)).sum()


def test_the_first_text_of_each_task_is_judged_by_the_others():
    """Itself held out; a task with one text is not asked."""
    vectors = torch.eye(4)[[0, 0, 0, 2]]
    scores, owners = TextIndex(["a", "b"], vectors, torch.tensor([0, 0, 0, 1])).held_out()
    assert owners.tolist() == [0]
    torch.testing.assert_close(scores, torch.tensor([[((1 + 1 - 1) / 3 + 1) / 2, 0.0]]))  # itself counts -1


class _Codes:
    """A generator whose codes are given: all that an index of descriptions asks of it."""

    def __init__(self, vectors):
        self.vectors, self.space, self.embedder, self.method, self.conditioner = vectors, self, self, self, lambda one: one
        self.size = 2

    def embed(self, texts):
        return [SimpleNamespace(pooled=self.vectors[text][0], code=self.vectors[text][1]) for text in texts]

    def condition(self, text):
        (one,) = self.embed([text])
        return SimpleNamespace(embedding=one, code=one.code)

    def generate(self, condition, rng):
        return condition.code[None]


@pytest.mark.parametrize("telling", ["words", "codes"])
def test_what_tells_tasks_apart_is_what_counts(telling):
    """Words or codes, whichever the wordings of one task share: the other is given no weight that would mislead."""
    rng = torch.Generator().manual_seed(0)
    tasks = torch.randn(12, 8, generator=rng)
    vectors = {}
    for task in range(12):
        for wording in "abcdz":
            good, bad = tasks[task] + 0.3 * torch.randn(8, generator=rng), torch.randn(8, generator=rng)
            vectors[f"{task}{wording}"] = (good, bad[:2]) if telling == "words" else (bad, good)
    generator = _Codes(vectors)
    generator.size = 2 if telling == "words" else 8
    index = DescriptionIndex.generate(generator, {str(task): [f"{task}{wording}" for wording in "abcd"] for task in range(12)})
    assert index.weights[telling == "words"] <= 5 < index.weights[telling == "codes"]
    found = index.scores([f"{task}z" for task in range(12)]).argmax(1).tolist()
    assert sum(a == b for a, b in enumerate(found)) >= 11


@pytest.mark.slow
def test_adapters_are_kept_in_bounds(router):
    """No more than the bound; the last ones used stay."""
    fresh = LoraRouter(router.generator, router.bank, kept=2)
    routes = [fresh.route(["x"], models=[f"lorag:expert/{name}"])[0] for name in router.bank.names[:3]]
    made = [fresh.adapter(route) for route in routes]
    assert isinstance(made[0], LoraAdapter)
    assert [fresh.adapter(routes[n]) is made[n] for n in (2, 1, 0)] == [True, True, False]
