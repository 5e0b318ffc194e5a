"""Who takes part in a sum, and which sum it is: what all parties must agree on for their masks to cancel."""

import hashlib
from dataclasses import dataclass, field

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.secure_sum.fixed_point import FixedPoint
from hf_mlopt.secure_sum.keys import KEY_BYTES, encode_parts


def check_count(name: str, value: int):
    """Refuses what does not fit the eight bytes in which counts are hashed."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ConfigurationError(name, value, "must be a whole number, 0 to 2^63 - 1")


@dataclass(frozen=True)
class Request:
    """
    One sum. The keystream depends on every field, and a [`Party`] answers rising `round_id`s of a channel only.

    Args:
        round_id (`int`): Number of the sum within its channel, 0 to 2^63 - 1; gaps are allowed, repeats are not.
        channel (`str`, *optional*, defaults to `""`): Who asks and what for, such as `"bank/train"`.
        context (`bytes`, *optional*, defaults to `b""`): What the sum is about, such as epoch and batch. Parties that
            disagree on it get an error and not a sum of different things.
    """

    round_id: int
    channel: str = ""
    context: bytes = b""

    def __post_init__(self):
        check_count("round_id", self.round_id)
        for name, kind in (("channel", str), ("context", bytes)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(name, getattr(self, name), f"must be {kind.__name__}")

    def to_bytes(self) -> bytes:
        """What the keys of this request are derived from."""
        return encode_parts(self.channel.encode(), self.round_id.to_bytes(8, "big"), self.context)


@dataclass(frozen=True)
class Roster:
    """
    The fixed set of parties of a sum. Every party builds it for itself from the public keys it has authenticated.

    Args:
        run (`str`): Name of the training run.
        members (`tuple[tuple[str, bytes], ...]` or `dict[str, bytes]`): Name and X25519 public key (32 bytes) of each
            party, in any order; kept as a tuple sorted by name. Three at least: of two, each could subtract its own
            vector from the sum.
        epoch (`int`, *optional*, defaults to 0): Raised whenever a party leaves, returns or changes its key.
        fraction_bits (`int`, *optional*, defaults to 24): Binary digits after the point.

    Raises:
        ConfigurationError: If fewer than three parties are named, a name or key occurs twice, or a field is ill-typed.
    """

    run: str
    members: tuple[tuple[str, bytes], ...]
    epoch: int = 0
    fraction_bits: int = 24
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.run, str) or not self.run:
            raise ConfigurationError("run", self.run, "must be a name that no other run of these parties has")
        check_count("epoch", self.epoch)
        members = tuple(self.members.items() if isinstance(self.members, dict) else self.members)
        for name, key in members:
            if not isinstance(name, str) or not name:
                raise ConfigurationError("members", name, "a party needs a name")
            if not isinstance(key, bytes) or len(key) != KEY_BYTES:
                raise ConfigurationError(f"members[{name}]", key, f"must be an X25519 public key of {KEY_BYTES} bytes")
        if len(members) < 3:
            remedy = "a masked sum needs three parties: of two, each gets the other's vector by subtracting its own"
            raise ConfigurationError("members", [name for name, _ in members], remedy)
        for column, what in ((0, "name"), (1, "public key")):
            values = [member[column] for member in members]
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ConfigurationError("members", twice[0], f"this {what} occurs twice; each party needs its own")
        members = tuple(sorted(members))
        # A frozen dataclass sets its derived fields this way.
        object.__setattr__(self, "members", members)
        FixedPoint(len(members), self.fraction_bits)
        numbers = (self.epoch.to_bytes(8, "big"), self.fraction_bits.to_bytes(8, "big"))
        parts = [part for name, key in members for part in (name.encode(), key)]
        digest = hashlib.sha256(encode_parts(self.run.encode(), *numbers, *parts)).digest()
        object.__setattr__(self, "digest", digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parties, sorted."""
        return tuple(name for name, _ in self.members)

    @property
    def fixed_point(self) -> FixedPoint:
        """How the parties encode their vectors; its `limit` is the largest value that one may contribute."""
        return FixedPoint(len(self.members), self.fraction_bits)
