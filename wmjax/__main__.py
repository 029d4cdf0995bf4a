"""The door of `python -m wmjax`: wmjax.main's, which names the others."""

from wmjax.main import cli

if __name__ == "__main__":
    cli()
