"""``python -m vitscope.cli`` is the same as ``vitscope``."""

from vitscope.cli import main

if __name__ == "__main__":
    main()
