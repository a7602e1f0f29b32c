"""The loops of a search, compiled on their first call and kept on disk: they need Numba, `scan` and `refine`
AVX512-VNNI.

`vpdpbusd` multiplies 64 pairs of bytes, the first unsigned, the second signed, and adds them in fours to 16
sums of 32 bits. A panel holds candidates side by side, four bytes of each in turn, so that one load fills a
register; its products with some queries stay in registers to the end, and no product is written to memory.
`vpdpwssd` does the same with 32 pairs of 16 bits, in twos.
"""

from functools import reduce
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
STEP_WORDS = 32 * _UNROLLED
"""Of a vector of 8, of 16 bits; its length is a multiple of it."""
_LENGTH_WORDS = 32_000
"""Of a vector of int16: no value exceeds 16 bits, no part of a product of two 32 (Cauchy-Schwarz)."""
ZERO = 128
"""Of a candidate's byte, which is unsigned."""

TINY = np.float32(2.0**-100)
NUM_FACTS = 5
"""Of a query, see `scan`."""

_I32, _I64, _REAL = ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _REALS = ir.VectorType(_I32, 16), ir.VectorType(_REAL, 16)
_DOT = "llvm.x86.avx512.vpdpbusd.512"
_DOT_WORDS = "llvm.x86.avx512.vpdpwssd.512"
_SUM = "llvm.vector.reduce.add.v16i32"
_TO_WHOLE = np.float32(1.5 * 2**23)
"""A float32 near it has no fraction."""


