"""What a recipe can say, in words: the sites where a kernel rounds, numbers, choices, integers.

A choice "rounded here or not" is a site with a Format (float32: not rounded); a threshold or offset
is a number; a name stands only where a kernel calls another function or walks another way.
"""

SITES: dict[str, str] = {
    "query": "q, widened exactly from its dtype, as the dot product reads it",
    "key": "k, likewise",
    "value": "v, likewise",
    "scale": "the constant that scores are multiplied by (scale, scale·log2e, scale / cap)",
    "scaled_query": "q·scale, where q is scaled before the product",
    "log2e": "log2(e), where the kernel multiplies by it apart from the scale",
    "cap": "the constant that tanh is multiplied by (cap, cap·log2e)",
    "shift": "what is taken from every key of a block (`key_shift`), and given back to s",
    "qk_accum": "the accumulator inside q·k, every `qk_chunk` products",
    "scores": "scaled scores s as stored",
    "squashed": "tanh(s) as stored, before it is multiplied by the cap",
    "softcap": "tanh(s)·cap as stored",
    "bias": "bias·factor, and s + bias",
    "running_max": "m, the largest score so far, as stored",
    "seen_max": "m as the probabilities see it",
    "difference": "s - m and m_prev - m_next",
    "exponent": "the argument of exp2, where log2(e) is multiplied after the difference",
    "probs": "p = exp(s - m) as p·v reads it",
    "summand": "p as the row sum adds it (float32: before it is rounded to `probs`)",
    "row_sum": "r, the sum of a block's p as stored",
    "rescale": "a = exp(m_prev - m_next)",
    "output_rescale": "a as the output sees it, rounded once more",
    "rescaled_sum": "a·l",
    "running_sum": "l = a·l + r",
    "pv_accum": "the accumulator inside p·v of one block, every `pv_chunk` keys",
    "rescaled_output": "a·o (and p·v·y, where o is kept as o/l)",
    "output": "o = a·o + p·v, every `output_every` keys",
    "final_output": "o once more, as it is handed over to be normalised",
    "inverse": "y = 1/l",
    "result": "o·y (or o/l)",
}

# intermediate -> the value it goes into, for replace()
FOLLOWS = {"rescaled_sum": "running_sum", "rescaled_output": "output", "summand": "probs"}

NUMBERS: dict[str, str] = {
    "initial_max": "m before the first key",
    "mask_value": "what replaces the score of a masked key (-inf: the key is skipped)",
    "mask_below": "a bias at or below this masks its key",
    "bias_factor": "what a bias is multiplied by, beside log2(e) where scores are in base 2",
    "key_shift": "share of a block's mean key that is taken from its keys, and given back to s",
    "max_offset": "added to each block's maximum, against overflow",
    "max_step": "each block's maximum is then rounded up to a multiple of this (0: it is not): with"
    " 1 in base 2, ln 2 in base e, every a is a power of two (AMLA, arXiv 2509.25224)",
    "lazy_threshold": "m stays while a block's maximum exceeds it by no more than this",
    "rescale_flush": "a is 0 where m_prev - m_next is below this",
    "empty_inverse": "1/l where l is 0",
}

CHOICES: dict[str, dict[str, str]] = {
    "exp": {
        "exp": "base e, correctly rounded up to the host's exp",
        "exp_cubic": "base e, by a cubic in the bits, good to 1e-4 (PyTorch's fexp_u20)",
        "exp2": "base 2, likewise",
        "exp2_half": "base 2, the degree-6 polynomial in half precision of ggml's Hexagon backend,"
        " without subnormals (0 below 2^-15)",
        "exp2_half_clamped": "exp2_half of max(x, -24)",
        "exp2_poly3": "base 2, FlashAttention-4's degree-3 polynomial",
        "exp2_poly4": "base 2, FlashAttention-4's degree-4 polynomial",
        "exp2_poly5": "base 2, FlashAttention-4's degree-5 polynomial",
    },
    "rescale_exp": {
        "same": "a = exp(m_prev - m_next) by the exponential of p",
        "exact": "by a correctly rounded one of the same base",
    },
    "log2e_at": {
        "scale": "log2(e) is folded in the scale: scores are in base 2",
        "query": "the scaled query is multiplied by log2(e) apart, and stored as such again",
        "exponent": "log2(e) is multiplied after s - m",
    },
    "scale_at": {"scores": "q·k is multiplied by the scale", "query": "q is, before the product"},
    "cap_at": {
        "scale": "1/cap is folded in the scale",
        "scores": "scores are divided by the cap apart, and stored as scores again",
    },
    "tanh": {
        "tanh": "correctly rounded up to the host's tanh",
        "tanh_half": "2·sigmoid(2x) - 1 in half precision, as ggml's Hexagon backend has it",
    },
    "sinks": {
        "none": "the kernel knows no sinks",
        "seed": "a sink starts m, and l at 1",
        "end": "a sink is one more key with value 0, after the last, in the formats of the others",
        "after": "likewise, but in storage precision, once o is handed over (`final_output`)",
    },
    "summation": {
        "plain": "l = a·l + r",
        "kahan": "likewise with a correction term in l's format, rescaled beside it and given back"
        " at the end (Kahan 1965, doi 10.1145/363707.363723)",
    },
    "normalise": {
        "multiply": "o·round(1/l)",
        "divide": "o/l",
        "blocks": "o is kept as o/l, and brought to the new l with every block",
        "before": "p = round(summand/l), of the whole context, before p·v",
    },
    "kv_order": {"forward": "first block first", "backward": "last block first"},
    "storage": {
        "float32": "values are kept in float32 between roundings",
        "float64": "in float64: needed by formats that float32 cannot hold, exact for all others",
    },
}

INTEGERS = {
    "output_every": "keys between two roundings of o",
    "flush_every": "blocks after which l and o go into float32 sums and start anew",
    "qk_chunk": "products that q·k's accumulator adds exactly before it rounds",
    "qk_promote": "products after which q·k's accumulator goes into a float32 sum and starts anew",
    "qk_partials": "interleaved accumulators inside q·k",
    "qk_tree": "partial sums that are left when their tree goes on in float32",
    "pv_chunk": "keys that p·v's accumulator adds exactly before it rounds",
    "query_group": "queries of a head that share one scale, amax / the largest number of `query`",
    "key_group": "keys that share one scale, amax / the largest number of `key`",
    "split_kv": "chunks of keys that are attended to apart and merged in float32",
}


OPTIONAL = (
    *("output_every", "flush_every", "qk_chunk", "qk_promote", "pv_chunk"),
    *("query_group", "key_group"),
)

WORDS = ("name", "citation", "inferred", "evidence")  # about the kernel, not of its arithmetic
