"""Readers of the layouts in which labelled sets are published, one file a family; data/labelled chooses among them."""
