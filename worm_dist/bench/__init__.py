"""Side by side with plain DDP, compressing hooks and PowerSGD: bytes, seconds, overhead."""
