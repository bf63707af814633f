"""Which settings: spaces of them, the search in a space, and the fusion of predictions into one score.

Reading order: space, search, fusion.
"""
