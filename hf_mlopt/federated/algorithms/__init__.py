"""What a server does in a round and a site adds to its local steps. Tensors in, tensors out; no engine, no files."""

from hf_mlopt.lazy import lazy_names


# The algorithms that recipes may name; a new one is a row here.
ALGORITHM_CLASSES = {
    "Ditto": "hf_mlopt.federated.algorithms.ditto",
    "FedAdam": "hf_mlopt.federated.algorithms.fedadam",
    "FedAvg": "hf_mlopt.federated.algorithms.fedavg",
    "FedAvgM": "hf_mlopt.federated.algorithms.fedavgm",
    "FedBN": "hf_mlopt.federated.algorithms.fedbn",
    "FedProx": "hf_mlopt.federated.algorithms.fedprox",
    "FedSM": "hf_mlopt.federated.algorithms.fedsm",
    "FedYogi": "hf_mlopt.federated.algorithms.fedyogi",
    "FederatedDOMO": "hf_mlopt.federated.algorithms.domo",
    "Scaffold": "hf_mlopt.federated.algorithms.scaffold",
}

_PUBLIC = {
    **ALGORITHM_CLASSES,
    "ALGORITHMS": "hf_mlopt.federated.algorithms.registry",
    "AutoFedRL": "hf_mlopt.federated.algorithms.auto_fedrl",
    "MaskedFedSM": "hf_mlopt.federated.algorithms.fedsm_masked",
    "Message": "hf_mlopt.federated.algorithms.message",
    "SearchSpace": "hf_mlopt.federated.algorithms.search_space",
    "ServerAlgorithm": "hf_mlopt.federated.algorithms.server",
    "check_reply": "hf_mlopt.federated.algorithms.replies",
    "ditto_gradient": "hf_mlopt.federated.algorithms.ditto",
    "domo_fused_step": "hf_mlopt.federated.algorithms.domo",
    "fedprox_gradient": "hf_mlopt.federated.algorithms.fedprox",
    "normalization_names": "hf_mlopt.federated.algorithms.fedbn",
    "scaffold_gradient": "hf_mlopt.federated.algorithms.scaffold",
    "scaffold_new_control": "hf_mlopt.federated.algorithms.scaffold",
    "shared_names": "hf_mlopt.federated.algorithms.fedbn",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
