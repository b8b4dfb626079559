"""The `fastgoal` command, and `python -m fastgoal_models`, which is the same.

`pip install .` installs the command without what it is made of: that, and a Ctrl-C before it
began, ends in one line, too. The exit codes are those of `cli`.
"""

from __future__ import annotations

import sys

from .errors import how_to_install


def main() -> None:
    """The entry point."""
    try:
        from .cli import app

        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"error: {error}. Fix: {how_to_install('models')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
