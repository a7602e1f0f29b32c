"""The loops of a search, compiled on their first call and kept on disk: they need Numba, `scan` AVX512-VNNI.

`vpdpbusd` multiplies 64 pairs of bytes, the first unsigned, the second signed, and adds them in fours to 16
sums of 32 bits. A panel holds candidates side by side, four bytes of each in turn, so that one load fills a
register; its products with some queries stay in registers to the end, and no product is written to memory.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 32
"""Candidates of a panel: two registers of 16."""
ROWS = 12
"""Queries that are multiplied together: 24 of 32 registers hold sums."""
_UNROLLED = 4
STEP_BYTES = 4 * _UNROLLED
"""Of a vector; its length is a multiple of it."""
ZERO = 128
"""Of a candidate's byte, which is unsigned."""

TINY = np.float32(2.0**-100)
NUM_FACTS = 5
"""Of a query, see `scan`."""

_I32, _I64, _REAL = ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _REALS = ir.VectorType(_I32, 16), ir.VectorType(_REAL, 16)
_DOT = "llvm.x86.avx512.vpdpbusd.512"
_TO_WHOLE = np.float32(1.5 * 2**23)
"""A float32 near it has no fraction."""


def _compare_rows(
    _: Any, low: Any, row_bytes: Any, facts: Any, panel: Any, num_steps: Any, known: Any, out: Any
) -> Any:
    """Multiply `ROWS` queries with a panel, and compare what scores may be with what they have to be.

    All arguments are addresses and numbers of bytes or steps: int8 `low` and float32 `facts` of the queries,
    a panel and what is known of its candidates, and `out`, which is filled with float32 (ROWS, LANES) upper
    bounds, and with int32 (ROWS,) whose bits tell which may be among the best.
    """

    def generate(context: Any, build: Any, _: Any, values: Any) -> Any:
        low, row_bytes, facts, panel, num_steps, known, out = values
        dot = build.module.globals.get(_DOT) or ir.Function(
            build.module, ir.FunctionType(_SUMS, [_SUMS, _SUMS, _SUMS]), _DOT
        )
        halves = range(LANES // 16)

        def at(address: Any, offset: int, kind: ir.Type) -> Any:
            return build.inttoptr(build.add(address, _I64(offset)), kind.as_pointer())

        def load(address: Any, offset: int, kind: ir.Type) -> Any:
            loaded = build.load(at(address, offset, kind))
            loaded.align = 1
            return loaded

        def store(value: Any, address: Any, offset: int) -> None:
            build.store(value, at(address, offset, value.type)).align = 1

        def everywhere(value: Any, kind: ir.VectorType) -> Any:
            undefined = ir.Constant(kind, ir.Undefined)
            alone = build.insert_element(undefined, value, _I32(0))
            return build.shuffle_vector(alone, undefined, ir.Constant(_SUMS, [0] * 16))

        starts = [build.add(low, build.mul(row_bytes, _I64(row))) for row in range(ROWS)]
        before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
        build.branch(loop)
        build.position_at_end(loop)
        step = build.phi(_I64)
        entering = [[build.phi(_SUMS) for _ in halves] for _ in range(ROWS)]
        sums = [list(row) for row in entering]
        for unrolled in range(_UNROLLED):
            place = build.add(step, _I64(unrolled))
            column = build.add(panel, build.mul(place, _I64(4 * LANES)))
            beside = [load(column, 64 * half, _SUMS) for half in halves]
            along = build.mul(place, _I64(4))
            for row, start in enumerate(starts):
                four = everywhere(load(build.add(start, along), 0, _I32), _SUMS)
                sums[row] = [build.call(dot, [sums[row][half], beside[half], four]) for half in halves]
        following = build.add(step, _I64(_UNROLLED))
        step.add_incoming(_I64(0), before)
        step.add_incoming(following, loop)
        for row in range(ROWS):
            for half, phi in enumerate(entering[row]):
                phi.add_incoming(ir.Constant(_SUMS, [0] * 16), before)
                phi.add_incoming(sums[row][half], loop)
        build.cbranch(build.icmp_signed("<", following, num_steps), loop, after)

        build.position_at_end(after)
        of_half = [[load(known, 64 * (2 * fact + half), _REALS) for fact in range(3)] for half in halves]
        for row in range(ROWS):
            place = 4 * NUM_FACTS * row
            offset = everywhere(load(facts, place, _I32), _SUMS)
            scale, rest, length, least = (
                everywhere(load(facts, place + 4 * fact, _REAL), _REALS) for fact in range(1, NUM_FACTS)
            )
            survives = []
            for half, (its_scale, by_rest, by_length) in enumerate(of_half):
                product = build.sitofp(build.sub(sums[row][half], offset), _REALS)
                estimate = build.fmul(product, build.fmul(scale, its_scale))
                error = build.fadd(build.fmul(rest, by_rest), build.fmul(length, by_length))
                # Where products are so small that they are rounded off, the error would be as well.
                upper = build.fadd(build.fadd(estimate, error), ir.Constant(_REALS, [float(TINY)] * 16))
                store(upper, out, 4 * LANES * row + 64 * half)
                is_below = build.fcmp_ordered("<", upper, least)
                survives.append(build.zext(build.bitcast(build.not_(is_below), ir.IntType(16)), _I32))
            first, second = survives
            store(build.or_(first, build.shl(second, _I32(16))), out, 4 * LANES * ROWS + 4 * row)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


def _place_of_lowest_bit(_: Any, bits: Any) -> Any:
    """Of those that are set; there has to be one."""

    def generate(context: Any, build: Any, _: Any, values: Any) -> Any:
        return build.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.uint32(types.uint32), generate


_compare: Any = intrinsic(_compare_rows)
_lowest_bit: Any = intrinsic(_place_of_lowest_bit)


@njit(nogil=True, cache=True)
def _largest(bits):
    """Largest of absolute values. Bits of positive float32 stand in their order, and whole numbers can be
    compared side by side."""
    largest = np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _square(vector):
    square = np.float32(0)
    for i in range(len(vector)):
        square += vector[i] * vector[i]
    return square


@njit(nogil=True, cache=True)
def round_rows(vectors, low, scales, squares, rests):
    """float32 (N, D) → int8, the largest value of a row as 127.

    Args:
        vectors: float32 (N, D).
        low: int8 (N, D or more), to be filled to D.
        scales: float32 (N,), what one unit stands for.
        squares, rests: float32 (N,), of the vector and of what rounding took in units of the scale, squared.
    """
    num, width = vectors.shape
    lost, peak = np.empty(width, np.float32), np.empty(1, np.int32)
    bits = vectors.view(np.int32)
    for row in range(num):
        vector, rounded = vectors[row], low[row]
        peak[0] = _largest(bits[row])
        largest = max(peak.view(np.float32)[0], TINY)
        inverse = np.float32(127) / largest
        for i in range(width):
            value = vector[i] * inverse
            whole = (value + _TO_WHOLE) - _TO_WHOLE
            lost[i] = value - whole
            rounded[i] = np.int8(np.int32(whole))
        scales[row] = largest / np.float32(127)
        squares[row], rests[row] = _square(vector), _square(lost)


@njit(nogil=True, cache=True)
def pack(low, panels):
    """Rows of S groups of four int8 → panels of uint8, `ZERO` added; the last panel is filled up.

    Args:
        low: uint32 (N, S), the groups as they lie in memory.
        panels: uint32 (⌈N / LANES⌉, S, LANES), to be filled.
    """
    num, num_steps = low.shape
    for panel in range(len(panels)):
        start = panel * LANES
        for step in range(num_steps):
            packed = panels[panel, step]
            for lane in range(min(LANES, num - start)):
                packed[lane] = low[start + lane, step] ^ np.uint32(0x80808080)
            for lane in range(num - start, LANES):
                packed[lane] = np.uint32(0x80808080)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dot(left, right):
    total = np.float32(0)
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


@njit(nogil=True, cache=True)
def scan(queries, low, facts, candidates, panels, known, share, first_key, heap, keys, limits):
    """Write down which pairs may be among the best: those that 8 bits cannot exclude are multiplied in
    float32 at once, while the candidate is in the cache, and raise the floor.

    Args:
        queries: float32 (Q, D).
        low: int8 (Q filled up to a multiple of ROWS, 4·S), the same rounded.
        facts: float32 (the same, NUM_FACTS): what `ZERO` adds to all products of the query, as int32; its
            scale, rest and length; and what has to be reached, which is kept up to date.
        candidates: float32 (C, D).
        panels: uint32 (P, S, LANES), the same rounded.
        known: float32 (P, 3, LANES), the candidates' scales, and what a unit of a query's rest and of its
            length adds to the error.
        share: What float32 sums lose, as a share of the product of the lengths.
        first_key: Of query 0 and the first candidate.
        heap: float32 (Q, K), the best lower bounds so far as a heap, the least in front; kept up to date.
        keys, limits: int64 (M,) and float32 (2, M), to be filled: query · 2³² + column, lower, upper bound.

    Returns:
        How many were written down, and how many were multiplied in float32.
    """
    num_queries = len(heap)
    row_bytes, num_steps = low.shape[1], panels.shape[1]
    uppers = np.empty((ROWS + 1, LANES), np.float32)
    survives = uppers[ROWS].view(np.uint32)
    count, num_multiplied = 0, 0
    for panel in range(len(panels)):
        start = panel * LANES
        real = np.uint32(0xFFFFFFFF) >> np.uint32(max(0, LANES - (len(candidates) - start)))
        panel_at, known_at = panels[panel].ctypes.data, known[panel].ctypes.data
        for block in range(0, num_queries, ROWS):
            low_at, facts_at = low[block].ctypes.data, facts[block].ctypes.data
            _compare(low_at, row_bytes, facts_at, panel_at, num_steps, known_at, uppers.ctypes.data)
            for row in range(min(ROWS, num_queries - block)):
                bits, query = survives[row] & real, block + row
                while bits:
                    lane = _lowest_bit(bits)
                    bits &= bits - np.uint32(1)
                    if uppers[row, lane] < facts[query, 4]:
                        continue
                    product = _dot(queries[query], candidates[start + lane])
                    num_multiplied += 1
                    error = share * facts[query, 3] * known[panel, 1, lane] + TINY
                    if product + error < facts[query, 4]:
                        continue
                    keys[count] = first_key + (query << 32) + start + lane
                    limits[0, count], limits[1, count] = product - error, product + error
                    count += 1
                    if product - error > heap[query, 0]:
                        _replace_least(heap[query], product - error)
                        facts[query, 4] = max(facts[query, 4], heap[query, 0])
    return count, num_multiplied


@njit(nogil=True, cache=True)
def _replace_least(heap, value):
    place, size = 0, len(heap)
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _exact_products(left, right):
    total = 0.0
    for i in range(len(left)):
        total += np.float64(left[i]) * np.float64(right[i])
    return total


@njit(nogil=True, cache=True)
def inner_products(left, right, rows, columns, products):
    """float64 inner products of pairs of rows.

    Args:
        left, right: float32 (N, D), (M, D).
        rows, columns: int64 (P,), which make each pair.
        products: float64 (P,), to be filled.
    """
    for pair in range(len(products)):
        products[pair] = _exact_products(left[rows[pair]], right[columns[pair]])
