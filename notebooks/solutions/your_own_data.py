"""Solutions of the exercises of 10_your_own_data.ipynb."""


def shortcut(chosen, rejected):
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()  # a tie is a coin: half a win
    return wins.mean()


def decision(low, high, matters):
    better = (low >= matters).long()  # even the worst that is plausible is worth it
    worse = (high <= -matters).long()
    no_gain = ((high < matters) & (worse == 0)).long()  # even the best that is plausible is not
    return better + 2 * no_gain - worse
