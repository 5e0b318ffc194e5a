"""
The gradient codecs in float64 and plain loops, in the notation of the papers. Shares no code with the library.

v: entries of a block. b[0] <= ... <= b[s]: levels. u: a uniform number. Levels are found by trying every candidate and
comparing the error that rounding makes, rather than from optimality conditions.
"""

import math


MASK = 2**64 - 1


def splitmix_mix(z: int) -> int:
    """SplitMix64's finaliser."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(key, i: int) -> float:
    """Number i of the stream of a key: the four 16-bit lanes of a word, read as signed, to odd multiples of 2^-17."""
    state = 0
    for part in key:
        state = splitmix_mix(((state + 0x9E3779B97F4A7C15) & MASK) ^ part)
    word = splitmix_mix((state + (i // 4 + 1) * 0x9E3779B97F4A7C15) & MASK)
    lane = (word >> (16 * (i % 4))) & 0xFFFF
    if lane >= 2**15:
        lane -= 2**16
    return (lane + 2**15 + 0.5) / 2**16


def codes_a_byte(alphabet: int) -> tuple[int, int]:
    """(base, digits)."""
    for limit, base, digits in ((2, 2, 8), (3, 3, 5), (4, 4, 4), (6, 6, 3), (16, 16, 2), (256, 256, 1)):
        if alphabet <= limit:
            return base, digits


def pack(codes, alphabet: int) -> list[int]:
    """Byte j of n is the sum of codes[i n + j] base^i."""
    base, digits = codes_a_byte(alphabet)
    n = math.ceil(len(codes) / digits)
    return [sum(codes[i * n + j] * base**i for i in range(digits) if i * n + j < len(codes)) for j in range(n)]


def expected_error(v, b) -> float:
    r"""\sum_i E (Q(v_i) - v_i)^2 = \sum (b_{k+1} - v)(v - b_k), squared distance outside [b_0, b_s]."""
    error = 0.0
    for x in v:
        if x <= b[0] or x >= b[-1]:
            error += (x - min(max(x, b[0]), b[-1])) ** 2
        else:
            k = max(k for k in range(len(b) - 1) if b[k] <= x)
            error += (b[k + 1] - x) * (x - b[k])
    return error


def best_between(v, low: float, high: float) -> float:
    """The level between two others with the least error, tried at every entry; the middle where there is none."""
    inside = [x for x in v if low <= x <= high]
    if not inside:
        return (low + high) / 2
    return min(inside, key=lambda x: expected_error(inside, [low, x, high]))


def best_end(v, inner: float) -> float:
    r"""
    The last level next to `inner` with the least error. Between two entries it is quadratic in b_s,
    \sum_{in} (b_s - v)(v - inner) + \sum_{out} (v - b_s)^2, so every minimum inside a gap and every entry is tried.
    """
    right = sorted(x for x in v if x >= inner)
    candidates = list(right)
    for j in range(len(right) - 1):
        inside, outside = right[: j + 1], right[j + 1 :]
        b = (sum(outside) - sum(x - inner for x in inside) / 2) / len(outside)
        candidates.append(min(max(b, right[j]), right[j + 1]))
    return min(candidates, key=lambda b: expected_error(right, [inner, b]))


def orq(v, num_levels: int, clip="none", sweeps: int = 2, start=None) -> list[float]:
    """Bisection, then sweeps: ends from the levels next to them if free, levels of even number, of odd number."""
    s = num_levels - 1
    b = [0.0] * num_levels
    b[0], b[s] = start or (min(v), max(v))
    if isinstance(clip, float):
        c = clip * math.sqrt(sum(x * x for x in v) / len(v))
        b[0], b[s] = min(max(b[0], -c), c), min(max(b[s], -c), c)

    def solve(lo, hi):
        if hi - lo > 1:
            mid = (lo + hi) // 2
            b[mid] = best_between(v, b[lo], b[hi])
            solve(lo, mid)
            solve(mid, hi)

    solve(0, s)
    for _ in range(sweeps):
        if clip == "optimal":
            b[s] = best_end(v, b[s - 1])
            b[0] = -best_end([-x for x in v], -b[1])
        for first in (2, 1):
            for k in range(first, s, 2):
                b[k] = best_between(v, b[k - 1], b[k + 1])
    return b


def orq_exact_error(v, num_levels: int) -> float:
    """
    The least error of any levels from min(v) to max(v), by dynamic programming over sorted entries in O(L d^2):
    best[j], the least error of what lies below entry j with a level there, = min_i best[i] + cost(i, j).
    """
    s = sorted(v)
    d = len(s)
    P, P2 = [0.0], [0.0]
    for x in s:
        P.append(P[-1] + x)
        P2.append(P2[-1] + x * x)

    def cost(i, j):
        m, S, S2 = j - i + 1, P[j + 1] - P[i], P2[j + 1] - P2[i]
        return (s[i] + s[j]) * S - S2 - m * s[i] * s[j]

    best = [cost(0, j) for j in range(d)]
    for _ in range(num_levels - 2):
        best = [min(best[i] + cost(i, j) for i in range(j + 1)) for j in range(d)]
    return best[-1]


def round_between(x: float, b, u: float) -> int:
    """Up with probability (x - b_k) / (b_{k+1} - b_k)."""
    if x < b[0]:
        return 0
    if x >= b[-1]:
        return len(b) - 1
    k = max(k for k in range(len(b) - 1) if b[k] <= x)
    return k + (1 if u <= (x - b[k]) / (b[k + 1] - b[k]) else 0)


def bingrad_b(v) -> list[float]:
    """Means of the entries below, and at or above, the mean; decoded."""
    t = sum(v) / len(v)
    low, high = [x for x in v if x < t], [x for x in v if x >= t]
    return [sum(high) / len(high) if x >= t else sum(low) / len(low) for x in v]


def scaled_sign(v) -> list[float]:
    r"""sign(v) ||v||_1 / d."""
    mean = sum(abs(x) for x in v) / len(v)
    return [mean if x >= 0 else -mean for x in v]


def linear(v, num_levels: int, u) -> list[float]:
    """Even levels from min to max, floor(position + u) of them up."""
    low, step = min(v), (max(v) - min(v)) / (num_levels - 1)
    return [low + step * min(math.floor((x - low) / step + w), num_levels - 1) for x, w in zip(v, u, strict=True)]


def qsgd(v, num_levels: int, u, norm: str = "max", clip: float | None = None) -> list[float]:
    r"""scale sgn(v) l/s; TernGrad with three levels, its scale clipped at c sigma."""
    rms = math.sqrt(sum(x * x for x in v) / len(v))
    scale = max(abs(x) for x in v) if norm == "max" else rms * math.sqrt(len(v))
    if clip is not None:
        scale = min(scale, clip * rms)
    s = (num_levels - 1) // 2
    decoded = []
    for x, w in zip(v, u, strict=True):
        position = s * min(max(x / scale, -1), 1)
        decoded.append(scale * min(math.floor(position + w), s) / s)
    return decoded


def shared_orq(v, b, u, scale: str) -> list[float]:
    """Levels b of v / scale."""
    c = max(abs(x) for x in v) if scale == "max" else math.sqrt(sum(x * x for x in v) / len(v))
    return [c * b[round_between(x / c, b, w)] for x, w in zip(v, u, strict=True)]


def top_k(v, k: int) -> list[float]:
    """The k largest by magnitude; among equal ones the first."""
    kept = sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:k]
    return [x if i in kept else 0.0 for i, x in enumerate(v)]


def fp8(v) -> list[float]:
    """The nearest e4m3 number times max|v|/448: three bits of mantissa, exponents from -6, ties to even."""
    scale = max(abs(x) for x in v) / 448
    decoded = []
    for x in v:
        exponent = max(math.frexp(abs(x) / scale)[1] - 1, -6) if x else -6
        unit = 2.0 ** (exponent - 3)
        decoded.append(round(x / scale / unit) * unit * scale)
    return decoded
