"""Makes `python -m safebridge` the same as the `safebridge` command."""

import sys

from safebridge.cli.main import main

sys.exit(main())
