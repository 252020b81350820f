"""`python -m lorag.cli`."""

from lorag.cli.main import main

if __name__ == "__main__":
    main()
