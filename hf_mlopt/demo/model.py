"""A small Mixtral, trained here on English text that every Python installation carries."""

from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_mlopt.data import byte_tokenizer, embedded_corpus, token_windows, tokenize_corpus
from hf_mlopt.training import MLOptTrainer, MLOptTrainingArguments


CONTEXT = 128


def train_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the embedded training text."""
    tokenizer = byte_tokenizer(embedded_corpus("train"), vocab_size)
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MixtralForCausalLM:
    """A random Mixtral with 8 experts, 2 per token, and the load-balancing loss on."""
    set_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=CONTEXT,
            output_router_logits=True,  # without it the load-balancing loss is silently absent
            router_aux_loss_coef=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, scratch: str) -> None:
    """Trains on windows of the embedded training text, on the CPU, so that the same seed gives the same numbers."""
    stream = tokenize_corpus(embedded_corpus("train"), tokenizer)
    dataset = token_windows(stream, CONTEXT)
    arguments = MLOptTrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=16,
        mlopt_optim="adamw",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        seed=seed,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    trainer = MLOptTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.log = lambda *args, **kwargs: None  # the table at the end is the output
    trainer.train()
    model.config.use_cache = True  # Trainer turns it off, and this model is not saved by a Trainer
    model.eval()
