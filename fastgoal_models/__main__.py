"""`python -m fastgoal_models`: the same as the `fastgoal` command."""

from .cli import main

if __name__ == "__main__":
    main()
