"""Predicted errors of flash attention: closed forms and short walks in NumPy, in place of runs.

`predict` goes from a Recipe and the moments of its inputs to the error at each context, term by
term; `roundings` holds the laws of sums that it is made of (F1-F4 and the bounds).
"""

from jaxattn.theory.moments import Moments as Moments
from jaxattn.theory.moments import gaussian as gaussian
from jaxattn.theory.moments import measured as measured
from jaxattn.theory.predict import TERMS as TERMS
from jaxattn.theory.predict import Prediction as Prediction
from jaxattn.theory.predict import outside as outside
from jaxattn.theory.predict import predict as predict
from jaxattn.theory.roundings import bound_likely as bound_likely
from jaxattn.theory.roundings import bound_worst as bound_worst
from jaxattn.theory.roundings import drift as drift
from jaxattn.theory.roundings import overflow as overflow
from jaxattn.theory.roundings import spread as spread
from jaxattn.theory.roundings import stagnation as stagnation
