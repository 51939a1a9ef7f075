"""The threshold from which top_k and top_p keep the logits of a row, found in two to four reads of the row.

Both search for the smallest key (a float's bits as an integer of the same order) above which the tokens' weight, their
number or their probability, is below a limit. The first read of the row leaves the largest logit and the total
probability of each of BLOCK places in registers. The weight of a place above any key lies between that of its largest
token and that of all its tokens, which gives a bracket for the key: with top_k = 50 in V = 128,256, 50 places reach its
lower end, and with top_p and a few likely tokens, not many more. If the bracket may contain more than BLOCK tokens, a
read weighs all tokens against 32 pivots at once, which usually narrows it to a 28th. The last read lists the tokens in
the bracket, and bisecting the list, in registers, ends the search.

Reads of a row: for top_k 2, or 3 if it is above 100 to 400; for top_p 2 if few tokens are likely, else 3 or 4. Both
together need only those of top_k, whose list contains all that top_p may keep; only with more than BLOCK tokens, top_p
needs two or three more. Weighing against pivots is bound by its 170 instructions per logit, the other reads by memory.
Sums have a fixed order, so that a row gives the same threshold in every call.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4e38)  # the maximum of an empty set of logits; −inf − (−inf) would be NaN
_KEY_OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)
_MOST_KEY = tl.constexpr(0x7FFFFFFF)

_PIVOTS = tl.constexpr(32)
# So many of these are spaced evenly in value. Four more are spaced evenly in bits, so that the bracket always narrows.
_BY_VALUE = tl.constexpr(27)


@triton.jit
def _key(x):
    """Convert float32 to int32 of the same order."""
    # −0 comes before 0, but this moves no threshold, since thresholds are compared as floats.
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """Convert a key back to float32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(logits, top, inverse_temperature, COUNT: tl.constexpr):
    """Return the weight of a token: 1 if COUNT, else its probability relative to that of the most likely token."""
    if COUNT:
        return tl.full(logits.shape, 1.0, tl.float32)
    else:
        return tl.exp((logits - top) * inverse_temperature)


@triton.jit
def _smallest_cut(keys, weights, above, limit, low, high):
    """Find the smallest key from ``low`` to ``high`` above which ``weights`` plus ``above`` sum to less than limit."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        enough = above + tl.sum(tl.where(keys > middle, weights, 0.0), 0) < limit
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def _places(row, size, inverse_temperature, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Return each place's largest logit, and Σ exp((logit − largest) / temperature); places are columns mod BLOCK."""
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < size, other=float("-inf"))
        if MASS:
            smaller = tl.exp(-tl.abs(logits - peak) * inverse_temperature)
            total = tl.where(logits > peak, total * smaller + 1, total + smaller)
        peak = tl.maximum(peak, logits)
    return tl.where(peak > _LOWEST, peak, float("-inf")), total


