"""``python -m bench``: what ``vmtc bench`` does, in a checkout that is not installed."""

from .app import app

if __name__ == "__main__":
    app(prog_name="python -m bench")
