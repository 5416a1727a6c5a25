"""The speed study: what jaxattn costs, in bare float32 matrix products of the same size."""
