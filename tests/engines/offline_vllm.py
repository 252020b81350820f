"""Run in vLLM's environment: answers prompts with the bare base model and with each adapter, offline. Reads and writes JSON."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = LLM(
        job["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=16,
    )
    settings = SamplingParams(temperature=0, max_tokens=job["tokens"])
    prompts, found = [{"prompt_token_ids": ids} for ids in job["prompts"]], []
    for number, folder in enumerate([None, *job["adapters"]]):
        request = None if folder is None else LoRARequest(f"adapter{number}", number, folder)
        answers = model.generate(prompts, settings, lora_request=request, use_tqdm=False)
        found.append([list(answer.outputs[0].token_ids) for answer in answers])
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
