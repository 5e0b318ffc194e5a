"""Federated training: a model is trained at several sites whose data stay where they are."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "FederatedClient": "hf_mlopt.federated.client",
    "FederatedTrainer": "hf_mlopt.federated.trainer",
    "FederatedTrainingArguments": "hf_mlopt.federated.arguments",
    "RoundFailed": "hf_mlopt.federated.rounds",
    "SiteData": "hf_mlopt.federated.site_data",
    "SiteStore": "hf_mlopt.federated.storage",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
