"""The learning round: when it is due, what it reads, what it may cost."""
