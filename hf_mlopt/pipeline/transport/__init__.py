"""Channels between stages: threads of one process, or processes over gloo or NCCL."""
