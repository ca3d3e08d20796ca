"""Benchmarks against plain DDP, compression hooks and PowerSGD: bytes, step time, overhead."""
