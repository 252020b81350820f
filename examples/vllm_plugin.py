"""Ask vLLM for a description: starts it with lorag's plug-in on the embedded base model, then asks with curl and with OpenAI's client.

Usage: python examples/vllm_plugin.py [URL of a server that runs already]. Needs vLLM in this environment; see docs/serving.md.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

from lorag.base.names import locate

PORT = 8765
TEXT = "at 9 o'clock Lena Marsh of Oakline Homes rents a flat in Oslo; the tenant shall repair the roof by 3 May for 960 pounds."


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Runs `vllm serve` until the block ends, and yields its address."""
    environment = {
        "LORAG_SERVING": "default",  # or a generator's folder, or a YAML file of settings
        "VLLM_PLUGINS": "lorag",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    }
    command = ["vllm", "serve", locate("sandbox-lm"), "--enable-lora", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log) as running:  # noqa: S603
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                    break
                if running.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-3000:])
                time.sleep(1)
            yield f"http://127.0.0.1:{PORT}"
        finally:
            running.terminate()


def main(url: str) -> None:
    """Asks."""
    body = {"model": "lorag:summarise legal text", "prompt": f"{TEXT}\n", "temperature": 0, "max_tokens": 48}
    command = ["curl", "-s", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)  # noqa: S603
    print(f"curl    {body['model']}: {answer['choices'][0]['text'].strip()}")

    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for description in ("which person does this legal text name?", "drive my robot arm forward"):
        try:
            completion = client.completions.create(**{**body, "model": f"lorag:{description}"})
            print(f"client  lorag:{description}: {completion.choices[0].text.strip()}")
        except BadRequestError as error:  # the gate refuses
            print(f"client  lorag:{description}: refused: {error.body['message']}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with server() as address:
            main(address)
