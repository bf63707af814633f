"""Claims of the literature, measured again with our pieces. `python -m benchmarks.evidence` runs the parts and writes
docs/evidence.md.

Reading order: part (what a part is, how its results are kept), fit (one training loop for all), then a file a part.
"""
