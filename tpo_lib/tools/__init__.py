"""What reads runs, checkpoints and answers from outside: diagnosis, pages, answers for judges, win rates."""
