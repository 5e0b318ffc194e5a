"""Text, images and splits of them. Nothing here imports torch, transformers, datasets or NumPy before it is called."""

from hf_mlopt.data.calibration import CalibrationConfig, CalibrationSet, load_calibration
from hf_mlopt.data.embedded import embedded_corpus
from hf_mlopt.data.images import ImageData, image_dataset, load_images
from hf_mlopt.data.labelled_text import LabelledText, load_labelled_text
from hf_mlopt.data.overlap import overlap, sketch
from hf_mlopt.data.shares import dirichlet_shares, label_sorted_shares
from hf_mlopt.data.text import Corpus, load_text, open_corpus, tokenize_corpus
from hf_mlopt.data.windows import token_windows, window_dataset
from hf_mlopt.data.words import byte_tokenizer, word_tokenizer


__all__ = [
    "CalibrationConfig",
    "CalibrationSet",
    "Corpus",
    "ImageData",
    "LabelledText",
    "byte_tokenizer",
    "dirichlet_shares",
    "embedded_corpus",
    "image_dataset",
    "label_sorted_shares",
    "load_calibration",
    "load_images",
    "load_labelled_text",
    "load_text",
    "open_corpus",
    "overlap",
    "sketch",
    "token_windows",
    "tokenize_corpus",
    "window_dataset",
    "word_tokenizer",
]
