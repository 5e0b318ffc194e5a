"""A checkpoint's decoder layers one at a time: read from its shards, written to new ones, resumable at any moment."""
