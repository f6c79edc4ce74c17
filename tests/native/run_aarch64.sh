#!/bin/sh
# Runs the fuzzer of the kernels for AArch64 on another processor, under qemu: compiled as the library is, then with the
# sanitizers. Arguments: as for run_fuzz.sh.
set -eu

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v $tool > /dev/null; then
    echo "$tool: not found, expected of Debian's packages g++-aarch64-linux-gnu and qemu-user" >&2
    exit 1
  fi
done

here=$(cd "$(dirname "$0")" && pwd)
export CXX=aarch64-linux-gnu-g++
# Side by side: each has one file that takes a minute or two to compile, on one core.
FLAGS="-O3 -static" BUILD_DIR=build/aarch64 RUN=qemu-aarch64 sh "$here/run_fuzz.sh" "${1:-300}" "${2:-0}" &
plain=$!
# Under qemu a sanitized unit takes ten times as long as another: a fifth as many. The leak checker traces the process,
# which qemu does not emulate.
BUILD_DIR=build/aarch64-sanitize RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" ASAN_OPTIONS=detect_leaks=0 \
  sh "$here/run_sanitized.sh" "${1:-60}" "${2:-0}"
wait $plain
