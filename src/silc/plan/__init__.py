"""What a run costs before it runs: FLOPs, memory, traffic, time and money, from shapes and a card's data sheet.

Gives: flops_per_sample, Flops; the rest by its file: machines, memory, estimate.
"""

from silc.plan.flops import Flops, flops_per_sample

__all__ = ["Flops", "flops_per_sample"]
