"""Federated training: a model is trained at several sites whose data stay where they are."""
