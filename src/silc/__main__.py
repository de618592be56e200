"""`python -m silc` and `torchrun -m silc` are the `silc` command."""

from silc.cli import main

if __name__ == "__main__":
    main()
