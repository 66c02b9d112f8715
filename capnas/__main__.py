"""``python -m capnas`` is the command ``capnas``."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line: an interrupt, also by SIGTERM, ends it with a word and status 130 from its first moments on."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from capnas.cli import main as run  # a tenth of a second and more

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        exec("")  # after an interrupt in a text given to exec, as for a dataclass, Python would end by SIGINT and not with the status


if __name__ == "__main__":
    main()
