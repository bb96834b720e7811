"""The command: `tilenet` and `python -m tilenet`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from tilenet.strangers import forget_drivers

    forget_drivers()
    from tilenet.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
