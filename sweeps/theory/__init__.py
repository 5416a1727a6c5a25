"""The study of predictions: jaxattn.theory beside jaxattn.error_curves."""
