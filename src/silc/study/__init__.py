"""Studies: a declared grid of runs over one corpus, run, collected and shown.

declared: what is run, as data; corpus: what it learns from; running: the runs; analysis: what they say, as pure
functions; page: tables, plots and the HTML page.
"""
