"""Training data that belong to one rank."""

from torch.utils.data import DataLoader, IterableDataset

from hf_mlopt.errors import ConfigurationError


def keep_whole(dataloader: DataLoader) -> None:
    """
    Undoes the division over the ranks that accelerate has put around a data set, in place.

    Args:
        dataloader (`DataLoader`): A prepared one, as `Trainer.get_train_dataloader` returns it.

    Raises:
        ConfigurationError: For a data set without a length, which is divided elsewhere.
    """
    if isinstance(dataloader.dataset, IterableDataset):
        raise ConfigurationError("per_rank_data", True, "needs a training set with a length, not an iterable one")
    sampler = dataloader.batch_sampler
    if hasattr(sampler, "num_processes"):  # accelerate's BatchSamplerShard; absent in a single process
        sampler.num_processes, sampler.process_index = 1, 0
