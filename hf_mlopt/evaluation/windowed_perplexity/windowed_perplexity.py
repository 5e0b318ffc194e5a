"""The perplexity of hf_mlopt as a metric of `evaluate`."""

# One module a line: `evaluate` scans these for what is not installed, and takes `import a, b` for a module "a,".
import datasets
import evaluate

from hf_mlopt.evaluation import perplexity


_DESCRIPTION = """
Perplexity of a causal language model as papers on pruning measure it: the texts are joined with blank lines and
tokenized in one go, windows do not overlap, the tail is dropped, the first token of a window is not predicted.
"""

_KWARGS = """
Args:
    predictions (list of str): The texts.
    model_id (str or PreTrainedModel): Local directory or Hub id, or a loaded model.
    tokenizer (PreTrainedTokenizerBase): Needed with a loaded model.
    window (int): Tokens in a window; by default 2048, or the model's context if that is shorter.
    batch_size (int): Windows in a forward pass.
    device (str): Where a model that is named is loaded to; by default the first GPU, else the CPU.
Returns:
    perplexity, nll (nats per token), tokens, windows, window, and stderr, the standard error of the perplexity.
"""

_CITATION = """
@inproceedings{sun2024simple,
  title={A Simple and Effective Pruning Approach for Large Language Models},
  author={Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle={ICLR}, year={2024}, url={https://huggingface.co/papers/2306.11695}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class WindowedPerplexity(evaluate.Metric):
    def __init__(self, *args, model_id=None, tokenizer=None, window=None, batch_size=8, device=None, **kwargs):
        # Given here they need not be given to `compute`, which `evaluate.combine` passes on to every metric alike.
        self._defaults = {
            "model_id": model_id, "tokenizer": tokenizer, "window": window, "batch_size": batch_size, "device": device
        }  # fmt: skip
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options):
        return _measure(predictions, **{**self._defaults, **options})


def _measure(texts, model_id, tokenizer, window, batch_size, device):
    from dataclasses import asdict

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model_id is None:
        raise ValueError("model_id=None: name a model, to evaluate.load or to compute")
    if isinstance(model_id, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_id)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto").to(device)
    else:
        model = model_id
    if tokenizer is None:
        raise ValueError("tokenizer=None: a loaded model needs its tokenizer beside it")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    token_ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False).input_ids, dtype=torch.long)
    return asdict(perplexity(model, token_ids, window or min(2048, context), batch_size))
