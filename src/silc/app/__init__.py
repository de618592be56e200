"""Pages and tools for people: the report of a run, the web demo, the text-to-image index."""
