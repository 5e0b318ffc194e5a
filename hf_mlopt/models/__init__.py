"""
Small models for experiments where a Hub model would be too large. An import of this room registers them with the Auto
classes of transformers; it imports torch.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from hf_mlopt.models.word_lm import WordLM, WordLMConfig


AutoConfig.register("word_lm", WordLMConfig)
AutoModelForCausalLM.register(WordLMConfig, WordLM)

__all__ = ["WordLM", "WordLMConfig"]
