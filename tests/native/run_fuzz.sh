#!/bin/sh
# Builds the fuzzer of the kernels and runs it, one process on each core. Needs no Python and no torch.
#
# Usage: run_fuzz.sh [units] [seed]
# The processes share the units, and each has a seed of its own, from the given one on. CXX chooses the compiler, FLAGS
# what it is given besides warnings, BUILD_DIR where the program goes, RUN what runs it (an emulator; nothing).
set -eu

cd "$(dirname "$0")/../.."
export CXX="${CXX:-c++}" FLAGS="${FLAGS:--O3}"
build=${BUILD_DIR:-build/fuzz}
units=${1:-1000}
seed=${2:-0}
cores=$(getconf _NPROCESSORS_ONLN)
mkdir -p "$build"
rm -f "$build"/*.o  # of files that are no more

# The kernels alone, as all else needs torch. GCC knows neither clang's pragmas nor its warnings, and says so of the pragmas only.
for source in tests/native/fuzz_kernels.cpp tests/native/plain_pairs.cpp csrc/cpu/isa/*.cpp; do
  echo "$source $build/$(echo "$source" | tr / _).o"
# shellcheck disable=SC2016  # the inner shell's variables
done | xargs -P "$cores" -n 2 sh -c '$CXX -std=c++17 $FLAGS -Wall -Wextra -Werror -Wno-unknown-pragmas \
  -Wno-unknown-warning-option -Wno-psabi -c "$0" -o "$1"'
# shellcheck disable=SC2086  # a list of words
$CXX $FLAGS "$build"/*.o -o "$build/fuzz_kernels"

pids=
for i in $(seq 0 $((cores - 1))); do
  ${RUN:-} "$build/fuzz_kernels" $(((units + cores - 1) / cores)) $((seed + i)) &
  pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
