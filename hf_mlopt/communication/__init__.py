"""Compressed gradients: codecs, how their codes are packed into bytes, and what carries them between processes."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "Codec": "hf_mlopt.communication.quantizers.interface",
    "Compression": "hf_mlopt.communication.ddp",
    "CompressionConfig": "hf_mlopt.communication.config",
    "Payload": "hf_mlopt.communication.quantizers.interface",
    "codec": "hf_mlopt.communication.quantizers.registry",
    "compress": "hf_mlopt.communication.ddp",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
