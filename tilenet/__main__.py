"""The command: `tilenet` and `python -m tilenet`."""

import gc
import signal
import sys
import warnings

_STOPPED = 128
"""Exit codes from here on say which signal ended a run: another one may end it at once."""


def main() -> None:
    """Run the command line and exit with its code."""
    # Until the command runs, and once it has, Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tilenet.console import drop_unread, drop_unwritten
    from tilenet.strangers import forget_drivers

    drop_unread()
    forget_drivers()
    from tilenet.cli import run

    code = run(sys.argv[1:])
    drop_unwritten()
    if code < _STOPPED:
        # What is done is done: a signal while Python ends must not make a failure of it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    else:
        _drop_remains()
    if "torch" not in sys.modules:  # some of what it imports complains of what is never freed
        gc.freeze()  # or Python looks for garbage among all that was imported, before it ends
    sys.exit(code)


def _drop_remains() -> None:
    """Let go of what a signal left half made, an event loop say: it complains as it is freed."""
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    gc.collect()


if __name__ == "__main__":
    main()
