"""Real kernels that run on this machine, each called in a process of its own.

A module of this folder is a family: a table PEERS and one function `attend` that calls the kernel.
None of them needs its package to be imported.
"""
