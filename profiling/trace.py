"""A trace of one generation, for chrome://tracing, with a table and a picture: CPU or GPU.

    python profiling/trace.py "frog on a bicycle" --steps 10 --out trace.json

The same as ``sidestep profile``, whose options it takes; `sidestep.tracing` does the work.
"""

from __future__ import annotations

import sys

from sidestep.cli import main

if __name__ == "__main__":
    main(["profile", *sys.argv[1:]])
