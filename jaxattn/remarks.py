"""Remarks: what is wrong with an observed output beyond rounding, in sentences."""

import math
from typing import NamedTuple

import numpy as np

from jaxattn.captures import LAYOUT_RULE
from jaxattn.exact import ONE_THREAD
from jaxattn.reference import reference_attention

FAR = 0.1  # NMSE that no rounding explains
QUERIES, KV_HEADS = 8, 4  # that are looked at, from the first to the last
WELL = 1e-5  # NMSE that leaves no doubt about the reading
BETTER = 0.1  # error of a reading, or of an order of heads, that is believed, to the given one's
MUCH = 30  # times the error of every recipe: a mistake where V has a mean is not FAR


GIVEN, EXCHANGED = "", "with head and token exchanged"
INTERLEAVED = "with query head h on KV head h % K"
NOT_LAST, NOT_FIRST = "without the last key of each query", "without the first key"
MULTIPLES = (32, 64, 128, 256)  # that kernels pad keys to


class Reading(NamedTuple):
    """causal: query t sees keys up to S - T + t; layout: of the arrays; scale: of the scores;
    keys: those that are lost; zeros: how many follow them, which no mask hides."""

    causal: bool
    layout: str
    scale: float
    keys: str = GIVEN
    zeros: int = 0


def better_reading(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    output: np.ndarray,
    *,
    scale: float | None,
    causal: bool,
) -> str | None:
    """A sentence on the reading that fits far better than the one given, [B, T, N, H]; or None.

    Compares some queries of some heads with float64 attention by the largest NMSE of a query, since
    the first queries alone may betray a causal kernel; no recipe runs.
    """
    N, K, H = query.shape[2], key.shape[2], query.shape[3]
    S, own = key.shape[1], H**-0.5 if scale is None else scale
    straight = (query, key, value, output)
    as_given = Reading(causal, GIVEN, own)
    if (given := _worst(as_given, *straight)) < WELL:
        return None
    layouts = {GIVEN: straight, EXCHANGED: tuple(np.swapaxes(x, 1, 2) for x in straight)}
    if 1 < K < N:
        order = np.argsort(np.arange(N) % K, kind="stable")
        layouts[INTERLEAVED] = (query[:, :, order], key, value, output[:, :, order])
    readings = [Reading(c, layout, own) for layout in layouts for c in (causal, not causal)]
    scales = (1.0, 1 / H, own * math.log2(math.e), own / math.log2(math.e), 2 * own, own / 2)
    readings += [Reading(causal, GIVEN, x) for x in scales]
    readings += [as_given._replace(keys=keys) for keys in (NOT_LAST, NOT_FIRST)]
    pads = set() if causal else {-S % multiple for multiple in MULTIPLES} - {0}
    readings += [as_given._replace(zeros=zeros) for zeros in sorted(pads)]

    def worst(reading: Reading) -> float:
        return _worst(reading, *layouts[reading.layout])

    def fits(reading: Reading) -> bool:
        (T, N), (S, K) = (x.shape[1:3] for x in layouts[reading.layout][:2])
        return N % K == 0 and not (reading.causal and T > S)

    found = {r: worst(r) for r in readings if r != as_given and fits(r)}
    best = min(found, key=lambda reading: found[reading])
    if not found[best] < min(FAR, BETTER * given):
        return None
    words = [best.layout] * (best.layout != GIVEN)
    words += [f"with{'' if best.causal else 'out'} --causal"] * (best.causal != causal)
    words += [f"with --scale {best.scale:.6g}"] * (best.scale != own)
    words += [best.keys] * (best.keys != GIVEN)
    words += [f"with {best.zeros} keys of zeros behind the last"] * bool(best.zeros)
    told = (
        f"{' and '.join(words)} the largest NMSE of a query is {found[best]:.1e}, not {given:.1e}"
    )
    if best.layout == EXCHANGED:
        return f"{told}: {LAYOUT_RULE}"
    if best.layout == INTERLEAVED:
        return f"{told}: here it is h // (N / K)"
    if best.scale != own:
        return f"{told}: is that its scale?"
    if best.keys != GIVEN:
        return f"{told}: does this kernel lose it?"
    if best.zeros:
        return f"{told}: does this kernel mask its padding?"
    kernel = "is this kernel causal" if best.causal else "does every query see all keys"
    return f"{told}: {kernel}?"


