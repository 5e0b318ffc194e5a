"""How messages travel between server and sites: in this process, in processes beside it, or by Flower."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "Answer": "hf_mlopt.federated.engines.base",
    "Engine": "hf_mlopt.federated.engines.base",
    "Exchanged": "hf_mlopt.federated.engines.base",
    "InProcessEngine": "hf_mlopt.federated.engines.in_process",
    "ProcessEngine": "hf_mlopt.federated.engines.processes",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
