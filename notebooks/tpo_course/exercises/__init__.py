"""Checkers for the exercises of the course, one module a notebook; each knows the common mistakes by name.

from tpo_course.exercises import dpo as check
check.dpo_loss            # the card: what, why, hints, solution
check.dpo_loss(my_loss)   # the verdict
check.dpo_loss.used(my_loss)             # what a cell goes on with: the answer if it is right, else the course's own
check.dpo_loss.trains(my_loss, "dpo")    # the same for `tpo_lib.fit`, as its loss
"""
