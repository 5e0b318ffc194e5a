"""Flower's records of what a message of ours holds; without torch, see `flower_app`."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hf_mlopt.errors import InputError


_HEADER, _GROUP, _BYTES = "message", "group.", "hf_mlopt.bytes"


def from_flat(header: str, blobs: dict[str, np.ndarray]) -> RecordDict:
    """
    Records of a message. One array a group, since every array of a record travels in requests of its own; Flower cuts
    it into pieces, and sends pieces that several sites get only once.

    Args:
        header (`str`): The message's header.
        blobs (`dict[str, numpy.ndarray]`): Group to the bytes of its tensors, `[nbytes]`, uint8, none of them empty.
    """
    records = RecordDict({_HEADER: ConfigRecord({"header": header})})
    for group, blob in blobs.items():
        array = Array(dtype="uint8", shape=(blob.size,), stype=_BYTES, data=blob.tobytes())
        records[_GROUP + group] = ArrayRecord({"bytes": array})
    return records


def to_flat(records: RecordDict) -> tuple[str, dict[str, np.ndarray]]:
    """
    What [`from_flat`] was given; the arrays are read-only.

    Raises:
        InputError: If the records are none of ours.
    """
    try:
        header = records.config_records[_HEADER]["header"]
        arrays = {key.removeprefix(_GROUP): record["bytes"] for key, record in records.array_records.items()}
    except KeyError as error:
        raise InputError(f"the records hold no message of ours ({error} is missing)") from error
    foreign = [group for group, array in arrays.items() if array.stype != _BYTES]
    if foreign:
        raise InputError(f"the records hold no message of ours (type of {foreign})")
    return header, {group: np.frombuffer(array.data, dtype=np.uint8) for group, array in arrays.items()}
