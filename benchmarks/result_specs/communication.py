"""Gradient codecs."""

from result_tables import CLAIM, RATIO, Spec, Table, scaled, spread


CODEC = Table(
    "Codecs: rate, and time in copies of a float32 tensor",
    "codec",
    {"codec": "codec"},
    {
        "bytes an element": "bytes_per_element",
        "encode, 10⁹ a second": scaled("encode_per_second", 1e-9),
        "decode, 10⁹ a second": scaled("decode_per_second", 1e-9),
        "encode, copies": spread("encode_in_copies"),
        "decode, copies": spread("decode_in_copies"),
    },
)


CODEC_RATIO = Table(
    "Time of ORQ-9 over that of 4-bit codes of even levels",
    "codec-ratio",
    {"codec": "codec", "over": "baseline", "part": "part"},
    RATIO,
    targets=(CLAIM,),
)


def _quality_of_communication(record: dict) -> list[dict]:
    return [row | {"task": task} for task in ("LM", "ResNet") for row in record.get(f"quality_summary_{task}", [])]


def _link(row: dict) -> str:
    return f"{row['ranks']} ranks, {row['bandwidth'] / 1e6:,.0f} Mbit/s{', emulated' * (row['network'] == 'emulated')}"


SPECS = {
    "communication": Spec(
        "Gradient codecs",
        (
            Table(
                "Quality at equal steps",
                _quality_of_communication,
                {"task": "task", "mode": "mode"},
                {"loss": "loss", "deviation of seeds": "std", "over bf16": "over_bf16", "accuracy": "accuracy"},
            ),
            Table(
                "Step over a throttled link",
                "link",
                {"codec": "codec"},
                {"time over that of bf16": lambda row: "failed" if row.get("error") else row["of_bf16_time"]},
                across=_link,
            ),
            Table(
                "Bandwidth below which a codec pays",
                "crossover",
                {"ranks": "ranks", "codec": "codec"},
                {
                    "measured, Mbit/s": scaled("measured", 1e-6),
                    "predicted, Mbit/s": scaled("predicted", 1e-6),
                    "beyond": "beyond",
                },
            ),
            Table(
                "Error",
                "error",
                {"codec": "codec", "bits": "bits"},
                {"‖Q(v) - v‖² / ‖v‖²": "error"},
                across="source",
            ),
            CODEC_RATIO,
            CODEC,
        ),
        omit=("tuning", "quality", "optimum"),
    ),
    "communication_gpu": Spec(
        "Gradient codecs on a GPU",
        (
            CODEC_RATIO,
            CODEC,
            Table(
                "GPU against CPU",
                "equal",
                {"codec": "codec"},
                {
                    "bytes of codes that differ": "code_bytes_that_differ",
                    "decoded, relative difference": "decoded_relative_difference",
                },
            ),
            Table(
                "Two ranks on one GPU",
                "smoke",
                {"run": "run", "backend": "backend"},
                {
                    "loss falls": "loss_falls",
                    "replicas bit-identical": "bit_identical",
                    "seconds a step": "seconds_per_step",
                    "bytes over bf16": "of_bf16",
                },
            ),
            Table("Failed", "failed", {"part": "part"}, {"error": "error"}),
        ),
    ),
}
