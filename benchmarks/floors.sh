#!/usr/bin/env bash
# Tests of the library over pairs of torch and triton, each pair in a fresh environment; a row of a table for each.
#
#     benchmarks/floors.sh [torch:triton ...]        PYTHON=python3.10 for another Python; LOGS=DIR keeps what tests print
#
# Not in CI: on Linux every torch brings gigabytes of CUDA along. What diffusers needs of torch is its own affair.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=${LOGS:-$(mktemp -d)}
pairs=("$@")
[ ${#pairs[@]} -gt 0 ] || pairs=(2.8.0:3.4.0 2.9.1:3.5.1 2.10.0:3.6.0 2.13.0:3.7.1)
tests=(reference guidance ops errors recording sampling launches twins_attention twins_guidance adapter_diffusers transformers)

kernels=$(cat csrc_triton/*.py | grep -cE '^def _\w+_kernel\(')
echo "| Python | torch | triton | tests | kernels compiled, of $((2 * kernels)) |"
echo "|---|---|---|---|--:|"
for pair in "${pairs[@]}"; do
  torch=${pair%:*} triton=${pair#*:} work=$(mktemp -d) log=$logs/$torch.log
  "$python" -m venv "$work"
  "$work/bin/pip" install -q "torch==$torch" "triton==$triton" >"$log" 2>&1 &&
    "$work/bin/pip" install -q --no-deps -e . >>"$log" 2>&1 &&
    grep -vE '^(torch|triton|mkdocs)' constraints.txt >"$work/constraints.txt" &&
    "$work/bin/pip" install -q -c "$work/constraints.txt" "torch==$torch" "triton==$triton" einops numpy safetensors tqdm pillow matplotlib \
      diffusers transformers accelerate peft hypothesis pytest pytest-xdist >>"$log" 2>&1 &&
    "$work/bin/python" -m pytest -rs $(printf "tests/test_%s.py " "${tests[@]}") >>"$log" 2>&1
  compiled=$("$work/bin/python" -m benchmarks.compiled --one-each --skip bfloat16 float32 --target sm_80 --target sm_90 2>>"$log" | grep -c _kernel)
  result=$(grep -E '^[0-9]+ (passed|failed)|^[0-9]+ .*(passed|error)' "$log" | tail -1)
  echo "| $("$python" -V | cut -d' ' -f2) | $torch | $triton | ${result:-none: $(tail -1 "$log")} | ${compiled:-0} |"
  rm -rf "$work"
done
