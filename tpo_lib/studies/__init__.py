"""Studies: questions with a plan, run over seeds and settings, and answered with intervals."""
