"""`python -m dqrm`: the same as the command `dqrm`."""

from dqrm.cli import main

if __name__ == "__main__":
    main()
