"""What measured times say, in words. Needs no torch."""

_NOTICEABLE = 1.05  # a gain that may be below this is not called one
_NOISY = 0.2  # half the width of an interval


def verdict(variants: dict[str, dict], rows: list[dict]) -> list[str]:
    """
    Which variant wins at which number of tokens, what zeros do, and where 2:4 gains and loses.

    Args:
        variants (`dict[str, dict]`): `ExpertVariants.described`.
        rows (`list[dict]`): Of [`ExpertVariants.measure`], one for each number of tokens.

    Returns:
        `list[str]`: Sentences.
    """
    lines, without = [], []
    for row in rows:
        # What could be deployed to gain speed; the other variants are there to explain.
        rivals = {name: row["speedup"][name] for name in variants if name == "2:4" or name.startswith("drop_")}
        faster = [name for name, speedup in rivals.items() if speedup["low"] > _NOTICEABLE]
        if not faster:
            without.append(row["tokens"])
            continue
        best = max(faster, key=lambda name: rivals[name]["median"])
        lines.append(f"{_tokens([row['tokens']])}: fastest is {variants[best]['what']}, {_times(rivals[best])} dense")
    if without:
        lines.append(f"{_tokens(without)}: nothing here is faster than dense")
    return [*lines, *_about_2_of_4(rows), _about_zeros(rows), *_about_noise(rows)]


def _about_2_of_4(rows: list[dict]) -> list[str]:
    measured = [row for row in rows if "kernel_speedup" in row]
    if not measured:
        return []
    kernel = _range([row["kernel_speedup"]["median"] for row in measured])
    loop = _range([row["speedup"]["dense_loop"]["median"] for row in measured])
    return [
        f"2:4: its kernels run at {kernel} times the speed of the same loop over dense matrices; calling experts one "
        f"by one runs at {loop} times the speed of dense"
    ]


def _about_zeros(rows: list[dict]) -> str:
    text = f"half zeros: {_range([row['speedup']['half_zeros']['median'] for row in rows])} times the speed of dense"
    faster = [row["tokens"] for row in rows if row["speedup"]["half_zeros"]["low"] > _NOTICEABLE]
    if faster:  # some GPUs clock higher when they multiply zeros
        return f"{text}; here zeros do gain, at {_tokens(faster)}"
    return f"{text}, no gain: in dense kernels a zero costs as much as any other weight"


def _about_noise(rows: list[dict]) -> list[str]:
    noisy = [
        row["tokens"]
        for row in rows
        if any((speedup["high"] - speedup["low"]) / 2 > _NOISY for speedup in row["speedup"].values())
    ]
    if not noisy:
        return []
    return [
        f"{_tokens(noisy)}: uncertain by more than {_NOISY:g}, the machine does something else as well; measure again "
        "when it is idle, or with more --repeats"
    ]


def _tokens(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last} tokens" if first else f"{last} token{'s' if last != '1' else ''}"


def _times(speedup: dict[str, float]) -> str:
    return f"{speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f}) times the speed of"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
