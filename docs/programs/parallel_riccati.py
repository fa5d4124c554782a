"""Times of `dp.Riccati` and `dp.ParallelRiccati`, for docs/how-to-choose.md.

.venv/bin/python docs/programs/parallel_riccati.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


jax.config.update("jax_enable_x64", True)

CASES = [(128, None), (1024, None), (8192, 256)]  # horizon, chunk
SIZES = [(4, 2), (12, 4)]  # states, controls


def problem(T: int, n: int, m: int):
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((n + m, n + m)) / np.sqrt(n + m)
    hessian = factor @ factor.T + 0.1 * np.eye(n + m)
    lqr = dp.LQR(
        A=rng.standard_normal((T, n, n)) / np.sqrt(n),
        B=rng.standard_normal((T, n, m)),
        c=rng.standard_normal((T, n)),
        Q=np.tile(hessian[:n, :n], (T, 1, 1)),
        R=np.tile(hessian[n:, n:], (T, 1, 1)),
        M=np.tile(hessian[:n, n:], (T, 1, 1)),
        Q_final=hessian[:n, :n],
    )
    return lqr, jnp.asarray(rng.standard_normal(n))


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call().us)
    return time.perf_counter() - start


def main():
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, float64")
    print("              Riccati                ParallelRiccati")
    print(" n m     T    compile      solve     compile      solve    ratio  chunk")
    for n, m in SIZES:
        for T, chunk in CASES:
            lqr, x0 = problem(T, n, m)
            calls = [
                lambda method=method: dp.solve_lqr(lqr, x0, method=method)
                for method in (dp.Riccati(), dp.ParallelRiccati(chunk=chunk))
            ]
            first = [seconds(call) for call in calls]
            pairs = [[seconds(call) for call in calls] for _ in range(9)]
            a, b = np.median(pairs, axis=0)
            print(
                f"{n:2} {m} {T:5} {first[0]:8.1f} s {1e3 * a:7.2f} ms "
                f"{first[1]:9.1f} s {1e3 * b:7.2f} ms {b / a:8.1f} {chunk or '-':>6}"
            )


if __name__ == "__main__":
    main()
