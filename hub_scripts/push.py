# /// script
# dependencies = ["hf-mlopt"]
# ///
"""
Checks a pruned or distilled checkpoint and puts it on the Hub, as `hf-mlopt push` does.

python hub_scripts/push.py mixtral-8x7b-50 user/Mixtral-8x7B-50 --private
"""

import argparse
import sys

from hf_mlopt.cli import push
from hf_mlopt.errors import InputError


def main(argv: list[str] | None = None, api=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    push.add_arguments(parser)
    try:
        push.run(parser.parse_args(argv), api)
    except InputError as error:
        print(f"push: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
