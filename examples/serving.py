"""Serve a generated adapter: with transformers and PEFT here, and with vLLM by configuration alone.

    python examples/serving.py [FOLDER]

The folder that lorag writes is an ordinary PEFT adapter; nothing below the first step imports lorag's generator again.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag import generate_lora
from lorag.adapters.portability import check_portability
from lorag.adapters.reading import read_facts
from lorag.base.names import locate
from lorag.serving.commands import start_commands
from lorag.tasks.finding import find_tasks

DESCRIPTION = "summarise legal text"


def main(out: Path) -> None:
    """Runs it."""
    adapter = generate_lora(DESCRIPTION)
    folder = adapter.save_pretrained(out)
    text = find_tasks("sandbox", "test")["legal-summarise-plain"].examples[0].input

    # transformers and PEFT; of a base model on the hub, `base` is its id.
    base = locate("sandbox-lm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    prompt = tokenizer(f"{text}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), prompt], 1)  # the embedded model reads no text without its start
    print(f"text          {text}")
    print(f"with adapter  {answer(model, tokenizer, prompt)}")
    with model.disable_adapter():
        print(f"without       {answer(model, tokenizer, prompt)}")

    # Where else it loads, and with which settings.
    for verdict in check_portability(read_facts(folder)):
        print(f"{verdict.target + ':':<14}{verdict.line()}")
    for start in start_commands(folder, read_facts(folder), adapter.info):
        print(f"\n{start.engine}:\n{start.command}\n{start.ask}")


def answer(model: PeftModel, tokenizer: AutoTokenizer, prompt: torch.Tensor) -> str:
    """A greedy answer."""
    with torch.inference_mode():
        written = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/serving"))
