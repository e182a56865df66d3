"""The page of a comparison: figures, sentences and plots from report.json."""
