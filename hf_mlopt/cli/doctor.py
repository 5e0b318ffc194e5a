"""`hf-mlopt doctor`."""

import argparse
import json
from pathlib import Path

from hf_mlopt.errors import InputError


HELP = "Tell what this machine can do: versions, devices, optional packages, the Hub; and what to install."

# Always shown; others only where they do not fit.
_SHOWN = ("python", "torch", "transformers", "accelerate", "peft", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="Also write what was found to this file, as JSON.")


def run(args: argparse.Namespace) -> int:
    from hf_mlopt.workflows.doctor import examine

    record = examine()
    print("\n".join(lines(record)))
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={args.json!r}: cannot be written ({error.strerror})") from None
    return 1 if record["broken"] else 0


def lines(record: dict) -> list[str]:
    """
    Four tables, what to install for each extra, then advice and what is broken.

    Args:
        record (`dict`): Of [`~workflows.doctor.examine`].
    """
    from hf_mlopt.workflows.tables import text_table

    packages = [row for row in record["packages"] if row["name"] in _SHOWN or not row["fits"]]
    tables = [
        [
            {
                "package": row["name"],
                "installed": row["installed"],
                "needed": row["needs"],
                "": "fits" if row["fits"] else "BROKEN",
            }
            for row in packages
        ],
        _devices(record),
        _places(record),
        [
            {"optional": row["opens"] or row["extra"], "extra": row["extra"], "": "lacks" if row["lacks"] else "ready"}
            for row in record["extras"]
        ],
    ]
    found = [f"hf-mlopt {record['hf_mlopt']} on {record['system']}"]
    for table in filter(None, tables):
        found += ["", *(line.rstrip() for line in text_table(table))]
    lacking = [f"{row['extra']}: {row['install']}" for row in record["extras"] if row["install"]]
    for title, texts in ("to install", lacking), ("advice", record["advice"]), ("BROKEN", record["broken"]):
        found += ["", *(f"{title}: {text}" for text in texts)] if texts else []
    return [*found, "", "what is required is broken" if record["broken"] else "nothing that is required is broken"]


def _devices(record: dict) -> list[dict]:
    memory = record["memory_bytes"]
    rows = [("cpu", f"{record['cores']} cores", memory.get("total"), memory.get("available"), None)]
    rows += [
        (row["device"], row["name"], row["memory_bytes"], row["free_bytes"], "yes" if row["bf16"] else "no")
        for row in record["devices"]
    ]
    return [
        {"device": device, "": name, "memory": _gigabytes(total), "free": _gigabytes(free), "bf16": bf16}
        for device, name, total, free, bf16 in rows
    ]


def _places(record: dict) -> list[dict]:
    hub, yes = record["hub"], {True: "yes", False: "no"}
    told = {
        "free disk, this folder": _gigabytes(record["disk_bytes"]["here"]),
        "free disk, HF_HOME": _gigabytes(record["disk_bytes"]["HF_HOME"]),
        "OMP_NUM_THREADS": record["omp_num_threads"] or "not set",
        "ranks on CPUs (gloo)": yes.get(record["backends"].get("gloo")),
        "ranks on GPUs (nccl)": yes.get(record["backends"].get("nccl")),
        f"Hub, {hub.get('endpoint', 'unknown')}": hub.get("state"),
        "Hub, a token": yes.get(hub.get("token")),
        "Flower reports its use": yes[record["flower_telemetry"]],
    }
    return [{"this machine": name, "": value} for name, value in told.items()]


def _gigabytes(number: int | None) -> str | None:
    return None if number is None else f"{number / 1e9:.1f} GB"
