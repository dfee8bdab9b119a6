"""`python -m broker.cli`: the command line without its installed script."""

from broker.cli.main import main

main()
