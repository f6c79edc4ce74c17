#!/bin/sh
# Runs the fuzzer of the kernels for AArch64 on another processor, under qemu: compiled as the library is, then with the
# sanitizers. Arguments: as for fuzz_kernels.
set -eu

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v $tool > /dev/null; then
    echo "$tool: not found, expected of Debian's packages g++-aarch64-linux-gnu and qemu-user" >&2
    exit 1
  fi
done

here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
build=$root/build/aarch64
mkdir -p "$build"

aarch64-linux-gnu-g++ -std=c++17 -O3 -Wall -Wextra -Werror -Wno-unknown-pragmas -static \
  "$here/fuzz_kernels.cpp" "$root"/csrc/cpu/isa/*.cpp -o "$build/fuzz_kernels"
qemu-aarch64 "$build/fuzz_kernels" "$@"

# The leak checker traces the process, which qemu does not emulate.
CXX=aarch64-linux-gnu-g++ BUILD_DIR=$build RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
  ASAN_OPTIONS=detect_leaks=0 sh "$here/run_sanitized.sh" "$@"
