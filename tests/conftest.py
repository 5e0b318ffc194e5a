import gc
import os
import sys
import tempfile


# Before any Hugging Face import: no network, and caches of our own.
_CACHE = tempfile.mkdtemp(prefix="hf_mlopt_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE, "datasets")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data(request):
    """Real text and the reference MoE; absent from the repository."""
    path = request.config.rootpath.parent / "shared" / "data"
    return path if path.is_dir() else pytest.skip(f"shared data folder not found at {path}")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE with 256 entries, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 3,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


@pytest.fixture(scope="session")
def tiny_mixtral():
    """A factory of small random Mixtrals: `tiny_mixtral(num_hidden_layers=1)`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def make(seed: int = 0, **overrides):
        settings = {
            "vocab_size": 260,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **overrides,
        }
        torch.manual_seed(seed)
        return MixtralForCausalLM(MixtralConfig(**settings)).eval()

    return make


@pytest.fixture(scope="module", autouse=True)
def garbage_of_this_module_only():
    """Every Trainer ends with a full collection, which takes seconds where earlier modules have left much behind."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def verbosity_of_this_module_only():
    """Benchmarks that a module has called leave transformers silent, and without bars."""
    yield
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_warning()


@pytest.fixture
def federate():
    """Makes the parties of a vertical training, which end with the test."""
    from tests.test_vertical_parties import Federation

    made = []

    def make(*args, **options):
        made.append(Federation(*args, **options))
        return made[-1]

    yield make
    for federation in made:
        federation.close()
