"""Token-level preference optimization: DPO, TDPO and TGDPO, derived, checked and trained.

Data flows one way: pairs -> PairBatch -> TokenStats -> LossOutput -> update -> metrics -> figures.
"""

__version__ = "0.1.0"
