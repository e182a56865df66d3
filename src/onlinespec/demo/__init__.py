"""The small models that ship with the package (`registry.SHIPPED_TARGETS`), and how they were made."""
