#!/usr/bin/env bash
# Makes sure that Debian packages are there. Usage: install-debian-packages.sh build|development PYTHON
# build: to compile; development: what tests, linters and the wheel need as well.
# Installs the missing ones as root or through sudo; where neither is possible it prints the command and fails.
set -euo pipefail

purpose="$1"
python="${2:-python3}"
packages=(g++ cmake ninja-build nlohmann-json3-dev)
optional_packages=()
case "$purpose" in
build) ;;
development)
  packages+=(libgtest-dev libbenchmark-dev pkg-config clang-format)
  # For the tests by other compilers, sanitizers, fuzzers and emulated CPUs and of the documentation, which are skipped
  # without them.
  optional_packages=(clang libclang-rt-14-dev doxygen g++-aarch64-linux-gnu qemu-user)
  ;;
*)
  echo "The first argument is '$purpose', expected build or development." >&2
  exit 2
  ;;
esac

if ! command -v dpkg-query >/dev/null; then
  echo "This system is not Debian. Needed: ${packages[*]}, or what they are called here." >&2
  for tool in g++ cmake ninja; do
    command -v "$tool" >/dev/null || { echo "$tool is missing." >&2; exit 1; }
  done
  exit 0
fi

is_installed() { dpkg-query --show --showformat='${Status}' "$1" 2>/dev/null | grep -q '^install ok installed$'; }

missing=()
for package in "${packages[@]}"; do
  is_installed "$package" || missing+=("$package")
done
missing_optional=()
if [ "$(dpkg --print-architecture)" = amd64 ]; then
  for package in "${optional_packages[@]}"; do
    is_installed "$package" || missing_optional+=("$package")
  done
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  missing+=(python3 python3-venv)
fi
# torch.compile builds against Python's headers.
if ! "$python" -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' 2>/dev/null; then
  missing+=(python3-dev)
fi
[ "${#missing[@]}" -eq 0 ] && [ "${#missing_optional[@]}" -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
  as_root=(env DEBIAN_FRONTEND=noninteractive)
elif sudo -n true 2>/dev/null; then
  as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)
elif [ "${#missing[@]}" -eq 0 ]; then
  echo "Some tests will be skipped (other compilers, emulated CPUs), they need: apt-get install ${missing_optional[*]}" >&2
  exit 0
else
  echo "Some Debian packages are missing. Install them, then run make again:" >&2
  echo >&2
  echo "    sudo apt-get install ${missing[*]}" >&2
  echo >&2
  exit 1
fi

missing+=("${missing_optional[@]}")
echo "Installing Debian packages: ${missing[*]}"
"${as_root[@]}" apt-get update
"${as_root[@]}" apt-get install --yes --no-install-recommends "${missing[@]}"
