"""``python -m lp_plugin``: the same as the ``lp-plugin`` command."""

from lp_plugin.cli import main

if __name__ == "__main__":
    main()
