"""``python -m laminar`` is the command ``laminar``."""

from laminar.cli.main import run

if __name__ == "__main__":
    run()
