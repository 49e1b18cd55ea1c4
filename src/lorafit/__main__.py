"""python -m lorafit, and the command `lorafit`: Ctrl-C ends it in one line from its beginning.

Owns the moments before the command line is there.
"""

import signal


def main() -> None:
    """The entry point: hands over to `cli`."""
    from lorafit.run.signals import leave_at_once

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it stays ignored
        signal.signal(signal.SIGINT, leave_at_once)
    from lorafit.cli import main as begin

    begin()


if __name__ == "__main__":
    main()
