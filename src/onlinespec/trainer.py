"""The learning end: records of Feedback in, weights worth serving out. Knows neither who serves nor where it runs."""
