"""Data: pictures, views, captions and tokens, from bytes to batches."""
