"""`python -m benchmarks ...` is `attention-transfer bench ...`."""

import sys

from attention_transfer.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
