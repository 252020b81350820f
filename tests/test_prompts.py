"""Prompts: what the tokenizer's own chat template writes, bos once, ended as the template ends a turn, for five kinds of templates."""

import pytest
from conftest import VOCABULARY, stack_adapters
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorag.base.layout import LoraLayout
from lorag.base.objectives import make_objective
from lorag.base.objectives.prompts import Conversation
from lorag.base.runner import Runner
from lorag.errors import ConfigError, TaskError
from lorag.tasks.suite import Example, Task

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nyou are good<|im_end|>\n{% endif %}" + CHATML
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# template, bos, eos, what ends a turn, other special tokens, whether there is a system turn
KINDS = {
    "llama3": (LLAMA3, "<|begin|>", "<|end_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], True),
    "qwen": (CHATML, None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"], True),
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>", "<|im_end|>", [], True),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>", ["<start_of_turn>"], False),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>", ["[INST]", "[/INST]"], False),
}
WORDS = [*VOCABULARY[3:], "user", "assistant", "system", "model", "you", "are", "é", "12"]


def chat_tokenizer(kind):
    """A tokenizer of one token per word with a family's special tokens and a template of its kind."""
    template, bos, eos, end, more, _ = KINDS[kind]
    words = list(dict.fromkeys(["<unk>", *WORDS]))
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": eos, "pad_token": eos, "unk_token": "<unk>"} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **ends)
    tokenizer.add_special_tokens({"additional_special_tokens": [*more, end]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=sorted(KINDS))
def chat(request):
    """Each kind in turn: its name and tokenizer."""
    return request.param, chat_tokenizer(request.param)


def _rendered(tokenizer, text, system=None):
    turns = [{"role": "user", "content": text}]
    turns = turns if system is None else [{"role": "system", "content": system}, *turns]
    return tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)


def test_a_prompt_is_what_apply_chat_template_gives(chat):
    """Token for token, for any input; chat is the default where the tokenizer has a template; the bos token comes once at most."""
    _, tokenizer = chat
    objective = make_objective("causal_lm", tokenizer)
    assert objective.settings()["template"] == "chat"
    for text in ("the cat sat", "12 é unheard-of {input} {{ x }}", "dog"):
        (ids,) = objective.prompts.prompts([text])
        assert ids == _rendered(tokenizer, text)
        if tokenizer.bos_token not in (None, "<|im_start|>"):
            assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[:2] != [tokenizer.bos_token_id] * 2
    again = make_objective("causal_lm", tokenizer, objective.settings())
    assert again.settings() == objective.settings() and again.prompts.prompts(["cat"]) == objective.prompts.prompts(["cat"])


def test_an_answer_ends_as_the_template_ends_a_turn(chat):
    """Prompt and answer together are the conversation as the template writes it, up to the token that ends the turn."""
    kind, tokenizer = chat
    objective = make_objective("causal_lm", tokenizer)
    ((prompt, answer),) = objective.prompts.rows([("the cat", "good dog")])
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "good dog"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert (prompt + answer)[: len(whole)] == whole[: len(prompt + answer)]
    assert tokenizer.decode(answer[-1]) == KINDS[kind][3]
    assert tokenizer.eos_token_id in objective.prompts.stops and answer[-1] in objective.prompts.stops
    assert objective.prompts.read([*answer, *answer]) == "good dog"


def test_system_text(chat):
    """As a turn of its own where the template has one; before the input where it refuses; without one the template's own."""
    kind, tokenizer = chat
    objective = make_objective("causal_lm", tokenizer, {"template": "chat", "system": "you are late"})
    (ids,) = objective.prompts.prompts(["the cat"])
    if KINDS[kind][5]:
        assert ids == _rendered(tokenizer, "the cat", "you are late")
    else:
        assert ids == _rendered(tokenizer, "you are late\n\nthe cat")
    assert objective.settings()["system"] == "you are late"
    plain = make_objective("causal_lm", tokenizer).prompts.texts(["the cat"])[0]
    assert ("you are good" in plain) == (kind == "smollm2")
    empty = make_objective("causal_lm", tokenizer, {"system": ""}).prompts.texts(["the cat"])[0]
    assert "you are" not in empty


def test_long_inputs_lose_their_beginning_and_the_template_nothing(chat):
    """Cut to the limit with the template's own tokens whole, and the end of the input kept."""
    _, tokenizer = chat
    text = " ".join(WORDS[1:25])
    frame = len(_rendered(tokenizer, "cat")) - 1
    objective = make_objective("causal_lm", tokenizer, {"max_length": frame + 5})
    (ids,) = objective.prompts.prompts([text])
    assert ids == _rendered(tokenizer, " ".join(text.split()[-5:])) and len(ids) == frame + 5
    with pytest.raises(ConfigError, match=f"no room.*more than {frame} tokens"):
        make_objective("causal_lm", tokenizer, {"max_length": frame})


def test_examples_are_earlier_turns_and_the_first_are_dropped(chat):
    """As the template writes a conversation; where that is too long, the oldest example goes, and the description stays."""
    kind, tokenizer = chat
    said = Conversation("you are good", [("the cat", "sat"), ("12", "late")], "dog")
    turns = ["you are good\n\nthe cat", "sat", "12", "late", "dog"]
    written = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    (ids,) = make_objective("causal_lm", tokenizer).prompts.prompts([said])
    assert ids == tokenizer.apply_chat_template(written, tokenize=True, add_generation_prompt=True, return_dict=False)
    written = [{**written[2], "content": "you are good\n\n12"}, *written[3:]]
    shorter = tokenizer.apply_chat_template(written, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert make_objective("causal_lm", tokenizer, {"max_length": len(ids) - 1}).prompts.prompts([said]) == [shorter]
    (plain,) = make_objective("causal_lm", tokenizer, {"template": "{input}\n"}).prompts.texts([said])
    assert plain == f"{said}\n" and "Input: 12\nOutput: late\n\nInput: dog\nOutput:" in plain
    system = make_objective("causal_lm", tokenizer, {"system": "late"}).prompts.texts([said])[0]
    assert system.index("late") < system.index("you are good\n\nthe cat") < system.index("dog")


def test_a_written_template_has_bos_once(chat):
    """Whether it writes the bos token itself or not."""
    _, tokenizer = chat
    if tokenizer.bos_token is None:
        return
    for template in ("{input} :", tokenizer.bos_token + " {input} :"):
        (ids,) = make_objective("causal_lm", tokenizer, {"template": template}).prompts.prompts(["the cat"])
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    written = make_objective("causal_lm", tokenizer, {"template": tokenizer.bos_token + " {input} :", "max_length": 2})
    assert (
        written.prompts.prompts(["the cat"])[0]
        == make_objective("causal_lm", tokenizer, {"template": "{input} :", "max_length": 2}).prompts.prompts(["the cat"])[0]
    )


def test_the_same_seed_gives_the_same_prompt_on_any_day(chat):
    """A template that states the date gets a fixed one."""
    _, tokenizer = chat
    tokenizer.chat_template = "{{ date_string if date_string is defined else strftime_now('%d') }} " + tokenizer.chat_template
    texts = make_objective("causal_lm", tokenizer).prompts.texts(["the cat"])
    assert texts[0].startswith("26 Jul 2024 ")


def test_templates_that_cannot_be_used_are_named(tokenizer):
    """One that raises, one with a fault, one that leaves the input out, no template at all, a system text without chat."""
    fresh = chat_tokenizer("qwen")
    for template, text in (
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages | nothing }}", "nothing"),
        ("{% for", "chat template"),
        ("hello", "leaves texts out"),
    ):
        fresh.chat_template = template
        with pytest.raises(ConfigError, match=rf"(?s){text}.*Write a template instead"):
            make_objective("causal_lm", fresh)
        assert make_objective("causal_lm", fresh, {"template": "{input}\n"}).template == "{input}\n"
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        make_objective("causal_lm", tokenizer, {"template": "chat"})
    assert make_objective("causal_lm", tokenizer).template == "{input}\n"
    with pytest.raises(ConfigError, match="system belongs to a chat template"):
        make_objective("causal_lm", tokenizer, {"template": "{input}", "system": "be good"})
    with pytest.raises(ConfigError, match="template cannot be used"):
        make_objective("causal_lm", tokenizer, {"template": "{input} {other}"})


