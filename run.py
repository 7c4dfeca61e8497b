"""The command. `python run.py --help` says what it takes."""

from sandbox.cli.main import main

if __name__ == "__main__":
    main()
