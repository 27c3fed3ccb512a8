#!/usr/bin/env bash
# A timeline of one generation with Nsight Systems: kernels, CUDA calls and the ranges of sidestep.
#
#   bash profiling/nsys.sh OUT [options of `sidestep profile`]
#
# The first generation warms up (compiles kernels, captures graphs); the second alone is recorded,
# between cudaProfilerStart and Stop. Look at OUT.nsys-rep in the GUI, or with `nsys stats`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=profiling/nsight.sh
source "$here/nsight.sh"
need nsys "Nsight Systems" "https://developer.nvidia.com/nsight-systems"
begin "$@"

exec nsys profile \
  --capture-range=cudaProfilerApi --capture-range-end=stop \
  --trace=cuda,nvtx,osrt,cublas,cudnn --cuda-graph-trace=node \
  --force-overwrite=true --output="$out" \
  "$python" -m sidestep profile --nsight --device cuda "${@:2}"
