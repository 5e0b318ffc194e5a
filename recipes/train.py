"""`hf-mlopt train` as a script: `accelerate launch recipes/train.py --config FILE --output-dir DIR`."""

import sys

from hf_mlopt.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
