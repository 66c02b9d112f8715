"""``python -m capnas`` is the command ``capnas``."""

from capnas.cli import main

if __name__ == "__main__":
    main()
