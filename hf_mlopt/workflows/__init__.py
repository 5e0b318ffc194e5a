"""A checkpoint in, a checkpoint or a result out: what a verb of the command line does, callable from Python."""
