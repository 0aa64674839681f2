"""`python -m fastrssm` is the command `fastrssm`."""

import sys

from fastrssm.cli import main

sys.exit(main())
