"""``python -m sidestep``: the same as the ``sidestep`` command."""

from sidestep.cli import main

if __name__ == "__main__":
    main()
