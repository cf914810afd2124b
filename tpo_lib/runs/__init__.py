"""Whole runs: their folders, lists of them trained and compared, reports and figures."""
