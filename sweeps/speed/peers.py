"""Other ways to the same job, each as its own library would have it: one configuration at a time.

The job: attention in blocks of 512 keys whose p, row sums, l and o are kept in float16. A library
that cannot round inside (`plain`) computes float32 attention instead.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sweeps.speed.measure import HEAD_DIM, NotRun, Problem, Row, limit, problem, take_turns
from sweeps.speed.ours import FORMATS, LONG, SHORT, attention, call_of, curves, lattice, row

BLOCK = 512
SITES = ("probs", "row_sum", "running_sum", "output")
SCALE = HEAD_DIM**-0.5
PLAIN = "plain float32: it rounds nothing inside"

Attend = Callable[[Any, Any, Any], Any]


class Peer(NamedTuple):
    """packages: distributions it needs; make: Problem -> a call whose result is attention [T, D].

    rounds: whether it does the job, or plain attention; slow: left out with --quick
    """

    packages: tuple[str, ...]
    make: Callable[[Problem], Callable[[], Any]]
    rounds: bool = True
    slow: bool = False


def job() -> Any:
    """The job as a recipe."""
    from jaxattn.recipe import Recipe

    halves = dict.fromkeys((*SITES, "summand"), "float16")
    return Recipe(name="float16-job", kv_block=BLOCK, **halves)  # type: ignore[arg-type]


def step(xp: Any, rounded: Any, q: Any, carry: Any, k: Any, v: Any) -> Any:
    """A block of keys; xp: the library's exp, maximum, amax and sum."""
    m_prev, l, o = carry
    s = (q @ k.T) * SCALE
    m = xp.maximum(m_prev, xp.amax(s, -1))
    p = rounded(xp.exp(s - m[:, None]))
    a = xp.exp(m_prev - m)
    l = rounded(a * l + rounded(xp.sum(p, -1)))
    o = rounded(a[:, None] * o + p @ v)
    return m, l, o


def in_a_loop(xp: Any, rounded: Any, q: Any, k: Any, v: Any) -> Any:
    """As one writes it in NumPy or in eager torch."""
    carry = (xp.full_like(q[:, 0], -float("inf")), xp.zeros_like(q[:, 0]), xp.zeros_like(q))
    for start in range(0, len(k), BLOCK):
        piece = slice(start, start + BLOCK)
        carry = step(xp, rounded, q, carry, k[piece], v[piece])
    _, l, o = carry
    return o / l[:, None]


def in_a_scan(rounded: Any, q: Any, k: Any, v: Any) -> Any:
    """As one writes it in jax."""
    import jax
    import jax.numpy as jnp

    zero = jnp.zeros_like(q[:, 0])
    blocks = tuple(x.reshape(-1, BLOCK, HEAD_DIM) for x in (k, v))
    body = lambda carry, kv: (step(jnp, rounded, q, carry, *kv), None)  # noqa: E731
    (_, l, o), _ = jax.lax.scan(body, (zero - jnp.inf, zero, jnp.zeros_like(q)), blocks)
    return o / l[:, None]


def _numpy(rounded: Any, drawn: Problem) -> Any:
    return lambda: in_a_loop(np, rounded, *drawn)


def _torch(rounded: Any, drawn: Problem) -> Any:
    import torch

    arrays = [torch.from_numpy(x) for x in drawn]

    def call() -> Any:
        with torch.inference_mode():
            return in_a_loop(torch, rounded, *arrays)

    return call


def _jax(rounded: Any, drawn: Problem) -> Any:
    import jax

    return call_of(jax.jit(functools.partial(in_a_scan, rounded)), *drawn.arrays())


def _numpy_cast(drawn: Problem) -> Any:
    return _numpy(lambda x: x.astype(np.float16).astype(np.float32), drawn)


def _torch_cast(drawn: Problem) -> Any:
    return _torch(lambda x: x.half().float(), drawn)


def _jax_cast(drawn: Problem) -> Any:
    import jax.numpy as jnp

    return _jax(lambda x: x.astype(jnp.float16).astype(jnp.float32), drawn)