def _at(build: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    return build.inttoptr(build.add(address, _I64(offset)), kind.as_pointer())


def _load(build: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    loaded = build.load(_at(build, address, offset, kind))
    loaded.align = 1
    return loaded


def _declared(build: Any, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    known = build.module.globals.get(name)
    return known or ir.Function(build.module, ir.FunctionType(result, arguments), name)


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
        dot = _declared(build, _DOT, _SUMS, [_SUMS, _SUMS, _SUMS])
        halves = range(LANES // 16)

        def load(address: Any, offset: int, kind: ir.Type) -> Any:
            return _load(build, address, offset, kind)

        def store(value: Any, address: Any, offset: int) -> None:
            build.store(value, _at(build, address, offset, value.type)).align = 1

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


def _product_of_words(_: Any, left: Any, right: Any, num_steps: Any) -> Any:
    """Inner product of two rows of int16, whose addresses are given, in steps of `STEP_WORDS`."""

    def generate(context: Any, build: Any, _: Any, values: Any) -> Any:
        left, right, num_steps = values
        dot = _declared(build, _DOT_WORDS, _SUMS, [_SUMS, _SUMS, _SUMS])
        before, loop, after = build.block, build.append_basic_block(), build.append_basic_block()
        build.branch(loop)
        build.position_at_end(loop)
        step, entering = build.phi(_I64), [build.phi(_SUMS) for _ in range(_UNROLLED)]
        start = build.mul(step, _I64(2 * STEP_WORDS))
        left, right = build.add(left, start), build.add(right, start)
        sums = [
            build.call(dot, [total, *(_load(build, side, 64 * part, _SUMS) for side in (left, right))])
            for part, total in enumerate(entering)
        ]
        following = build.add(step, _I64(1))
        step.add_incoming(_I64(0), before)
        step.add_incoming(following, loop)
        for total, phi in zip(sums, entering, strict=True):
            phi.add_incoming(ir.Constant(_SUMS, [0] * 16), before)
            phi.add_incoming(total, loop)
        build.cbranch(build.icmp_signed("<", following, num_steps), loop, after)

        build.position_at_end(after)
        total = reduce(build.add, sums)
        return build.call(_declared(build, _SUM, _I32, [_SUMS]), [total])

    return types.int32(*[types.intp] * 3), generate


_compare: Any = intrinsic(_compare_rows)
_multiply_words: Any = intrinsic(_product_of_words)
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
def round_rows(vectors, low, facts):
    """float32 (N, D) → int8, the largest value of a row as 127, or int16, a row's length as `_LENGTH_WORDS`.

    Args:
        vectors: float32 (N, D).
        low: int8 or int16 (N, D or more), to be filled to D.
        facts: float32 (N, 3), to be filled: what one unit stands for, and upper bounds of the length of what
            rounding took, and of the length, before and after.
    """
    num, width = vectors.shape
    lost, peak = np.empty(width, np.float32), np.empty(1, np.int32)
    bits = vectors.view(np.int32)
    for row in range(num):
        vector, rounded = vectors[row], low[row]
        length = np.sqrt(_square(vector))
        if low.itemsize == 1:
            peak[0] = _largest(bits[row])
            whole_range, unit = np.float32(127), max(peak.view(np.float32)[0], TINY)
        else:
            whole_range, unit = np.float32(_LENGTH_WORDS), max(length, TINY)
        inverse, scale = whole_range / unit, unit / whole_range
        for i in range(width):
            value = vector[i] * inverse
            whole = (value + _TO_WHOLE) - _TO_WHOLE
            lost[i] = value - whole
            rounded[i] = np.int32(whole)
        # Squares were summed in float32; a scale, its inverse and each product with it were rounded.
        more = np.float32(1) + width * np.float32(2.0**-23)
        rest = np.sqrt(_square(lost)) * scale * more + np.float32(2.0**-21) * length
        facts[row, 0], facts[row, 1], facts[row, 2] = scale, rest, length * more + rest


@njit(nogil=True, cache=True)
def round_panels(vectors, panels, facts, words, words_facts):
    """float32 (N, D) → panels of uint8, `ZERO` added to int8; the last panel is filled up. And → int16.

    Args:
        vectors: float32 (N, D).
        panels: uint32 (⌈N / LANES⌉, S, LANES), to be filled: four values of each vector in turn.
        facts: float32 (N, 3), see `round_rows`.
        words, words_facts: int16 (N, D or more) and float32 (N, 3), the same.
    """
    num_panels, num_steps, _ = panels.shape
    low = np.zeros((LANES, 4 * num_steps), np.int8)
    groups = low.view(np.uint32)
    for panel in range(num_panels):
        start = panel * LANES
        some = vectors[start : start + LANES]
        round_rows(some, low, facts[start : start + LANES])
        round_rows(some, words[start : start + LANES], words_facts[start : start + LANES])
        if len(some) < LANES:
            low[len(some) :] = 0
        for step in range(num_steps):
            packed = panels[panel, step]
            for lane in range(LANES):
                packed[lane] = groups[lane, step] ^ np.uint32(0x80808080)


@njit(nogil=True, cache=True)
def scan(low, facts, num_candidates, panels, known, share, first_key, heap, keys, uppers):
    """Write down which pairs 8 bits cannot exclude, and raise the floor by them.

    Args:
        low: int8 (Q filled up to a multiple of ROWS, 4·S), the queries.
        facts: float32 (the same, NUM_FACTS): what `ZERO` adds to all products of the query, as int32; its
            scale, rest and length; and what has to be reached, which is kept up to date.
        num_candidates: C.
        panels: uint32 (P, S, LANES), the candidates.
        known: float32 (P, 3, LANES), their scales, and what a unit of a query's rest and of its length adds
            to the error.
        share: Of the error bound, how much an estimate is taken to be off.
        first_key: Of query 0 and the first candidate.
        heap: float32 (Q, K), the best lower bounds so far as a heap, the least in front; kept up to date.
        keys, uppers: int64 and float32 (M,), to be filled: query · 2³² + column, and the upper bound.

    Returns:
        How many were written down.
    """
    num_queries = len(heap)
    row_bytes, num_steps = low.shape[1], panels.shape[1]
    bounds = np.empty((ROWS + 1, LANES), np.float32)
    survives = bounds[ROWS].view(np.uint32)
    twice, count = np.float32(1) + share, 0
    for panel in range(len(panels)):
        start = panel * LANES
        real = np.uint32(0xFFFFFFFF) >> np.uint32(max(0, LANES - (num_candidates - start)))
        panel_at, known_at = panels[panel].ctypes.data, known[panel].ctypes.data
        for block in range(0, num_queries, ROWS):
            low_at, facts_at = low[block].ctypes.data, facts[block].ctypes.data
            _compare(low_at, row_bytes, facts_at, panel_at, num_steps, known_at, bounds.ctypes.data)
            for row in range(min(ROWS, num_queries - block)):
                bits, query = survives[row] & real, block + row
                while bits:
                    lane = _lowest_bit(bits)
                    bits &= bits - np.uint32(1)
                    upper = bounds[row, lane]
                    if upper < facts[query, 4]:
                        continue
                    keys[count], uppers[count] = first_key + (query << 32) + start + lane, upper
                    count += 1
                    error = facts[query, 2] * known[panel, 1, lane] + facts[query, 3] * known[panel, 2, lane]
                    lower = upper - twice * (error + TINY)
                    if lower > heap[query, 0]:
                        _replace_least(heap[query], lower)
                        facts[query, 4] = max(facts[query, 4], heap[query, 0])
    return count


@njit(nogil=True, cache=True)
def refine(low, facts, floor, words, words_facts, share, heap, keys, uppers, limits):
    """Write down which of the pairs 16 bits cannot exclude either, in the place of all, and raise the floor.

    Args:
        low: int16 (Q, W), the queries.
        facts: float32 (Q, 3), see `round_rows`.
        floor: float32 (Q,), what has to be reached; kept up to date.
        words, words_facts: int16 (C, W) and float32 (C, 3), the candidates.
        share: Of the error bound, how much an estimate is taken to be off.
        heap: float32 (Q, K), as in `scan`.
        keys, uppers: int64 and float32 (P,), the pairs, with what their scores are at most.
        limits: float32 (2, P), to be filled: lower, upper bound.

    Returns:
        How many were written down, and how many were multiplied.
    """
    num_steps = low.shape[1] // STEP_WORDS
    count, num_multiplied = 0, 0
    for pair in range(len(keys)):
        query, column = keys[pair] >> 32, keys[pair] & 0xFFFFFFFF
        if uppers[pair] < floor[query]:
            continue
        product = np.float32(_multiply_words(low[query].ctypes.data, words[column].ctypes.data, num_steps))
        num_multiplied += 1
        scale, rest, length = words_facts[column]
        # Beside what rounding took: the rounding of the exact score, of the estimate and of the bounds.
        error = facts[query, 1] * length + facts[query, 2] * (rest + np.float32(2.0**-18) * length)
        error = np.float32(1.01) * error + TINY
        estimate = product * (facts[query, 0] * scale)
        if estimate + error < floor[query]:
            continue
        lower = estimate - share * error
        if not lower >= -np.inf:  # what overflowed says nothing
            lower = np.float32(-np.inf)
        keys[count], limits[0, count], limits[1, count] = keys[pair], lower, estimate + error
        count += 1
        if lower > heap[query, 0]:
            _replace_least(heap[query], lower)
            floor[query] = max(floor[query], heap[query, 0])
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
def inner_products(left, right, rows, columns, order, products):
    """float64 inner products of pairs of rows.

    Args:
        left, right: float32 (N, D), (M, D).
        rows, columns: int64 (P,), which make each pair.
        order: int64 (P,), in which they are taken.
        products: float64 (P,), to be filled.
    """
    for pair in order:
        products[pair] = _exact_products(left[rows[pair]], right[columns[pair]])
