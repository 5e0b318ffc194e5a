"""ResNet for image classification: its layers are the residual layers of all stages, in order."""

from torch import nn

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.adapters.base import PassThrough
from hf_mlopt.pipeline.adapters.vision import ImageAdapter


class ResNetAdapter(ImageAdapter):
    """`ResNetForImageClassification`."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.layers = [
            f"resnet.encoder.stages.{number}.layers.{i}"
            for number, stage in enumerate(model.resnet.encoder.stages)
            for i in range(len(stage.layers))
        ]
        self.inputs = {"resnet.embedder": PassThrough()}
        self.outputs = {"resnet.pooler": PassThrough(), "classifier": PassThrough()}

    def check_cut(self, index: int) -> None:
        activation = self.model.get_submodule(self.layers[index - 1]).activation
        if getattr(activation, "inplace", False):
            # The block after would be handed a tensor that a graph of this one still writes.
            raise ConfigurationError(
                "bounds", index, f"{self.layers[index - 1]} ends in an activation in place: set its inplace=False"
            )