def _worst(
    reading: Reading, query: np.ndarray, key: np.ndarray, value: np.ndarray, output: np.ndarray
) -> float:
    """The largest NMSE of the queries that are looked at; one head at a time is widened."""
    (B, T, N), (S, K) = query.shape[:3], key.shape[1:3]
    at = _spread(T, QUERIES)
    last = (S - T + at if reading.causal else np.full(at.shape, S - 1))[:, None]
    slots = np.arange(S + reading.zeros)
    mask = slots <= last - (reading.keys == NOT_LAST) + reading.zeros
    mask[:, 0] &= reading.keys != NOT_FIRST
    worst = 0.0
    for b, k in (divmod(int(i), K) for i in _spread(B * K, KV_HEADS)):
        heads = slice(k * N // K, (k + 1) * N // K)
        q = query[b, at, heads]
        k_head, v_head = (
            np.pad(x[b, :, k : k + 1], [(0, reading.zeros), (0, 0), (0, 0)]) for x in (key, value)
        )
        with ONE_THREAD:
            ideal = reference_attention(q, k_head, v_head, mask=mask, scale=reading.scale)
        error = np.sum((output[b, at, heads] - ideal) ** 2, axis=-1)
        size = np.sum(ideal**2, axis=-1)
        worst = max(worst, float(np.max(error[size > 0] / size[size > 0], initial=0)))
    return worst


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def remarks_on(
    observed: np.ndarray, ideal: np.ndarray, emulated: np.ndarray, reading: str | None
) -> list[str]:
    """Of outputs [B, T, N, D], [recipe, B, T, N, D] of recipes, and a sentence of better_reading.

    A query is called far that is FAR from float64 and from every recipe alike.
    """
    size, least = np.sum(ideal**2, axis=-1), np.sum((observed - ideal) ** 2, axis=-1)
    for one in emulated:
        least = np.fmin(least, np.sum((observed - one) ** 2, axis=-1))
    far = np.moveaxis(least > FAR * size, 1, 2)  # [B, N, T]
    zero = ~observed.any(axis=(1, 3)) & ideal.any(axis=(1, 3))
    constant = (np.ptp(observed, axis=(1, 3)) == 0) & (np.ptp(ideal, axis=(1, 3)) > 0) & ~zero
    error = np.sum((observed - ideal) ** 2, axis=(1, 3))  # [B, N]
    constant &= error > WELL * np.sum(size, axis=1)  # where V is constant, so is the output
    far[zero | constant] = False
    whole = far.all(axis=2)
    part = far.any(axis=2) & ~whole
    no_run = "it looks like a kernel that did not run"
    beyond = "further from float64 than rounding goes"
    found = {f"all zero: {no_run}": zero, f"one number throughout: {no_run}": constant}
    found[beyond] = whole
    if part.any():
        rows, at = far[part], np.flatnonzero(far[part].any(axis=0))
        share = f"{rows.sum():,} of {rows.size:,} rows, queries {at[0]:,} to {at[-1]:,}"
        found[f"{beyond} in {share}"] = part
    remarks = [f"output of {_heads(some)}: {what}" for what, some in found.items() if some.any()]
    errors = np.array([np.sum((one - ideal) ** 2, axis=(1, 3)) for one in emulated])
    most = np.max(np.where(np.isfinite(errors), errors, 0), axis=0)  # of those that do not overflow
    odd = far.any(axis=2) | (error > MUCH * most) & (error > WELL * np.sum(size, axis=1))
    odd &= ~(zero | constant)
    remarks += _other_heads(observed, ideal, error, odd)
    if reading is not None:
        remarks.append(reading)
    elif odd.any() and not far.any():
        remarks.append(
            f"output of {_heads(odd)}: over {MUCH} times the squared error of every recipe tried; "
            "narrower formats than theirs, or another scale, mask or order of heads"
        )
    elif far.any():
        remarks.append(
            "check --scale, --causal (the last query sees all keys), the order of heads and the "
            f"layout: {LAYOUT_RULE}"
        )
    return remarks


def _other_heads(
    observed: np.ndarray, ideal: np.ndarray, error: np.ndarray, odd: np.ndarray
) -> list[str]:
    """Of the odd heads [B, N], those whose output is another head's."""
    found = []
    for b, n in np.argwhere(odd):
        each = np.sum((observed[b, :, n, None] - ideal[b]) ** 2, axis=(0, 2))
        other = int(np.argmin(each))
        if each[other] < BETTER * error[b, n]:
            found.append(f"{n} (head {other}'s)" if len(odd) == 1 else f"{b}.{n} (head {other}'s)")
    return [f"output of another head: head {', '.join(found)}"] if found else []


def _heads(some: np.ndarray) -> str:
    """Names where some [B, N] is true, with the batch entry where there are several."""
    if some.all():
        return "all heads"
    names = (f"{n}" if len(some) == 1 else f"{b}.{n}" for b, n in np.argwhere(some))
    return f"head {', '.join(names)}"
