"""`scripts/gpu_check.py`, on a CPU and in small."""
