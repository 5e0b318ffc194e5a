"""
Adapters on stacked experts that keep zeros, in plain loops. Shares no code with the library.

W_e: the matrix of expert e as it is stored, [m][n] or, where a family stores it transposed to what peft takes for its
output, [n][m]. M_e = 1 where W_e is not 0. peft keeps the factors of all experts in one matrix each: expert e's
A_e [r][n] are rows e r ... e r + r - 1 of A, its B_e [m][r] are columns e, e + E, e + 2 E, ... of B. s: alpha / r.
"""


def factors(A, B, e: int, num_experts: int, r: int) -> tuple[list, list]:
    A_e = [[float(value) for value in A[e * r + k]] for k in range(r)]
    B_e = [[float(row[k * num_experts + e]) for k in range(r)] for row in B]
    return A_e, B_e


def is_transposed(W, A, B) -> bool:
    """Told from the shapes; of square matrices it cannot be."""
    m, n = len(B), len(A[0])
    assert m != n
    return (len(W[0]), len(W[0][0])) == (n, m)


def effective(W, A, B, r: int, s: float) -> list:
    """W_e + M_e * s (B_e A_e), as stored."""
    transposed, result = is_transposed(W, A, B), []
    for e, W_e in enumerate(W):
        A_e, B_e = factors(A, B, e, len(W), r)
        result.append([[float(value) for value in row] for row in W_e])
        for a, row in enumerate(W_e):
            for b, value in enumerate(row):
                o, i = (b, a) if transposed else (a, b)
                if value != 0:
                    result[e][a][b] += s * sum(B_e[o][k] * A_e[k][i] for k in range(r))
    return result


def gradients(G, W, A, B, r: int, s: float) -> tuple[list, list]:
    """dL/dA and dL/dB, laid out as A and B, from G = dL/d(effective weight)."""
    transposed = is_transposed(W, A, B)
    dA, dB = ([[0.0] * len(rows[0]) for _ in rows] for rows in (A, B))
    for e, W_e in enumerate(W):
        A_e, B_e = factors(A, B, e, len(W), r)
        for a, row in enumerate(W_e):
            for b, value in enumerate(row):
                o, i = (b, a) if transposed else (a, b)
                if value != 0:
                    for k in range(r):
                        dA[e * r + k][i] += s * B_e[o][k] * float(G[e][a][b])
                        dB[o][k * len(W) + e] += s * A_e[k][i] * float(G[e][a][b])
    return dA, dB