@triton.jit
def _narrowed(
    row, size, limit, low, high, within, start, top, inverse_temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the bracket after one more read, its largest possible number of tokens, and the weight from ``low`` on.

    This weight is infinite if unknown. Before the read, at most ``within`` tokens are in the bracket.
    All pivots except the last are keys from ``low`` to below ``high``, so that each narrows the bracket; those spaced
    by value begin at ``start``. All tokens in or above the bracket are above the last pivot.
    """
    number = tl.arange(0, _PIVOTS)
    first, last = tl.maximum(_value(low), start), _value(high)
    by_value = _key(first + (last - first) * ((number + 1) / (_BY_VALUE + 1)))
    by_bits = low + ((high.to(tl.int64) - low) * (number - _BY_VALUE + 1) // (_PIVOTS - _BY_VALUE)).to(tl.int32)
    pivots = tl.maximum(tl.minimum(tl.where(number < _BY_VALUE, by_value, by_bits), high - 1), low)
    pivots = tl.where(number == _PIVOTS - 1, low - 1, pivots)
    PART: tl.constexpr = max(BLOCK // 32, 32)  # each thread has one logit and half of the pivots
    sums = tl.zeros((_PIVOTS, PART), tl.float32)
    for begin in tl.range(0, size, PART, num_stages=6):
        columns = begin + tl.arange(0, PART)
        logits = tl.load(row + columns, mask=columns < size, other=float("-inf"))
        keys = _key(logits)
        weights = _weight(logits, top, inverse_temperature, COUNT)
        sums += tl.where(keys[None, :] > pivots[:, None], weights[None, :], 0.0)
    above = tl.sum(sums, 1)
    enough = above < limit
    low = tl.maximum(low, tl.max(tl.where(enough, low, pivots + 1), 0))
    high = tl.maximum(tl.minimum(high, tl.min(tl.where(enough, pivots, _MOST_KEY), 0)), low)
    from_low = tl.min(tl.where(enough, float("inf"), above), 0)
    # The weight between the two, divided by the weight of the lowest token.
    between = from_low - tl.max(tl.where(enough, above, 0.0), 0)
    lightest = 1.0 if COUNT else 0.999 * tl.exp((_value(low) - top) * inverse_temperature)
    return low, high, tl.minimum(within, between / lightest), from_low


@triton.jit
def _listed(
    row, candidates, size, low, high, top, inverse_temperature, COUNT: tl.constexpr, BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List logits from ``low`` to ``high``, padded with −∞; also the weight above and, if BOTH, count and mass."""
    PART: tl.constexpr = BLOCK // 4  # fits the registers together with everything else
    count = tl.zeros((), tl.int32)
    above = tl.zeros((PART,), tl.float32)
    number = tl.zeros((PART,), tl.float32)
    mass = tl.zeros((PART,), tl.float32)
    for start in range(0, size, PART):
        columns = start + tl.arange(0, PART)
        logits = tl.load(row + columns, mask=columns < size, other=float("-inf"))
        keys = _key(logits)
        above += tl.where(keys > high, _weight(logits, top, inverse_temperature, COUNT), 0.0)
        if BOTH:
            number += tl.where(keys >= low, 1.0, 0.0)
            mass += tl.where(keys >= low, _weight(logits, top, inverse_temperature, False), 0.0)
        inside = ((keys >= low) & (keys <= high) & (columns < size)).to(tl.int32)
        place = count + tl.cumsum(inside, 0) - 1
        tl.store(candidates + place, logits, mask=(inside != 0) & (place < BLOCK))  # beyond BLOCK all are equal
        count += tl.sum(inside, 0)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    place = tl.arange(0, BLOCK)
    logits = tl.load(candidates + place, mask=place < count, other=float("-inf"))
    tl.debug_barrier()  # before another list is written over it
    return logits, tl.sum(above, 0), tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _searched(
    row, candidates, size, top_p, low, high, within, number, mass, start, top, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """Return top_p's bracket, narrow enough for a list, the list, and the weight above all of it.

    The tokens to choose from have total ``mass``; they are at most ``number``, at most ``within`` in the bracket.
    """
    inverse_temperature = 1 / temperature
    # All lower tokens together weigh less than what may be left out.
    spare = tl.log((1 - top_p) * mass / number) - 1e-2
    low = tl.minimum(tl.maximum(low, _key(top + tl.minimum(spare, 0.0) * temperature)), high)
    while (within > BLOCK) & (low < high):
        low, high, within, _ = _narrowed(
            row, size, top_p * mass, low, high, within, start, top, inverse_temperature, False, BLOCK
        )
    z, above, _, _ = _listed(row, candidates, size, low, high, top, inverse_temperature, False, False, BLOCK)
    return low, high, z, above


@triton.jit
def threshold_kernel(logits, candidates, thresholds, size, temperature, top_k, top_p, BLOCK: tl.constexpr):
    """Find the smallest logit of a row that may be drawn; top_k or top_p may be None. Grid: rows.

    ``candidates`` is room for BLOCK logits of each row.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    candidates += row * BLOCK
    inverse_temperature = 1 / temperature
    BOTH: tl.constexpr = top_k is not None and top_p is not None
    peak, masses = _places(logits, size, inverse_temperature, top_k is None, BLOCK)
    top = tl.max(peak, 0)
    highest = _key(top)
    start = 2 * tl.min(peak, 0) - top  # about the smallest logit if logits are distributed symmetrically
    in_a_place = tl.cdiv(size, BLOCK)
    cut = tl.full((), _KEY_OF_MINUS_INFINITY, tl.int32)

    if top_k is not None:
        ones = tl.full((BLOCK,), 1.0, tl.float32)
        low, high = _smallest_cut(_key(peak), ones, 0.0, top_k, cut, highest), highest
        from_low = tl.sum(tl.where(_key(peak) >= low, 1.0, 0.0), 0) * in_a_place
        within = from_low
        while (within > BLOCK) & (low < high):
            low, high, within, from_low = _narrowed(
                logits, size, top_k, low, high, within, start, top, inverse_temperature, True, BLOCK
            )  # fmt: skip
        all_listed = from_low <= BLOCK
        if BOTH:
            high = tl.where(all_listed, highest, high)
        z, above, number, mass = _listed(
            logits, candidates, size, low, high, top, inverse_temperature, True, BOTH, BLOCK
        )
        cut = _smallest_cut(_key(z), ones, above, top_k, low, high)
        if BOTH:
            mass -= tl.sum(tl.where(_key(z) < cut, tl.exp((z - top) * inverse_temperature), 0.0), 0)
            low, high = cut, highest
            if not all_listed:
                low, high, z, above = _searched(
                    logits, candidates, size, top_p, low, high, number, number, mass, start, top, temperature, BLOCK
                )
            cut = _smallest_cut(_key(z), tl.exp((z - top) * inverse_temperature), above, top_p * mass, low, high)
    else:
        weights = tl.exp((peak - top) * inverse_temperature)
        masses *= weights
        mass = tl.sum(masses, 0)
        high = _smallest_cut(_key(peak), masses, 0.0, top_p * mass, cut, highest)
        low = _smallest_cut(_key(peak), weights, 0.0, top_p * mass, cut, high)
        within = tl.sum(tl.where(_key(peak) >= low, 1.0, 0.0), 0) * in_a_place
        number = size.to(tl.float32)
        low, high, z, above = _searched(
            logits, candidates, size, top_p, low, high, within, number, mass, start, top, temperature, BLOCK
        )
        cut = _smallest_cut(_key(z), tl.exp((z - top) * inverse_temperature), above, top_p * mass, low, high)
    tl.store(thresholds + row, _value(cut))
