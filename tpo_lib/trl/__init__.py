"""TDPO and TGDPO as trainers of TRL (extra `trl`)."""
