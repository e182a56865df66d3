"""Learning beside serving: learning threads and processes, the gate that promotes weights, versions on disk."""
