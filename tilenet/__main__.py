"""The command: `tilenet` and `python -m tilenet`."""

import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Until the command runs, and once it has, Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tilenet.strangers import forget_drivers

    forget_drivers()
    from tilenet.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
