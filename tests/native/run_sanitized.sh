#!/bin/sh
# Builds the fuzzer of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs it. Needs no Python and
# no torch. Arguments: as for fuzz_kernels. CXX chooses the compiler, BUILD_DIR where the program goes,
# RUN what runs it (an emulator; nothing).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
build=${BUILD_DIR:-$root/build/sanitize}
mkdir -p "$build"

objects=
pids=
for source in "$here/fuzz_kernels.cpp" "$root"/csrc/cpu/isa/*.cpp; do
  object=$build/$(basename "$source" .cpp).o
  "${CXX:-c++}" -std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi \
    -fsanitize=address,undefined -fno-sanitize-recover=all -c "$source" -o "$object" &
  pids="$pids $!"
  objects="$objects $object"
done
for pid in $pids; do wait "$pid"; done
# shellcheck disable=SC2086  # a list of words
"${CXX:-c++}" -fsanitize=address,undefined $objects -o "$build/fuzz_kernels"
${RUN:-} "$build/fuzz_kernels" "$@"
