"""Published numbers about precision, each measured again here: `python -m sweeps run claims`.

A claim says what was published, where, and how near is near enough; its function measures it with
jaxattn alone and says whether it holds. registry.CLAIMS is the list.
"""
