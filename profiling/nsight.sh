# What nsys.sh and ncu.sh share: what has to be there, and where the report goes. To be sourced.
name=$(basename "$0")
python=${PYTHON:-python}

# need COMMAND PRODUCT ADDRESS: exits 3 with a sentence where the command is missing.
need() {
  command -v "$1" >/dev/null && return
  echo "$name: $1 is not on PATH, install $2 ($3) or add its folder to PATH" >&2
  exit 3
}

# begin OUT ...: sets `out`, and looks for what the ranges and the GPU need.
begin() {
  if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "$name: expected the report to write, as in: bash profiling/$name report --steps 10" >&2
    exit 2
  fi
  out=$1
  "$python" -c 'import nvtx' 2>/dev/null || {
    echo "$name: the package nvtx is missing, without which there are no ranges: pip install nvtx" >&2
    exit 3
  }
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$name: torch sees no CUDA device, and $name looks at nothing else" >&2
    exit 3
  }
}
