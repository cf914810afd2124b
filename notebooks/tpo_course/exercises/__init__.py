"""Checkers for the exercises of the course, one module a notebook; each knows the common mistakes by name.

from tpo_course.exercises import dpo as check
check.dpo_loss            # the card: what, why, hints, solution
check.dpo_loss(my_loss)   # the verdict
"""
