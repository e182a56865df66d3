"""The learning round: when it is due, which rows it trains, what it may cost, and telemetry about it."""
