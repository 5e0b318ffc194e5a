"""Compressed gradients: codecs, how their codes are packed into bytes, and what carries them between processes."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "Budget": "hf_mlopt.communication.bits",
    "Codec": "hf_mlopt.communication.quantizers.interface",
    "Compression": "hf_mlopt.communication.ddp",
    "CompressionConfig": "hf_mlopt.communication.config",
    "Payload": "hf_mlopt.communication.quantizers.interface",
    "SAEFOptimizer": "hf_mlopt.communication.saef",
    "ShardedCompression": "hf_mlopt.communication.sharded",
    "Watch": "hf_mlopt.communication.auto_off",
    "codec": "hf_mlopt.communication.quantizers.registry",
    "compress": "hf_mlopt.communication.ddp",
    "compress_sharded": "hf_mlopt.communication.sharded",
    "decide": "hf_mlopt.communication.pays",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
