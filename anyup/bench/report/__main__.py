"""`python -m anyup.bench.report`: the page again, from stored results."""

import sys

from anyup.bench.report.page import main

if __name__ == "__main__":
    sys.exit(main())
