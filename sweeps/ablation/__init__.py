"""The ablation study: which of a kernel's rounding sites owes how much of its error."""
