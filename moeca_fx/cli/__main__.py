"""``python -m moeca_fx.cli``: the command without its installed script."""

from moeca_fx.cli import main

main()
