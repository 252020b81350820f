"""What the tests of engines share: vLLM's environment, a running `vllm serve`, and greedy answers of transformers beside it."""

import collections
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

BIN = Path(os.environ.get("LORAG_VLLM", "/nonexistent"))
DTYPE = os.environ.get("LORAG_VLLM_DTYPE", "float32")  # in another one answers need not be those of transformers
needs_vllm = pytest.mark.skipif(not (BIN / "vllm").is_file(), reason="vLLM is not there: bash tests/engines/run.sh")
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
HOSTILE = ["lorag:a\0b", "lorag:a\nb", "lorag:../../etc/passwd", "lorag:expert/../../../etc", "lorag:" + "x" * 20_000, "lorag:#0", "lorag:"]


@torch.inference_mode()
def greedy(model, prompts, tokens, ends):
    """Token ids of greedy answers without their end token, one prompt at a time."""
    found = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        written = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, pad_token_id=ends
        )
        found.append([token for token in written[0, len(ids) :].tolist() if token != ends])
    return found


class Server:
    """`vllm serve` of a base model, with the plug-in.

    Args:
        base: Folder of the base model.
        store: Folder of the adapters; the settings are written beside it.
        settings: Of `lorag.serving.resolver.ServingSettings`.
    """

    def __init__(self, base, store, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = Path(store).parent / "serving.yaml"
        config.write_text(json.dumps({"folder": str(store), **settings}), encoding="utf-8")
        environment = {**os.environ, **QUIET, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "lorag"}
        command = [str(BIN / "vllm"), "serve", base, "--dtype", DTYPE, "--enforce-eager", "--max-model-len", "256"]
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
        """Status, and the answer's token ids or the error's message; and seconds. A prompt is text or token ids."""
        began = time.monotonic()
        status, found = self._post("completions", model, tokens, prompt=prompt)
        return status, found, time.monotonic() - began

    def chat(self, model, text, tokens=48, **asked):
        """Status, and token ids or message, of one user's turn; `asked` goes into the request."""
        return self._post("chat/completions", model, tokens, messages=[{"role": "user", "content": text}], **asked)

    def _post(self, path, model, tokens, **asked):
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "return_token_ids": True, **asked}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)["choices"][0]["token_ids"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    def work(self):
        """Seconds that its processes have computed: what other programs on the machine do does not count."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                after_name = path.read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(after_name[2]) == self.process.pid:  # its process group
                    ticks += int(after_name[11]) + int(after_name[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self, how=signal.SIGTERM):
        """Ends it with all its processes, as a kill or as a service manager does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
