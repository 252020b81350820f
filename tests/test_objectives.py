"""Objectives: batching, padding and teacher forcing are shortcuts that change no loss, no score and no sample."""

import dataclasses
import math

import pytest
import torch
from conftest import EOS, WORDS, stack_adapters

from lorag.base.layout import LoraLayout
from lorag.base.objectives import OBJECTIVES, make_objective, take
from lorag.base.objectives.sentence_encoder import _macro_f1
from lorag.base.objectives.text_metrics import lenient_match, rouge_l
from lorag.base.row_adapters import RowAdapters
from lorag.base.runner import Runner
from lorag.errors import ConfigError, TaskError
from lorag.tasks.suite import Example, Task

BASES = {"causal_lm": "llama", "seq2seq_lm": "t5", "label_matching": "bert", "prototypes": "bert"}


def _words(rng, low, high):
    count = int(torch.randint(low, high, (), generator=rng))
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=rng))


def _task(name, labels, longest, examples=24):
    """A task of random texts up to `longest` words; two thirds to train on."""
    rng = torch.Generator().manual_seed(len(name))
    rows = []
    for number in range(examples):
        output = labels[number % len(labels)] if labels else _words(rng, 1, 5)
        rows.append(Example(_words(rng, 1, longest), output, "train" if number < 2 * examples // 3 else "test"))
    return Task(name, "demo", ("do it",), tuple(labels) if labels else None, "MIT", "made", tuple(rows))


@pytest.fixture(params=sorted(BASES))
def setting(request, tiny_models, tokenizer, random_adapter):
    """Each objective with three tasks of different lengths and label counts, and an adapter for each."""
    tiny = tiny_models[BASES[request.param]]
    model = tiny.build()
    layout = tiny.layout(model)
    labelled = OBJECTIVES[request.param].kind == "encoder"
    counts = (2, 5, 3) if labelled else (0, 0, 0)
    tasks = [_task("t" * (i + 1), WORDS[3 * i : 3 * i + n], 4 + 6 * i) for i, n in enumerate(counts)]
    adapters = [random_adapter(layout, rank=2 + i, seed=i) for i in range(3)]
    return make_objective(request.param, tokenizer), RowAdapters(model, layout), tasks, stack_adapters(adapters)


def _losses(objective, rows, stacked, tasks, seed="0"):
    with rows.use(stacked) as model:
        return objective.losses(model, objective.sample(tasks, 4, seed))


# --- all objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_of_a_batch_are_those_of_each_task_alone(setting):
    """What is drawn for a task and what it loses depend on no task beside it: not by padding, order or number."""
    objective, rows, tasks, stacked = setting
    with torch.no_grad():
        together = _losses(objective, rows, stacked, tasks)
        turned = _losses(objective, rows, {n: (a.flip(0), b.flip(0)) for n, (a, b) in stacked.items()}, tasks[::-1])
        alone = torch.cat([_losses(objective, rows, take(stacked, i, i + 1), [task]) for i, task in enumerate(tasks)])
    assert together.shape == (3,)
    assert together.isfinite().all() and (together > 0).all()
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(turned.flip(0), alone, atol=1e-4)
    assert not torch.allclose(together, together.roll(1), atol=1e-2)


def test_samples_depend_on_seed_and_task_alone(setting):
    """The same seed draws the same tokens, another seed others."""
    objective, _, tasks, _ = setting
    ids = [objective.sample(tasks, 4, seed).arguments["input_ids"].tolist() for seed in ("0", "0", "1")]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


@pytest.mark.slow
def test_gradients_flow_to_each_task_own_adapter(setting):
    """The loss of task 1 moves adapter 1, and no other."""
    objective, rows, tasks, stacked = setting
    leaves = {name: tuple(x.clone().requires_grad_() for x in pair) for name, pair in stacked.items()}
    _losses(objective, rows, leaves, tasks)[1].backward()
    grads = [leaf.grad.flatten(1).norm(dim=1) for pair in leaves.values() for leaf in pair]
    total = torch.stack(grads).sum(0)
    assert total.isfinite().all()
    assert total[1] > 0 and total[0] == total[2] == 0


@pytest.mark.slow
def test_scores_of_a_batch_are_those_of_each_task_alone(setting, monkeypatch):
    """Scores are in range and depend on no task beside it, nor on how many rows run at once."""
    objective, rows, tasks, stacked = setting
    alone = [objective.scores(rows, take(stacked, i, i + 1), [task], limit=6)[0] for i, task in enumerate(tasks)]
    limit = "tokens_at_once" if objective.generates else "rows_at_once"
    for at_once in (100_000, 3):
        monkeypatch.setattr(type(objective), limit, at_once)
        for together, one in zip(objective.scores(rows, stacked, tasks, limit=6), alone, strict=True):
            assert together == pytest.approx(one, rel=1e-5, abs=1e-5)
    for score in alone:
        assert objective.metric in score
        assert all(0 <= value <= 1 for key, value in score.items() if key not in ("log_likelihood", "perplexity", "bits_per_character"))
    bare = objective.scores(rows, None, tasks, limit=6)
    zero = {name: (a, b * 0) for name, (a, b) in stacked.items()}
    for one, other in zip(objective.scores(rows, zero, tasks, limit=6), bare, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_settings_build_it_again(setting, tokenizer):
    """Stored settings make the same objective; unknown names and settings are refused."""
    objective, *_ = setting
    again = make_objective(objective.name, tokenizer, {**objective.settings(), "max_length": 17})
    assert again.settings() == {**objective.settings(), "max_length": 17}
    with pytest.raises(ConfigError, match="temper"):
        make_objective(objective.name, tokenizer, {"temper": 1})
    with pytest.raises(ConfigError, match="objective is unknown"):
        make_objective("bagging", tokenizer)


def test_tasks_without_examples_are_refused(setting):
    """No training or no test examples: TaskError naming the task."""
    objective, rows, tasks, stacked = setting
    for split, use in (
        ("train", lambda task: objective.sample([task], 2, "0")),
        ("test", lambda task: objective.scores(rows, take(stacked, 0, 1), [task], limit=4)),
    ):
        kept = tuple(e for e in tasks[0].examples if e.split != split)
        with pytest.raises(TaskError, match="'t'"):
            use(dataclasses.replace(tasks[0], examples=kept))


# --- language models --------------------------------------------------------------------------------------------------


# Llama's positions are relative, GPT-2's absolute: padding must move neither.
@pytest.fixture(params=[("causal_lm", "llama"), ("causal_lm", "gpt2"), ("seq2seq_lm", "t5")], ids=lambda p: p[1])
def speaker(request, tiny_models, tokenizer):
    """A language model that ends its answers now and then, and its objective."""
    objective, base = request.param
    tiny = tiny_models[base]
    model = tiny.build(seed=3)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[EOS] *= 3
        weight[[0, 1, 3]] = 0  # decoding would drop pad, begin and unknown tokens from the text
    return tiny, model, make_objective(objective, tokenizer, {"rouge": True})


@pytest.mark.slow
def test_exact_match_is_that_of_greedy_generation(speaker, tokenizer, random_adapter):
    """Teacher forcing says "exact" just where generating says it: right answers, and near misses of one word."""
    tiny, model, objective = speaker
    layout = LoraLayout.from_model(model, tiny.targets)
    adapters = [random_adapter(layout, seed=i) for i in range(2)]
    rows = RowAdapters(model, layout)
    rng = torch.Generator().manual_seed(0)
    inputs = list(dict.fromkeys(_words(rng, 1, 9) for _ in range(64)))
    tasks, truth = [], []
    for index in range(2):
        with torch.no_grad(), rows.use(stack_adapters(adapters[index : index + 1])) as adapted:
            answers = objective.generate(adapted, inputs)
            alone = [objective.generate(adapted, [text])[0] for text in inputs[:6]]
        assert alone == answers[:6]  # padding does not change an answer
        spoken = [(t, a) for t, a in zip(inputs, answers, strict=True) if 0 < len(a.split()) < 30]
        assert len(spoken) >= 8, "the tiny model must end some answers"
        examples = []
        for number, (text, answer) in enumerate(spoken):
            wrong = [f"{answer} cat", " ".join(answer.split()[1:]) or "cat", f"{WORDS[number % 9]} {answer}"]
            examples.append(Example(text, [answer, answer, *wrong][number % 5], "test"))
        tasks.append(Task(f"t{index}", "demo", ("do it",), None, "MIT", "made", tuple(examples)))
        truth.append([e.output == answer for e, (_, answer) in zip(examples, spoken, strict=True)])
    together = objective.scores(rows, stack_adapters(adapters), tasks, limit=100)
    for index, (task, right, score) in enumerate(zip(tasks, truth, together, strict=True)):
        assert 0.2 < sum(right) / len(right) < 0.6
        assert score["exact_match"] == pytest.approx(sum(right) / len(right))
        for example, expected in zip(task.examples[:10], right[:10], strict=True):
            one = dataclasses.replace(task, examples=(example,))
            found = objective.scores(rows, stack_adapters(adapters[index : index + 1]), [one], limit=1)[0]
            assert found["exact_match"] == expected
            assert (found["token_accuracy"] == 1) == expected
            if expected:
                assert found["rouge_l"] == 1


def test_log_likelihood_and_loss_are_those_of_the_answer(speaker):
    """Loss and log-likelihood are the mean over the answer's tokens and its end, computed here token by token."""
    _, model, objective = speaker
    text, answer = "the red cat sat", "good dog"
    example = Example(text, answer, "test")
    task = Task("t", "demo", ("do it",), None, "MIT", "made", (example, dataclasses.replace(example, split="train")))
    prompt = objective.tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = [*objective.tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]
    total = 0.0
    with torch.no_grad():
        for position, token in enumerate(wanted):
            if objective.name == "causal_lm":
                logits = model(input_ids=torch.tensor([[1, *prompt, *wanted[:position]]])).logits[0, -1]
            else:
                decoder = torch.tensor([[0, *wanted[:position]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
        loss = objective.losses(model, objective.sample([task], 1, "0"))
    score = objective.scores(RowAdapters(model, LoraLayout((), ())), None, [task], limit=1)[0]
    assert score["log_likelihood"] == pytest.approx(total / len(wanted), abs=1e-4)
    assert loss.item() == pytest.approx(-total / len(wanted), abs=1e-4)


def test_padding_changes_no_loss(speaker):
    """A short prompt loses the same alone and beside a long one, and a short answer beside a long one."""
    _, model, objective = speaker
    pairs = [("cat", "good"), ("the red cat sat on the mat and then flew home", "bad"), ("dog", "the blue bird flew over the log")]
    with torch.no_grad():
        together = objective.losses(model, objective.encode([[pair] for pair in pairs]))
        alone = torch.cat([objective.losses(model, objective.encode([[pair]])) for pair in pairs])
    assert torch.allclose(together, alone, atol=1e-4)


def test_long_prompts_lose_their_beginning(tiny_models, tokenizer):
    """A causal prompt is cut on the left, where it is farthest from the answer; the begin token stays."""
    objective = make_objective("causal_lm", tokenizer, {"max_length": 2, "template": "{input} then"})
    batch = objective.encode([[("the red cat sat", "good")]])
    assert tokenizer.decode(batch.arguments["input_ids"][0]) == "<s> sat then good </s>"
    assert batch.targets.tolist() == [[tokenizer.convert_tokens_to_ids("good"), EOS]]


@pytest.mark.parametrize("template", ["no place", "{input} {input}"])
def test_templates_need_one_input(tokenizer, template):
    """A prompt without the text, or with it twice, is a mistake in a config."""
    with pytest.raises(ConfigError, match="template"):
        make_objective("causal_lm", tokenizer, {"template": template})


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a c", "a b c d", 2 * 1 * 0.5 / 1.5),
        ("The CAT", "the cat", 1.0),
        ("a b a b", "b a b a", 3 / 4),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("x", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, expected):
    """F-measure of the longest common subsequence of words."""
    assert rouge_l(answer, reference) == pytest.approx(expected)


# --- sentence encoders ------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_models):
    """The tiny BERT, bare."""
    return RowAdapters(tiny_models["bert"].build(), tiny_models["bert"].layout())


def _labelled(rows, labels):
    return Task("t", "demo", ("do it",), tuple(labels), "MIT", "made", tuple(Example(*row) for row in rows))


def test_label_matching_takes_the_nearest_label(encoder, tokenizer):
    """A text equal to a label's text is nearest to it: three right and one wrong by construction."""
    labels = ["red cat", "blue dog", "green bird home"]
    rows = [(label, label, "test") for label in labels] + [("red cat ", "blue dog", "test")]
    (score,) = make_objective("label_matching", tokenizer).scores(encoder, None, [_labelled(rows, labels)], limit=9)
    assert score["accuracy"] == 0.75
    assert score["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_prototypes_never_see_label_names(encoder, tokenizer):
    """A test text equal to its class's only training text is right, whatever the classes are called."""
    texts = ["red cat sat", "blue dog ran", "green bird flew over"]
    for labels in (["one", "two", "three"], ["blue dog ran", "green bird flew over", "red cat sat"]):
        rows = [(t, label, split) for t, label in zip(texts, labels, strict=True) for split in ("train", "test")]
        (score,) = make_objective("prototypes", tokenizer).scores(encoder, None, [_labelled(rows, labels)], limit=9)
        assert score == {"accuracy": 1.0, "macro_f1": 1.0}


def test_prototype_is_the_mean_embedding(encoder, tokenizer):
    """Loss of one episode, computed by hand from the model's hidden states."""
    texts = {"x": ["red cat", "red cat"], "y": ["blue dog ran home", "blue dog ran home"]}
    rows = [(text, label, "train") for label, own in texts.items() for text in own]
    objective = make_objective("prototypes", tokenizer, {"temperature": 0.5})
    with torch.no_grad():
        loss = objective.losses(encoder.model, objective.sample([_labelled(rows, texts)], 1, "0")).item()
        unit = []
        for own in texts.values():
            read = tokenizer(own[0], return_tensors="pt")
            unit.append(torch.nn.functional.normalize(encoder.model(**read).last_hidden_state[0].mean(0), dim=0))
    cosine = (unit[0] @ unit[1]).item()
    assert loss == pytest.approx(math.log(1 + math.exp((cosine - 1) / 0.5)), abs=1e-5)


@pytest.mark.parametrize("name", ["label_matching", "prototypes"])
def test_tasks_without_labels_need_a_language_model(encoder, tokenizer, name):
    """No closed label set: TaskError with the remedy."""
    objective = make_objective(name, tokenizer)
    task = _task("t", None, 4)
    for use in (lambda: objective.sample([task], 2, "0"), lambda: objective.scores(encoder, None, [task], limit=2)):
        with pytest.raises(TaskError, match="language-model objective"):
            use()


def test_prototypes_need_a_class_that_was_seen(encoder, tokenizer):
    """If no class of the test examples occurs in training there is nothing to score: TaskError, not a division by zero."""
    rows = [("red cat", "a", "train"), ("blue dog", "b", "train"), ("green bird", "c", "test")]
    with pytest.raises(TaskError, match="'t'"):
        make_objective("prototypes", tokenizer).scores(encoder, None, [_labelled(rows, "abc")], limit=9)


def test_macro_f1_by_hand():
    """Each class counts once: 2·1/(2+1) and 2·1/(1+2) and, never guessed, 0."""
    assert _macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx(2 / 3)
    assert _macro_f1([0, 0], [0, 2]) == pytest.approx((2 / 3 + 0) / 2)


# --- fast ways that change nothing --------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tiny_models, tokenizer):
    """A runner and six tasks, half of them of short texts and half of long ones."""
    tiny = tiny_models["llama"]
    model = tiny.build(seed=3)
    runner = Runner(model, tiny.layout(model), make_objective("causal_lm", tokenizer))
    return runner, [_task("t" * (i + 1), (), 3 if i % 2 else 40) for i in range(6)]


def test_the_head_sees_the_states_of_answers_alone(mixed):
    """As many as there are answer tokens, in one contiguous block; the losses are those of all positions."""
    runner, tasks = mixed
    seen = []
    hook = runner.model.lm_head.register_forward_hook(lambda module, given, result: seen.append((given[0].shape, given[0].is_contiguous())))
    batch = runner.objective.sample(tasks, 4, "0")
    with torch.no_grad():
        slow = runner.objective.losses(runner.model, batch)  # a hook on the head, as that of an adapter, keeps rows whole
        hook.remove()
        pre = runner.model.lm_head.register_forward_pre_hook(lambda module, given: seen.append((given[0].shape, given[0].is_contiguous())))
        fast = runner.objective.losses(runner.model, batch)
        pre.remove()
    assert [contiguous for _, contiguous in seen] == [True, seen[1][1]]
    assert seen[0][0][:2] == (24, batch.targets.shape[1] + 1)
    assert torch.allclose(fast, slow, atol=1e-5)
    assert not runner.model.lm_head._forward_pre_hooks


def test_parts_of_a_step_hold_what_the_step_holds_with_less_padding(mixed, monkeypatch):
    """The same rows, each once, in fewer tokens; losses and gradients of every adapter as in one batch."""
    runner, tasks = mixed
    monkeypatch.setattr(runner.objective, "tokens_of_a_part", 16)
    parts = runner.objective.sample_parts(tasks, 4, "0")
    whole = runner.objective.sample(tasks, 4, "0")
    assert len(parts) > 1 and sorted(number for numbers, _ in parts for number in numbers) == list(range(6))

    def rows(batch):
        ids, mask = batch.arguments["input_ids"].tolist(), batch.arguments["attention_mask"].tolist()
        return [tuple(i for i, kept in zip(*pair, strict=True) if kept) for pair in zip(ids, mask, strict=True)]

    apart = {number: rows(batch)[4 * k : 4 * k + 4] for numbers, batch in parts for k, number in enumerate(numbers)}
    assert [row for number in range(6) for row in apart[number]] == rows(whole)
    assert sum(batch.arguments["input_ids"].numel() for _, batch in parts) < 0.8 * whole.arguments["input_ids"].numel()
    factors = {name: (torch.randn(6, 2, m.in_features) * 0.3, torch.randn(6, m.out_features, 2) * 0.3) for name, m in _modules(runner)}
    stacked = {name: tuple(x.requires_grad_() for x in pair) for name, pair in factors.items()}
    losses = runner.losses(stacked, tasks, 4, "0")
    with runner.use(stacked) as model:
        together = runner.objective.losses(model, whole)
    assert torch.allclose(losses, together, atol=1e-4)
    leaves = [x for pair in stacked.values() for x in pair]
    for one, other in zip(torch.autograd.grad(losses.sum(), leaves), torch.autograd.grad(together.sum(), leaves), strict=True):
        assert torch.allclose(one, other, atol=1e-3 * other.abs().max().clamp_min(1).item())


def test_a_bound_on_the_tokens_of_a_part_changes_no_loss(mixed):
    """A part has one task at least; losses are those of one batch, whatever the parts."""
    runner, tasks = mixed
    whole = runner.objective.losses(runner.model, runner.objective.sample(tasks, 4, "0"))
    for most, count in ((1, 6), (10**6, 1)):
        parts = runner.objective.sample_parts(tasks, 4, "0", most)
        assert len(parts) == count
        losses = {
            n: loss for numbers, batch in parts for n, loss in zip(numbers, runner.objective.losses(runner.model, batch), strict=True)
        }
        assert torch.allclose(torch.stack([losses[n] for n in range(6)]), whole, atol=1e-4)


def _modules(runner):
    return [(module.name, module) for module in runner.layout.modules]


@pytest.mark.slow
def test_answers_are_written_only_where_they_are_not_the_reference(tiny_models, tokenizer, monkeypatch):
    """An exact match is what would be written; the scores are those of writing every answer."""
    tiny = tiny_models["llama"]
    model = tiny.build(seed=3)
    runner = Runner(model, tiny.layout(model), make_objective("causal_lm", tokenizer, {"rouge": True}))
    inputs = [f"{first} {second}" for first in WORDS for second in WORDS[:6]]
    answers = runner.generate(inputs, max_new_tokens=16)
    known = [Example(text, answer, "test") for text, answer in zip(inputs, answers, strict=True) if answer]
    exact = runner.scores(None, [dataclasses.replace(_task("one", (), 3), examples=(example,)) for example in known], limit=1)
    right = [example for example, one in zip(known, exact, strict=True) if one["exact_match"] == 1][:6]
    rows = (*right, *(Example(text, "cat dog", "test") for text in inputs[:5]))
    task = Task("t", "demo", ("x",), None, "MIT", "made", rows)
    asked = []
    real = runner.objective.generate
    monkeypatch.setattr(runner.objective, "generate", lambda model, texts, **more: asked.extend(texts) or real(model, texts, **more))
    (score,) = runner.scores(None, [task], limit=99)
    assert score["exact_match"] == pytest.approx(len(right) / len(rows)) and right
    assert sorted(set(asked)) == sorted(set(inputs[:5]))
    every = [real(runner.model, [example.input], max_new_tokens=16)[0] for example in rows]
    pairs = [(answer, example.output) for answer, example in zip(every, rows, strict=True)]
    assert score["rouge_l"] == pytest.approx(sum(rouge_l(*pair) for pair in pairs) / len(pairs))
    assert score["lenient_match"] == sum(lenient_match(*pair) for pair in pairs) / len(pairs) >= score["exact_match"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Yes.", "yes", True),
        (' "YES!" ', "yes", True),
        ("Straße", "STRASSE", True),
        ("a  b", "a b", True),
        ("yes, it is", "yes", False),
        ("don't", "dont", False),
        ("-5", "5", True),
        ("$5", "5", False),
        ("?!", "?!", True),
        ("?", "!", False),
        ("", "yes", False),
    ],
)
def test_lenient_match_by_hand(answer, reference, expected):
    """Case, blanks and punctuation around the whole are forgiven; anything inside, and symbols that mean something, are not."""
    assert lenient_match(answer, reference) is expected


def test_tasks_of_free_text_are_written_out(mixed):
    """Beside exact match they get ROUGE-L and a lenient match, whatever the setting; others do not, and are not written."""
    runner, tasks = mixed
    plain, free = runner.scores(None, [tasks[0], dataclasses.replace(tasks[1], free_text=True)], limit=4)
    assert {"rouge_l", "lenient_match"} <= set(free) and not {"rouge_l", "lenient_match"} & set(plain)
    assert set(plain) == set(free) - {"rouge_l", "lenient_match"}
