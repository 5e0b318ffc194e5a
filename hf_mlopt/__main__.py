"""`python -m hf_mlopt`: the `hf-mlopt` command, in the form that `accelerate launch -m` and `torchrun -m` take."""

import sys

from hf_mlopt.cli import main


sys.exit(main())
