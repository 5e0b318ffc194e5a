"""What a Trainer takes for its model, its optimizer and its schedule, where a worker has the real ones."""

from torch import nn

from hf_mlopt.errors import InputError


class StageModel(nn.Module):
    """
    Holds the block of a stage. The worker of the stage runs it, and zeroes its gradients when a group is complete.

    Args:
        block (`Block`): From [`~hf_mlopt.pipeline.partition.split`].
        num_parameters (`int`): Of the whole model.
        main_input_name (`str`): Of the whole model.
    """

    def __init__(self, block: nn.Module, num_parameters: int, main_input_name: str):
        super().__init__()
        self.block, self._num_parameters, self.main_input_name = block, num_parameters, main_input_name

    @property
    def config(self):
        return self.block.config

    def num_parameters(self, *_, **__) -> int:
        """Of the whole model, as `PreTrainedModel` has it."""
        return self._num_parameters

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a Trainer calls this between updates, where a stage may be in the middle of one."""

    def forward(self, *args, **kwargs):
        raise InputError("a stage of a pipeline cannot be called: train and evaluate through PipelineTrainer")


class Shown:
    """An optimizer or a scheduler for others to read: its steps are the worker's to take."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def step(self, *args, **kwargs) -> None:
        pass

    def zero_grad(self, *args, **kwargs) -> None:
        pass
