"""From a learner's weights to weights that serve: the learning process, the gate, versions on disk."""
