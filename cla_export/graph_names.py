"""Names that a bundle's graphs share with what runs them.

Executors import this and no library of graphs: those are for those who export.
"""

KEEP = "logits_to_keep"  # input, int64: how many of each row's last tokens have logits
ALL = 2**31 - 1  # its default
OWN_DOMAINS = {"float16": "cla.float16", "bfloat16": "cla.bfloat16"}  # of operators for GPUs
