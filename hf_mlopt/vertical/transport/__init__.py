"""How frames travel between parties: the interface, threads of one process, and gRPC."""
