"""The LSTM language model of pytorch/examples `word_language_model`, as a model of transformers."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutput

from hf_mlopt.errors import ConfigurationError


class WordLMConfig(PreTrainedConfig):
    """
    Sizes of a [`WordLM`]. The defaults are those of the example.

    Args:
        vocab_size (`int`, *optional*, defaults to 33278): Words, `<unk>` and `<eos>` among them; the default is that
            of WikiText-2.
        hidden_size (`int`, *optional*, defaults to 200): Width of the embedding and of every LSTM layer.
        num_layers (`int`, *optional*, defaults to 2): LSTM layers.
        dropout (`float`, *optional*, defaults to 0.2): After the embedding, between the layers and before the decoder.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): Whether the decoder's weight is the embedding's.
        use_cache (`bool`, *optional*, defaults to `False`): There is no cache; `generate` reads this.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    model_type = "word_lm"

    vocab_size: int = 33278
    hidden_size: int = 200
    num_layers: int = 2
    dropout: float = 0.2
    tie_word_embeddings: bool = True
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        for field in ("vocab_size", "hidden_size", "num_layers"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(field, value, "must be a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError("dropout", self.dropout, "must be at least 0 and below 1")
        super().__post_init__(**kwargs)


class WordLM(PreTrainedModel, GenerationMixin):
    """
    Embedding, LSTM, tied decoder, with dropout between them.

    The hidden state starts at zero in every row. The example carries it from one row to the next instead, which needs
    them in order, and a Trainer shuffles. So a position sees no more than the tokens before it in its own row, the
    first token of a row is no target, and perplexity is higher than with a carried state.

    Args:
        config ([`WordLMConfig`]): The sizes.
    """

    config_class = WordLMConfig
    _tied_weights_keys = {"decoder.weight": "embedding.weight"}

    def __init__(self, config: WordLMConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers reads it off the class name, and Trainer counts targets by it
        between = config.dropout if config.num_layers > 1 else 0.0  # torch warns of dropout where nothing follows
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(
            config.hidden_size, config.hidden_size, config.num_layers, batch_first=True, dropout=between
        )
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the example's `init_weights`: it leaves the LSTM to torch, whose bound is `1 / sqrt(hidden_size)`."""
        if isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                initialization.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding | nn.Linear):
            initialization.uniform_(module.weight, -0.1, 0.1)
        if isinstance(module, nn.Linear):
            initialization.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor`): `[batch, length]`.
            labels (`torch.LongTensor`, *optional*): `[batch, length]`, the same tokens: they are shifted inside.
                -100 is no target.
            attention_mask (`torch.Tensor`, *optional*): `[batch, length]`, 0 at padding, which must be on the right:
                nothing after a token changes its logits.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): What to divide the summed loss by (tokens), if
                it is not the number of targets here: a Trainer's, over all its accumulated batches.
            kwargs: For the loss; anything else is ignored.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits`, `[batch, length, vocab_size]`, and `loss` in
            nats per token if there are labels.

        Raises:
            ValueError: If the padding is on the left.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("attention_mask: padding on the left would go through the LSTM; pad on the right")
        hidden, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        logits = self.decoder(self.dropout(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
        return CausalLMOutput(loss=loss, logits=logits)
