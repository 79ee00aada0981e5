"""The benchmarks of `make bench`: one file a part; what they share is in measure.py, layers.py and node_cache.py."""
