"""`python -m powerband` is the `powerband` command."""

import sys

from powerband.cli.main import main

sys.exit(main())
