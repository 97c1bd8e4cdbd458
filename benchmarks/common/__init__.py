"""What several benchmarks share: recorded traces and their replays, the literature's policies, a
raised trace, other libraries' kernels.
"""
