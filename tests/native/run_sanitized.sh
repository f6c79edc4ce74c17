#!/bin/sh
# Runs the fuzzer of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer. Arguments and environment: as for
# run_fuzz.sh, but for FLAGS, and for the units: 600 unless told.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
FLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
  BUILD_DIR=${BUILD_DIR:-build/sanitize} sh "$here/run_fuzz.sh" "${1:-600}" "${2:-0}"
