#!/bin/sh
# Builds race_phases with ThreadSanitizer and runs it; then once more with a copy of phases.h in which no thread waits
# for the others, which must be reported. Needs no Python and no torch. Arguments: as for race_phases. CXX chooses the
# compiler.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
build=$root/build/races
phases=$(cd "$root" && find csrc -name phases.h)
folder=$(dirname "$phases")
mkdir -p "$build/planted/$folder" "$build/planted/tests/native"

compile() {
  "${CXX:-c++}" -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -pthread \
    -I"$here/stand_in" -I"$root/$folder" "$1" -o "$2"
}

compile "$here/race_phases.cpp" "$build/race_phases"
"$build/race_phases" "$@"

cp "$here/race_phases.cpp" "$build/planted/tests/native"
sed 's/progress\[p\]\.done\.load([^)]*) < phase\.tasks/false/' "$root/$phases" > "$build/planted/$phases"
if cmp -s "$root/$phases" "$build/planted/$phases"; then
  echo "phases.h has no wait that could be taken out" >&2
  exit 1
fi
compile "$build/planted/tests/native/race_phases.cpp" "$build/race_planted"
if "$build/race_planted" "$@" > "$build/planted.log" 2>&1 || ! grep -q "ThreadSanitizer: data race" "$build/planted.log"; then
  echo "a missing wait was not reported: see $build/planted.log" >&2
  exit 1
fi
echo "phases: a missing wait is reported"
