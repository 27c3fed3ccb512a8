#!/usr/bin/env bash
# The kernels of sidestep in one generation with Nsight Compute: bytes, occupancy, registers, stalls.
#
#   bash profiling/ncu.sh OUT [options of `sidestep profile`]
#   KERNELS='regex:.*' COUNT=20 bash profiling/ncu.sh OUT      # the model's kernels as well
#
# The first generation warms up and is not looked at. Of the second, COUNT launches of the kernels
# that KERNELS names are, each run several times; compare with docs/kernels.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=profiling/nsight.sh
source "$here/nsight.sh"
need ncu "Nsight Compute" "https://developer.nvidia.com/nsight-compute"
begin "$@"
ours='regex:solver_step|difference_gram|parareal_correct|exit_(score|decide|compact)'

exec ncu \
  --profile-from-start off --target-processes all --nvtx \
  --kernel-name "${KERNELS:-$ours}" --launch-count "${COUNT:-50}" \
  --section SpeedOfLight --section SpeedOfLight_RooflineChart --section MemoryWorkloadAnalysis \
  --section Occupancy --section LaunchStats --section SchedulerStats --section WarpStateStats \
  --force-overwrite --export "$out" \
  "$python" -m sidestep profile --nsight --device cuda "${@:2}"
