"""`python -m wmjax`: the same command as `python -m wmjax.main`."""

from wmjax.main import cli

if __name__ == "__main__":
    cli()