def test_outputs_that_do_not_fit_name_their_task(tokenizer, tiny_models):
    """In training and in scoring: the task, the tokens and the limit."""
    tiny = tiny_models["llama"]
    runner = Runner(tiny.build(), tiny.layout(), make_objective("causal_lm", tokenizer, {"max_length": 6}))
    for split, use in (
        ("train", lambda tasks: runner.losses(None, tasks, 2, "0")),
        ("test", lambda tasks: runner.scores(None, tasks, limit=4)),
    ):
        tasks = [
            Task(name, "demo", ("do it",), None, "MIT", "made", (Example("the cat", "dog " * length, split),))
            for name, length in (("short", 6), ("long", 7))
        ]
        with pytest.raises(TaskError, match=r"'long' does not fit; got 8 tokens; expected at most 6"):
            use(tasks)
        use(tasks[:1])


def test_training_and_writing_agree(tiny_models, random_adapter):
    """Exact match by teacher forcing is that of written answers, with a chat template and its end of turn, adapter by adapter."""
    tokenizer = chat_tokenizer("llama3")
    tiny = tiny_models["llama"]
    model = tiny.build(seed=4)
    model.resize_token_embeddings(len(tokenizer))
    layout = LoraLayout.from_model(model, tiny.targets)
    runner = Runner(model, layout, make_objective("causal_lm", tokenizer))
    adapters = stack_adapters([random_adapter(layout, seed=seed) for seed in range(3)])
    inputs = ["the cat", "a dog ran", "bird"]
    written = runner.generate([text for text in inputs for _ in range(1)], adapters, max_new_tokens=5)
    ended = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) < 5 for text in written]
    tasks = [Task(f"t{i}", "demo", ("x",), None, "MIT", "made", (Example(inputs[i], written[i] or "cat", "test"),)) for i in range(3)]
    for score, done, text in zip(runner.scores(adapters, tasks, limit=1), ended, written, strict=True):
        if text:
            assert score["exact_match"] <= float(done) and score["token_accuracy"] >= 1 - 1 / 6 - 1e-6
