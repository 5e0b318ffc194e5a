"""The algorithms by the names recipes use."""

from hf_mlopt.federated.algorithms.ditto import Ditto
from hf_mlopt.federated.algorithms.domo import FederatedDOMO
from hf_mlopt.federated.algorithms.fedadam import FedAdam
from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.fedavgm import FedAvgM
from hf_mlopt.federated.algorithms.fedbn import FedBN
from hf_mlopt.federated.algorithms.fedprox import FedProx
from hf_mlopt.federated.algorithms.fedsm import FedSM
from hf_mlopt.federated.algorithms.fedyogi import FedYogi
from hf_mlopt.federated.algorithms.scaffold import Scaffold


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (FedAvg, FedAvgM, FedAdam, FedYogi, FedProx, Scaffold, FedBN, Ditto, FedSM, FederatedDOMO)
}
