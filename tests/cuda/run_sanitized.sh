#!/bin/sh
# The CUDA kernels under compute-sanitizer: memcheck, racecheck, initcheck and synccheck. Any report fails.
# Arguments: the Python to use. CUDA_HOME may name the toolkit.
set -eu

python=$1
cd "$(dirname "$0")/../.."
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH
if ! command -v compute-sanitizer > /dev/null; then
  echo "sanitize-cuda needs compute-sanitizer, part of the CUDA toolkit (on PATH, or by CUDA_HOME)" >&2
  exit 1
fi
"$python" -c '
import sys
import shufflenet_ext
error = shufflenet_ext.build_info()["cuda_error"]
sys.exit(error and f"sanitize-cuda needs a GPU and the CUDA kernels: {error}")
'
# Every tensor in an allocation of its own, so that what lies beyond its end is nobody's.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  # Errors of the runtime's functions are PyTorch's to handle: it probes for what a driver can do.
  compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no \
    "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_sanitized.py
done
