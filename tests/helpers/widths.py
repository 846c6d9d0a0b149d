"""Every quantizer with a width that it has, for tests that try all of them."""

WEIGHTS = {
    "affine": 4, "apot": 4, "bwn": 1, "binary_connect": 1, "bnn": 1, "bnn_plus": 1, "dorefa": 4, "duq": 4, "inq": 4,
    "ir_net": 1, "kmeans": 4, "lq_nets": 3, "lsq": 4, "lsq_plus": 4, "mx": 4, "ocp_mx": 4, "power_of_two": 4,
    "product": 4, "prox_quant": 4, "qil": 4, "reste": 1, "stochastic_rounding": 4, "ttq": 2, "twn": 2, "vsq": 4,
    "weighted_entropy": 4, "wrpn": 4, "abc_net": 3,
}  # fmt: skip
"""Weight quantizer -> a width that it has."""

INPUTS = {
    "affine": 4, "apot": 4, "bnn": 1, "dorefa": 4, "duq": 4, "dynamic": 4, "lq_nets": 3, "lsq": 4, "lsq_plus": 4,
    "mx": 4, "ocp_mx": 4, "pact": 4, "power_of_two": 4, "qil": 4, "stochastic_rounding": 4, "vsq": 4, "wrpn": 4,
    "weighted_log": 4, "xnor": 1, "abc_net": 3,
}  # fmt: skip

WRAPPERS = ("blend", "incremental", "oscillation", "outlier", "pruned", "quant_noise")
"""Wrappers of a weight quantizer."""
