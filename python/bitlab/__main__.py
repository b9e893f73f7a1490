"""`python -m bitlab`."""

import sys

from bitlab.cli import main

sys.exit(main())
