"""Studies: which recipes meet which inputs, and the directory of rows that comes of it.

`python -m sweeps list | run STUDY | show DIR`. Nothing here does arithmetic: `plan` lists the
parts, `run` hands them to `jaxattn.error_curves`, `store` keeps the rows, `table` prints them.
"""
