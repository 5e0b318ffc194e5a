"""What leaves a site: clipped changes, changes with noise, and masked ones of which a server learns the sum."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "clipped": "hf_mlopt.federated.privacy.clipping",
    "epsilon": "hf_mlopt.federated.privacy.accounting",
    "run_secure_round": "hf_mlopt.federated.privacy.secure_round",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
