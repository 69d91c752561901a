"""``python -m smalto VERB`` is ``smalto VERB``."""

from smalto.cli import main

main()
