"""``python -m daskinfer.cli``: the command, for an environment whose scripts are not on the path."""

from daskinfer.cli.main import main

main()
