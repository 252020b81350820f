"""A generated adapter in EleutherAI's lm-evaluation-harness: a task of one's own, and the command that `lorag info` prints.

Usage: python examples/lm_eval_task.py [OUT]. It prints the command, and where lm-eval is installed (`pip install "lm-eval[hf]"`) runs it.
"""

import json
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import yaml

from lorag import generate_lora
from lorag.adapters.reading import read_provenance
from lorag.evaluation.harness import lm_eval_command
from lorag.tasks.finding import find_tasks

EXAMPLES = 12


def write_task(out: Path, name: str) -> None:
    """A task of the harness from the test texts of a task of lorag's: exact match of what the model writes after the text."""
    rows = [{"input": one.input, "output": one.output} for one in find_tasks("sandbox", "test")[name].split("test")[:EXAMPLES]]
    (out / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(out.resolve() / "test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}\n",  # the template of the embedded base model; a chat template is the command's own option
        "doc_to_target": "{{output}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    (out / "own.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def main(out: Path) -> None:
    """Runs it."""
    out.mkdir(parents=True, exist_ok=True)
    folder = generate_lora("summarise legal text").save_pretrained(out / "summary")
    write_task(out, "legal-summarise-plain")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    command = lm_eval_command(folder, config, read_provenance(folder)).replace("TASK", "own")
    command += f" --include_path {shlex.quote(str(out))} --output_path {shlex.quote(str(out / 'results'))} --device cpu"
    print(command)
    if util.find_spec("lm_eval") is None:
        print('not run: pip install "lm-eval[hf]"')
        return
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True, capture_output=True)  # noqa: S603 - made above
    (found,) = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "results").rglob("results_*.json")]
    print(f"exact match {found['results']['own']['exact_match,none']:.3f} on {EXAMPLES} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/lm_eval_task"))
