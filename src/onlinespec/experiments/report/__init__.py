"""The HTML report of a comparison: tables, sentences and plots from report.json."""
