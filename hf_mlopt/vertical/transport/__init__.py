"""How frames travel between parties: the interface, threads of one process, and gRPC."""

import os


# Before gRPC is imported: it writes of every connection that ends, over the one line that says what happened.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
