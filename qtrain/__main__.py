"""`python -m qtrain`."""

from qtrain.cli import main

if __name__ == "__main__":
    main()
