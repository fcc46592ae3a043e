"""`python -m kvprune`: the command `kvprune`."""

from .cli import main

if __name__ == "__main__":
    main()
