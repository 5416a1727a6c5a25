"""Block rules: the citable values, and equality with the kernels' own loops over every (Br, Bc)."""

import dataclasses
import random
import time

import pytest

from jaxattn import block_rules
from jaxattn.block_rules import HmxConfiguration, block_size, largest, unit, width

HMX = JUNE, AUGUST = "hexagon-hmx-2026-06", "hexagon-hmx-2026-08"
MIB = 2**20


def up(number, step):
    return (number + step - 1) // step * step


def buffers_june(d, dv, br, bc, g, threads, pipeline):
    """(copies, bytes, alignment) of every buffer in VTCM."""
    rows = up(g * br, 32)
    return [
        (1, rows * d * 2, 4096), (2, rows * dv * 2, 4096),
        (2, bc * up(d * 2, 128), 4096), (2, bc * up(dv * 2, 128), 4096),
        (1, bc * d * 2, 4096), (2 if pipeline else 1, bc * dv * 2, 4096),
        (2, rows * bc * 2, 4096), (1, rows * rows * 2, 4096), (4, rows * 2, 256),
        (2 * threads, bc * 2, 256), (1, br * up(bc * 2, 128), 4096), (1, rows * 2, 128),
        (2, 256, 1),
    ]  # fmt: skip


def buffers_august(d, dv, br, bc, g, threads, pipeline, query_bytes):
    """As buffers_june, in three groups: always there, while blocks are worked on, Q's arrival."""
    rows, n = up(g * br, 32), 2 if pipeline else 1
    always = [
        (1, rows * d * 2, 2048), (2, rows * dv * 2, 2048), (n + 1, rows // 32 * 2048, 1),
        (2, bc * up(d * 2, 128), 128), (2, bc * up(dv * 2, 128), 128), (2, rows * 4, 256),
        (2, 256, 1), (4, br * up(bc * 2, 128), 256), (1, rows * 2, 128),
    ]  # fmt: skip
    working = [
        (n, bc * d * 2, 2048), (n, bc * dv * 2, 2048), (2 * n, rows * bc * 2, 2048),
        (2, rows * 4, 256), (2 * threads, bc * 2, 256),
    ]  # fmt: skip
    return always, working, [(1, rows * d * query_bytes, 128)]


def total(buffers):
    return sum(copies * up(size, alignment) for copies, size, alignment in buffers)


def loop(rule, context, d, dv, configuration):
    """The search as the kernels write it: Br downwards, and Bc downwards until the buffers fit."""
    vtcm, threads, queries, g, query_float32 = dataclasses.astuple(configuration)
    step = -(-32 // g)
    pipeline = context >= 192 and threads >= 2
    limit = max(64, (context // 3 if pipeline else context) // 64 * 64)
    best = (float("inf"), 0, None)
    for br in range(max(step, queries // step * step), 0, -step):
        rows = up(g * br, 32)
        for bc in range(limit, 0, -64):
            if rule == JUNE:
                values = 4 if pipeline else 3
                per_key = 6 * d + 2 * values * dv + 4 * threads + 4 * rows + 2 * br
                fixed = rows * ((d + 2 * dv) * 2 + 8) + rows * rows * 2
                free = vtcm - 512 - 13 * 4096 - fixed
                if free <= 0 or bc * per_key > free:
                    continue
                used = total(buffers_june(d, dv, br, bc, g, threads, pipeline))
            else:
                shape = (d, dv, br, bc, g, threads, pipeline)
                always, working, arrival = buffers_august(*shape, 4 if query_float32 else 2)
                used = total(always) + max(total(working), total(arrival))
            if used > vtcm:
                continue
            query_blocks, kv_blocks = -(-queries // br), -(-context // bc)
            if rule == JUNE:
                cost = query_blocks * (1400 + kv_blocks * 200)
            else:
                vectors = -(-br * g // 64)
                busy = min(vectors, threads if kv_blocks >= 3 else 1)
                cost = query_blocks * (800 + kv_blocks * (200 + 600 * -(-vectors // busy)))
            if (cost, -br * bc) < best[:2]:
                best = (cost, -br * bc, bc)
            break
    return best[2]


def test_values_of_the_default_configuration():
    contexts = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    august = [block_size(AUGUST, n, 128, 128) for n in contexts]
    june = [block_size(JUNE, n, 128, 128) for n in contexts]
    assert august == [64, 128, 256, 576, 832] + [1408] * 5
    assert june == [64, 128, 320, 640] + [832] * 4 + [1344] * 2


@pytest.mark.parametrize(
    ("change", "size"), [({"group": 1}, 1280), ({"threads": 4}, 1728), ({"threads": 8}, 1088)]
)
def test_values_of_other_configurations(change, size):
    assert block_size(AUGUST, 131072, 128, 128, HmxConfiguration(**change)) == size


@pytest.mark.parametrize("rule", HMX)
def test_equals_the_loop_over_all_pairs(rule):
    draw = random.Random(rule)
    cases = [(n, 128, 128, HmxConfiguration()) for n in (1, 63, 64, 191, 192, 1000, 8192, 131072)]
    for _ in range(40):
        configuration = HmxConfiguration(
            vtcm_bytes=draw.choice([1, 2, 4, 8, 16]) * MIB,
            threads=draw.choice([1, 2, 4, 6, 8]),
            queries=draw.choice([1, 5, 32, 100, 512, 2048]),
            group=draw.choice([1, 2, 3, 4, 7, 8, 16]),
            query_float32=draw.random() < 0.5,
        )
        head_dim, value_dim = draw.choice([(32, 32), (64, 64), (96, 96), (128, 128), (192, 128)])
        cases.append((draw.randint(1, 40000), head_dim, value_dim, configuration))
    for context, head_dim, value_dim, configuration in cases:
        expected = loop(rule, context, head_dim, value_dim, configuration)
        assert expected is not None, configuration
        assert block_size(rule, context, head_dim, value_dim, configuration) == expected


@pytest.mark.parametrize("rule", HMX)
def test_blocks_are_multiples_of_64_and_at_least_three(rule):
    assert unit(rule) == 64
    for context in range(192, 20000, 777):
        size = block_size(rule, context, 128, 128)
        assert size % 64 == 0 and 64 <= size <= context // 3


def test_largest_is_where_the_size_settles():
    assert largest(AUGUST, 128, 128) == block_size(AUGUST, 2**26, 128, 128) == 1408
    assert largest(JUNE, 128, 128) == block_size(JUNE, 2**26, 128, 128) == 1344
    assert largest(AUGUST, 128, 128, HmxConfiguration(threads=4)) == 1728
    assert largest(100, 128, 128) == 100


def test_a_number_passes_through():
    assert block_size(96, 10, 64, 64) == unit(96) == 96
    block_rules.check(1)


def test_a_hundred_contexts_take_milliseconds():
    contexts = [int(256 * 2 ** (i / 10)) for i in range(100)]
    start = time.perf_counter()
    for context in contexts:
        block_size(AUGUST, context, 80, 80)
    assert time.perf_counter() - start < 1.0  # 10 ms here, the search included


def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'hexagon-hmx-2026-08'"):
        block_size("hexagon-hmx-2026-09", 512, 128, 128)
    with pytest.raises(ValueError, match="rules: whole, hexagon-hmx-2026-06"):
        block_rules.check("zzz")
    for rule in (0, -64):
        with pytest.raises(ValueError, match="kv_block must be at least 1"):
            block_rules.check(rule)
    for rule in (64.0, True, None):
        with pytest.raises(TypeError, match="kv_block must be an integer"):
            block_rules.check(rule)
    with pytest.raises(ValueError, match="context must be at least 1"):
        block_size(64, 0, 128, 128)
    with pytest.raises(ValueError, match="HmxConfiguration.threads must be at least 1"):
        HmxConfiguration(threads=0)
    for rule in HMX:
        with pytest.raises(ValueError, match="vtcm_bytes=65536"):
            block_size(rule, 4096, 128, 128, HmxConfiguration(vtcm_bytes=65536))


def test_whole_is_the_context_in_slots_of_few_sizes():
    assert [block_size("whole", n, 64, 64) for n in (1, 300, 2**20)] == [1, 300, 2**20]
    slots = {width("whole", n, 64, 64) for n in range(1, 4097)}
    assert slots == {256, 512, 1024, 2048, 4096}
    assert all(width("whole", n, 64, 64) >= n for n in (1, 256, 257, 4096, 4097, 2**20))
    assert unit("whole") == 256 and largest("whole", 64, 64) == 2**20
    with pytest.raises(ValueError, match="'whole' goes up to 1048576 keys, got .* 1048577"):
        width("whole", 2**20 + 1, 64, 64)
