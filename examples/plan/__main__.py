"""`python -m examples.plan` is the command of `plan.py`."""

import sys

from examples.plan.plan import main

if __name__ == "__main__":
    sys.exit(main())
