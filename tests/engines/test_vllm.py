"""vLLM, run: the plug-in end to end on the embedded base model. `bash tests/engines/run.sh` starts it."""

import concurrent.futures
import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from peft import PeftModel
from servers import BIN, HOSTILE, Server, greedy, needs_vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.bank.bank import find_bank
from lorag.base.names import locate
from lorag.files.artifacts import embedded
from lorag.serving.store import content_hash
from lorag.tasks.finding import find_tasks

pytestmark = [pytest.mark.engines, needs_vllm]
BANK = {"bank": str(embedded("data/sandbox/bank"))}
FAR = ["drive my robot arm forward", "asdf qwer zxcv", "bake me a cake of seven layers"]


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
    running = Server(locate("sandbox-lm"), disk[0] / "store", **BANK).wait()
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
        wanted += greedy(peft, [prompt], 48, end)
    assert served == wanted
    with peft.disable_adapter():
        bare = greedy(peft, prompts[:5], 48, end)
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
    second = Server(locate("sandbox-lm"), disk[0] / "store", **BANK, max_adapters=len(before)).wait()
    try:
        assert second.ask(name, prompts[0])[:2] == first[:2]
        status, message, _ = second.ask("lorag:which city does this travel note name?", prompts[0])
        assert status == 429 and "max_adapters" in message
        assert [(f.name, f.stat().st_mtime_ns) for f in _folders(disk)] == before
    finally:
        second.stop()
