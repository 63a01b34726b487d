"""``python -m cpsmailaccess_delivery``: the console script, where it is not on the path."""

from .cli import main

main()
