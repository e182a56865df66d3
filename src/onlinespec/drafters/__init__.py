"""What proposes tokens, and how each family drafts, learns and is saved."""
