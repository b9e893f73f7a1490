#!/usr/bin/env bash
# Runs the C++ tests on an emulated CPU and checks which kernels ran there. Usage:
#   run_emulated.sh 'KERNEL ...' 'KERNEL ...' EMULATOR [ARGUMENT ...] TESTS [ARGUMENT ...]
# The kernels of the first list must have passed their test EveryKernel, which counts the calls of their tiles; those of
# the second list must have been skipped by it, because the CPU lacks what they need.
set -euo pipefail

runs="$1" lacks="$2"
shift 2

log="$(mktemp)"
trap 'rm -f "$log"' EXIT
status=0
# What the emulator cannot offer of a CPU it says on every start.
"$@" 2> >(grep -v "TCG doesn't support requested feature" >&2) | tee "$log" || status=$?
for kernel in $runs; do
  grep -qE "^\[       OK \] .*EveryKernel\..*/$kernel " "$log" || { echo "$kernel did not run." >&2; status=1; }
done
for kernel in $lacks; do
  grep -qE "^\[  SKIPPED \] .*EveryKernel\..*/$kernel " "$log" || { echo "$kernel was not skipped." >&2; status=1; }
done
exit "$status"