def _qtorch(drawn: Problem) -> Any:
    # Its first import builds C++ by ninja, which may be in the environment's own folder.
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    from qtorch.quant import float_quantize

    return _torch(lambda x: float_quantize(x, exp=5, man=10, rounding="nearest"), drawn)


def _pychop(of: Callable[[Any, Problem], Any], drawn: Problem) -> Any:
    import pychop

    return of(pychop.Chop(5, 10), drawn)  # its backend is that of the arrays


def _sdpa(drawn: Problem) -> Any:
    import torch

    q, k, v = (torch.from_numpy(x)[None, None] for x in drawn)

    def call() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]

    return call


def _nn(drawn: Problem) -> Any:
    import jax

    return _without_head(jax.nn.dot_product_attention, drawn)


def _tokamax(drawn: Problem) -> Any:
    import tokamax

    call = _without_head(
        functools.partial(tokamax.dot_product_attention, implementation="xla"), drawn
    )
    arguments, sys.argv = sys.argv, sys.argv[:1]  # its first call parses them as flags of its own
    try:
        call()
    finally:
        sys.argv = arguments
    return call


def _without_head(attend: Attend, drawn: Problem) -> Any:
    import jax

    def call(q: Any, k: Any, v: Any) -> Any:
        return attend(*(x[None, :, None] for x in (q, k, v)))[0, :, 0]

    return call_of(jax.jit(call), *drawn.arrays())


PEERS: dict[str, Peer] = {
    "numpy": Peer(("numpy",), _numpy_cast),
    "jax by hand": Peer(("jax",), _jax_cast),
    "torch eager": Peer(("torch",), _torch_cast),
    "torch + qtorch": Peer(("torch", "qtorch"), _qtorch, slow=True),
    "pychop, numpy": Peer(("pychop",), functools.partial(_pychop, _numpy), slow=True),
    "pychop, torch": Peer(("pychop", "torch"), functools.partial(_pychop, _torch), slow=True),
    "pychop, jax": Peer(("pychop", "jax"), functools.partial(_pychop, _jax), slow=True),
    "jax.nn": Peer(("jax",), _nn, rounds=False),
    "tokamax": Peer(("tokamax",), _tokamax, rounds=False),
    "torch SDPA": Peer(("torch",), _sdpa, rounds=False),
}


def refuse_missing(packages: tuple[str, ...]) -> None:
    """Raises NotRun for a distribution that is not installed."""
    import importlib.metadata

    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise NotRun(f"{package} is not installed") from None


def rows(name: str) -> Iterator[Row]:
    """One peer, at both shapes."""
    peer = PEERS[name]
    refuse_missing(peer.packages)
    for shape in (SHORT, LONG):
        drawn = problem(*shape)
        call = peer.make(drawn)
        why = f"{apart(call(), drawn):.1e} from jaxattn's result" if peer.rounds else PLAIN
        times = take_turns(call, limit(drawn))
        series = "peer" if peer.rounds else "plain"
        yield row(name, times, drawn, recipes=1, series=series, why=why)


def apart(result: Any, drawn: Problem) -> float:
    """Relative distance of a result [T, D] from that of the job's recipe."""
    ours = np.asarray(attention(job(), drawn)())[:, 0]
    return float(np.linalg.norm(np.asarray(result) - ours) / np.linalg.norm(ours))


def ours() -> Iterator[Row]:
    """The same job by jaxattn."""
    for shape in (SHORT, LONG):
        drawn = problem(*shape)
        times = take_turns(attention(job(), drawn), limit(drawn))
        yield row("jaxattn", times, drawn, recipes=1, series="ours")


def ours_at_once() -> Iterator[Row]:
    """256 such jobs with their errors against float64, divided by their number."""
    recipes = lattice(job(), dict.fromkeys(SITES, FORMATS))
    for shape in (SHORT, LONG):
        drawn = problem(*shape)
        times = take_turns(curves(recipes, drawn), limit(drawn))
        each = times._replace(seconds=times.seconds / len(recipes))
        why = f"errors and float64 reference included, {times.ratio:.1f} limits in all"
        what = f"jaxattn, each of {len(recipes)}"
        yield row(what, each, drawn, recipes=len(recipes), series="ours", why=why)
