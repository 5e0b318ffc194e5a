"""Calibration and evaluation text. Nothing here imports torch, transformers or datasets before it is called."""

from hf_mlopt.data.calibration import CalibrationConfig, CalibrationSet, load_calibration
from hf_mlopt.data.embedded import embedded_corpus
from hf_mlopt.data.overlap import overlap, sketch
from hf_mlopt.data.text import Corpus, load_text, open_corpus, tokenize_corpus


__all__ = [
    "CalibrationConfig",
    "CalibrationSet",
    "Corpus",
    "embedded_corpus",
    "load_calibration",
    "load_text",
    "open_corpus",
    "overlap",
    "sketch",
    "tokenize_corpus",
]
